// What a prompt can be besides one text: several lines with a picture each, and wildcards.

import { find, setText } from "./dom.js";
import { linesOf } from "./form_parts.js";
import { t } from "./language.js";
import { read, write } from "./store.js";

const WILDCARDS = /\{[^{}|]*\|[^{}]*\}|__[A-Za-z0-9-]+(?:_[A-Za-z0-9-]+)*__/;
const MOST_REMEMBERED = 100;

/** The fields of a request that come from the prompt. */
export function promptFields({ prompt, lines, expand_wildcards: expand }) {
  const text = prompt.trim();
  if (!text) return {};
  const many = linesOf(text);
  const fields = { prompt: lines && many.length > 1 ? many : text };
  if (expand && WILDCARDS.test(text)) fields.expand_wildcards = true;
  return fields;
}

export function showPromptOptions({ prompt, lines, expand_wildcards: expand }) {
  const n = linesOf(prompt).length;
  find("lines-option").hidden = n < 2;
  find("lines").checked = lines;
  setText(find("lines-words"), t("form.lines", { n }));
  find("n").disabled = lines && n > 1;
  find("wildcards-option").hidden = !WILDCARDS.test(prompt);
  find("expand_wildcards").checked = expand;
  find("another-choice").hidden = find("wildcards-example").hidden = !expand;
}

/** Shows what the wildcards became in a forecast. */
export function showExample({ params }) {
  setText(find("wildcards-example"), params.prompts?.join(" · ") ?? params.prompt ?? "");
}

/** The latest prompts, each once. */
export const remembered = () => read("prompts") ?? [];
export const forget = (text) => write("prompts", remembered().filter((one) => one !== text));

export function remember(prompt) {
  const text = prompt.trim();
  if (text) write("prompts", [text, ...remembered().filter((one) => one !== text)].slice(0, MOST_REMEMBERED));
}
