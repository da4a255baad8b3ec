// Calls of the public API. All URLs are relative, so that the page works below a path prefix.

const TIMEOUT_MS = 20_000;
let authorization = {};

/** Sends this key with each request from now on; null: none, a cookie may stand for it. */
export function useKey(key) {
  authorization = key ? { Authorization: `Bearer ${key}` } : {};
}

/** The server refused a request. `message` is a sentence for the user. */
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

/** The server cannot be reached. */
export class Unreachable extends Error {
  constructor() {
    super("The server cannot be reached.");
  }
}

export async function ask(path, { signal, timeout = TIMEOUT_MS, ...options } = {}) {
  const stop = new AbortController();
  const abort = () => stop.abort();
  const timer = setTimeout(abort, timeout);
  signal?.addEventListener("abort", abort);
  try {
    const headers = { ...options.headers, ...authorization };
    const answer = await fetch(path, { ...options, headers, signal: stop.signal, cache: "no-store" });
    const text = await answer.text();
    if (answer.status === 502 || answer.status === 504) throw new Unreachable(); // from a proxy
    let body = null;
    try {
      body = JSON.parse(text);
    } catch {
      // not an answer of this server
    }
    if (!answer.ok) throw new Refused(answer.status, body);
    return body;
  } catch (error) {
    if (error instanceof Refused || signal?.aborted) throw error;
    throw new Unreachable();
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener("abort", abort);
  }
}

const query = (params) => new URLSearchParams(params).toString();

export const session = () => ask("session");
/** Exchanges a key for a cookie, which pictures and event streams need. */
export const signIn = (key) => post("session", { key }, {});
export const models = () => ask("models");
export const specification = () => ask("openapi.json");
export const queue = () => ask("queue?limit=100");
export const status = (id) => ask(`status?${query({ task_id: id })}`);
export const remove = (id) => ask(`delete?${query({ task_id: id })}`, { method: "DELETE" });
/** Cancel a task after the picture that is being generated. */
export const endAfterPicture = (id) =>
  ask(`delete?${query({ task_id: id, after_current: true })}`, { method: "DELETE" });
/** Remove one picture of a task: fetched with delete=true. */
export const removeOne = (id, index) =>
  fetch(`image?${query({ task_id: id, index, delete: true })}`).then((answer) => answer.blob());

/** The latest preview, or null if there is none yet (204). The server prepares previews only on request. */
export async function preview(id) {
  const answer = await fetch(`preview?${query({ task_id: id })}`, { cache: "no-store" });
  return answer.status === 200 ? answer.blob() : null;
}

/** The body of /health, also with status 503. */
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
    timeout: form ? 120_000 : TIMEOUT_MS,
    signal,
  });
}

export const imageUrl = (id, index) => `image?${query({ task_id: id, index, delete: false })}`;
export const thumbnailUrl = (id, index, size = 512) =>
  `thumbnail?${query({ task_id: id, index, size })}`;
export const events = () => new EventSource("events");
