// Numbers, states and errors as text.

import { decimal, t } from "./language.js";

/** 0.4 -> "1 s", 75 -> "75 s", 200 -> "3 min" */
export function duration(seconds) {
  const whole = Math.max(Math.ceil(seconds), 1);
  if (whole < 100) return t("words.duration_s", { n: whole });
  const minutes = Math.round(whole / 60);
  if (minutes < 100) return t("words.duration_min", { n: minutes });
  return whole < 36_000 ? t("words.duration_h", { n: decimal(whole / 3600) }) : age(whole);
}

/** Seconds of the life of a picture, roughly: "50 min", "23 h", "6 days". */
export function age(seconds) {
  if (seconds < 5_400) return t("words.duration_min", { n: Math.max(Math.ceil(seconds / 60), 1) });
  if (seconds < 172_800) return t("words.duration_h", { n: Math.round(seconds / 3_600) });
  return t("words.duration_days", { n: Math.round(seconds / 86_400) });
}

export function countdown(seconds) {
  return seconds < 0.5 ? t("words.soon") : duration(seconds);
}

/** The number of tasks ahead as text: 0 -> "next in the queue". */
export function place(pos) {
  return pos === 0 ? t("words.next_in_queue") : t("words.place_in_queue", { n: pos + 1 });
}

/** Progress of a download of weights. */
export function downloadWords({ model, bytes_done: done, bytes_total: total }) {
  const gb = (bytes) => decimal(bytes / 1e9);
  const name = total ? "words.downloading_of" : "words.downloading";
  return t(name, { model, done: gb(done), total: gb(total ?? 0) });
}

/** The size of the picture, after upscaling: even sides, as the upscaler makes them. */
export function drawnSize({ width, height, upscale }) {
  if (!upscale) return size(width, height);
  const shorter = Math.min(width, height);
  const by = Math.round(shorter * upscale) / shorter;
  return size(...[width, height].map((side) => Math.floor(Math.floor(side * by) / 2) * 2));
}

const EXTENSIONS = { JPEG: "jpg", PNG: "png", WEBP: "webp" };

/** The name of a file that is downloaded: "a lighthouse in the fog 42.png". */
export function fileName(title, seed, format) {
  const words = title.normalize("NFC").replace(/[^\p{L}\p{M}\p{N}]+/gu, " ").trim();
  const short = [...words].slice(0, 50).join("").trim() || t("words.file_name");
  return `${short} ${seed}.${EXTENSIONS[format] ?? "png"}`;
}

export const size = (width, height) => `${width} × ${height}`;

/** The title of a model up to the colon. */
export function modelName(model) {
  return model.title === "not described yet" ? model.name : model.title.split(":")[0];
}

export const REASONS = {
  overtaken: t("words.reason_overtaken"),
  model_switch: t("words.reason_model_switch"),
  slower_than_expected: t("words.reason_slower"),
};

export const PHASES = Object.fromEntries(
  ["prompt_expansion", "loading", "text_encoding", "denoising", "paused", "decoding", "image_encoding"].map(
    (phase) => [phase, t(`words.phase_${phase}`)],
  ),
);

/** An error without the details for the operator in brackets: "(ConnectionError: ...)". */
export const short = (error) => plain(error).replace(/ \(\w+: .*\)(?=[:.])/, "");

/** Why a task failed, with the LoRAs it used: one of them is often the reason. */
export function failure({ error, params }) {
  const names = params.loras?.map(({ name }) => name) ?? [];
  return names.length ? t("words.failed_loras", { error: short(error), names: names.join(", ") }) : short(error);
}

const FIELDS = [
  "init_image", "control_image", "negative_prompt", "image_strength", "control_strength", "control_type", "loras",
];

/** Names of the API's fields as the form names them. */
const asInForm = (words) =>
  words.replace(/\b[a-z]+_[a-z]+\b|\bloras\b/g, (word) => (FIELDS.includes(word) ? t(`field.${word}`) : word));

export function plain(error) {
  return asInForm(error?.message || t("words.wrong"));
}
