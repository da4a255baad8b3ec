// Requests without an answer: shown with their progress, sent when the server can be reached, or cancelled.

import * as api from "./api.js";
import { el, find, follow, setText } from "./dom.js";
import { bodyOf } from "./request.js";
import { t } from "./language.js";
import { randomKey, read, write } from "./store.js";
import { short } from "./words.js";

const PAUSE_MS = 5_000;
const MOST_PAUSE_MS = 80_000;

const stored = () => read("sending") ?? [];
const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);
const rowOf = ({ key, request }) => request.grid?.id ?? key;
const hasUpload = ({ inputs }) => Object.values(inputs ?? {}).some((list) => list.some((input) => input.key));

/**
 * Each request is stored as {key, request, arrived, withdrawn} until it is answered. The server
 * answers a key that it has seen with the same task, so that nothing is drawn twice.
 *
 * Dispatches "accepted" (detail: {answer, request}) and "refused" ({error, request}) for requests
 * that are sent later.
 */
export class Pending extends EventTarget {
  #list = find("pending");
  /** By key, of this visit: {stop, share} while it is sent; {failed, retryAt} afterwards. */
  #states = new Map();

  /** Submits a request. Throws what api.generate throws; an Unreachable one is sent again later. */
  async submit(request) {
    const known = stored().find((one) => same(one.request, request) && !one.withdrawn);
    const key = known?.key ?? randomKey();
    this.#write(key, { key, request, arrived: known?.arrived ?? false });
    return this.#send(key, request);
  }

  /** Keeps requests for later, after one of their kind that could not be sent. */
  later(requests) {
    for (const request of requests) {
      const key = randomKey();
      this.#write(key, { key, request, arrived: false });
    }
    this.#allWait();
  }

  /** Keys of the stored pictures of these requests. */
  pictureKeys() {
    return stored().flatMap(({ request }) => Object.values(request.inputs ?? {}).flat().map((one) => one.key));
  }

  /** Sends what has no answer yet. now: also what failed a moment ago. */
  async sendAll(now = true) {
    for (const { key, request, withdrawn } of stored()) {
      const state = this.#states.get(key);
      if (state?.stop || (!now && performance.now() < (state?.retryAt ?? 0))) continue;
      try {
        const answer = await this.#send(key, request);
        if (withdrawn) await api.remove(answer.task_id);
        else this.#dispatch("accepted", { answer, request });
      } catch (error) {
        if (error instanceof api.Unreachable) return this.#allWait();
        if (!withdrawn && error.name !== "AbortError") this.#dispatch("refused", { error, request });
      }
    }
  }

  /** What has not been tried waits as long as what has failed. */
  #allWait() {
    const retryAt = performance.now() + PAUSE_MS;
    for (const { key } of stored()) {
      if (!this.#states.has(key)) this.#states.set(key, { stop: null, share: 0, failed: 1, retryAt });
    }
    this.show();
  }

  /** If the server may have received the request, it is cancelled there when the server answers. */
  cancel(key) {
    const entry = stored().find((one) => one.key === key);
    const state = this.#states.get(key);
    if (entry?.arrived) this.#write(key, { ...entry, withdrawn: true });
    else this.#settle(key);
    state?.stop?.abort();
    this.show();
  }

  async #send(key, request) {
    const before = this.#states.get(key);
    const state = { stop: new AbortController(), share: 0, failed: before?.failed ?? 0 };
    this.#states.set(key, state);
    this.show();
    try {
      const body = await bodyOf(request);
      const onUpload = (share) => this.#uploaded(key, state, share);
      const answer = await api.generate(body, key, { signal: state.stop.signal, onUpload });
      this.#settle(key);
      return answer;
    } catch (error) {
      if (error instanceof api.Unreachable) this.#failed(key, state, error);
      else if (error.name !== "AbortError") this.#settle(key);
      throw error;
    } finally {
      state.stop = null;
      this.show();
    }
  }

  #uploaded(key, state, share) {
    state.share = share;
    const entry = stored().find((one) => one.key === key);
    if (share === 1 && entry) this.#write(key, { ...entry, arrived: true });
    this.show();
  }

  #failed(key, state, { arrived }) {
    const entry = stored().find((one) => one.key === key);
    if (entry) this.#write(key, { ...entry, arrived: entry.arrived || arrived });
    state.failed += 1;
    state.retryAt = performance.now() + Math.min(PAUSE_MS * 2 ** (state.failed - 1), MOST_PAUSE_MS);
  }

  #write(key, entry) {
    const others = stored().filter((one) => one.key !== key);
    const all = entry ? [...others, entry] : others;
    write("sending", all.length ? all : null);
  }

  #settle(key) {
    this.#write(key, null);
    this.#states.delete(key);
  }

  /** Shows the requests that wait for the server, and uploads; those of a grid as one. Others are answered at once. */
  show() {
    const shown = stored().filter(({ key, request, withdrawn }) => {
      const state = this.#states.get(key);
      return !withdrawn && state && (state.failed || hasUpload(request));
    });
    const rows = new Map();
    for (const entry of shown) rows.set(rowOf(entry), [...(rows.get(rowOf(entry)) ?? []), entry]);
    follow(this.#list, [...rows], ([id]) => id, ([id, [entry]]) => this.#row(id, entry), (node, [, entries]) => {
      const states = entries.map(({ key }) => this.#states.get(key));
      const many = entries[0].request.grid ? `${t("xy.open")}: ${t("xy.count", { n: entries.length })} · ` : "";
      setText(node.querySelector(".hint"), many + words(states.find((state) => state.stop) ?? states[0]));
    });
  }

  #row(id, { request }) {
    const prompt = el("span", { class: "who", dir: "auto" }, request.fields.prompt || t("queue.upscaling"));
    const click = () => stored().filter((entry) => rowOf(entry) === id).forEach(({ key }) => this.cancel(key));
    const cancel = el("button", { type: "button", class: "quiet", on: { click } }, t("gallery.cancel"));
    return el("li", { class: "row" }, el("span", { class: "what" }, prompt, el("span", { class: "hint" })), cancel);
  }

  #dispatch(kind, detail) {
    this.dispatchEvent(new CustomEvent(kind, { detail }));
  }
}

function words({ stop, share }) {
  if (!stop) return t("pending.waits");
  return share < 1 ? t("pending.uploading", { percent: Math.round(share * 100) }) : t("pending.uploaded");
}

/** A sentence about a request that was sent later and refused. */
export const refusal = ({ error, request }) =>
  t("pending.refused", { prompt: request.fields.prompt ?? t("words.file_name"), error: short(error) });
