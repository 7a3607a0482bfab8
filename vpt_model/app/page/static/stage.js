// The picture: what lies over it, and how a visitor draws boxes on it, with the mouse, a finger or the keyboard.

const SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);

export const stage = {
  picture: null, grid: 8, boxes: [], marks: [], cursor: null, onBoxes: () => {}, say: () => {},
};
let dragging = null;

export function element(name, attributes, kind = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (kind) made.setAttribute("class", kind);
  return made;
}

export function show(picture) {
  stage.picture = picture;
  stage.marks = [];
  stage.cursor = null;
  setBoxes([]);
  $("frame").dataset.state = picture ? "shown" : "empty";
  if (!picture) return;
  const image = $("shown");
  image.src = picture.preview;
  image.width = picture.width;
  image.height = picture.height;
  image.alt = describe(picture);
  $("frame").style.setProperty("--ratio", picture.width / picture.height);
  redraw();
}

export function describe(picture) {
  const size = `${picture.width} by ${picture.height} pixels`;
  if (!picture.scene) return `Your picture, ${size}`;
  const things = picture.scene.things.map((thing) => `${/^[aeiou]/.test(thing.colour) ? "an" : "a"} ${thing.colour} ${thing.shape}`);
  return `Example ${picture.scene.seed}, ${size}: ${things.join(", ")}, each with a tag`;
}

// What a look showed: named cells, and crops around them, in pixels of the picture.
export function mark(boxes, cells = []) {
  stage.marks = boxes.map((box, index) => ({ box, cells: cells[index] }));
  redraw();
}

export function setBoxes(boxes) {
  stage.boxes = boxes;
  redraw();
  stage.onBoxes(boxes);
}

export const spec = () => `region:${stage.boxes.map(([a, b, c, d]) => `x${a},y${b},x${c},y${d}`).join("+")}`;
export const words = ([a, b, c, d]) =>
  `${a === c ? `column ${a}` : `columns ${a} to ${c}`}, ${b === d ? `row ${b}` : `rows ${b} to ${d}`}`;

function rectangle([left, top, right, bottom], kind) {
  return element("rect", { x: left, y: top, width: right - left, height: bottom - top }, kind);
}

function pixels([a, b, c, d], margin = 0) {
  const { picture, grid } = stage;
  const [w, h] = [picture.width / grid, picture.height / grid];
  const low = (cell) => Math.max(cell - margin, 0);
  const high = (cell) => Math.min(cell + margin, grid - 1) + 1;
  return [low(a) * w, low(b) * h, high(c) * w, high(d) * h];
}

export function redraw() {
  const { picture, grid } = stage;
  const overlay = $("overlay");
  overlay.replaceChildren();
  if (!picture) return;
  overlay.setAttribute("viewBox", `0 0 ${picture.width} ${picture.height}`);
  const lines = element("g", {}, "grid");
  for (let index = 1; index < grid; index += 1) {
    const [x, y] = [(index * picture.width) / grid, (index * picture.height) / grid];
    lines.append(element("line", { x1: x, x2: x, y1: 0, y2: picture.height }));
    lines.append(element("line", { x1: 0, x2: picture.width, y1: y, y2: y }));
  }
  overlay.append(lines);
  for (const { box, cells } of stage.marks) {
    overlay.append(rectangle(box, "crop under"), rectangle(box, "crop"));
    if (cells) overlay.append(rectangle(cells, "cells under"), rectangle(cells, "cells"));
  }
  for (const box of stage.boxes) {
    overlay.append(rectangle(pixels(box, 1), "margin"), rectangle(pixels(box), "drawn under"), rectangle(pixels(box), "drawn"));
  }
  const open = dragging ? dragging.box : stage.cursor;
  if (open) overlay.append(rectangle(pixels(open), "open under"), rectangle(pixels(open), "open"));
}

function cell(event) {
  const area = $("pad").getBoundingClientRect();
  const at = (share) => Math.min(Math.max(Math.floor(share * stage.grid), 0), stage.grid - 1);
  return [at((event.clientX - area.left) / area.width), at((event.clientY - area.top) / area.height)];
}

const between = ([a, b], [c, d]) => [Math.min(a, c), Math.min(b, d), Math.max(a, c), Math.max(b, d)];

function add(box) {
  const same = stage.boxes.some((other) => other.every((value, index) => value === box[index]));
  if (!same) setBoxes([...stage.boxes, box]);
  stage.say(`Box added: ${words(box)}.`);
}

export function listen() {
  const pad = $("pad");
  pad.addEventListener("pointerdown", (event) => {
    if (!stage.picture || event.button > 0) return;
    if (event.pointerType === "touch" && !document.querySelector('[name="look"][value="region"]').checked) return;
    pad.setPointerCapture(event.pointerId);
    const begin = cell(event);
    dragging = { begin, box: between(begin, begin) };
    stage.cursor = null;
    redraw();
  });
  pad.addEventListener("pointermove", (event) => {
    if (!dragging) return;
    dragging.box = between(dragging.begin, cell(event));
    redraw();
  });
  pad.addEventListener("pointerup", () => {
    if (!dragging) return;
    const { box } = dragging;
    dragging = null;
    add(box);
  });
  pad.addEventListener("pointercancel", () => {
    dragging = null;
    redraw();
  });
  pad.addEventListener("blur", () => {
    stage.cursor = null;
    redraw();
  });
  pad.addEventListener("keydown", keys);
}

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function keys(event) {
  if (!stage.picture || event.ctrlKey || event.metaKey || event.altKey) return;
  const last = stage.grid - 1;
  const within = (value) => Math.min(Math.max(value, 0), last);
  if (event.key in MOVES) {
    const [dx, dy] = MOVES[event.key];
    const [a, b, c, d] = stage.cursor || [3, 3, 3, 3];
    if (!stage.cursor) stage.cursor = [a, b, c, d];
    else if (event.shiftKey) stage.cursor = [a, b, Math.max(within(c + dx), a), Math.max(within(d + dy), b)];
    else {
      const [x, y] = [Math.min(Math.max(dx, -a), last - c), Math.min(Math.max(dy, -b), last - d)];
      stage.cursor = [a + x, b + y, c + x, d + y];
    }
    stage.say(words(stage.cursor));
  } else if ((event.key === "Enter" || event.key === " ") && stage.cursor) add(stage.cursor);
  else if (event.key === "Delete" || event.key === "Backspace") setBoxes(stage.boxes.slice(0, -1));
  else if (event.key === "Escape") stage.cursor = null;
  else return;
  event.preventDefault();
  redraw();
}
