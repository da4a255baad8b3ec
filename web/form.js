// The form: its fields, which of them the chosen model takes, and the forecast on the button.

import { Refused } from "./api.js";
import { el, find, icon, iconButton, setText } from "./dom.js";
import { estimate } from "./request.js";
import { SLOTS, Slot } from "./slots.js";
import { read, write } from "./store.js";
import { duration, listed, modelName, plain, size, some } from "./words.js";

const PAUSE_MS = 350;
const SHAPES = [
  ["1:1", 1, 1],
  ["4:3", 4, 3],
  ["3:4", 3, 4],
  ["16:9", 16, 9],
  ["9:16", 9, 16],
];
const SCALES = [
  ["Small", 0.5],
  ["Medium", 0.75],
  ["Large", 1],
];
/** Until the models are known. */
const USUAL_SIDES = { side_step: 16, least_side: 16, most_side: 8192 };
const EMPTY = {
  prompt: "",
  model: null,
  shape: "1:1",
  scale: "Large",
  width: null,
  height: null,
  n: 1,
  steps: null,
  guidance: null,
  upscale: "",
  negative_prompt: "",
  seed_mode: "random",
  seed: "",
  format: "JPEG",
  image_strength: 0.4,
  control_strength: null,
  control_type: "",
  loras: {},
  tags: "",
};
const NUMBERS = ["n", "steps", "guidance", "width", "height", "image_strength", "control_strength"];
const TEXTS = ["prompt", "negative_prompt", "seed", "upscale", "format", "control_type", "tags"];

/** Dispatches "submit" (detail: {fields, inputs}). */
export class Form extends EventTarget {
  state = { ...EMPTY, ...read("form") };
  #form = find("form");
  #models = [];
  #modelsOf = {}; // of each LoRA
  #limits = { side: 1024, steps: 100, n: 10, prompt: 10_000 };
  #slots = {};
  #timer = null;
  #request = null;

