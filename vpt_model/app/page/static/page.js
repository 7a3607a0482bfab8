// The page: its controls, and what they ask of the server.

import * as api from "./api.js";
import * as stage from "./stage.js";
import { useColours } from "./timeline.js";
import { TurnView } from "./turns.js";

const $ = (id) => document.getElementById(id);
const state = { about: null, pictures: [], branches: [], branch: null, running: null, examples: 0 };

function say(text) {
  $("status").textContent = text;
}

function problem(id, error) {
  if (error && error.status === 410) {
    const ended = $("ended");
    ended.replaceChildren(error.message, " ", button("Reload", () => location.reload()));
    ended.hidden = false;
    return;
  }
  $(id).textContent = error ? error.message : "";
  $(id).hidden = !error;
}

function button(text, act, kind = "button small") {
  const made = document.createElement("button");
  made.type = "button";
  made.className = kind;
  made.textContent = text;
  made.addEventListener("click", act);
  return made;
}

// Pictures

async function show(make) {
  problem("picture-error", null);
  const before = stage.stage.picture;
  $("frame").dataset.state = "loading";
  try {
    const picture = await make();
    state.pictures.push(picture);
    select(picture);
    say(`${stage.describe(picture)}.`);
  } catch (error) {
    $("frame").dataset.state = before ? "shown" : "empty";
    problem("picture-error", error);
  }
}

function select(picture) {
  stage.show(picture);
  drawThumbs();
  drawScene(picture);
}

function drawThumbs() {
  $("pictures").replaceChildren(...(state.pictures.length < 2 ? [] : state.pictures).map((picture, index) => {
    const image = Object.assign(document.createElement("img"), { src: picture.preview, alt: "" });
    const choose = button("", () => select(picture), "thumb");
    choose.append(image);
    choose.setAttribute("aria-label", `Picture ${index + 1}`);
    choose.setAttribute("aria-pressed", String(picture === stage.stage.picture));
    const item = document.createElement("li");
    item.append(choose);
    return item;
  }));
}

function drawScene(picture) {
  const { scene } = picture || {};
  $("known").hidden = !scene;
  $("suggestions").replaceChildren(...(scene ? scene.questions : []).map((question) =>
    button(question.text, () => {
      $("question").value = question.text;
      $("question").focus();
    }, "chip")));
  if (!scene) return;
  $("known").querySelector("tbody").replaceChildren(...scene.things.map((thing) => {
    const row = document.createElement("tr");
    const name = Object.assign(document.createElement("th"), { scope: "row", textContent: `${thing.colour} ${thing.shape}` });
    row.append(name, ...[thing.tag, `column ${thing.column}, row ${thing.row}`].map((text) =>
      Object.assign(document.createElement("td"), { textContent: text })));
    return row;
  }));
  $("known-seed").textContent = `Drawn for you: picture ${scene.seed} of vpt-mini’s test split. The model is told none of this.`;
}

function uploadFile(file) {
  const { upload } = state.about.limits;
  if (!file) return;
  if (file.size > upload) {
    const size = (file.size / 2 ** 20).toFixed(1);
    problem("picture-error", new api.Problem(`The file has ${size} MB, the limit is ${upload / 2 ** 20} MB: make it smaller and try again.`));
    return;
  }
  show(() => api.upload(file));
}

const picture = (items) => [...items].find((file) => file.type.startsWith("image/")) || items[0];

// Camera

let stream = null;

async function openCamera() {
  const dialog = $("camera-dialog");
  problem("camera-error", null);
  $("snap").disabled = true;
  dialog.showModal();
  try {
    if (!navigator.mediaDevices) throw new api.Problem("A browser gives the camera to secure pages only: open this one as localhost, or by https.");
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment", width: { ideal: 1920 } } });
    if (!dialog.open) return closeCamera();
    $("video").srcObject = stream;
    await $("video").play();
    $("snap").disabled = false;
  } catch (error) {
    const told = error instanceof api.Problem ? error : new api.Problem("There is no camera, or the browser may not use it.");
    problem("camera-error", told);
  }
}

function closeCamera() {
  stream?.getTracks().forEach((track) => track.stop());
  stream = null;
}

