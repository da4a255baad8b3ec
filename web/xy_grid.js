// A grid of pictures: the same request with two fields that change, one across and one down.

import { el, setText } from "./dom.js";
import { t } from "./language.js";
import { openPanel, sheet } from "./panel.js";
import { randomKey } from "./store.js";

const MOST_CELLS = 100;
const MOST_SEED = 2 ** 32;
const NUMBERS = ["steps", "guidance", "image_strength", "control_strength"];

/** Fields that can change. request: of the form; model: the chosen one. */
function fieldsFor(model, request) {
  const names = NUMBERS.filter((name) => model.takes.includes(name));
  const given = names.filter((name) => !name.includes("_") || request.inputs[{ image_strength: "init_image" }[name] ?? "control_image"]);
  return [...given, "seed", "model", ...(typeof request.fields.prompt === "string" ? ["words"] : [])];
}

/** The values of a text; null if one of them is not valid. */
function valuesOf(name, text, { models, request }) {
  const values = text.split(",").map((value) => value.trim()).filter(Boolean);
  const valid = {
    seed: (value) => /^\d{1,20}$/.test(value),
    model: (value) => models.some((model) => model.name === value),
    words: (value) => value === values[0] ? request.fields.prompt.includes(value) : true,
  }[name] ?? ((value) => Number.isFinite(Number(value)));
  return values.length && values.every(valid) ? values : null;
}

function changed(fields, name, value, first) {
  if (name === "words") return { ...fields, prompt: fields.prompt.replaceAll(first, value) };
  if (name === "seed" || name === "model") return { ...fields, [name]: value };
  return { ...fields, [name]: Number(value) };
}

/** The requests of all cells, row by row. */
export function cellsOf({ fields, inputs }, across, down) {
  const seed = fields.seed ?? String(Math.floor(Math.random() * MOST_SEED));
  const { n, ...one } = { ...fields, seed };
  const grid = { id: randomKey(), across, down };
  return down.values.flatMap((y, row) =>
    across.values.map((x, column) => ({
      fields: changed(changed(one, across.name, x, across.values[0]), down.name, y, down.values[0]),
      inputs,
      grid: { ...grid, column, row },
    })),
  );
}

/** Resolves to the requests of a grid, or null. */
export async function askForGrid(request, model, models) {
  await sheet("web/xy_grid.css");
  const names = fieldsFor(model, request);
  const usual = { steps: "2, 4, 8", guidance: "2, 3.5, 5", seed: "1, 2, 3", model: models.slice(0, 3).map(({ name }) => name).join(", ") };
  let cells = null;
  const words = el("p", { class: "hint", role: "status" });
  const wordsHint = el("p", { class: "hint" }, t("xy.words_hint"));
  const start = el("button", { type: "button", class: "generate", on: { click: (event) => finish(event) } }, t("form.generate"));
  const axis = (label, chosen) => {
    const field = el("select", { "aria-label": label }, ...names.map((name) => el("option", { value: name }, t(`xy.${name}`))));
    field.value = names.includes(chosen) ? chosen : names[0];
    const values = el("input", { type: "text", value: usual[field.value] ?? "", "aria-label": t("xy.values", { axis: label }), placeholder: t("xy.separated") });
    field.addEventListener("change", () => {
      values.value = usual[field.value] ?? "";
      show();
    });
    values.addEventListener("input", show);
    return { field, values, node: el("div", { class: "axis" }, el("span", { class: "hint" }, label), field, values) };
  };
  const across = axis(t("xy.across"), names[0]);
  const down = axis(t("xy.down"), names[1]);
  const read = ({ field, values }) => ({ name: field.value, values: valuesOf(field.value, values.value, { models, request }) });
  function show() {
    const [x, y] = [read(across), read(down)];
    const n = (x.values?.length ?? 0) * (y.values?.length ?? 0);
    const problem = x.name === y.name ? t("xy.same") : !x.values || !y.values ? t("xy.invalid") : n > MOST_CELLS ? t("xy.too_many", { n: MOST_CELLS }) : "";
    start.disabled = problem !== "";
    setText(words, problem || t("xy.count", { n }));
    wordsHint.hidden = ![x.name, y.name].includes("words");
  }
  function finish(event) {
    cells = cellsOf(request, read(across), read(down));
    event.target.closest("dialog").close();
  }
  show();
  await openPanel("xy", t("xy.title"), [
    el("p", { class: "hint" }, t("xy.hint")),
    across.node,
    down.node,
    wordsHint,
    el("div", { class: "actions" }, words, start),
  ]);
  return cells;
}
