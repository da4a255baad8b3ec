// The LoRAs of the form: those that fit the chosen model, with their scales.

import { el, find } from "./dom.js";
import { t } from "./language.js";

/** With more of them, the list has a search field. */
const SEARCHED = 6;

export class Loras {
  #list = find("lora-list");
  #search = find("lora-search");
  #modelsOf = new Map();

  constructor() {
    this.#search.addEventListener("input", (event) => {
      event.stopPropagation(); // it is no field of the request
      this.show(this.model);
    });
  }

  /** loras: of GET /models; chosen: {name: scale}. */
  build(loras, chosen) {
    this.#modelsOf = new Map(loras.map(({ name, models }) => [name, models.map((model) => model.name)]));
    this.#list.replaceChildren(...loras.map(({ name }) => row(name, Object.hasOwn(chosen, name) ? chosen[name] : undefined)));
  }

  /** Whether a LoRA fits a model, as far as its header says; unknown: of those that the server does not have. */
  fits(name, model, unknown = true) {
    return this.#modelsOf.get(name)?.includes(model?.name) ?? unknown;
  }

  /** Shows those that fit and are found. Returns whether any fits. */
  show(model) {
    this.model = model;
    const rows = [...this.#list.children].filter((node) => {
      node.hidden = !this.fits(nameOf(node), model);
      return !node.hidden;
    });
    this.#search.hidden = rows.length <= SEARCHED;
    const words = this.#search.hidden ? [] : this.#search.value.toLowerCase().split(/\s+/);
    for (const node of rows) {
      const found = words.every((word) => nameOf(node).toLowerCase().includes(word));
      node.hidden = !found && !node.querySelector("input").checked;
    }
    return rows.length > 0;
  }

  /** Writes the chosen ones into the list. */
  set(chosen) {
    for (const node of this.#list.children) {
      const [check, scale] = node.querySelectorAll("input");
      check.checked = Object.hasOwn(chosen, nameOf(node));
      if (check.checked && document.activeElement !== scale) scale.value = chosen[nameOf(node)];
    }
  }

  /** {name: scale} of the chosen ones. */
  read() {
    const chosen = {};
    for (const node of this.#list.children) {
      const [check, scale] = node.querySelectorAll("input");
      if (check.checked) chosen[nameOf(node)] = Number(scale.value) || 0;
    }
    return chosen;
  }
}

const nameOf = (node) => node.querySelector("input").value;

function row(name, scale) {
  return el(
    "li",
    {},
    el(
      "label",
      {},
      el("input", { type: "checkbox", name: "lora", value: name, checked: scale !== undefined }),
      el("span", {}, name),
    ),
    el("input", {
      type: "number",
      name: "lora_scale",
      min: -10,
      max: 10,
      step: 0.1,
      value: scale ?? 1,
      "aria-label": t("form.lora_scale", { name }),
    }),
  );
}
