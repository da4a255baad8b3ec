// The form: its fields, which of them the chosen model takes, and the forecast on the button.

import { Refused } from "./api.js";
import { el, find, setText } from "./dom.js";
import { ButtonForecast } from "./form_forecast.js";
import { Loras } from "./form_loras.js";
import { fillModels, findModel, modelInputs, modelNote } from "./form_model.js";
import { buildStepper, grow, outOfRange, showError, tagsOf } from "./form_parts.js";
import { Pictures } from "./form_pictures.js";
import { promptFields, remember, showExample, showPromptOptions } from "./form_prompt.js";
import { buildSizes, shapeOf, showSize, sidesOf } from "./form_sizes.js";
import { CHECKS, EMPTY, NUMBERS, TEXTS, UPSCALES, upscaleOf } from "./form_state.js";
import { t } from "./language.js";
import { read, write } from "./store.js";
import { modelName, plain } from "./words.js";

const FORECAST_MS = 350;

/** Dispatches "submit" (detail: {fields, inputs}), and "changed" when its forecast has to be asked for. */
export class Form extends EventTarget {
  state = { ...EMPTY, ...read("form") };
  #form = find("form");
  #models = [];
  #default = null;
  #loras = new Loras();
  #limits = { side: 1024, steps: 100, n: 10, prompt: 10_000 };
  #pictures = new Pictures(read("form")?.inputs ?? {}, () => this.#pictureChanged());
  #forecastTimer = null;
  #edited = true; // since the latest forecast or refusal
  forecast = new ButtonForecast(() => this.#toForecast(), {
    answered: (answer) => {
      if (this.#edited) this.#clearErrors();
      this.#edited = false;
      showExample(answer);
    },
    failed: (error) => error instanceof Refused && showError(error.field, plain(error)),
  });

  constructor() {
    super();
    delete this.state.inputs;
    buildSizes();
    find("upscale").append(...UPSCALES.map((n) => el("option", { value: n }, t("form.upscale_times", { n }))));
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
    this.#loras.build(answer.loras, this.state.loras);
    fillModels(this.#models);
    if (!this.model) this.state.model = this.#default;
    this.show();
    this.forecastSoon();
  }

  /** Takes over which models are loaded and on disk. */
  refresh(answer) {
    this.#models = answer.models.filter((model) => model.allowed);
    this.show(document.activeElement);
  }

  /** Those that tasks may name. */
  get models() {
    return this.#models;
  }

  get model() {
    return this.#models.find((model) => model.name === this.state.model);
  }

  takes(name) {
    return this.model?.takes.includes(name) ?? false;
  }

  // The request

  request() {
    const { state } = this;
    const fields = { model: state.model };
    if (this.takes("prompt")) Object.assign(fields, promptFields(state));
    const inputs = this.#pictures.chosen(this.model);
    if (this.#sized && state.shape !== "input") [fields.width, fields.height] = this.sides();
    if (state.n > 1 && !Array.isArray(fields.prompt)) fields.n = state.n;
    if (this.takes("steps") && state.steps !== null) fields.steps = state.steps;
    if (this.takes("guidance") && state.guidance !== null) fields.guidance = state.guidance;
    if (this.#negative && state.negative_prompt.trim()) {
      fields.negative_prompt = state.negative_prompt.trim();
    }
    if (inputs.init_image && this.takes("image_strength")) fields.image_strength = state.image_strength;
    if (inputs.mask && this.takes("mask_feather")) fields.mask_feather = state.mask_feather;
    if (inputs.control_image) {
      if (this.takes("control_strength") && state.control_strength !== null) {
        fields.control_strength = state.control_strength;
      }
      if (this.model?.control_types.includes(state.control_type)) fields.control_type = state.control_type;
    }
    const upscale = this.takes("upscale") && upscaleOf(state, this.model);
    if (upscale) fields.upscale = Number(upscale);
    const loras = Object.entries(state.loras)
      .filter(([name]) => this.#loras.fits(name, this.model))
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
    return this.#pictures.keys();
  }

  get #sized() {
    return !this.model?.needs.includes("upscale");
  }

  get #negative() {
    const guidance = this.state.guidance ?? this.model?.default_guidance ?? null;
    return this.takes("negative_prompt") && (guidance === null || guidance > 1);
  }

  get #hasInput() {
    return this.#pictures.givesSize(this.model);
  }

