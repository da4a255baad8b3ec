// Small parts of the form that know nothing of its state.

import { el, find, iconButton, setText } from "./dom.js";
import { t } from "./language.js";

/** "a, b,, c" -> ["a", "b", "c"] */
export const tagsOf = (text) => text.split(",").map((tag) => tag.trim()).filter(Boolean);

/** The lines of a text that are not empty. */
export const linesOf = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

/** Adds buttons for less and more to a number field. */
export function buildStepper(stepper) {
  const input = stepper.querySelector("input");
  const step = (words, name, by) =>
    iconButton(name, words, () => {
      const size = Number(input.step);
      const [least, most] = [Number(input.min), Number(input.max)];
      const next = Math.min(Math.max((Number(input.value) || 0) + by * size, least), most);
      input.value = next;
      input.dispatchEvent(new Event("input", { bubbles: true }));
    });
  const what = stepper.closest(".field").querySelector("label").firstChild.textContent.trim();
  stepper.prepend(step(t("form.fewer", { what }), "minus", -1));
  stepper.append(step(t("form.more", { what }), "plus", 1));
}

/** Fits the height to the text, for browsers without CSS field-sizing. */
export function grow(area) {
  if (CSS.supports("field-sizing", "content")) return;
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}

/** A slider with its value beside its label. */
export const range = (name, label, props) =>
  el(
    "label",
    { class: "strength" },
    el("span", {}, label, " ", el("output", { id: `${name}-words` })),
    el("input", { type: "range", name, id: name, ...props }),
  );

/** The first visible number field under `form` that is out of its range. */
export const outOfRange = (form) =>
  [...form.querySelectorAll("input[type=number]")].find((node) => {
    const { badInput, rangeUnderflow, rangeOverflow } = node.validity;
    return node.checkVisibility() && (badInput || rangeUnderflow || rangeOverflow);
  });

const HOMES = {
  count: "n",
  height: "width",
  image_strength: "init_image",
  control_strength: "control_image",
  control_type: "control_image",
  mask_feather: "mask",
};

/** Shows an error beside its field, or above the button. Returns the name of the field. */
export function showError(field, words) {
  const name = HOMES[field] ?? field;
  const place = name && find(`${name}-error`);
  if (place?.closest("[data-field]")?.hidden === false) {
    setText(place, words);
    find(name)?.toggleAttribute("aria-invalid", Boolean(words));
    return name;
  }
  setText(find("form-error"), words);
  return null;
}
