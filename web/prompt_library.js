// Styles, which are added to a prompt, and the prompts of before. Both are kept in this browser only.

import { el, iconButton } from "./dom.js";
import { forget, remembered } from "./form_prompt.js";
import { t } from "./language.js";
import { openPanel } from "./panel.js";
import { read, write } from "./store.js";

const MOST_STYLES = 100;
const styles = () => read("styles") ?? [];

/** The prompt with the text of a style, or without it if it has it. {prompt} in a style stands for the prompt. */
function withStyle(prompt, text) {
  if (text.includes("{prompt}")) {
    const [before, after] = text.split("{prompt}");
    const has = prompt.startsWith(before) && prompt.endsWith(after) && prompt.length >= before.length + after.length;
    return has ? prompt.slice(before.length, prompt.length - after.length) : before + prompt + after;
  }
  const added = `, ${text}`;
  if (prompt.endsWith(added)) return prompt.slice(0, -added.length);
  return prompt ? prompt + added : text;
}

/** prompt(): the present one; change(text): replaces it. */
export async function openLibrary(prompt, change) {
  const styleList = el("ul", { class: "rows" });
  const promptList = el("ul", { class: "rows" });
  const search = el("input", { type: "search", placeholder: t("prompts.search"), "aria-label": t("prompts.search") });
  const noPrompts = el("p", { class: "hint" }, t("prompts.none"));
  const pick = (title, text, choose, remove) =>
    el(
      "li",
      {},
      el(
        "button",
        { type: "button", class: "pick", dir: "auto", on: { click: choose } },
        title ? el("strong", {}, title) : null,
        el("span", { class: title ? "hint" : "" }, text),
      ),
      iconButton("close", t("prompts.remove", { name: title ?? text }), remove),
    );
  const show = () => {
    styleList.replaceChildren(
      ...styles().map(({ name, text }) =>
        pick(
          name,
          text,
          () => change(withStyle(prompt(), text)),
          () => (write("styles", styles().filter((one) => one.name !== name)), show()),
        ),
      ),
    );
    const words = search.value.toLowerCase();
    const found = remembered().filter((text) => text.toLowerCase().includes(words));
    promptList.replaceChildren(
      ...found.map((text) =>
        pick(null, text, (event) => (change(text), event.currentTarget.closest("dialog").close()), () => (forget(text), show())),
      ),
    );
    search.hidden = remembered().length < 6;
    noPrompts.hidden = found.length > 0;
  };
  search.addEventListener("input", show);
  show();
  await openPanel("prompt-library", t("prompts.title"), [
    el("h3", {}, t("prompts.styles")),
    el("p", { class: "hint" }, t("prompts.styles_hint")),
    styleList,
    newStyle(prompt, show),
    el("h3", {}, t("prompts.latest")),
    search,
    promptList,
    noPrompts,
  ]);
}

/** Adds a style under a name; one with this name is replaced. */
function newStyle(prompt, show) {
  const name = el("input", { type: "text", maxLength: 60, required: true, "aria-label": t("prompts.name"), placeholder: t("prompts.name") });
  const text = el("input", { type: "text", maxLength: 2000, required: true, dir: "auto", "aria-label": t("prompts.text"), placeholder: t("prompts.text") });
  const save = (event) => {
    event.preventDefault();
    const style = { name: name.value.trim(), text: text.value.trim() };
    if (!style.name || !style.text) return;
    write("styles", [style, ...styles().filter((one) => one.name !== style.name)].slice(0, MOST_STYLES));
    name.value = text.value = "";
    show();
  };
  return el(
    "form",
    { class: "new-style", on: { submit: save } },
    name,
    text,
    el("button", { type: "submit", class: "quiet" }, t("prompts.save")),
  );
}
