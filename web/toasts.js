// Short messages at the edge of the page, also read by screen readers.

import { el, find } from "./dom.js";

const SHOWN_MS = 7_000;

/** While a dialog is open, everything outside it is covered and cannot be reached: messages move into it. */
function place() {
  const home = document.querySelector("dialog[open]") ?? document.body;
  for (const id of ["toasts", "announcer"]) if (find(id)?.parentElement !== home) home.append(find(id));
}

document.addEventListener("close", place, true); // of a dialog

/** A message for screen readers only. */
export function announce(words) {
  find("announcer").textContent = words;
}

/** action: {words, run}; onGone runs if the message disappears without it. */
export function toast(words, { action = null, onGone = null, bad = false } = {}) {
  let timer = null;
  const button = action
    ? el("button", { type: "button", class: "quiet", on: { click: () => go(true) } }, action.words)
    : null;
  const node = el("p", { class: bad ? "toast bad" : "toast" }, el("span", {}, words), button);
  const go = (acted) => {
    clearTimeout(timer);
    if (!node.isConnected) return;
    node.remove();
    if (acted) action.run();
    else onGone?.();
  };
  const wait = () => {
    clearTimeout(timer);
    timer = setTimeout(() => go(false), SHOWN_MS);
  };
  for (const kind of ["pointerenter", "focusin"]) node.addEventListener(kind, () => clearTimeout(timer));
  for (const kind of ["pointerleave", "focusout"]) node.addEventListener(kind, wait);
  place();
  const list = find("toasts");
  while (list.childElementCount >= 3) list.firstElementChild.dispatchEvent(new Event("go"));
  node.addEventListener("go", () => go(false));
  list.append(node);
  wait();
}
