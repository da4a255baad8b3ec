// The button that changes the theme; theme.js has set it before the page was painted.

import { find, icon } from "./dom.js";

const root = document.documentElement;

function show() {
  const dark = root.dataset.theme === "dark";
  find("theme").setAttribute("aria-pressed", String(dark));
  find("theme").replaceChildren(icon(dark ? "light" : "dark"));
}

export function themeButton() {
  find("theme").addEventListener("click", () => {
    const next = root.dataset.theme === "dark" ? "light" : "dark";
    root.dispatchEvent(new CustomEvent("theme-chosen", { detail: next }));
  });
  root.addEventListener("theme", show);
  show();
}
