// The server's interface: every call has the session's secret in a header, and says in a sentence what went wrong.

let secret = "";

export class Problem extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

async function send(method, path, body, signal, keepalive = false) {
  const raw = body instanceof Blob;
  const headers = { "X-VPT-Session": secret };
  if (body !== undefined && !raw) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, signal, keepalive, body: raw ? body : body && JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server does not answer: is vpt app still running?");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  throw new Problem(told.error || `The server refused this (${response.status}).`, response.status);
}

export const about = async () => (await send("GET", "/api/about")).json();

export async function begin() {
  const begun = await (await send("POST", "/api/session")).json();
  secret = begun.session;
  return begun.branch;
}

// Also while the page is being closed.
export const leave = () => secret && send("DELETE", "/api/session", undefined, undefined, true).catch(() => {});

export const upload = async (file) => (await send("POST", "/api/pictures", file)).json();
export const example = async (seed) => (await send("POST", "/api/examples", seed === undefined ? {} : { seed })).json();
export const stop = () => send("POST", "/api/stop");
export const undo = (branch) => send("POST", `/api/branches/${branch}/undo`);
export const fork = async (branch) => (await send("POST", `/api/branches/${branch}/fork`)).json();
export const close = async (branch) => (await send("DELETE", `/api/branches/${branch}`)).json();
export const answers = async (branch) => (await send("GET", `/api/branches/${branch}/answers.json`)).blob();
export const drawing = async (turn) => (await send("GET", `/api/turns/${turn}/picture.png`)).blob();

export const ask = (asked) => messages("/api/turns", asked);
export const compare = (turn) => messages(`/api/turns/${turn}/compare`, {});

async function* messages(path, body) {
  const reader = (await send("POST", path, body)).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let read;
    try {
      read = await reader.read();
    } catch {
      throw new Problem("The connection to the server broke off.");
    }
    if (read.done) return;
    const lines = (rest + read.value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}
