// The pictures of the form: which of its image fields the chosen model takes, and their strengths.

import { el, find, setText } from "./dom.js";
import { range } from "./form_parts.js";
import { t } from "./language.js";
import { withModule } from "./panel.js";
import { blobOf } from "./request.js";
import { SLOTS, Slot } from "./slots.js";
import { keepPicture } from "./store.js";

export class Pictures {
  #slots = {};
  #model = null;
  #latest = []; // names of the fields, the one that changed last first

  /** stored: {name: inputs}; onChange() is called when a picture is added or removed. */
  constructor(stored, onChange) {
    for (const slot of SLOTS) {
      this.#slots[slot.name] = new Slot(slot, () => {
        this.#latest = [slot.name, ...this.#latest.filter((name) => name !== slot.name)];
        onChange();
      });
      this.#slots[slot.name].set(stored[slot.name] ?? []);
      find("slots").append(this.#slots[slot.name].node);
    }
    this.#slots.init_image.extra.append(
      range("image_strength", t("form.image_strength"), { min: 0.05, max: 0.95, step: 0.05 }),
    );
    this.#slots.mask.extra.append(
      el("button", { type: "button", class: "quiet", id: "paint-mask", on: { click: () => this.#paint() } }, t("mask.paint")),
      range("mask_feather", t("mask.feather"), { min: 0, max: 64, step: 2 }),
    );
    this.#slots.control_image.extra.append(
      range("control_strength", t("form.control_strength"), { min: 0, max: 2, step: 0.05 }),
      el(
        "label",
        { class: "strength" },
        `${t("form.control_type")} `,
        el("select", { name: "control_type", id: "control_type" }),
      ),
    );
  }

  /** The picture that a mask belongs to, or undefined. */
  #masked() {
    return this.#model?.mask_of.flatMap((name) => this.#slots[name].inputs)[0];
  }

  async #paint() {
    const mask = this.#slots.mask;
    mask.fail("");
    const files = [this.#masked(), mask.inputs[0]].map((input) => input && blobOf(input));
    const blobs = await Promise.all(files).catch((error) => mask.fail(error.message));
    const painted =
      blobs && (await withModule(() => import("./mask_brush.js"), ({ paintMask }) => paintMask(...blobs)));
    if (!painted) return;
    const { blob, width, height } = painted;
    mask.add({ key: await keepPicture(blob), width, height });
  }

  /** The pictures of all fields, also those that the model does not take: {name: inputs}. */
  all() {
    return Object.fromEntries(SLOTS.map(({ name }) => [name, this.#slots[name].inputs]));
  }

  set(inputs) {
    for (const { name } of SLOTS) this.#slots[name].set(inputs?.[name] ?? []);
  }

  /** Keys of the stored images. */
  keys() {
    return Object.values(this.all()).flat().map((input) => input.key);
  }

  slot(name) {
    return this.#slots[name];
  }

  /** The field for a picture from outside, or undefined. */
  main(model) {
    const needed = SLOTS.find(({ name }) => name !== "mask" && model?.needs.includes(name));
    const taken = SLOTS.find(({ name }) => name !== "mask" && model?.takes.includes(name));
    return this.#slots[(needed ?? taken)?.name];
  }

  /** Whether a field is shown: a mask that the model does not need, only with a picture to repaint. */
  #offers(name, model) {
    const taken = model?.takes.includes(name) ?? false;
    if (!taken || name !== "mask" || model.needs.includes(name)) return taken;
    return model.mask_of.some((of) => this.#slots[of].inputs.length);
  }

  /**
   * The pictures of a request: {name: inputs}. Where the model cannot use all of them together, it gets
   * what it needs, and then what was added last.
   */
  chosen(model) {
    const given = SLOTS.map(({ name }) => name).filter(
      (name) => this.#offers(name, model) && this.#slots[name].inputs.length,
    );
    const rank = (name) => (model.needs.includes(name) ? -1 : (this.#latest.indexOf(name) + 1 || SLOTS.length));
    let taken = [];
    for (const name of given.sort((one, other) => rank(one) - rank(other))) {
      const more = [...taken, name];
      if (model.pictures_together.some((set) => more.every((one) => set.includes(one)))) taken = more;
    }
    return Object.fromEntries(taken.map((name) => [name, this.#slots[name].inputs]));
  }

  /** The first field that the model needs and that is empty. */
  missing(model, inputs) {
    return SLOTS.find(({ name }) => model.needs.includes(name) && !inputs[name])?.name;
  }

  /** Whether there is a picture whose size the result can have. */
  givesSize(model) {
    return ["init_image", "images"].some((name) => model?.takes.includes(name) && this.#slots[name].inputs.length);
  }

  show(model, state) {
    this.#model = model;
    const chosen = this.chosen(model);
    find("paint-mask").hidden = !this.#masked();
    strength("mask_feather").hidden = !chosen.mask || !model.takes.includes("mask_feather");
    find("mask_feather").value = state.mask_feather;
    setText(find("mask_feather-words"), `${state.mask_feather} px`);
    for (const { name } of SLOTS) {
      const slot = this.#slots[name];
      slot.node.hidden = !this.#offers(name, model);
      slot.need(model.needs.includes(name));
      slot.unused(slot.inputs.length > 0 && !chosen[name]);
    }
    const takes = (name) => model.takes.includes(name);
    strength("image_strength").hidden = !takes("image_strength") || !chosen.init_image;
    strength("control_strength").hidden = !takes("control_strength") || !chosen.control_image;
    find("image_strength").value = state.image_strength;
    setText(find("image_strength-words"), `${Math.round(state.image_strength * 100)} %`);
    const control = state.control_strength;
    find("control_strength").value = control ?? 0.7;
    setText(
      find("control_strength-words"),
      control === null ? t("form.default_word") : `${Math.round(control * 100)} %`,
    );
    showControlTypes(model, state, chosen);
  }
}

const strength = (name) => find(name).closest(".strength");

function showControlTypes(model, state, chosen) {
  const types = ["", ...model.control_types];
  const select = find("control_type");
  if ([...select.options].map((option) => option.value).join() !== types.join()) {
    select.replaceChildren(...types.map((type) => el("option", { value: type }, type || t("form.default_word"))));
  }
  strength("control_type").hidden = types.length === 1 || !chosen.control_image;
  select.value = types.includes(state.control_type) ? state.control_type : "";
}
