// The tasks that were asked for in this browser: what is stored of them, and how they stand now.

import { onTaskChanged, storedTasks, writeTask } from "./store.js";

const LIVE = ["waiting", "running"];
const STORED = [
  "id", "created", "fields", "inputs", "params", "status", "error", "hidden", "removed", "images_done",
];
const FOLLOWED = [
  "pos", "progress", "phase", "steps_done", "steps_total", "images_done", "last_image", "confidence",
];

export const isLive = (task) => LIVE.includes(task.status);

/** Pictures of a task that can be fetched: also while it runs, and when it was cancelled. */
export const stored = (task) =>
  task.status === "done" ? task.params.count : task.status === "gone" ? 0 : (task.images_done ?? 0);

/** Dispatches "change" when the list or a task in it changed, "ended" with the task in detail. */
export class Tasks extends EventTarget {
  #tasks = new Map();

  constructor() {
    super();
    for (const task of storedTasks()) this.#tasks.set(task.id, task);
    onTaskChanged((id, task) => {
      if (!task) this.#tasks.delete(id);
      else this.#tasks.set(id, { ...this.#tasks.get(id), ...task });
      this.#changed();
    });
  }

  /** The latest first, without those whose removal may still be undone. */
  list() {
    return [...this.#tasks.values()]
      .filter((task) => !task.removed)
      .sort((one, other) => other.created - one.created);
  }

  all() {
    return [...this.#tasks.values()];
  }

  get(id) {
    return this.#tasks.get(id);
  }

  live() {
    return this.all().filter(isLive);
  }

  /** answer: of /generate; request: {fields, inputs} as it was sent. */
  add(answer, request) {
    const known = this.#tasks.get(answer.task_id);
    this.#tasks.set(answer.task_id, {
      id: answer.task_id,
      created: known?.created ?? Date.now(),
      fields: request.fields,
      inputs: request.inputs,
      params: answer.params,
      status: answer.status,
      hidden: [],
    });
    this.#store(answer.task_id);
    this.follow(answer.task_id, { ...answer, wait_remaining: answer.expected_time_seconds });
  }

  /** told: fields of StatusAnswer, as many as there are. */
  follow(id, told) {
    const task = this.#tasks.get(id);
    if (!task || !isLive(task)) return;
    if (told.version !== undefined) {
      if (told.version < (task.version ?? 0)) return; // an older answer that came late
      task.version = told.version;
    }
    const imagesBefore = task.images_done;
    for (const name of FOLLOWED) if (told[name] !== undefined) task[name] = told[name];
    if (told.wait_remaining !== undefined) {
      task.remaining = told.wait_remaining;
      task.toldAt = performance.now();
      task.reason = told.reason;
    }
    const before = task.status;
    if (told.status !== undefined && told.status !== before) {
      task.status = told.status;
      task.error = told.error;
      this.#store(id);
    } else if (task.images_done !== imagesBefore) this.#store(id);
    this.#changed();
    if (!isLive(task)) this.#ended(task);
  }

  /** A newer preview can be had. */
  previewed(id, version) {
    const task = this.#tasks.get(id);
    if (!task || !isLive(task)) return;
    task.preview = version;
    this.#changed();
  }

  /** The server no longer has it. */
  lost(id) {
    this.set(id, { status: "gone" });
  }

  set(id, change) {
    const task = this.#tasks.get(id);
    if (!task) return;
    Object.assign(task, change);
    this.#store(id);
    this.#changed();
  }

  forget(id) {
    this.#tasks.delete(id);
    writeTask(id, null);
    this.#changed();
  }

  #ended(task) {
    this.dispatchEvent(new CustomEvent("ended", { detail: task }));
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }

  #store(id) {
    const task = this.#tasks.get(id);
    writeTask(id, Object.fromEntries(STORED.map((name) => [name, task[name]])));
  }
}

/** Forecast seconds that remain at this moment. */
export function remaining(task) {
  return Math.max((task.remaining ?? 1) - (performance.now() - (task.toldAt ?? 0)) / 1000, 0);
}

/** 0 to 1: goes on by the forecast between two answers, and never quite arrives by itself. */
export function progress(task) {
  if (task.status !== "running") return 0;
  const told = task.progress ?? 0;
  const share = task.remaining ? 1 - remaining(task) / task.remaining : 0;
  const now = Math.min(told + (1 - told) * share, 0.98);
  task.shown_progress = Math.max(task.shown_progress ?? 0, now);
  return task.shown_progress;
}
