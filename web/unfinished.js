// The card of a task that waits or runs: its preview, its progress, what it is at.

import * as api from "./api.js";
import { el, setText } from "./dom.js";
import { tagList, titleOf } from "./cards.js";
import { t } from "./language.js";
import { progress, remaining, stored } from "./tasks.js";
import { PHASES, REASONS, countdown, downloadWords, place } from "./words.js";

/** gallery: its tasks, its actions, and the running download. */
export function unfinishedCard({ task }, gallery) {
  const { tasks, act } = gallery;
  const preview = el("img", { alt: "", class: "preview", hidden: true });
  preview.addEventListener("load", () => {
    preview.hidden = false;
    URL.revokeObjectURL(preview.src);
  });
  const label = t("gallery.progress_of", { title: titleOf(task) });
  const bar = el("div", { class: "bar", role: "progressbar", "aria-valuemin": "0", "aria-valuemax": "100", "aria-label": label });
  const left = el("span", { class: "left" });
  const frame = el("div", { class: "frame" }, el("div", { class: "clouds" }), preview, left, bar);
  const status = el("p", { class: "hint status" });
  const why = el("p", { class: "hint why" });
  const button = (words, run) => el("button", { type: "button", class: "quiet", on: { click: run } }, words);
  const cancel = button(t("gallery.cancel"), () => act.cancel({ task }));
  const endAfter = button(t("gallery.stop_after"), () => act.endAfter({ task }));
  endAfter.hidden = true;
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
  const newPreview = previewOf(task.id, (blob) => {
    if (card.isConnected) preview.src = URL.createObjectURL(blob);
  });
  card.tick = () => {
    const now = tasks.get(task.id);
    if (!now) return;
    const share = progress(now);
    bar.style.setProperty("--progress", share.toFixed(3));
    bar.setAttribute("aria-valuenow", String(Math.round(share * 100)));
    frame.style.setProperty("--blur", `${((1 - share) * 10).toFixed(1)}px`);
    setText(left, countdown(remaining(now)));
    setText(status, [statusOf(now, gallery.download), now.machine].filter(Boolean).join(" · "));
    const ending = now.last_image !== undefined;
    setText(why, ending ? t("gallery.stops_after") : (REASONS[now.reason] ?? ""));
    endAfter.hidden = ending || now.status !== "running" || stored(now) + 1 >= now.params.count;
  };
  card.refresh = () => {
    const now = tasks.get(task.id);
    card.classList.toggle("running", now.status === "running");
    newPreview(now);
    card.tick();
  };
  return card;
}

/** A function that fetches each new preview of a running task. The first request makes the server prepare previews. */
function previewOf(id, show) {
  let [shown, loading] = [null, false];
  return async (now) => {
    const version = now.preview ?? 0;
    if (loading || now.status !== "running" || version === shown) return;
    [shown, loading] = [version, true];
    const blob = await api.preview(id).catch(() => null);
    loading = false;
    if (blob) show(blob);
  };
}

function statusOf(task, download) {
  if (task.status === "waiting" && download?.model === task.params.model) return downloadWords(download);
  if (task.status === "waiting") return t("gallery.waiting", { place: place(task.pos ?? 0) });
  if (task.phase === "denoising" && task.steps_total) {
    const step = Math.min((task.steps_done ?? 0) + 1, task.steps_total);
    const { count } = task.params;
    const values = { step, steps: task.steps_total, picture: Math.min(stored(task) + 1, count), pictures: count };
    return t(count > 1 ? "gallery.generating_of" : "gallery.generating", values);
  }
  const words = PHASES[task.phase] ?? t("gallery.starting");
  return words[0].toUpperCase() + words.slice(1);
}