function snap() {
  const video = $("video");
  const canvas = Object.assign(document.createElement("canvas"), { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob((blob) => {
    $("camera-dialog").close();
    uploadFile(blob);
  }, "image/jpeg", 0.95);
}

// Looks

function look() {
  return document.querySelector('[name="look"]:checked').value;
}

function chooseLook(value) {
  document.querySelector(`[name="look"][value="${value}"]`).checked = true;
  $("boxes").hidden = value !== "region";
  $("frame").classList.toggle("drawing", value === "region");
}

function drawBoxes(boxes) {
  if (boxes.length && look() !== "region") chooseLook("region");
  $("box-list").replaceChildren(...boxes.map((box, index) => {
    const item = document.createElement("li");
    const remove = button("×", () => stage.setBoxes(boxes.filter((_, other) => other !== index)), "remove");
    remove.setAttribute("aria-label", `Remove the box at ${stage.words(box)}`);
    item.className = "chip";
    item.append(stage.words(box), remove);
    return item;
  }));
}

// The looks as the server reads them, and in words.
function chosenLooks() {
  if (look() === "encoder") return { looks: [state.about.reencoder], forced: "You chose the re-encoding." };
  if (look() !== "region") return { looks: null, forced: "" };
  if (!stage.stage.picture) throw new api.Problem("Show it a picture before you draw boxes.");
  if (!stage.stage.boxes.length) throw new api.Problem("Draw a box on the picture first, or let it decide where to look.");
  return { looks: [stage.spec()], forced: `You chose: ${stage.stage.boxes.map(stage.words).join("; ")}.` };
}

// Conversations

function newBranch(number, from = null) {
  const branch = { number, turns: from ? [...from.turns] : [], from: from?.number };
  state.branches.push(branch);
  selectBranch(branch);
}

function selectBranch(branch) {
  state.branch = branch;
  // What is there already stays where it is: put in anew, it would move once more.
  const wanted = branch.turns.map((view) => view.node);
  const list = $("turns");
  for (const node of [...list.children]) if (!wanted.includes(node)) node.remove();
  for (const node of wanted) if (node.parentNode !== list) list.append(node);
  drawBranches();
}

function drawBranches() {
  const several = state.branches.length > 1;
  const made = state.branches.map((branch) => {
    const name = branch.from ? `${branch.number}, from ${branch.from}` : String(branch.number);
    const choose = button(name, () => selectBranch(branch), "chip");
    choose.setAttribute("aria-pressed", String(branch === state.branch));
    choose.setAttribute("aria-label", `Conversation ${name}`);
    return choose;
  });
  const close = button("Close this one", closeBranch, "chip");
  $("branches").replaceChildren(...(several ? [...made, close] : []));
  $("first").hidden = state.branch.turns.length > 0;
  const last = state.branch.turns.at(-1);
  for (const view of state.branch.turns) {
    for (const name of [".undo", ".fork"]) view.part(name).hidden = view !== last;
  }
}

async function closeBranch() {
  await attempt(async () => {
    const { branches } = await api.close(state.branch.number);
    state.branches = state.branches.filter((branch) => branches.includes(branch.number));
    selectBranch(state.branches.at(-1));
  });
}

async function attempt(act) {
  problem("ask-error", null);
  try {
    await act();
  } catch (error) {
    problem("ask-error", error);
  }
}

function save(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// Asking

function setRunning(view) {
  state.running = view;
  $("stop").hidden = !view;
  $("submit").disabled = Boolean(view);
  document.body.classList.toggle("busy", Boolean(view));
}

async function follow(view, messages, take) {
  setRunning(view);
  try {
    for await (const message of messages) take(message);
  } finally {
    setRunning(null);
  }
}

async function ask() {
  const branch = state.branch;
  const shown = stage.stage.picture;
  const question = $("question").value.trim();
  if (state.running) return;
  if (!question) throw new api.Problem("Ask something first: the question is empty.");
  const { looks, forced } = chosenLooks();
  const view = new TurnView({ question, picture: shown, forced }, say);
  branch.turns.push(view);
  selectBranch(branch);
  stage.mark([]);
  listenTo(view, branch);
  view.reveal();
  const asked = { question, looks, picture: shown?.id ?? null, branch: branch.number };
  try {
    await follow(view, api.ask({ ...asked, remember: $("remember").checked, tokens: Number($("tokens").value) }), (m) => view.take(m));
    if (view.node.dataset.state === "done") {
      $("question").value = "";
      if (looks) stage.setBoxes([]), chooseLook("");
      view.mark();
    }
  } catch (error) {
    view.on_error({ message: error.message });
    if (error.status === 410) problem("ask-error", error);
  }
  // What was stopped or failed has not happened: it stays to be read until the next question.
  branch.turns = branch.turns.filter((other) => other === view || other.node.dataset.state === "done");
  if (branch === state.branch) selectBranch(branch);
}

function listenTo(view, branch) {
  const on = (name, act) => view.part(name).addEventListener("click", () => attempt(act));
  const focus = () => {
    if (view.turn && view.asked.picture && !state.running) {
      if (view.asked.picture !== stage.stage.picture) select(view.asked.picture);
      view.mark();
    }
  };
  view.part(".asked").addEventListener("click", focus);
  on(".compare", async () => {
    view.clearComparison();
    await follow(view, api.compare(view.turn.id), (message) => view.compare(message));
  });
  on(".replay", async () => {
    focus();
    stage.mark([]);
    await view.replay();
  });
  on(".draw", async () => save(await api.drawing(view.turn.id), "vpt-answer.png"));
  on(".keep", async () => save(await api.answers(state.branch.number), "vpt-conversation.json"));
  on(".fork", async () => {
    const from = state.branch;
    const { branch: number } = await api.fork(from.number);
    newBranch(number, from);
    say("A second conversation begins here.");
  });
  on(".undo", async () => {
    await api.undo(state.branch.number);
    const undone = state.branch.turns.pop();
    selectBranch(state.branch);
    $("question").value = undone.asked.question;
    $("question").focus();
    stage.mark([]);
    say("The last question is forgotten.");
  });
}

// Beginning

function chooseTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  $("theme").value = theme;
  try {
    localStorage.setItem("vpt-theme", theme);
  } catch {
    // Without storage the choice lasts as long as the page.
  }
}

function stored() {
  try {
    return localStorage.getItem("vpt-theme") || "";
  } catch {
    return "";
  }
}

function listen() {
  stage.listen();
  Object.assign(stage.stage, { onBoxes: drawBoxes, say });
  $("theme").addEventListener("change", () => chooseTheme($("theme").value));
  $("choose").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => {
    uploadFile($("file").files[0]);
    $("file").value = "";
  });
  $("example").addEventListener("click", () => {
    const first = state.examples++ === 0 ? 3 : undefined;
    show(() => api.example(first));
  });
  $("camera").addEventListener("click", openCamera);
  $("camera-cancel").addEventListener("click", () => $("camera-dialog").close());
  $("camera-dialog").addEventListener("close", closeCamera);
  $("snap").addEventListener("click", snap);
  $("looks").addEventListener("change", () => chooseLook(look()));
  $("stop").addEventListener("click", () => attempt(api.stop));
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(ask);
  });
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      attempt(ask);
    }
  });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) {
      event.preventDefault();
      uploadFile(picture(event.clipboardData.files));
    }
  });
  const frame = $("frame");
  for (const name of ["dragenter", "dragover"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      frame.classList.add("over");
    });
  }
  for (const name of ["dragleave", "drop"]) document.addEventListener(name, () => frame.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files.length) uploadFile(picture(event.dataTransfer.files));
  });
  addEventListener("pagehide", api.leave);
  addEventListener("pageshow", (event) => event.persisted && location.reload());
}

async function start() {
  chooseTheme(stored());
  listen();
  state.about = await api.about();
  const { name, device, dtype, limits, reencoder, regions, mini, stages, grid } = state.about;
  useColours(stages);
  stage.stage.grid = grid;
  $("model").textContent = `${name}, ${dtype} on ${device}`;
  $("mini-note").hidden = !mini;
  $("remember").checked = !mini; // it was trained on single questions
  $("tokens").max = limits.tokens;
  $("question").maxLength = limits.question;
  $("by-box").hidden = !regions;
  $("by-encoder").hidden = !reencoder;
  $("encoder").textContent = reencoder || "";
  newBranch(await api.begin());
  document.body.classList.add("ready");
}

start().catch((error) => {
  $("ended").textContent = error.message;
  $("ended").hidden = false;
});
