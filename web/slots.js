// The image fields of the form. Images are dropped, pasted, chosen or taken from the gallery.

import { thumbnailUrl, imageUrl } from "./api.js";
import { el, icon, iconButton, setText } from "./dom.js";
import { t } from "./language.js";
import { inputOfFile } from "./request.js";
import { picture } from "./store.js";

export const SLOTS = [
  { name: "init_image" },
  { name: "images", most: 8 },
  { name: "mask" },
  { name: "control_image" },
];

/** One image field. Calls onChange() when its list of inputs changes. */
export class Slot {
  inputs = [];
  #picks = el("ul", { class: "picks" });
  #hint = el("span", { class: "hint" });
  #unused = el("p", { class: "hint" });
  #wrong;
  #choose;
  #zone;

  constructor({ name, most = 1 }, onChange) {
    this.name = name;
    this.most = most;
    this.onChange = onChange;
    this.#wrong = el("p", { class: "wrong", id: `${name}-error` });
    this.#choose = el("input", {
      type: "file",
      accept: "image/*",
      multiple: most > 1,
      id: name,
      class: "unseen",
      "aria-describedby": `${name}-error`,
      on: {
        change: (event) => {
          this.addFiles([...event.target.files]);
          event.target.value = "";
        },
      },
    });
    const words = el("span", { class: "zone-words" }, t(`slot.${name}`));
    this.#zone = el("label", { class: "zone" }, this.#choose, icon("picture"), words, this.#hint);
    this.extra = el("div", { class: "extra" });
    this.node = el(
      "div",
      { class: "field slot" },
      this.#zone,
      this.#picks,
      this.#unused,
      this.extra,
      this.#wrong,
    );
    this.node.dataset.field = name;
    for (const kind of ["dragover", "dragleave", "drop"]) {
      this.node.addEventListener(kind, (event) => this.#dragged(event));
    }
  }

  #dragged(event) {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    this.node.classList.toggle("over", event.type === "dragover");
    if (event.type !== "drop") return;
    event.stopPropagation();
    document.dispatchEvent(new Event("dropped"));
    this.addFiles([...event.dataTransfer.files]);
  }

  async addFiles(files) {
    this.fail("");
    for (const file of files.slice(0, this.most)) {
      try {
        this.add(await inputOfFile(file));
      } catch (error) {
        this.fail(error.message);
      }
    }
  }

  /** Adds an input; the oldest one is dropped if there are too many. */
  add(input) {
    this.set([...this.inputs, input].slice(-this.most));
    this.onChange();
  }

  set(inputs) {
    this.inputs = inputs;
    this.#picks.replaceChildren(...inputs.map((input, index) => this.#pick(input, index)));
    this.node.classList.toggle("filled", inputs.length > 0);
    this.fail("");
  }

  /** needed: whether the model requires this field. */
  need(needed) {
    setText(this.#hint, t(needed ? "slot.required" : "slot.how"));
    this.#hint.classList.toggle("needed", needed);
  }

  /** unused: whether the model cannot use these pictures together with others. */
  unused(unused) {
    this.node.classList.toggle("unused", unused);
    setText(this.#unused, unused ? t("slot.unused") : "");
  }

  fail(words) {
    setText(this.#wrong, words);
    this.#choose.toggleAttribute("aria-invalid", Boolean(words));
  }

  focus() {
    this.#choose.focus();
  }

  #pick(input, index) {
    const image = el("img", { alt: `${t(`slot.${this.name}`)}, ${index + 1}`, width: 64, height: 64 });
    if (input.task_id) {
      image.onerror = () => {
        image.onerror = null;
        image.src = imageUrl(input.task_id, input.index);
      };
      image.src = thumbnailUrl(input.task_id, input.index, 256);
    } else {
      picture(input.key).then((blob) => {
        if (!blob) return this.fail(t("slot.lost"));
        image.src = URL.createObjectURL(blob);
        image.onload = () => URL.revokeObjectURL(image.src);
      });
    }
    const remove = iconButton("close", t("slot.remove"), () => {
      this.set(this.inputs.filter((_, other) => other !== index));
      this.focus();
      this.onChange();
    });
    return el("li", {}, image, remove);
  }
}
