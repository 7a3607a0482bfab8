// One question and its answer, as they grow: what it says, where it looks, what it saw there, and the time it took.

import { element, mark } from "./stage.js";
import { drawLegend, drawTrack, fillTable, time } from "./timeline.js";

const SLOWLY = 6000; // milliseconds that a replay takes
const WAYS = { "second look": "with a second look", "one look": "without a second look", published: "published procedure" };
const plural = (count, one, many = `${one}s`) => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toPrecision(3)}`;

function clone(id) {
  return document.getElementById(id).content.firstElementChild.cloneNode(true);
}

export class TurnView {
  // asked: question, picture, forced (words for the looks that the visitor chose).
  constructor(asked, say) {
    this.asked = asked;
    this.say = say;
    this.node = clone("turn-template");
    this.part = (selector) => this.node.querySelector(selector);
    this.part("h3").textContent = asked.question;
    if (asked.picture) {
      this.part(".mini").src = asked.picture.preview;
      this.part(".mini").hidden = false;
    }
    this.part(".forced").textContent = asked.forced || "";
    this.part(".forced").hidden = !asked.forced;
    this.record = [];
    this.pace = 1;
    this.reset();
  }

  reset() {
    this.marks = [[], []];
    this.stages = [];
    this.round = 0;
    this.elapsed = 0;
    this.node.dataset.state = "waiting";
    this.part(".said").replaceChildren();
    this.part(".sights").replaceChildren();
    this.part(".notes").replaceChildren();
    for (const name of [".said", ".answer", ".verdict", ".time"]) this.part(name).hidden = true;
    this.state("Waiting …");
  }

  state(text) {
    this.part(".state .text").textContent = text;
    this.part(".state").hidden = !text;
  }

  // What the server tells; it is kept, so that it can be shown once more.
  take(message) {
    if (message.event !== "alive" && message.event !== "queued") this.record.push(message);
    this.show(message);
  }

  show(message) {
    if (message.stages) this.stages = message.stages;
    const handler = this[`on_${message.event}`];
    if (handler) handler.call(this, message);
  }

  on_queued({ ahead }) {
    this.state(`In line: ${plural(ahead, "question")} before yours.`);
    this.say(`${plural(ahead, "question")} before yours.`);
  }

  on_started({ remembered }) {
    this.node.dataset.state = "running";
    this.remembered = remembered;
    this.state(this.asked.picture ? "First look …" : "Reading …");
    this.started = performance.now();
    this.part(".time").hidden = false;
    this.part(".time details").hidden = true;
    this.part(".legend").replaceChildren();
    this.part(".time figcaption").textContent = "";
    cancelAnimationFrame(this.frame);
    const grow = () => {
      if (this.node.dataset.state !== "running") return;
      this.elapsed = (performance.now() - this.started) / this.pace;
      drawTrack(this.part(".track"), this.stages, this.elapsed, true, this.pace > 1 ? this.total : this.elapsed);
      this.part(".time figcaption").textContent = time(this.elapsed);
      drawLegend(this.part(".legend"), this.stages);
      this.frame = requestAnimationFrame(grow);
    };
    grow();
  }

  on_token({ text, perception, round }) {
    const said = this.part(".said");
    said.hidden = false;
    if (round !== this.round) {
      this.round = round;
      this.line = document.createElement("p");
      this.line.className = "round";
      said.append(this.line);
    }
    if (perception) {
      const pill = document.createElement("span");
      pill.className = "pill";
      pill.textContent = perception.replace("region_token_start", "look at").replace("region_token_end", "end")
        .replace(/_action.*/, ": encode again").replace(/^([xy])_/, "$1");
      this.line.append(pill);
      this.state("It asks for a second look …");
    } else if (text) {
      this.line.append(text);
      this.state(round > 1 ? "It answers, having looked again …" : "It answers …");
    }
  }

  on_region({ boxes, cells }) {
    this.marks = [boxes, cells];
    this.mark();
    this.state(`Looking again, at ${plural(boxes.length, "region")} …`);
    this.say("It looks at a region of the picture.");
  }

  on_reencode({ kind }) {
    this.state(`Encoding the picture again (${kind}) …`);
    this.say("It has the picture encoded again.");
  }

  on_look({ tokens }) {
    this.state(`Seen: ${plural(tokens, "visual token")} …`);
  }

  on_first(seen) {
    this.sight(seen, "First look", `the whole picture, fed as ${fed(seen)}`).classList.add("whole");
  }

  on_crop(seen) {
    const [left, top, right, bottom] = seen.box;
    const size = `${right - left}×${bottom - top} pixels of the picture`;
    this.sight(seen, `Crop ${seen.number + 1}`, `${size}, fed as ${fed(seen)}`);
  }

  on_map(seen) {
    const shown = this.sight(seen, "Re-encoded", `the whole picture, fed as ${fed(seen)}`);
    const map = shown.querySelector(".map");
    map.src = seen.map;
    map.hidden = false;
    map.alt = `How strongly each token was conditioned, a = f·k, from ${signed(seen.low)} to ${signed(seen.high)}; ${strongest(seen.values)}`;
    shown.querySelector(".low").textContent = `a = f·k: ${signed(seen.low)}`;
    shown.querySelector(".high").textContent = signed(seen.high);
    shown.querySelector(".scale").hidden = false;
    const button = shown.querySelector(".show-map");
    button.hidden = false;
    button.addEventListener("click", () => {
      map.hidden = !map.hidden;
      button.setAttribute("aria-pressed", String(!map.hidden));
    });
  }

  sight(seen, title, size) {
    const shown = clone("sight-template");
    const image = shown.querySelector("img");
    image.src = seen.image;
    image.width = seen.width;
    image.height = seen.height;
    image.alt = `${title}: ${size}`;
    shown.querySelector("strong").textContent = title;
    shown.querySelector(".size").textContent = size;
    const patches = shown.querySelector(".patches");
    patches.setAttribute("viewBox", `0 0 ${seen.width} ${seen.height}`);
    for (const [edge, x, y] of [[seen.width, 1, 0], [seen.height, 0, 1]]) {
      for (let at = seen.patch, number = 1; at < edge; at += seen.patch, number += 1) {
        const ends = { x1: x * at, y1: y * at, x2: x ? at : seen.width, y2: y ? at : seen.height };
        patches.append(element("line", ends, number % seen.merge ? "patch" : "patch token"));
      }
    }
    const button = shown.querySelector(".show-patches");
    button.addEventListener("click", () => {
      patches.toggleAttribute("hidden");
      button.setAttribute("aria-pressed", String(!patches.hasAttribute("hidden")));
    });
    this.part(".sights").append(shown);
    this.reveal();
    return shown;
  }

  on_done({ turn, length, capacity }) {
    this.turn = turn;
    this.total = turn.milliseconds;
    this.finish("done");
    const answer = turn.answer;
    this.part(".answer").textContent = answer.text || "(It says nothing.)";
    this.part(".answer").hidden = false;
    if ("truth" in turn) {
      const verdict = this.part(".verdict");
      verdict.hidden = false;
      verdict.dataset.right = turn.right;
      verdict.textContent = turn.right ? "✓ right" : `✗ the truth is “${turn.truth}”`;
    }
    const notes = [...answer.notices];
    if (answer.finish_reason === "length") notes.push("The answer was cut short: give it more tokens.");
    if (answer.finish_reason === "capacity") notes.push(`The conversation is full (${plural(capacity, "token")}).`);
    if (answer.finish_reason === "looks") notes.push("It asked for a further look, which it may not take.");
    if (turn.remembered) notes.push(`It knew of ${plural(turn.remembered, "question")} before this one.`);
    this.notes(notes);
    const track = this.part(".track");
    drawTrack(track, answer.stages, turn.milliseconds, false);
    drawLegend(this.part(".legend"), answer.stages);
    fillTable(this.part(".time tbody"), answer.stages);
    this.part(".time details").hidden = false;
    const look = turn.second_look_ms === null ? "no second look" : `second look in ${time(turn.second_look_ms)}`;
    this.part(".time figcaption").textContent = `${time(turn.milliseconds)} in all, ${look}; ${plural(length, "token")} held`;
    this.part(".actions").hidden = false;
    this.part(".compare").hidden = this.part(".draw").hidden = this.part(".replay").hidden = !turn.picture;
    this.reveal();
    this.say(`Answer: ${answer.text}. ${this.part(".verdict").textContent}`);
  }

  on_stopped({ why, seconds }) {
    this.finish("stopped");
    this.notes([why === "time" ? `It took longer than ${seconds} seconds and was stopped.` : "Stopped."]);
    this.say("Stopped.");
  }

  on_error({ message }) {
    this.finish("failed");
    this.notes([message]);
    this.say(message);
  }

  notes(texts) {
    this.part(".notes").replaceChildren(...texts.map((text) => Object.assign(document.createElement("li"), { textContent: text })));
  }

  finish(state) {
    this.node.dataset.state = state;
    this.state("");
    if (state !== "done") this.part(".time").hidden = true;
  }

  reveal() {
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.node.scrollIntoView({ block: "nearest", behavior: still ? "auto" : "smooth" });
  }

  mark() {
    mark(...this.marks);
  }

  async replay() {
    if (this.replaying) return;
    this.replaying = true;
    this.reset();
    this.pace = Math.max(SLOWLY / this.total, 1);
    let shown = 0;
    for (const message of this.record) {
      const at = message.event === "done" ? this.total : message.at;
      if (at !== undefined) {
        await new Promise((resolve) => setTimeout(resolve, (at - shown) * this.pace));
        shown = at;
      }
      this.show(message);
    }
    this.pace = 1;
    this.replaying = false;
  }

  // The same question in three ways.
  compare(message) {
    const box = this.part(".compared");
    box.hidden = false;
    if (message.event === "comparing") {
      const line = document.createElement("div");
      line.className = "way";
      line.append(text("span", "way-name", WAYS[message.way]), text("span", "quiet", "running …"));
      box.append(line);
    } else if (message.event === "compared") {
      const line = box.lastElementChild;
      const right = message.right === undefined ? "" : message.right ? " ✓" : " ✗";
      const look = message.second_look_ms === null ? "" : `; second look ${time(message.second_look_ms)}`;
      const track = text("div", "track", "");
      track.setAttribute("aria-hidden", "true");
      this.longest = Math.max(this.longest || 0, message.milliseconds);
      line.replaceChildren(
        text("span", "way-name", WAYS[message.way]), text("strong", "", `“${message.text}”${right}`),
        text("span", "quiet", `${time(message.milliseconds)}${look}`), track,
      );
      (this.ways ||= []).push([track, message]);
      for (const [each, way] of this.ways) drawTrack(each, way.stages, way.milliseconds, false, this.longest);
      this.say(`${WAYS[message.way]}: ${message.text}, ${time(message.milliseconds)}.`);
    } else if (message.event === "stopped" || message.event === "error") {
      box.lastElementChild?.querySelector(".quiet")?.replaceChildren(message.message || "stopped");
    } else if (message.event === "queued") {
      this.say(`${plural(message.ahead, "question")} before yours.`);
    }
  }

  clearComparison() {
    this.part(".compared").replaceChildren(text("p", "quiet", "The same question by itself, with both times:"));
    this.ways = [];
    this.longest = 0;
  }
}

function text(name, kind, content) {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  made.textContent = content;
  return made;
}

function fed(seen) {
  const patches = plural((seen.width * seen.height) / seen.patch ** 2, "patch", "patches");
  return `${seen.width}×${seen.height} pixels: ${patches}, ${plural(seen.visual_tokens, "token")}`;
}

function strongest(values) {
  let best = [0, 0];
  values.forEach((row, y) => row.forEach((value, x) => {
    if (value > values[best[0]][best[1]]) best = [y, x];
  }));
  return `strongest in row ${best[0] + 1} of ${values.length}, column ${best[1] + 1} of ${values[0].length}`;
}