  constructor() {
    super();
    this.#buildSlots();
    this.#buildSizes();
    for (const stepper of this.#form.querySelectorAll(".stepper")) buildStepper(stepper);
    this.#form.addEventListener("input", (event) => this.#changed(event.target));
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    this.#form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        this.#form.requestSubmit();
      }
    });
    find("random-seed").addEventListener("click", () => {
      this.state.seed_mode = "random";
      this.#save();
      this.show();
      find("generate").focus();
    });
    this.show();
  }

  /** answer: from GET /models; specification: the OpenAPI document with the operator's limits, or null. */
  setModels(answer, specification) {
    this.#models = answer.models.filter((model) => model.allowed);
    const fields = specification?.components?.schemas?.GenerateRequest?.properties;
    const maximum = (name) => fields?.[name]?.maximum ?? this.#limits[name];
    this.#limits = {
      side: fields?.width?.default ?? this.#limits.side,
      steps: maximum("steps"),
      n: maximum("n"),
      prompt: fields?.prompt?.maxLength ?? this.#limits.prompt,
    };
    find("steps").max = this.#limits.steps;
    find("n").max = this.#limits.n;
    find("prompt").maxLength = find("negative_prompt").maxLength = this.#limits.prompt;
    this.#default = answer.default;
    this.#buildLoras(answer.loras);
    const names = this.#models.map(modelName);
    find("model").replaceChildren(
      ...this.#models.map((model, index) => {
        const twice = names.indexOf(names[index]) !== names.lastIndexOf(names[index]);
        return el("option", { value: model.name }, twice ? `${names[index]} (${model.name})` : names[index]);
      }),
    );
    if (!this.model) this.state.model = this.#default;
    this.show();
    this.forecastSoon();
  }

  /** Takes over which models are loaded and on disk. */
  refresh(answer) {
    this.#models = answer.models.filter((model) => model.allowed);
    this.show(document.activeElement);
  }

  #default = null;

  get model() {
    return this.#models.find((model) => model.name === this.state.model);
  }

  takes(name) {
    return this.model?.takes.includes(name) ?? false;
  }

  /** Whether a slot is shown: a mask that the model does not need, only with a picture to repaint. */
  #offers(name) {
    if (!this.takes(name) || name !== "mask" || this.model.needs.includes(name)) return this.takes(name);
    return this.model.mask_of.some((of) => this.#slots[of].inputs.length);
  }

  /** Whether a LoRA fits the chosen model, as far as its header says. */
  #fits(lora) {
    return this.#modelsOf[lora]?.includes(this.model?.name) ?? true;
  }

  // The request

  request() {
    const { state } = this;
    const fields = { model: state.model };
    if (this.takes("prompt") && state.prompt.trim()) fields.prompt = state.prompt.trim();
    const inputs = {};
    for (const { name } of SLOTS) {
      if (this.#offers(name) && this.#slots[name].inputs.length) inputs[name] = this.#slots[name].inputs;
    }
    if (this.#sized && state.shape !== "input") [fields.width, fields.height] = this.#sides();
    if (state.n > 1) fields.n = state.n;
    if (this.takes("steps") && state.steps !== null) fields.steps = state.steps;
    if (this.takes("guidance") && state.guidance !== null) fields.guidance = state.guidance;
    if (this.#negative && state.negative_prompt.trim()) {
      fields.negative_prompt = state.negative_prompt.trim();
    }
    if (inputs.init_image && this.takes("image_strength")) fields.image_strength = state.image_strength;
    if (inputs.control_image) {
      if (this.takes("control_strength") && state.control_strength !== null) {
        fields.control_strength = state.control_strength;
      }
      if (this.model?.control_types.includes(state.control_type)) fields.control_type = state.control_type;
    }
    if (this.takes("upscale") && state.upscale) fields.upscale = Number(state.upscale);
    const loras = Object.entries(state.loras)
      .filter(([name]) => this.#fits(name))
      .map(([name, scale]) => ({ name, scale }));
    if (this.takes("loras") && loras.length) fields.loras = loras;
    if (state.seed_mode === "locked" && state.seed) fields.seed = state.seed;
    fields.format = state.format;
    const tags = tagsOf(state.tags);
    if (tags.length) fields.tags = tags;
    return { fields, inputs };
  }

  /** Keys of the stored images in the form. */
  pictureKeys() {
    return Object.values(this.#slots).flatMap((slot) => slot.inputs.map((input) => input.key));
  }

  get #sized() {
    return !this.model?.needs.includes("upscale");
  }

  get #negative() {
    const guidance = this.state.guidance ?? this.model?.default_guidance ?? null;
    return this.takes("negative_prompt") && (guidance === null || guidance > 1);
  }

  get #hasInput() {
    return ["init_image", "images"].some((name) => this.takes(name) && this.#slots[name].inputs.length);
  }

  #sides() {
    const { shape, scale, width, height } = this.state;
    const side = this.#limits.side;
    if (shape === "custom") return [width ?? side, height ?? side];
    const [, across, down] = SHAPES.find(([name]) => name === shape) ?? SHAPES[0];
    const [, share] = SCALES.find(([name]) => name === scale) ?? SCALES[2];
    const pixels = (side * share) ** 2;
    return [Math.sqrt((pixels * across) / down), Math.sqrt((pixels * down) / across)].map((exact) =>
      this.#side(exact),
    );
  }

  /** Pixels of a side that the model draws, from an exact length. */
  #side(exact) {
    const { side_step: step, least_side: least, most_side: most } = this.model ?? USUAL_SIDES;
    return Math.min(Math.max(Math.floor(exact / step) * step, least), most);
  }

  /** Loads the settings of an earlier task. Returns a function that undoes it. */
  load({ fields, inputs }, params) {
    const before = structuredClone({ ...this.state, inputs: this.#inputs() });
    const model = this.#models.some((one) => one.name === fields.model) ? fields.model : this.state.model;
    const next = { ...EMPTY, ...fields, model, loras: {} };
    for (const lora of fields.loras ?? []) next.loras[lora.name] = lora.scale ?? 1;
    next.upscale = fields.upscale ? String(fields.upscale) : "";
    next.seed = String(params.seed);
    next.seed_mode = "locked";
    next.n = fields.n ?? 1;
    next.tags = fields.tags?.join(", ") ?? "";
    const { shape, scale } = this.#shapeOf(fields.width, fields.height);
    Object.assign(next, { shape, scale });
    this.#restore({ ...next, inputs: structuredClone(inputs ?? {}) });
    return () => this.#restore(before);
  }

  #restore({ inputs, ...state }) {
    this.state = { ...EMPTY, ...state };
    for (const { name } of SLOTS) this.#slots[name].set(inputs?.[name] ?? []);
    this.#save();
    this.show();
    this.forecastSoon();
  }

  #shapeOf(width, height) {
    if (!width) return { shape: "input", scale: "Large" };
    const before = [this.state.shape, this.state.scale];
    for (const [shape] of SHAPES) {
      for (const [scale] of SCALES) {
        Object.assign(this.state, { shape, scale });
        const [across, down] = this.#sides();
        if (across === width && down === height) return { shape, scale };
      }
    }
    [this.state.shape, this.state.scale] = before;
    return { shape: "custom", scale: "Large" };
  }

  /** Adds a picture of the gallery. Returns false if the model takes no images. */
  addPicture(input) {
    const slot = this.mainSlot();
    if (!slot) return false;
    slot.add(input);
    return true;
  }

  mainSlot() {
    const needed = SLOTS.find(({ name }) => name !== "mask" && this.model?.needs.includes(name));
    const taken = SLOTS.find(({ name }) => name !== "mask" && this.takes(name));
    return this.#slots[(needed ?? taken)?.name] ?? null;
  }

  focus() {
    find("prompt").focus({ preventScroll: true });
    this.#form.scrollIntoView({ block: "start", behavior: "instant" });
  }

  // Changes

  #inputs() {
    return Object.fromEntries(Object.entries(this.#slots).map(([name, slot]) => [name, slot.inputs]));
  }

  #changed(target) {
    const { name, value } = target;
    const { state } = this;
    if (name === "model") Object.assign(state, { model: value, steps: null, guidance: null });
    else if (["shape", "scale", "seed_mode"].includes(name)) {
      if (name === "shape" && value === "custom") [state.width, state.height] = this.#sides();
      state[name] = value;
      if (name === "seed_mode" && value === "locked") {
        state.seed ||= String(crypto.getRandomValues(new Uint32Array(1))[0]);
      }
    } else if (name === "lora" || name === "lora_scale") this.#readLoras();
    else if (NUMBERS.includes(name)) {
      state[name] = value === "" || !Number.isFinite(Number(value)) ? null : Number(value);
      if (name === "n") state.n ??= 1;
    } else if (TEXTS.includes(name)) state[name] = name === "seed" ? value.replace(/\D/g, "") : value;
    this.#fail(target.closest("[data-field]")?.dataset.field, "");
    this.#fail(null, "");
    this.#save();
    this.show(target);
    this.forecastSoon();
  }

  #save() {
    write("form", { ...this.state, inputs: this.#inputs() });
  }

  /** Writes the state into the form. typing: the element that is not overwritten. */
  show(typing = null) {
    const { state, model } = this;
    if (state.shape === "input" && !this.#hasInput) state.shape = "1:1";
    const set = (id, value) => {
      const node = find(id);
      if (node !== typing && node.value !== String(value)) node.value = value;
    };
    for (const name of ["prompt", "negative_prompt", "seed", "upscale", "format", "tags"]) set(name, state[name]);
    set("n", state.n);
    set("width", state.width ?? "");
    set("height", state.height ?? "");
    for (const name of ["shape", "scale", "seed_mode"]) {
      for (const radio of this.#form.elements[name] ?? []) radio.checked = radio.value === state[name];
    }
    find("seed").hidden = find("fixed-seed").hidden = state.seed_mode !== "locked";
    grow(find("prompt"));
    grow(find("negative_prompt"));
    this.#showSize();
    if (!model) return;
    set("model", model.name);
    set("steps", state.steps ?? model.default_steps);
    find("steps").min = model.least_steps;
    set("guidance", state.guidance ?? model.default_guidance ?? "");
    setText(find("steps-note"), state.steps === null ? "" : `default ${model.default_steps}`);
    const usual = model.default_guidance;
    setText(find("guidance-note"), state.guidance === null || usual === undefined ? "" : `default ${usual}`);
    setText(find("model-note"), this.#modelNote(model));
    for (const field of this.#form.querySelectorAll("[data-takes]")) {
      field.hidden = !this.takes(field.dataset.takes);
    }
    for (const row of find("lora-list").children) {
      row.hidden = !this.#fits(row.querySelector("input").value);
    }
    find("loras").hidden ||= !find("lora-list").querySelector("li:not([hidden])");
    for (const pair of this.#form.querySelectorAll(":scope > .pair")) {
      pair.hidden = [...pair.children].every((child) => child.hidden);
    }
    find("negative_prompt").disabled = !this.#negative;
    setText(find("negative_prompt-note"), this.#negative ? "" : "Needs guidance above 1.");
    if (model.needs.includes("upscale") && !state.upscale) set("upscale", (state.upscale = "2"));
    this.#showSlots(model);
    setText(find("model-inputs"), this.#modelInputs());
  }

  #showSize() {
    const { state } = this;
    find("size").hidden = !this.#sized;
    find("custom").hidden = state.shape !== "custom";
    find("scales").hidden = ["custom", "input"].includes(state.shape);
    find("shape-input").hidden = !this.#hasInput;
    setText(find("size-words"), state.shape === "input" ? "as the input image" : size(...this.#sides()));
  }

  #showSlots(model) {
    for (const { name } of SLOTS) {
      this.#slots[name].node.hidden = !this.#offers(name);
      this.#slots[name].need(model.needs.includes(name));
    }
    const { init_image: start, control_image: control } = this.#slots;
    find("image_strength").closest(".strength").hidden =
      !this.takes("image_strength") || !start.inputs.length;
    const controlled = control.inputs.length > 0;
    find("control_strength").closest(".strength").hidden = !this.takes("control_strength") || !controlled;
    const types = ["", ...model.control_types];
    const select = find("control_type");
    if ([...select.options].map((option) => option.value).join() !== types.join()) {
      select.replaceChildren(...types.map((type) => el("option", { value: type }, type || "default")));
    }
    select.closest(".strength").hidden = types.length === 1 || !controlled;
    find("image_strength").value = this.state.image_strength;
    setText(find("image_strength-words"), `${Math.round(this.state.image_strength * 100)} %`);
    const strength = this.state.control_strength;
    find("control_strength").value = strength ?? 0.7;
    setText(find("control_strength-words"), strength === null ? "default" : `${Math.round(strength * 100)} %`);
    select.value = types.includes(this.state.control_type) ? this.state.control_type : "";
  }

  #modelNote(model) {
    const parts = [];
    const what = model.title.split(":")[1]?.trim();
    if (what) parts.push(`${what[0].toUpperCase()}${what.slice(1)}.`);
    if (!model.present) {
      const much = model.weights_gb ? `, ${Math.round(model.weights_gb)} GB` : "";
      parts.push(`Weights not downloaded yet${much}. The first picture waits for the download.`);
    } else if (!model.loaded) parts.push("Not loaded: loading it comes first.");
    return parts.join(" ");
  }

  /** The required and the optional inputs of the model, as a sentence. */
  #modelInputs() {
    const named = [...this.#form.querySelectorAll("[data-name]")].map(({ dataset }) => [
      dataset.takes,
      dataset.name,
    ]);
    const taken = [...named, ...SLOTS.map(({ name, short }) => [name, short])].filter(
      ([name]) => this.takes(name),
    );
    const needs = ([name]) => name === "prompt" || this.model.needs.includes(name);
    const words = (pairs, last) => listed(pairs.map(([, name]) => name), last);
    const more = taken.filter((pair) => !needs(pair));
    const needed = words(taken.filter(needs), "and");
    return `Needs ${needed}.${more.length ? ` Optional: ${words(more, "and")}.` : ""}`;
  }

  // The forecast

  forecastSoon() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.forecast(), PAUSE_MS);
  }

  async forecast() {
    if (!this.model) return;
    this.#request?.abort();
    const aborter = (this.#request = new AbortController());
    const request = this.request();
    const missing = this.#missingPicture(request);
    if (missing) return this.#showForecast(`needs ${missing.short}`);
    if (this.#outOfRange()) return this.#showForecast("");
    const withoutPrompt = this.takes("prompt") && !request.fields.prompt;
    if (withoutPrompt) request.fields.prompt = "a";
    try {
      const answer = await estimate(request, aborter.signal);
      if (aborter.signal.aborted) return;
      for (const { dataset } of this.#form.querySelectorAll("[data-field]"))
        if (!(withoutPrompt && dataset.field === "prompt")) this.#fail(dataset.field, "");
      const sure = answer.confidence === "none" ? "roughly " : "about ";
      const others = answer.task_length ? ` · ${some(answer.task_length, "task", "tasks")} in the queue` : "";
      this.#showForecast(
        `ready in ${sure}${duration(answer.expected_time_seconds)}${others}`,
        `With 90 % probability within ${duration(answer.wait_p90_s)}.`,
      );
    } catch (error) {
      if (aborter.signal.aborted) return;
      this.#showForecast("");
      if (error instanceof Refused) this.#fail(error.field, plain(error));
    }
  }

  #missingPicture({ inputs }) {
    return SLOTS.find(({ name }) => this.model.needs.includes(name) && !inputs[name]);
  }

  /** The first number field that is out of range; shows the error beside it. */
  #outOfRange() {
    const numbers = [...this.#form.querySelectorAll("input[type=number]")];
    const wrong = numbers.find((node) => {
      const { badInput, rangeUnderflow, rangeOverflow } = node.validity;
      return node.checkVisibility() && (badInput || rangeUnderflow || rangeOverflow);
    });
    if (wrong) {
      const field = wrong.closest("[data-field]").dataset.field;
      this.#fail(field, `Enter a number from ${wrong.min} to ${wrong.max}.`);
    }
    return wrong;
  }

  #showForecast(words, title = "") {
    setText(find("forecast"), words);
    find("generate").title = title;
  }

  // Submitting

  #submit() {
    if (!this.model) return;
    const request = this.request();
    const missing = this.#missingPicture(request);
    if (missing) {
      this.#fail(missing.name, `${modelName(this.model)} needs ${missing.short}.`);
      this.#slots[missing.name].focus();
    } else if (this.takes("prompt") && !request.fields.prompt) {
      this.#fail("prompt", "Enter a prompt.");
      find("prompt").focus();
    } else if (this.#outOfRange()) {
      this.#outOfRange().focus();
    } else {
      this.dispatchEvent(new CustomEvent("submit", { detail: request }));
    }
  }

  /** Whether a request is being sent. */
  set sending(sending) {
    find("generate").setAttribute("aria-disabled", String(sending));
    find("generate").classList.toggle("sending", sending);
  }

  fail(error) {
    const field = this.#fail(error.field, plain(error));
    if (field) find(field)?.focus();
  }

  /** Shows an error beside its field, or above the button. Returns the name of the field. */
  #fail(field, words) {
    const home = { height: "width", control_strength: "control_image", control_type: "control_image" };
    const name = { image_strength: "init_image", count: "n", ...home }[field] ?? field;
    const place = name && find(`${name}-error`);
    if (place?.closest("[data-field]")?.hidden === false) {
      setText(place, words);
      find(name)?.toggleAttribute("aria-invalid", Boolean(words));
      return name;
    }
    setText(find("form-error"), words);
    return null;
  }

  // Building

  #buildSlots() {
    const stored = read("form")?.inputs ?? {};
    for (const slot of SLOTS) {
      this.#slots[slot.name] = new Slot(slot, () => this.#pictureChanged());
      this.#slots[slot.name].set(stored[slot.name] ?? []);
      find("slots").append(this.#slots[slot.name].node);
    }
    delete this.state.inputs;
    const range = (name, label, props) =>
      el(
        "label",
        { class: "strength" },
        el("span", {}, label, " ", el("output", { id: `${name}-words` })),
        el("input", { type: "range", name, id: name, ...props }),
      );
    this.#slots.init_image.extra.append(
      range("image_strength", "Image strength (higher: closer to the image)", { min: 0.05, max: 0.95, step: 0.05 }),
    );
    this.#slots.control_image.extra.append(
      range("control_strength", "Control strength", { min: 0, max: 2, step: 0.05 }),
      el(
        "label",
        { class: "strength" },
        "Control type ",
        el("select", { name: "control_type", id: "control_type" }),
      ),
    );
  }

  #pictureChanged() {
    if (this.#hasInput && this.state.shape === "1:1") this.state.shape = "input";
    this.#save();
    this.show();
    this.forecastSoon();
  }

  #buildSizes() {
    const radio = (name, value, ...words) =>
      el("label", {}, el("input", { type: "radio", name, value }), el("span", {}, ...words));
    const shape = (words, value, across, down) => {
      const frame = el("i", { class: "shape" });
      frame.style.setProperty("--across", across / Math.max(across, down));
      frame.style.setProperty("--down", down / Math.max(across, down));
      return radio("shape", value, frame, words);
    };
    const input = shape("As input", "input", 4, 4);
    input.id = "shape-input";
    input.querySelector("i").replaceWith(icon("picture"));
    const custom = shape("Other", "custom", 4, 4);
    custom.querySelector("i").classList.add("dashed");
    find("shapes").append(input, ...SHAPES.map(([name, a, d]) => shape(name, name, a, d)), custom);
    find("scales").append(...SCALES.map(([name]) => radio("scale", name, name)));
  }

  #buildLoras(loras) {
    this.#modelsOf = Object.fromEntries(
      loras.map(({ name, models }) => [name, models.map((model) => model.name)]),
    );
    find("lora-list").replaceChildren(
      ...loras.map(({ name }) => {
        const scale = this.state.loras[name];
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
            "aria-label": `Scale of ${name}`,
          }),
        );
      }),
    );
  }

  #readLoras() {
    this.state.loras = {};
    for (const row of find("lora-list").children) {
      const [chosen, scale] = row.querySelectorAll("input");
      if (chosen.checked) this.state.loras[chosen.value] = Number(scale.value) || 0;
    }
  }
}

/** "a, b,, c" -> ["a", "b", "c"] */
function tagsOf(text) {
  return text.split(",").map((tag) => tag.trim()).filter(Boolean);
}

function buildStepper(stepper) {
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
  stepper.prepend(step(`Fewer: ${what}`, "minus", -1));
  stepper.append(step(`More: ${what}`, "plus", 1));
}

/** Fits the height to the text, for browsers without CSS field-sizing. */
function grow(area) {
  if (CSS.supports("field-sizing", "content")) return;
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}
