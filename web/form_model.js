// The field of the model: its options, and what is said about the chosen one.

import { el, find } from "./dom.js";
import { listed, t } from "./language.js";
import { SLOTS } from "./slots.js";
import { modelName } from "./words.js";

/** What models do, in the order in which they are listed. */
export const TASKS = ["draw", "edit", "repaint", "control", "enlarge"];
const NAMED = ["prompt", "guidance", "negative_prompt"];

/** What a model does: the pictures that it needs say it. */
export function taskOf({ needs }) {
  if (needs.includes("upscale")) return "enlarge";
  if (needs.includes("mask")) return "repaint";
  if (needs.includes("control_image")) return "control";
  return needs.includes("images") || needs.includes("init_image") ? "edit" : "draw";
}

/** The name of each model; its title, where only one has it. */
export function namesOf(models) {
  const names = models.map(modelName);
  return new Map(
    models.map((model, index) => {
      const twice = names.indexOf(names[index]) !== names.lastIndexOf(names[index]);
      return [model.name, twice ? `${names[index]} (${model.name})` : names[index]];
    }),
  );
}

/** The model with this name, alias or repository, or undefined. Other models may load parts of its
 * repository. */
export function findModel(models, wanted) {
  const plain = (name) => name.toLowerCase().split("/").at(-1);
  const called = (words) =>
    models.find((model) => words(model).some((one) => plain(one) === plain(wanted)));
  return (
    called(({ name, aliases, repositories }) => [name, ...aliases, ...repositories.slice(0, 1)]) ??
    called(({ repositories }) => repositories)
  );
}

export function fillModels(models) {
  const names = namesOf(models);
  const groups = TASKS.map((task) => [task, models.filter((model) => taskOf(model) === task)]);
  const filled = groups.filter(([, members]) => members.length);
  const options = (members) => members.map(({ name }) => el("option", { value: name }, names.get(name)));
  find("model").replaceChildren(
    ...(filled.length === 1
      ? options(filled[0][1])
      : filled.map(([task, members]) => el("optgroup", { label: t(`models.${task}`) }, ...options(members)))),
  );
}

export function modelNote(model) {
  const parts = [];
  const what = model.title.split(":")[1]?.trim();
  if (what) parts.push(`${what[0].toUpperCase()}${what.slice(1)}.`);
  const n = Math.round(model.weights_gb ?? 0);
  if (!model.present) parts.push(n ? t("form.not_downloaded_gb", { n }) : t("form.not_downloaded"));
  else if (!model.loaded) parts.push(t("form.not_loaded"));
  return parts.join(" ");
}

/** The required and the optional inputs of the model, as a sentence. */
export function modelInputs(model) {
  const taken = [...NAMED, ...SLOTS.map(({ name }) => name)].filter((name) => model.takes.includes(name));
  const needs = (name) => name === "prompt" || model.needs.includes(name);
  const words = (names) => listed(names.map((name) => t(`a.${name}`)));
  const more = taken.filter((name) => !needs(name));
  const needed = t("form.needs", { list: words(taken.filter(needs)) });
  return more.length ? `${needed} ${t("form.optional", { list: words(more) })}` : needed;
}
