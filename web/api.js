// Calls of the public API. All URLs are relative, so that the page works below a path prefix.

import { t } from "./language.js";

/** A request fails if nothing moves for this long, however long it takes as a whole. */
const STALL_MS = 30_000;
/** The answer to pictures takes longer: the server decodes them. */
const PICTURES_MS = 120_000;

const OF_A_PROXY = { 413: t("api.too_large"), 429: t("api.too_many"), 503: t("api.overloaded") };

let authorization = {};

/** Sends this key with each request from now on; null: none, a cookie may stand for it. */
export function useKey(key) {
  authorization = key ? { Authorization: `Bearer ${key}` } : {};
}

/** The server refused a request. `message` is a sentence for the user. */
export class Refused extends Error {
  constructor(status, body) {
    const error = body?.error ?? {};
    super(error.message ?? OF_A_PROXY[status] ?? t("api.status", { status }));
    this.status = status;
    this.code = error.code ?? "unknown";
    this.field = error.field;
    this.body = body;
  }
}

/** The server cannot be reached. arrived: whether it may have received the request nevertheless. */
export class Unreachable extends Error {
  constructor(arrived = true) {
    super(t("api.unreachable"));
    this.arrived = arrived;
  }
}

/** Calls listener() when the server no longer knows the key of this browser. */
export function onSignedOut(listener) {
  signedOut = listener;
}

let signedOut = () => {};

/**
 * The body of the answer, parsed. onUpload(share) is called while the body is sent (0 to 1).
 * XMLHttpRequest, because fetch does not say how much of a body has been sent.
 */
export function ask(path, { method = "GET", body, headers = {}, signal, onUpload, answer = STALL_MS } = {}) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    let arrived = false;
    let timer = null;
    const wait = (limit) => {
      clearTimeout(timer);
      timer = setTimeout(() => request.abort(), limit);
    };
    request.open(method, path);
    for (const [name, value] of Object.entries({ ...headers, ...authorization })) request.setRequestHeader(name, value);
    request.upload.addEventListener("progress", ({ loaded, total }) => {
      wait(STALL_MS);
      onUpload?.(total ? loaded / total : 0);
    });
    request.upload.addEventListener("load", () => {
      arrived = true;
      wait(answer);
      onUpload?.(1);
    });
    request.addEventListener("progress", () => wait(STALL_MS));
    request.addEventListener("load", () => answered(request, resolve, reject));
    request.addEventListener("error", () => reject(new Unreachable(arrived)));
    const aborted = () => Object.assign(new DOMException("aborted", "AbortError"), { arrived });
    request.addEventListener("abort", () => reject(signal?.aborted ? aborted() : new Unreachable(arrived)));
    request.addEventListener("loadend", () => clearTimeout(timer));
    signal?.addEventListener("abort", () => request.abort(), { once: true });
    if (signal?.aborted) return reject(aborted());
    wait(STALL_MS);
    request.send(body);
  });
}

function answered({ status, responseText }, resolve, reject) {
  if (status === 502 || status === 504) return reject(new Unreachable()); // from a proxy
  let body = null;
  try {
    body = JSON.parse(responseText);
  } catch {
    // not an answer of this server
  }
  if (status >= 200 && status < 300) return resolve(body);
  if (status === 401) signedOut();
  reject(new Refused(status, body));
}

const query = (params) => new URLSearchParams(params).toString();

export const session = () => ask("session");
/** Exchanges a key for a cookie, which pictures and event streams need. */
export const signIn = (key) => post("session", { key });
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

/** The client's own pinned tasks, also those of other browsers: {task_ids, ...}. */
export const kept = () => ask("keep");
/** Pin a task, or release it. */
export const keep = (id) => ask(`keep?${query({ task_id: id })}`, { method: "POST" });
export const release = (id) => ask(`keep?${query({ task_id: id })}`, { method: "DELETE" });
/** A link to a picture: {url, expires_at}. */
export const linkTo = (id, index) => ask(`image/link?${query({ task_id: id, index })}`, { method: "POST" });

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

/** options: signal, onUpload(share). */
export const generate = (body, key, options) =>
  post("generate", body, { "Idempotency-Key": key }, { ...options, answer: PICTURES_MS });
export const estimate = (body, signal) => post("estimate", body, {}, { signal });

function post(path, body, headers, options) {
  headers = { ...headers, "Content-Type": "application/json" };
  return ask(path, { ...options, method: "POST", body: JSON.stringify(body), headers });
}

export const imageUrl = (id, index) => `image?${query({ task_id: id, index, delete: false })}`;
export const thumbnailUrl = (id, index, size = 512) =>
  `thumbnail?${query({ task_id: id, index, size })}`;
export const events = () => new EventSource("events");
/** An archive of pictures: {task, index} each. */
export const zipUrl = (items) =>
  `zip?${new URLSearchParams(items.map(({ task, index }) => ["task_id", `${task.id}:${index}`]))}`;
