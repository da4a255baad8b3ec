// Sets the theme before the page is painted: the chosen one, or the system's.
(() => {
  const PAPER = { light: "#f5f2ec", dark: "#151210" }; // as in variables.css
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const key = `mflux:${location.pathname.replace(/operator$/, "")}:theme`; // one theme for both pages
  const chosen = () => {
    try {
      return localStorage.getItem(key);
    } catch {
      return null;
    }
  };
  const show = () => {
    root.dataset.theme = chosen() ?? (system.matches ? "dark" : "light");
    document.querySelector("meta[name=theme-color]")?.setAttribute("content", PAPER[root.dataset.theme]);
    root.dispatchEvent(new Event("theme"));
  };
  system.addEventListener("change", show);
  addEventListener("storage", show);
  root.addEventListener("theme-chosen", (event) => {
    try {
      localStorage.setItem(key, event.detail);
    } catch {
      root.dataset.theme = event.detail; // without storage: until the page is closed
    }
    show();
  });
  show();
})();
