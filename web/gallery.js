// The pictures that were asked for here: those that develop, and those that are finished.

import * as api from "./api.js";
import { imageUrl, thumbnailUrl } from "./api.js";
import { el, find, follow, icon, iconButton, setText } from "./dom.js";
import { isLive, progress, remaining, stored } from "./tasks.js";
import { PHASES, REASONS, countdown, downloadWords, place, plain, short, size, some } from "./words.js";

const AT_FIRST = 48;

/** What can be done with a finished picture: [name of the icon, words, name of the action]. */
export const ACTIONS = [
  ["again", "Again: these settings into the form", "again"],
  ["vary", "Vary: draw it with another seed", "vary"],
  ["input", "Use it as input", "use"],
  ["remove", "Remove", "remove"],
];

export const seedOf = (task, index) => String((BigInt(task.params.seed) + BigInt(index)) % 2n ** 64n);
export const titleOf = (task) => task.params.prompt || "An enlarged picture";

export function downloadLink(item) {
  const words = "Download";
  const link = el("a", { class: "quiet icon", title: words, "aria-label": words, download: "" }, icon("download"));
  link.href = imageUrl(item.task.id, item.index);
  return link;
}

export class Gallery {
  #grid = find("grid");
  #most = AT_FIRST;

  /** act: functions by the name of the action, each (item); also open, cancel, endAfter, lost. */
  constructor(tasks, act) {
    this.tasks = tasks;
    this.act = act;
    this.download = undefined; // what the server fetches now, as /health tells it
    find("more").addEventListener("click", () => {
      this.#most += AT_FIRST;
      this.show();
    });
  }

  /** Of finished pictures, the latest first. */
  pictures() {
    return this.#items().filter((item) => item.index !== null);
  }

