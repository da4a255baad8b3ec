// All models side by side: what each does and takes, whether it is here, and how long it takes for this size.

import { el, setText } from "./dom.js";
import { TASKS, namesOf, taskOf } from "./form_model.js";
import { listed, t } from "./language.js";
import { openPanel, sheet } from "./panel.js";
import { estimate } from "./request.js";
import { duration } from "./words.js";

const PICTURES = ["init_image", "images", "mask", "control_image"];
const TAKES = [...PICTURES, "guidance", "negative_prompt", "loras"];

/** Lets the visitor choose. models: of GET /models; sides: [width, height]. Resolves to a name or null. */
export async function pickModel(models, current, sides) {
  await sheet("./model_picker.css");
  const names = namesOf(models);
  const closed = new AbortController();
  let chosen = null;
  const rows = models.map((model) => {
    const choose = (event) => {
      chosen = model.name;
      event.currentTarget.closest("dialog").close();
    };
    return row(model, names.get(model.name), model.name === current, choose);
  });
  const groups = TASKS.map((task) => {
    const members = rows.filter(({ model }) => taskOf(model) === task);
    const title = el("h3", { id: `models-${task}` }, t(`models.${task}`));
    const list = el("ul", { class: "rows", "aria-labelledby": title.id }, ...members.map(({ node }) => node));
    return el("section", { hidden: members.length === 0 }, title, list);
  });
  const none = el("p", { class: "hint", hidden: true }, t("models.none_found"));
  const search = el("input", {
    type: "search",
    placeholder: t("models.search"),
    "aria-label": t("models.search"),
    on: { input: () => filter(search.value, rows, groups, none) },
  });
  measure(models, rows, sides, closed.signal);
  await openPanel("model-picker", t("models.title"), [search, ...groups, none], (dialog) => {
    dialog.addEventListener("keydown", (event) => move(event, rows, search));
  });
  closed.abort();
  return chosen;
}

function row(model, name, isCurrent, choose) {
  const [, what = ""] = model.title.split(/: */);
  const takes = TAKES.filter((field) => model.takes.includes(field)).map((field) =>
    field === "loras" ? t("form.loras") : t(`a.${field}`),
  );
  const speed = el("span", { class: "speed" });
  const button = el(
    "button",
    { type: "button", class: "pick", "aria-current": String(isCurrent), on: { click: choose } },
    el("span", { class: "name" }, name, ...marks(model)),
    el("span", { class: "hint" }, what),
    el("span", { class: "hint" }, takes.length ? t("models.takes", { list: listed(takes) }) : ""),
    speed,
  );
  return { model, speed, button, node: el("li", {}, button), words: `${name} ${model.name} ${model.title}`.toLowerCase() };
}

/** Whether it can draw at once. */
function marks(model) {
  const mark = (kind, words) => el("span", { class: `availability ${kind}` }, words);
  const gb = Math.round(model.weights_gb ?? 0);
  const place = model.loaded
    ? mark("loaded", t("models.loaded"))
    : model.present
      ? mark("present", t("models.present"))
      : mark("absent", gb ? t("models.download_gb", { n: gb }) : t("models.download"));
  return [place, model.gated && !model.present ? mark("gated", t("models.gated")) : null].filter(Boolean);
}

function filter(text, rows, groups, none) {
  const wanted = text.toLowerCase().split(/\s+/);
  for (const { node, words } of rows) node.hidden = !wanted.every((word) => words.includes(word));
  for (const group of groups) group.hidden = !group.querySelector("li:not([hidden])");
  none.hidden = groups.some((group) => !group.hidden);
}

/** Up and down lead through the models that are found. */
function move(event, rows, search) {
  const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!by) return;
  event.preventDefault();
  const stops = [search, ...rows.filter(({ node }) => !node.hidden).map(({ button }) => button)];
  const at = stops.indexOf(document.activeElement);
  stops[Math.min(Math.max(at + by, 0), stops.length - 1)].focus();
}

/** Fills in the seconds of one picture of this size, model by model. */
async function measure(models, rows, [width, height], signal) {
  for (const { model, speed } of rows) {
    const inputs = Object.fromEntries(
      PICTURES.filter((name) => model.needs.includes(name)).map((name) => [name, [{ width, height }]]),
    );
    const fields = { model: model.name };
    if (model.takes.includes("prompt")) fields.prompt = "a";
    if (model.needs.includes("upscale")) fields.upscale = 2;
    else Object.assign(fields, { width, height });
    try {
      const answer = await estimate({ fields, inputs }, signal);
      const time = duration(answer.expected_end_at - answer.expected_start_at);
      setText(speed, answer.confidence === "none" ? t("models.roughly", { time }) : time);
    } catch (error) {
      if (signal.aborted) return;
      if (error.code === "does_not_fit") setText(speed, t("models.too_large"));
    }
  }
}