  /** [width, height] */
  sides() {
    return sidesOf(this.state, this.model, this.#limits.side);
  }

  /** Changes fields as if they were typed. */
  change(fields) {
    if (fields.model && fields.model !== this.state.model) Object.assign(this.state, { steps: null, guidance: null });
    this.#restore({ ...this.state, ...fields, inputs: this.#pictures.all() });
  }

  /** Loads the settings of an earlier task. Returns a function that undoes it. */
  load({ fields, inputs }, params) {
    const before = structuredClone({ ...this.state, inputs: this.#pictures.all() });
    const model = this.#models.some((one) => one.name === fields.model) ? fields.model : this.state.model;
    const next = { ...EMPTY, ...fields, model, loras: {} };
    for (const lora of fields.loras ?? []) next.loras[lora.name] = lora.scale ?? 1;
    if (Array.isArray(fields.prompt)) Object.assign(next, { prompt: fields.prompt.join("\n"), lines: true });
    next.upscale = fields.upscale ? String(fields.upscale) : "";
    next.seed = String(params.seed);
    next.seed_mode = next.seed ? "locked" : "random";
    next.n = fields.n ?? 1;
    next.tags = fields.tags?.join(", ") ?? "";
    const drawnWith = this.#models.find((one) => one.name === model);
    Object.assign(next, shapeOf(fields.width, fields.height, drawnWith, this.#limits.side));
    this.#restore({ ...next, inputs: structuredClone(inputs ?? {}) });
    return () => this.#restore(before);
  }

  /**
   * Loads the settings of a picture file. What this server does not have is left as it is.
   * Returns {missing: names of what it does not have, undo}.
   */
  loadSettings({ model: wanted, loras, ...settings }) {
    const model = wanted && findModel(this.#models, wanted);
    const known = (loras ?? []).filter(({ name }) => this.#loras.fits(name, model ?? this.model, false));
    const missing = (loras ?? []).filter((lora) => !known.includes(lora)).map(({ name }) => name);
    if (wanted && !model) missing.unshift(wanted);
    const fields = { ...settings, model: model?.name ?? this.state.model, loras: known, format: this.state.format };
    const undo = this.load({ fields, inputs: this.#pictures.all() }, { seed: settings.seed ?? "" });
    return { missing, undo };
  }

  #restore({ inputs, ...state }) {
    this.state = { ...EMPTY, ...state };
    this.#pictures.set(inputs);
    this.#save();
    this.show();
    this.forecastSoon();
  }

  /** Adds a picture of the gallery. Returns false if the model takes no images. */
  addPicture(input) {
    const slot = this.mainSlot();
    if (!slot) return false;
    slot.add(input);
    return true;
  }

  mainSlot() {
    return this.#pictures.main(this.model);
  }

  focus() {
    find("prompt").focus({ preventScroll: true });
    this.#form.scrollIntoView({ block: "start", behavior: "instant" });
  }

  // Changes

  #changed(target) {
    const { name, value } = target;
    const { state } = this;
    if (name === "model") Object.assign(state, { model: value, steps: null, guidance: null });
    else if (["shape", "scale", "seed_mode"].includes(name)) {
      if (name === "shape" && value === "custom") [state.width, state.height] = this.sides();
      state[name] = value;
      if (name === "seed_mode" && value === "locked") {
        state.seed ||= String(crypto.getRandomValues(new Uint32Array(1))[0]);
      }
    } else if (name === "lora" || name === "lora_scale") state.loras = this.#loras.read();
    else if (CHECKS.includes(name)) state[name] = target.checked;
    else if (NUMBERS.includes(name)) {
      state[name] = value === "" || !Number.isFinite(Number(value)) ? null : Number(value);
      if (name === "n") state.n ??= 1;
    } else if (TEXTS.includes(name)) state[name] = name === "seed" ? value.replace(/\D/g, "") : value;
    showError(target.closest("[data-field]")?.dataset.field, "");
    showError(null, "");
    this.#save();
    this.show(target);
    this.forecastSoon();
  }

  #save() {
    write("form", { ...this.state, inputs: this.#pictures.all() });
  }

  /** Writes the state into the form. typing: the element that is not overwritten. */
  show(typing = null) {
    const { state, model } = this;
    if (state.shape === "input" && !this.#hasInput) state.shape = "1:1";
    const set = (id, value) => {
      const node = find(id);
      if (node !== typing && node.value !== String(value)) node.value = value;
    };
    for (const name of ["prompt", "negative_prompt", "seed", "format", "tags"]) set(name, state[name]);
    set("n", state.n);
    set("width", state.width ?? "");
    set("height", state.height ?? "");
    for (const name of ["shape", "scale", "seed_mode"]) {
      for (const radio of this.#form.elements[name] ?? []) radio.checked = radio.value === state[name];
    }
    find("seed").hidden = find("fixed-seed").hidden = state.seed_mode !== "locked";
    showPromptOptions(state);
    grow(find("prompt"));
    grow(find("negative_prompt"));
    showSize(state, { sized: this.#sized, sides: this.sides(), hasInput: this.#hasInput });
    if (!model) return;
    set("model", model.name);
    set("steps", state.steps ?? model.default_steps);
    find("steps").min = model.least_steps;
    set("guidance", state.guidance ?? model.default_guidance ?? "");
    setText(find("steps-note"), state.steps === null ? "" : t("form.default", { n: model.default_steps }));
    const usual = model.default_guidance;
    setText(find("guidance-note"), state.guidance === null || usual === undefined ? "" : t("form.default", { n: usual }));
    setText(find("model-note"), modelNote(model));
    for (const field of this.#form.querySelectorAll("[data-takes]")) {
      field.hidden = !this.takes(field.dataset.takes);
    }
    this.#loras.set(state.loras);
    if (!this.#loras.show(model)) find("loras").hidden = true;
    for (const pair of this.#form.querySelectorAll(":scope > .pair")) {
      pair.hidden = [...pair.children].every((child) => child.hidden);
    }
    find("negative_prompt").disabled = !this.#negative;
    setText(find("negative_prompt-note"), this.#negative ? "" : t("form.needs_guidance"));
    set("upscale", upscaleOf(state, model));
    this.#pictures.show(model, state);
    setText(find("model-inputs"), modelInputs(model));
  }

  // The forecast

  forecastSoon() {
    this.#edited = true;
    this.forecast.forget();
    clearTimeout(this.#forecastTimer);
    this.#forecastTimer = setTimeout(() => this.dispatchEvent(new Event("changed")), FORECAST_MS);
  }

  /** The forecast of the form as it is now: of POST /estimate, for the button. Null: there is none. */
  async askForecast() {
    return this.model ? this.forecast.ask() : null;
  }

  /** The request to forecast, or what is shown in place of its forecast. */
  #toForecast() {
    const request = this.request();
    const missing = this.#pictures.missing(this.model, request.inputs);
    if (missing) return t("form.needs_first", { what: t(`a.${missing}`) });
    const tooMany = this.#tooManyLines(request.fields.prompt);
    if (tooMany) return tooMany;
    if (this.#outOfRange()) return "";
    if (this.takes("prompt")) request.fields.prompt ??= "a";
    return request;
  }

  /** A sentence; empty if the prompt has no more lines than a task may have pictures. */
  #tooManyLines(prompt) {
    const tooMany = Array.isArray(prompt) && prompt.length > this.#limits.n;
    return tooMany ? t("form.too_many_lines", { n: this.#limits.n }) : "";
  }

  #clearErrors() {
    showError(null, "");
    const unwritten = this.takes("prompt") && !this.state.prompt.trim();
    for (const { dataset } of this.#form.querySelectorAll("[data-field]")) {
      if (!(unwritten && dataset.field === "prompt")) showError(dataset.field, "");
    }
  }

  /** The first number field that is out of range; shows the error beside it. */
  #outOfRange() {
    const wrong = outOfRange(this.#form);
    if (wrong) {
      const field = wrong.closest("[data-field]").dataset.field;
      showError(field, t("form.enter_number", { least: wrong.min, most: wrong.max }));
    }
    return wrong;
  }

  // Submitting

  #submit() {
    const request = this.checked();
    if (request) this.dispatchEvent(new CustomEvent("submit", { detail: request }));
  }

  /** The request, or null: then the first field at fault says why and has the focus. */
  checked() {
    if (!this.model) return null;
    const request = this.request();
    const { prompt } = request.fields;
    const missing = this.#pictures.missing(this.model, request.inputs);
    const wrong = (field, words, node = find(field)) => {
      showError(field, words);
      node.focus();
      return null;
    };
    if (missing) {
      const words = t("form.model_needs", { model: modelName(this.model), what: t(`a.${missing}`) });
      return wrong(missing, words, this.#pictures.slot(missing));
    }
    if (this.takes("prompt") && !prompt) return wrong("prompt", t("form.enter_prompt"));
    const tooMany = this.#tooManyLines(prompt);
    if (tooMany) return wrong("prompt", tooMany);
    const outside = this.#outOfRange();
    if (outside) outside.focus();
    else remember(this.state.prompt);
    return outside ? null : request;
  }

  /** Whether a request is being sent. */
  set sending(sending) {
    find("generate").setAttribute("aria-disabled", String(sending));
    find("generate").classList.toggle("sending", sending);
  }

  fail(error) {
    this.#edited = false; // a forecast of the same form does not remove what is shown here
    const field = showError(error.field, plain(error));
    if (field) find(field)?.focus();
  }

  #pictureChanged() {
    if (this.#hasInput && this.state.shape === "1:1") this.state.shape = "input";
    this.#save();
    this.show();
    this.forecastSoon();
  }
}
