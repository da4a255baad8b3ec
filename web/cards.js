// The cards of the gallery: a finished picture, a task that is not finished, one that ended without a picture.

import * as api from "./api.js";
import { el, icon, iconButton, setText } from "./dom.js";
import { t } from "./language.js";
import { isLive } from "./tasks.js";
import { toast } from "./toasts.js";
import { age, drawnSize, failure, fileName, plain } from "./words.js";

/** Actions on a finished picture: [icon, name of the action and of its text]. */
export const ACTIONS = [
  ["again", "again"],
  ["vary", "vary"],
  ["input", "use"],
  ["remove", "remove"],
];

export const seedOf = (task, index) => String((BigInt(task.params.seed) + BigInt(index ?? 0)) % 2n ** 64n);
export const titleOf = (task, index = 0) =>
  task.params.prompts?.[index] || task.params.prompt || t("gallery.upscaled");
export const keyOf = ({ task, index }) => (index === null ? `${task.id} ${isLive(task)}` : `${task.id} ${index}`);
export const isStarred = ({ task, index }) => Boolean(task.stars?.includes(index));

/** The tags of a task as a list, or null. */
export function tagList({ params: { tags } }) {
  if (!tags?.length) return null;
  return el("ul", { class: "tags", "aria-label": t("form.tags") }, ...tags.map((tag) => el("li", {}, tag)));
}

export function downloadLink(item) {
  const words = t("gallery.download");
  const props = { class: "quiet icon", title: words, "aria-label": words, href: api.imageUrl(item.task.id, item.index) };
  const save = (event) => {
    event.preventDefault();
    download(item);
  };
  return el("a", { ...props, on: { click: save } }, icon("download"));
}

/** The file of a picture under a name made of its prompt: the server names it after its task. Null: it cannot be had. */
export async function fileOf({ task, index }) {
  const answer = await fetch(api.imageUrl(task.id, index)).catch(() => null);
  if (!answer?.ok) return null;
  const blob = await answer.blob();
  return new File([blob], fileName(titleOf(task, index), seedOf(task, index), task.params.format), { type: blob.type });
}

async function download(item) {
  const file = await fileOf(item);
  if (!file) return toast(t("gallery.not_downloaded"), { bad: true });
  const href = URL.createObjectURL(file);
  el("a", { href, download: file.name }).click();
  setTimeout(() => URL.revokeObjectURL(href), 60_000);
}

/** The button that makes a picture a favourite, which the server keeps. */
export function starButton(item, act) {
  const button = iconButton("star", "", () => act.star(item));
  button.classList.add("star");
  button.refresh = (now) => {
    const words = t(isStarred(now) ? "gallery.unstar" : "gallery.star");
    button.setAttribute("aria-pressed", String(isStarred(now)));
    if (button.title !== words) button.title = words;
    button.setAttribute("aria-label", words);
  };
  button.refresh(item);
  return button;
}

/** When a picture will expire: [words on the card, sentence]. */
export function expiry(task) {
  if (task.kept && !task.expires_at) return [t("gallery.kept"), t("gallery.kept_hint")];
  if (!task.expires_at) return ["", ""];
  const left = Math.max(task.expires_at - Date.now() / 1000, 0);
  return [age(left), t("gallery.expires_in", { time: age(left) })];
}

export function pictureCard(item, act, selection) {
  const { task, index } = item;
  const image = el("img", { alt: "", loading: "lazy", decoding: "async" });
  const card = el("li", { class: "card picture" });
  let tries = 0;
  image.addEventListener("load", () => card.classList.add("loaded"));
  image.addEventListener("error", () => {
    tries += 1;
    if (tries === 1) image.src = api.imageUrl(task.id, index); // without a thumbnail: the full image
    else act.lost(item);
  });
  card.load = () => {
    tries = 0;
    image.src = api.thumbnailUrl(task.id, index);
  };
  card.load();
  const open = el(
    "button",
    { type: "button", class: "open", "aria-label": t("gallery.large_view_of", { title: titleOf(task, index) }) },
    image,
  );
  open.addEventListener("click", (event) => {
    if (selection.on) selection.toggle(item, event.shiftKey);
    else act.open(item);
  });
  const buttons = ACTIONS.map(([name, action]) => iconButton(name, t(`gallery.${action}`), () => act[action](item)));
  const actions = el("div", { class: "actions" }, downloadLink(item), ...buttons);
  const star = starButton(item, act);
  const left = el("span", { class: "expiry" });
  const facts = el("span", { class: "facts" }, `${drawnSize(task.params)} · ${t("gallery.seed", { seed: seedOf(task, index) })}`);
  card.append(
    el("div", { class: "shot" }, open, selection.mark(), star, actions),
    el("p", { class: "words", dir: "auto" }, titleOf(task, index)),
    el("p", { class: "hint about" }, facts, left),
    tagList(task) ?? "",
  );
  card.refresh = (now) => {
    const [words, sentence] = expiry(now.task);
    setText(left, words);
    left.title = sentence;
    left.classList.toggle("kept", Boolean(now.task.kept));
    star.refresh(now);
    selection.refresh(card, open, now);
  };
  return card;
}

export function endedCard(item, act, selection) {
  const { task } = item;
  const [name, title, detail] = {
    failed: ["trouble", t("gallery.failed"), failure(task)],
    cancelled: ["stop", t("gallery.cancelled"), ""],
    gone: ["clock", t("gallery.gone"), t("gallery.gone_hint")],
  }[task.status] ?? ["stop", t("gallery.ended"), ""];
  const button = (text, action) =>
    el("button", { type: "button", class: "quiet", on: { click: () => act[action](item) } }, text);
  const error = task.error ? plain(task.error) : "";
  const card = el(
    "li",
    { class: `card ended ${task.status}` },
    el("div", { class: "frame" }, icon(name), el("p", { class: "end" }, title), el("p", { class: "hint", title: error }, detail)),
    el("p", { class: "words", dir: "auto" }, titleOf(task)),
    tagList(task),
    el("div", { class: "actions" }, button(t("gallery.again_short"), "again"), button(t("gallery.remove"), "remove")),
  );
  card.refresh = () => card.classList.toggle("unselectable", selection.on);
  return card;
}

