// Words that come and go at the edge of the page; a screen reader says them.

import { el, find } from "./dom.js";

const STAY_MS = 7_000;

/** Only for those who cannot see it happen. */
export function say(words) {
  find("said").textContent = words;
}

/** action: {words, run}; onGone runs when the toast went without it. */
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
    timer = setTimeout(() => go(false), STAY_MS);
  };
  for (const kind of ["pointerenter", "focusin"]) node.addEventListener(kind, () => clearTimeout(timer));
  for (const kind of ["pointerleave", "focusout"]) node.addEventListener(kind, wait);
  const shelf = find("toasts");
  while (shelf.childElementCount >= 3) shelf.firstElementChild.dispatchEvent(new Event("go"));
  node.addEventListener("go", () => go(false));
  shelf.append(node);
  wait();
}
