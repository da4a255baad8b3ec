// The dialog that asks for a key, on both pages.

import { el, setText } from "./dom.js";
import { t } from "./language.js";

/**
 * Shows the dialog until a key is accepted; Escape does not close it.
 *
 * check(key): returns what the key opens; throws an error whose message is shown.
 */
export function keyDialog({ title, hint, check }) {
  const wrong = el("p", { class: "wrong", id: "key-error", role: "alert" });
  const input = el("input", {
    id: "sign-in-key", type: "password", autocomplete: "current-password", required: true, autofocus: true,
    "aria-describedby": "key-error",
  });
  const form = el(
    "form",
    { id: "sign-in-form", method: "dialog" },
    el("h2", { id: "sign-in-title" }, title),
    el("p", { class: "hint" }, hint),
    el("input", { type: "text", name: "username", autocomplete: "username", value: "mflux-server", hidden: true }),
    el("div", { class: "field" }, el("label", { htmlFor: "sign-in-key" }, t("sign_in.key")), input, wrong),
    el("button", { type: "submit", class: "generate" }, t("sign_in.button")),
  );
  const dialog = el("dialog", { id: "sign-in", "aria-labelledby": "sign-in-title" }, form);
  dialog.addEventListener("cancel", (event) => event.preventDefault());
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((accepted) => {
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      setText(wrong, "");
      try {
        const found = await check(input.value.trim());
        dialog.close();
        dialog.remove();
        accepted(found);
      } catch (error) {
        setText(wrong, error.message);
        input.focus();
      }
    });
  });
}
