// The tasks of this browser: unfinished ones and finished pictures.

import * as api from "./api.js";
import { imageUrl, thumbnailUrl } from "./api.js";
import { el, find, follow, icon, iconButton, setText } from "./dom.js";
import { isLive, progress, remaining, stored } from "./tasks.js";
import { toast } from "./toasts.js";
import { PHASES, REASONS, countdown, downloadWords, drawnSize, failure, fileName, place, plain, some } from "./words.js";

const PAGE_SIZE = 48;

/** Actions on a finished picture: [icon, label, name of the action]. */
export const ACTIONS = [
  ["again", "Again: load these settings into the form", "again"],
  ["vary", "Vary: same settings, another seed", "vary"],
  ["input", "Use as input", "use"],
  ["remove", "Remove", "remove"],
];

export const seedOf = (task, index) => String((BigInt(task.params.seed) + BigInt(index)) % 2n ** 64n);
export const titleOf = (task, index = 0) => task.params.prompts?.[index] || task.params.prompt || "Upscaled picture";

/** The tags of a task as a list, or null. */
export function tagList({ params: { tags } }) {
  if (!tags?.length) return null;
  return el("ul", { class: "tags", "aria-label": "Tags" }, ...tags.map((tag) => el("li", {}, tag)));
}

export function downloadLink(item) {
  const words = "Download";
  const props = { class: "quiet icon", title: words, "aria-label": words, href: imageUrl(item.task.id, item.index) };
  const save = (event) => {
    event.preventDefault();
    download(item);
  };
  return el("a", { ...props, on: { click: save } }, icon("download"));
}

