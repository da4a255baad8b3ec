// Pictures from outside the page, dropped or pasted: input for a task, or their settings.

import { el, find } from "./dom.js";
import { listed, t } from "./language.js";
import { openPanel, withModule } from "./panel.js";
import { toast } from "./toasts.js";

const WITH_SETTINGS = ["image/png", "image/jpeg", "image/webp"];
const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
const pictures = (list) => [...(list ?? [])].filter((file) => file.type.startsWith("image/"));

/** Takes pictures that are dropped or pasted anywhere into the form. */
export function takeDropped(form) {
  let inside = 0;
  const show = (shown) => {
    if (!shown) inside = 0;
    find("drop").hidden = !shown;
  };
  addEventListener("dragenter", (event) => {
    if (!carriesFiles(event)) return;
    inside += 1;
    show(true);
  });
  addEventListener("dragleave", (event) => {
    if (carriesFiles(event) && --inside <= 0) show(false);
  });
  addEventListener("dragover", (event) => carriesFiles(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    show(false);
    take(form, pictures(event.dataTransfer.files));
  });
  document.addEventListener("dropped", () => show(false));
  document.addEventListener("paste", (event) => {
    const pasted = pictures(event.clipboardData?.files);
    if (!pasted.length) return;
    event.preventDefault();
    take(form, pasted);
  });
}

/** One picture with settings: asks what is wanted. */
async function take(form, files) {
  const [file] = files;
  const mayHave = files.length === 1 && WITH_SETTINGS.includes(file.type);
  const settings = mayHave && (await withModule(() => import("./picture_settings.js"), ({ settingsOf }) => settingsOf(file)));
  if (settings) ask(form, file, settings);
  else asInput(form, files);
}

function asInput(form, files) {
  const slot = form.mainSlot();
  if (!files.length) toast(t("app.not_an_image"), { bad: true });
  else if (slot) slot.addFiles(files);
  else toast(t("app.takes_no_images"), { bad: true });
}

function load(form, settings) {
  const { missing, undo } = form.loadSettings(settings);
  const words = missing.length ? t("dropped.loaded_without", { list: listed(missing) }) : t("dropped.loaded");
  toast(words, { action: { words: t("app.undo"), run: undo } });
  form.focus();
}

function ask(form, file, settings) {
  const url = URL.createObjectURL(file);
  let chosen = null;
  const button = (props, words, run) => {
    const click = (event) => {
      chosen = run;
      event.target.closest("dialog").close();
    };
    return el("button", { type: "button", ...props, on: { click } }, words);
  };
  openPanel("dropped", t("dropped.title"), [
    el(
      "div",
      { class: "about" },
      el("img", { src: url, alt: "" }),
      el("p", { dir: "auto" }, settings.prompt.slice(0, 400)),
    ),
    el(
      "div",
      { class: "actions" },
      button({ class: "quiet" }, t("dropped.as_input"), () => asInput(form, [file])),
      button({ class: "generate", autofocus: true }, t("dropped.load"), () => load(form, settings)),
    ),
  ]).then(() => {
    URL.revokeObjectURL(url);
    chosen?.();
  });
}