  #items() {
    return this.tasks.list().flatMap((task) => {
      const pictures = Array.from({ length: stored(task) }, (_, index) => ({
        key: `${task.id} ${index}`,
        task,
        index,
      }));
      const shown = pictures.filter(({ index }) => !task.hidden?.includes(index));
      const whole = task.status === "done" || (task.status === "cancelled" && pictures.length > 0);
      return whole ? shown : [{ key: `${task.id} ${isLive(task)}`, task, index: null }, ...shown];
    });
  }

  show() {
    const items = this.#items();
    const focused = document.activeElement?.closest?.(".card")?.dataset.key;
    follow(
      this.#grid,
      items.slice(0, this.#most),
      (item) => item.key,
      (item) => this.#card(item),
      (node, item) => node.refresh?.(item),
    );
    if (focused && document.activeElement === document.body) this.#keepFocus(focused);
    find("more").hidden = items.length <= this.#most;
    find("empty").hidden = items.length > 0;
    const finished = items.filter((item) => item.index !== null).length;
    const developing = items.filter((item) => item.index === null && isLive(item.task)).length;
    const words = [];
    if (developing) words.push(`${developing} developing`);
    if (finished) words.push(`${finished} finished`);
    setText(find("yours-words"), words.join(", "));
  }

  /** The card that had the focus is another one now: the picture that came of it, or the list. */
  #keepFocus(key) {
    const id = key.split(" ")[0];
    const heir = [...this.#grid.children].find((card) => card.dataset.key.startsWith(id));
    (heir?.querySelector("button, a") ?? find("yours")).focus({ preventScroll: true });
  }

  tick() {
    for (const card of this.#grid.children) card.tick?.();
  }

  /** What could not be shown while the server was away. */
  loadAgain() {
    for (const card of this.#grid.querySelectorAll(".picture:not(.loaded)")) card.load();
  }

  #card(item) {
    if (item.index !== null) return this.#picture(item);
    return isLive(item.task) ? this.#developing(item) : this.#ended(item);
  }

  #picture(item) {
    const { task, index } = item;
    const image = el("img", { alt: "", loading: "lazy", decoding: "async" });
    const card = el("li", { class: "card picture" });
    let tries = 0;
    image.addEventListener("load", () => card.classList.add("loaded"));
    image.addEventListener("error", () => {
      tries += 1;
      if (tries === 1) image.src = imageUrl(task.id, index); // no thumbnail: the picture itself
      else this.act.lost(item);
    });
    card.load = () => {
      tries = 0;
      image.src = thumbnailUrl(task.id, index);
    };
    card.load();
    const open = el(
      "button",
      { type: "button", class: "open", "aria-label": `Large view: ${titleOf(task)}`, on: { click: () => this.act.open(item) } },
      image,
    );
    const actions = el(
      "div",
      { class: "actions" },
      downloadLink(item),
      ...ACTIONS.map(([name, words, act]) => iconButton(name, words, () => this.act[act](item))),
    );
    const { width, height, steps } = task.params;
    const facts = `${size(width, height)} · ${some(steps, "step", "steps")} · seed ${seedOf(task, index)}`;
    card.append(
      el("div", { class: "shot" }, open, actions),
      el("p", { class: "words" }, titleOf(task)),
      el("p", { class: "hint facts" }, facts),
    );
    return card;
  }

  #developing({ task }) {
    const preview = el("img", { alt: "", class: "preview", hidden: true });
    preview.addEventListener("load", () => {
      preview.hidden = false;
      URL.revokeObjectURL(preview.src);
    });
    const bar = el("div", {
      class: "bar",
      role: "progressbar",
      "aria-valuemin": "0",
      "aria-valuemax": "100",
      "aria-label": `Progress: ${titleOf(task)}`,
    });
    const clouds = el("div", { class: "clouds" });
    const frame = el("div", { class: "frame" }, clouds, preview, el("span", { class: "left" }), bar);
    const stand = el("p", { class: "hint stand" });
    const why = el("p", { class: "hint why" });
    const cancel = el(
      "button",
      { type: "button", class: "quiet", on: { click: () => this.act.cancel({ task }) } },
      "Cancel",
    );
    const endAfter = el(
      "button",
      { type: "button", class: "quiet", hidden: true, on: { click: () => this.act.endAfter({ task }) } },
      "Stop after this one",
    );
    const card = el(
      "li",
      { class: "card developing" },
      frame,
      el("p", { class: "words" }, titleOf(task)),
      stand,
      why,
      el("div", { class: "actions" }, endAfter, cancel),
    );
    let shown = null;
    card.tick = () => {
      const now = this.tasks.get(task.id);
      if (!now) return;
      const share = progress(now);
      bar.style.setProperty("--progress", share.toFixed(3));
      bar.setAttribute("aria-valuenow", String(Math.round(share * 100)));
      frame.style.setProperty("--blur", `${((1 - share) * 10).toFixed(1)}px`);
      setText(frame.querySelector(".left"), countdown(remaining(now)));
      setText(stand, standOf(now, this.download));
      const ending = now.last_image !== undefined;
      setText(why, ending ? "It ends after this picture." : (REASONS[now.reason] ?? ""));
      endAfter.hidden = ending || now.status !== "running" || stored(now) + 1 >= now.params.count;
    };
    card.refresh = () => {
      const now = this.tasks.get(task.id);
      card.classList.toggle("running", now.status === "running");
      look(now);
      card.tick();
    };
    let looking = false;
    /** Once when it begins to run, which asks for previews, then at each newer one. */
    const look = async (now) => {
      const version = now.preview ?? 0;
      if (looking || now.status !== "running" || version === shown) return;
      [shown, looking] = [version, true];
      const blob = await api.preview(task.id).catch(() => null);
      looking = false;
      if (blob && card.isConnected) preview.src = URL.createObjectURL(blob);
    };
    return card;
  }

  #ended({ task }) {
    const told = {
      failed: ["It failed.", short(task.error)],
      cancelled: ["Cancelled.", ""],
      gone: ["No longer on the server.", "Finished pictures are kept for a while only."],
    }[task.status] ?? ["It has ended.", ""];
    const item = { task, index: null };
    return el(
      "li",
      { class: `card ended ${task.status}` },
      el("div", { class: "frame" }, icon("trouble"), el("p", { class: "end" }, told[0]), el("p", { class: "hint", title: task.error ? plain(task.error) : "" }, told[1])),
      el("p", { class: "words" }, titleOf(task)),
      el(
        "div",
        { class: "actions" },
        el("button", { type: "button", class: "quiet", on: { click: () => this.act.again(item) } }, "Again"),
        el("button", { type: "button", class: "quiet", on: { click: () => this.act.remove({ task, index: null }) } }, "Remove"),
      ),
    );
  }
}

function standOf(task, download) {
  if (task.status === "waiting" && download?.model === task.params.model) return downloadWords(download);
  if (task.status === "waiting") return `Waiting: ${place(task.pos ?? 0)}`;
  if (task.phase === "denoising" && task.steps_total) {
    const step = Math.min((task.steps_done ?? 0) + 1, task.steps_total);
    const { count } = task.params;
    const which = count > 1 ? `picture ${Math.min(stored(task) + 1, count)} of ${count}, ` : "";
    return `Drawing: ${which}step ${step} of ${task.steps_total}`;
  }
  const words = PHASES[task.phase] ?? "about to start";
  return words[0].toUpperCase() + words.slice(1);
}
