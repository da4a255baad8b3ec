// A dialog for a tool of the form: its title, its content and a button that closes it.

import { el, iconButton } from "./dom.js";
import { t } from "./language.js";
import { toast } from "./toasts.js";

/** Loads a style sheet, once. Resolves when it is there. */
export function sheet(path) {
  if (document.querySelector(`link[href="${path}"]`)) return Promise.resolve();
  return new Promise((resolve, reject) => {
    document.head.append(el("link", { rel: "stylesheet", href: path, on: { load: resolve, error: reject } }));
  });
}

/** Runs what needs files that are not loaded yet, and says so if they cannot be loaded. */
export async function withFiles(run) {
  try {
    return await run();
  } catch (error) {
    console.info(error);
    toast(t("panel.not_loaded"), { bad: true });
    return null;
  }
}

/**
 * Opens a dialog. Resolves when it is closed. content: nodes; name: its class.
 * The dialog is handed to fill(dialog) before it is shown.
 */
export async function openPanel(name, title, content, fill = () => {}) {
  await sheet("web/panel.css");
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
