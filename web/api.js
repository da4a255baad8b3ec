// The public API. Every address is relative: the page also works below a prefix.

const PATIENCE_MS = 20_000;

/** The server refused, and says why in words. */
export class Refused extends Error {
  constructor(status, body) {
    const error = body?.error ?? {};
    super(error.message ?? `The server answered ${status}.`);
    this.status = status;
    this.code = error.code ?? "unknown";
    this.field = error.field;
    this.body = body;
  }
}

/** Nobody answered. */
export class Away extends Error {
  constructor() {
    super("The server is away.");
  }
}

export async function ask(path, { signal, patience = PATIENCE_MS, ...options } = {}) {
  const stop = new AbortController();
  const leave = () => stop.abort();
  const timer = setTimeout(leave, patience);
  signal?.addEventListener("abort", leave);
  try {
    const answer = await fetch(path, { ...options, signal: stop.signal, cache: "no-store" });
    const text = await answer.text();
    if (answer.status === 502 || answer.status === 504) throw new Away(); // a proxy's words
    let body = null;
    try {
      body = JSON.parse(text);
    } catch {
      // not ours
    }
    if (!answer.ok) throw new Refused(answer.status, body);
    return body;
  } catch (error) {
    if (error instanceof Refused || signal?.aborted) throw error;
    throw new Away();
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener("abort", leave);
  }
}

const query = (params) => new URLSearchParams(params).toString();

export const models = () => ask("models");
export const specification = () => ask("openapi.json");
export const queue = () => ask("queue?limit=100");
export const status = (id) => ask(`status?${query({ task_id: id })}`);
export const remove = (id) => ask(`delete?${query({ task_id: id })}`, { method: "DELETE" });
/** Cancel a task once the picture that is being drawn is stored. */
export const endAfterPicture = (id) =>
  ask(`delete?${query({ task_id: id, after_current: true })}`, { method: "DELETE" });
/** Of a task with several: fetching one with delete=true is how one goes. */
export const removeOne = (id, index) =>
  fetch(`image?${query({ task_id: id, index, delete: true })}`).then((answer) => answer.blob());

/** The picture so far, or null (204: not yet). Asking is what makes the server prepare the next one. */
export async function preview(id) {
  const answer = await fetch(`preview?${query({ task_id: id })}`, { cache: "no-store" });
  return answer.status === 200 ? answer.blob() : null;
}

/** Also when it says that it cannot work, which it does with 503. */
export async function health() {
  try {
    return await ask("health");
  } catch (error) {
    if (error instanceof Refused && error.body?.status) return error.body;
    throw error;
  }
}

export const generate = (body, key) => post("generate", body, { "Idempotency-Key": key });
export const estimate = (body, signal) => post("estimate", body, {}, signal);

function post(path, body, headers, signal) {
  const form = body instanceof FormData;
  return ask(path, {
    method: "POST",
    body: form ? body : JSON.stringify(body),
    headers: form ? headers : { ...headers, "Content-Type": "application/json" },
    patience: form ? 120_000 : PATIENCE_MS,
    signal,
  });
}

export const imageUrl = (id, index) => `image?${query({ task_id: id, index, delete: false })}`;
export const thumbnailUrl = (id, index, size = 512) =>
  `thumbnail?${query({ task_id: id, index, size })}`;
export const events = () => new EventSource("events");
