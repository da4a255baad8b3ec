// A dialog for a tool of the form: its title, its content and a button that closes it.

import { el, iconButton } from "./dom.js";
import { t } from "./language.js";
import { toast } from "./toasts.js";

class NotLoaded extends Error {}

/** Loads a style sheet from the folder of this file, once. Resolves when it is there. Throws NotLoaded. */
export function sheet(name) {
  const path = new URL(name, import.meta.url).pathname;
  if (document.querySelector(`link[href="${path}"]`)) return Promise.resolve();
  return new Promise((resolve, reject) => {
    const link = el("link", { rel: "stylesheet", href: path, on: { load: resolve } });
    link.addEventListener("error", () => {
      link.remove();
      reject(new NotLoaded());
    });
    document.head.append(link);
  });
}

/**
 * Runs what needs a module that is not loaded yet. load(): imports it; run(module). If one of them
 * fails, the page says which, and the result is null.
 */
export async function withModule(load, run) {
  try {
    const module = await load().catch((error) => {
      console.info(error);
      throw new NotLoaded();
    });
    return await run(module);
  } catch (error) {
    toast(error instanceof NotLoaded ? t("panel.not_loaded") : t("panel.failed", { error: error.message }), { bad: true });
    return null;
  }
}

/**
 * Opens a dialog. Resolves when it is closed. content: nodes; name: its class.
 * The dialog is handed to fill(dialog) before it is shown.
 */
export async function openPanel(name, title, content, fill = () => {}) {
  await sheet("./panel.css");
  const close = iconButton("close", t("viewer.close"), () => dialog.close());
  const heading = el("h2", { id: "panel-title" }, title);
  const dialog = el(
    "dialog",
    { class: `panel ${name}`, "aria-labelledby": "panel-title" },
    el("header", {}, heading, close),
    ...content,
  );
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  fill(dialog);
  document.body.append(dialog);
  dialog.showModal();
  await new Promise((closed) => dialog.addEventListener("close", closed, { once: true }));
  dialog.remove();
}