/** Saves a picture under a name made of its prompt: the server names it after its task. */
async function download({ task, index }) {
  const answer = await fetch(imageUrl(task.id, index)).catch(() => null);
  if (!answer?.ok) return toast("The picture could not be downloaded.", { bad: true });
  const href = URL.createObjectURL(await answer.blob());
  const name = fileName(titleOf(task, index), seedOf(task, index), task.params.format);
  el("a", { href, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(href), 60_000);
}

export class Gallery {
  #grid = find("grid");
  #limit = PAGE_SIZE;

  /** act: functions by the name of the action, each (item); also open, cancel, endAfter, lost. */
  constructor(tasks, act) {
    this.tasks = tasks;
    this.act = act;
    this.download = undefined; // the running download, from /health
    find("search").addEventListener("input", () => this.show());
    find("clear-ended").addEventListener("click", () => this.act.clear(this.#ends()));
    find("more").addEventListener("click", () => {
      this.#limit += PAGE_SIZE;
      this.show();
    });
  }

  /** Finished pictures, the latest first. */
  pictures() {
    return this.#items().filter((item) => item.index !== null);
  }

  /** Tasks that have ended without a picture. */
  #ends() {
    return this.tasks.list().filter((task) => !isLive(task) && stored(task) === 0);
  }

  /** Whether the words that are searched for are in the prompt or in a tag. */
  #found(task) {
    const { prompt, prompts, tags } = task.params;
    const text = [prompt, ...(prompts ?? []), ...(tags ?? [])].join(" ").toLowerCase();
    return find("search").value.toLowerCase().split(/\s+/).every((word) => text.includes(word));
  }

  #items() {
    return this.tasks.list().filter((task) => this.#found(task)).flatMap((task) => {
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
      items.slice(0, this.#limit),
      (item) => item.key,
      (item) => this.#card(item),
      (node, item) => node.refresh?.(item),
    );
    if (focused && document.activeElement === document.body) this.#keepFocus(focused);
    find("more").hidden = items.length <= this.#limit;
    const all = this.tasks.list().length;
    find("empty").hidden = all > 0;
    find("tools").hidden = all === 0;
    find("clear-ended").hidden = this.#ends().length === 0;
    const finished = items.filter((item) => item.index !== null).length;
    const unfinished = items.filter((item) => item.index === null && isLive(item.task)).length;
    const words = [];
    if (unfinished) words.push(`${unfinished} in progress`);
    if (finished) words.push(`${finished} finished`);
    if (all && !items.length) words.push("no prompt with these words");
    setText(find("yours-words"), words.join(", "));
  }

  /** Moves the focus from a replaced card to the picture that replaced it, or else to the list. */
  #keepFocus(key) {
    const id = key.split(" ")[0];
    const successor = [...this.#grid.children].find((card) => card.dataset.key.startsWith(id));
    (successor?.querySelector("button, a") ?? find("yours")).focus({ preventScroll: true });
  }

  tick() {
    for (const card of this.#grid.children) card.tick?.();
  }

  /** Loads the pictures again that failed while the server could not be reached. */
  loadAgain() {
    for (const card of this.#grid.querySelectorAll(".picture:not(.loaded)")) card.load();
  }

  #card(item) {
    if (item.index !== null) return this.#picture(item);
    return isLive(item.task) ? this.#unfinished(item) : this.#ended(item);
  }

  #picture(item) {
    const { task, index } = item;
    const image = el("img", { alt: "", loading: "lazy", decoding: "async" });
    const card = el("li", { class: "card picture" });
    let tries = 0;
    image.addEventListener("load", () => card.classList.add("loaded"));
    image.addEventListener("error", () => {
      tries += 1;
      if (tries === 1) image.src = imageUrl(task.id, index); // without a thumbnail: the full image
      else this.act.lost(item);
    });
    card.load = () => {
      tries = 0;
      image.src = thumbnailUrl(task.id, index);
    };
    card.load();
    const open = el(
      "button",
      { type: "button", class: "open", "aria-label": `Large view: ${titleOf(task, index)}`, on: { click: () => this.act.open(item) } },
      image,
    );
    const actions = el(
      "div",
      { class: "actions" },
      downloadLink(item),
      ...ACTIONS.map(([name, words, act]) => iconButton(name, words, () => this.act[act](item))),
    );
    const { steps } = task.params;
    const facts = `${drawnSize(task.params)} · ${some(steps, "step", "steps")} · seed ${seedOf(task, index)}`;
    card.append(
      el("div", { class: "shot" }, open, actions),
      el("p", { class: "words", dir: "auto" }, titleOf(task, index)),
      el("p", { class: "hint facts" }, facts),
      tagList(task) ?? "",
    );
    return card;
  }

  #unfinished({ task }) {
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
    const status = el("p", { class: "hint status" });
    const why = el("p", { class: "hint why" });
    const cancel = el(
      "button",
      { type: "button", class: "quiet", on: { click: () => this.act.cancel({ task }) } },
      "Cancel",
    );
    const endAfter = el(
      "button",
      { type: "button", class: "quiet", hidden: true, on: { click: () => this.act.endAfter({ task }) } },
      "Stop after this picture",
    );
    const card = el(
      "li",
      { class: "card unfinished" },
      frame,
      el("p", { class: "words", dir: "auto" }, titleOf(task)),
      tagList(task),
      status,
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
      setText(status, statusOf(now, this.download));
      const ending = now.last_image !== undefined;
      setText(why, ending ? "Stops after this picture." : (REASONS[now.reason] ?? ""));
      endAfter.hidden = ending || now.status !== "running" || stored(now) + 1 >= now.params.count;
    };
    card.refresh = () => {
      const now = this.tasks.get(task.id);
      card.classList.toggle("running", now.status === "running");
      loadPreview(now);
      card.tick();
    };
    let loading = false;
    /** Fetches each new preview of a running task. The first request makes the server prepare previews. */
    const loadPreview = async (now) => {
      const version = now.preview ?? 0;
      if (loading || now.status !== "running" || version === shown) return;
      [shown, loading] = [version, true];
      const blob = await api.preview(task.id).catch(() => null);
      loading = false;
      if (blob && card.isConnected) preview.src = URL.createObjectURL(blob);
    };
    return card;
  }

  #ended({ task }) {
    const [name, title, detail] = {
      failed: ["trouble", "Failed.", failure(task)],
      cancelled: ["stop", "Cancelled.", ""],
      gone: ["clock", "No longer on the server.", "The server deletes finished pictures after some time."],
    }[task.status] ?? ["stop", "Ended.", ""];
    const item = { task, index: null };
    return el(
      "li",
      { class: `card ended ${task.status}` },
      el("div", { class: "frame" }, icon(name), el("p", { class: "end" }, title), el("p", { class: "hint", title: task.error ? plain(task.error) : "" }, detail)),
      el("p", { class: "words", dir: "auto" }, titleOf(task)),
      tagList(task),
      el(
        "div",
        { class: "actions" },
        el("button", { type: "button", class: "quiet", on: { click: () => this.act.again(item) } }, "Again"),
        el("button", { type: "button", class: "quiet", on: { click: () => this.act.remove({ task, index: null }) } }, "Remove"),
      ),
    );
  }
}

function statusOf(task, download) {
  if (task.status === "waiting" && download?.model === task.params.model) return downloadWords(download);
  if (task.status === "waiting") return `Waiting: ${place(task.pos ?? 0)}`;
  if (task.phase === "denoising" && task.steps_total) {
    const step = Math.min((task.steps_done ?? 0) + 1, task.steps_total);
    const { count } = task.params;
    const which = count > 1 ? `picture ${Math.min(stored(task) + 1, count)} of ${count}, ` : "";
    return `Generating: ${which}step ${step} of ${task.steps_total}`;
  }
  const words = PHASES[task.phase] ?? "starting";
  return words[0].toUpperCase() + words.slice(1);
}
