// What leaves the page with a picture: its prompt, its parameters, a link, the system's share sheet.

import { imageUrl, linkTo } from "./api.js";
import { fileOf, seedOf, titleOf } from "./cards.js";
import { el } from "./dom.js";
import { t } from "./language.js";
import { picture } from "./store.js";
import { toast } from "./toasts.js";
import { plain } from "./words.js";

/** Puts a text into the clipboard, also where the page is not served over https. */
async function copy(text, words) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    if (!copyByCommand(text)) return toast(t("share.not_copied"), { bad: true });
  }
  toast(words);
}

function copyByCommand(text) {
  const area = el("textarea", { value: text, class: "unseen" });
  (document.querySelector("dialog[open]") ?? document.body).append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  return copied;
}

export const copyPrompt = ({ task, index }) => copy(titleOf(task, index), t("share.prompt_copied"));

/** As other programs write them: the form reads this text, too. */
function parametersOf({ task, index }) {
  const { params } = task;
  const fields = [
    ["Steps", params.steps],
    ["CFG scale", params.guidance],
    ["Seed", seedOf(task, index)],
    ["Size", `${params.width}x${params.height}`],
    ["Model", params.model],
    ["Denoising strength", params.init_image && params.image_strength],
    ["Hires upscale", params.upscale],
  ].filter(([, value]) => value !== undefined && value !== null);
  const negative = params.negative_prompt ? `Negative prompt: ${params.negative_prompt}\n` : "";
  const loras = (params.loras ?? []).map(({ name, scale }) => ` <lora:${name}:${scale}>`).join("");
  const prompt = params.prompt ? titleOf(task, index) + loras : "";
  return `${prompt}\n${negative}${fields.map(([name, value]) => `${name}: ${value}`).join(", ")}`;
}

export const copyParameters = (item) => copy(parametersOf(item), t("share.parameters_copied"));

/** A link that shows the picture to everybody who has it. */
export async function copyLink({ task, index }) {
  try {
    const { url, expires_at: until } = await linkTo(task.id, index);
    const time = until && new Date(until * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
    await copy(url, until ? t("share.link_until", { time }) : t("share.link_copied"));
  } catch (error) {
    toast(plain(error), { bad: true });
  }
}

export const canShare = () =>
  Boolean(navigator.canShare?.({ files: [new File([""], "picture.png", { type: "image/png" })] }));

export async function share(item) {
  const file = await fileOf(item);
  if (!file) return toast(t("gallery.not_downloaded"), { bad: true });
  await navigator.share({ files: [file], title: titleOf(item.task, item.index) }).catch(() => {}); // closed by hand
}

/** A function that finds the picture which this one was made from, as a URL; null: it was made from none. */
export function inputPicture({ task }) {
  const { init_image: [start] = [], images: [first] = [] } = task.inputs ?? {};
  const input = start ?? first;
  if (!input) return null;
  if (input.task_id) return async () => imageUrl(input.task_id, input.index);
  return async () => {
    const blob = await picture(input.key);
    if (!blob) toast(t("slot.lost"), { bad: true });
    return blob && URL.createObjectURL(blob);
  };
}
