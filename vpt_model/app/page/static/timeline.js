// The bar of stages that grows while the model works, and the table of their numbers.

let colours = {};

export function useColours(stages) {
  colours = stages;
}

export function time(milliseconds) {
  if (milliseconds >= 10000) return `${(milliseconds / 1000).toFixed(0)} s`;
  if (milliseconds >= 1000) return `${(milliseconds / 1000).toFixed(1)} s`;
  return milliseconds >= 10 ? `${milliseconds.toFixed(0)} ms` : `${milliseconds.toFixed(1)} ms`;
}

const WORK = {
  tokens: ["token", "tokens"], token_forwards: ["token", "tokens"], images: ["image", "images"],
  vit_patches: ["patch", "patches"], lm_calls: ["language model call", "language model calls"],
  cache_copies: ["cache copy", "cache copies"], features: ["feature", "features"],
};

function segment(colour, share, name) {
  const part = document.createElement("span");
  part.className = name;
  part.style.width = `${100 * share}%`;
  if (colour) part.style.backgroundColor = colour;
  return part;
}

// stages: those that have ended. elapsed: milliseconds so far. scale: those that fill the whole width.
export function drawTrack(track, stages, elapsed, running, scale = elapsed) {
  const total = Math.max(scale, elapsed, 1e-3);
  const spent = stages.reduce((sum, stage) => sum + stage.milliseconds, 0);
  const parts = stages.map((stage) => segment(colours[stage.stage], stage.milliseconds / total, "part"));
  const left = Math.max(elapsed - spent, 0) / total;
  parts.push(segment(null, left, running ? "part running" : "part between"));
  track.replaceChildren(...parts);
}

export function drawLegend(list, stages) {
  list.replaceChildren(...stages.map((stage) => {
    const item = document.createElement("li");
    const swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.backgroundColor = colours[stage.stage];
    item.append(swatch, `${stage.stage} ${time(stage.milliseconds)}`);
    return item;
  }));
}

export function fillTable(body, stages) {
  body.replaceChildren(...stages.map((stage) => {
    const row = document.createElement("tr");
    const name = document.createElement("th");
    name.scope = "row";
    const swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.backgroundColor = colours[stage.stage];
    name.append(swatch, stage.stage);
    const work = Object.entries(stage.work).filter(([kind]) => kind in WORK)
      .map(([kind, count]) => `${count.toLocaleString("en")} ${WORK[kind][count === 1 ? 0 : 1]}`);
    const cells = [time(stage.milliseconds), work.join(", ")].map((text) => {
      const cell = document.createElement("td");
      cell.textContent = text;
      return cell;
    });
    row.append(name, ...cells);
    return row;
  }));
}
