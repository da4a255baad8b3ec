// A grid of pictures: the same request with two fields that change, one across and one down.

import { el, setText } from "./dom.js";
import { t } from "./language.js";
import { openPanel, sheet } from "./panel.js";
import { estimate } from "./request.js";
import { randomKey } from "./store.js";
import { duration } from "./words.js";

const MOST_CELLS = 100;
const MOST_FORECASTS = 25;
const PAUSE_MS = 350;
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
function cellsOf({ fields, inputs }, across, down) {
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

/**
 * Forecast seconds until all cells are drawn. Cells that differ in seed or words take as long as each
 * other: one of them is forecast. Of many cells some are.
 */
async function secondsOf(cells, signal) {
  const kinds = new Map();
  for (const cell of cells) {
    const { seed, prompt, ...fields } = cell.fields;
    const kind = JSON.stringify(fields);
    kinds.set(kind, { cell, count: (kinds.get(kind)?.count ?? 0) + 1 });
  }
  const every = Math.ceil(kinds.size / MOST_FORECASTS);
  const some = [...kinds.values()].filter((_, index) => index % every === 0);
  const answers = await Promise.all(some.map(({ cell }) => estimate(cell, signal)));
  const owns = answers.map(({ expected_start_at: start, expected_end_at: end }) => end - start);
  const waits = answers.map(({ expected_time_seconds: time }, index) => time - owns[index]);
  const sum = (numbers) => numbers.reduce((one, other) => one + other, 0);
  const drawing = sum(some.map(({ count }, index) => count * owns[index]));
  const share = sum(some.map(({ count }) => count)) / cells.length; // that was forecast
  return Math.max(Math.min(...waits), 0) + drawing / share;
}

/** Shows when the cells that show() is called with are ready; an empty list shows nothing. */
function forecastLine() {
  const node = el("p", { class: "hint", role: "status" });
  let [timer, aborter] = [null, null];
  const ask = async (cells) => {
    aborter = new AbortController();
    const { signal } = aborter;
    const seconds = await secondsOf(cells, signal).catch(() => null); // what is refused is said after Generate
    if (!signal.aborted) setText(node, seconds === null ? "" : t("xy.ready", { time: duration(seconds) }));
  };
  const show = (cells) => {
    clearTimeout(timer);
    aborter?.abort();
    setText(node, "");
    if (cells.length) timer = setTimeout(() => ask(cells), PAUSE_MS);
  };
  return { node, show };
}

/** Resolves to the requests of a grid, or null. */
export async function askForGrid(request, model, models) {
  await sheet("./xy_grid.css");
  const names = fieldsFor(model, request);
  const usual = { steps: "2, 4, 8", guidance: "2, 3.5, 5", seed: "1, 2, 3", model: models.slice(0, 3).map(({ name }) => name).join(", ") };
  let cells = null;
  const forecast = forecastLine();
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
    forecast.show(problem ? [] : cellsOf(request, x, y));
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
    forecast.node,
    el("div", { class: "actions" }, words, start),
  ]);
  forecast.show([]);
  return cells;
}
