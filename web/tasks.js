// The tasks that were submitted from this browser: their stored fields and their present state.

import { onTaskChanged, storedTasks, writeTask } from "./store.js";

const LIVE = ["waiting", "running"];
const STORED = [
  "id", "created", "fields", "inputs", "params", "status", "error", "hidden", "removed", "images_done",
  "stars", "kept", "expires_at", "grid",
];
/** Parameters that are fields of the form, too. */
const FIELDS = [
  "model", "prompt", "negative_prompt", "width", "height", "steps", "guidance", "upscale", "format", "loras", "tags",
];
const FOLLOWED = [
  "pos", "progress", "phase", "steps_done", "steps_total", "images_done", "last_image", "confidence", "expires_at",
];

export const isLive = (task) => LIVE.includes(task.status);

/** The number of pictures of a task that can be fetched, also while it runs and after a cancel. */
export const stored = (task) =>
  task.status === "done" ? task.params.count : task.status === "gone" ? 0 : (task.images_done ?? 0);

/** Dispatches "change" (the list or a task changed; detail: the task, or null) and "ended" (detail: the task). */
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

  /** The latest first, without removed ones (a removal can be undone for some seconds). */
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

  /** answer: from /generate; request: {fields, inputs} that was sent. */
  add(answer, request) {
    const known = this.#tasks.get(answer.task_id);
    this.#tasks.set(answer.task_id, {
      id: answer.task_id,
      created: known?.created ?? Date.now(),
      fields: request.fields,
      inputs: request.inputs,
      params: answer.params,
      status: answer.status,
      grid: request.grid,
      hidden: [],
    });
    this.#store(answer.task_id);
    this.follow(answer.task_id, { ...answer, wait_remaining: answer.expected_time_seconds });
  }

  /** A task that another browser has kept: all of its pictures are favourites. answer: of /status. */
  adopt(id, { created_at: created, status, params, images_done, expires_at }) {
    const given = FIELDS.filter((name) => params[name] !== undefined).map((name) => [name, params[name]]);
    const fields = { ...Object.fromEntries(given), n: params.count };
    if (params.prompts) fields.prompt = params.prompts;
    const stars = Array.from({ length: images_done }, (_, index) => index);
    const task = { id, created: created * 1000, fields, inputs: {}, params, hidden: [], ...this.#tasks.get(id) };
    this.#tasks.set(id, { ...task, status, images_done, expires_at, stars, kept: true });
    this.#store(id);
    this.#changed();
  }

  /** Takes over some or all fields of a StatusAnswer. */
  follow(id, answer) {
    const task = this.#tasks.get(id);
    if (!task || !isLive(task)) return;
    if (answer.version !== undefined) {
      if (answer.version < (task.version ?? 0)) return; // an old answer that arrived late
      task.version = answer.version;
      task.machine = answer.machine; // the list of the queue has neither
    }
    const imagesBefore = task.images_done;
    for (const name of FOLLOWED) if (answer[name] !== undefined) task[name] = answer[name];
    if (answer.wait_remaining !== undefined) {
      task.remaining = answer.wait_remaining;
      task.answeredAt = performance.now();
      task.reason = answer.reason;
    }
    const before = task.status;
    if (answer.status !== undefined && answer.status !== before) {
      task.status = answer.status;
      task.error = answer.error;
      this.#store(id);
    } else if (task.images_done !== imagesBefore) this.#store(id);
    this.#changed();
    if (!isLive(task)) this.#ended(task);
  }

  /** What is ahead of the waiting tasks ends so many seconds later than their answers said. */
  postpone(seconds) {
    for (const task of this.live()) if (task.status === "waiting") task.answeredAt += seconds * 1000;
  }

  /** There is a newer preview. */
  previewed(id, version) {
    const task = this.#tasks.get(id);
    if (!task || !isLive(task)) return;
    task.preview = version;
    this.#changed();
  }

  /** The server no longer has the task. */
  lost(id) {
    this.set(id, { status: "gone" });
  }

  set(id, change) {
    const task = this.#tasks.get(id);
    if (!task) return;
    Object.assign(task, change);
    this.#store(id);
    this.#changed(task);
  }

  forget(id) {
    this.#tasks.delete(id);
    writeTask(id, null);
    this.#changed();
  }

  #ended(task) {
    this.dispatchEvent(new CustomEvent("ended", { detail: task }));
  }

  #changed(task = null) {
    this.dispatchEvent(new CustomEvent("change", { detail: task }));
  }

  #store(id) {
    const task = this.#tasks.get(id);
    writeTask(id, Object.fromEntries(STORED.map((name) => [name, task[name]])));
  }
}

/** Forecast of the remaining seconds, now. */
export function remaining(task) {
  return Math.max((task.remaining ?? 1) - (performance.now() - (task.answeredAt ?? 0)) / 1000, 0);
}

/** Progress from 0 to 1. Between two answers it follows the forecast, up to 0.98. */
export function progress(task) {
  if (task.status !== "running") return 0;
  const reported = task.progress ?? 0;
  const share = task.remaining ? 1 - remaining(task) / task.remaining : 0;
  const now = Math.min(reported + (1 - reported) * share, 0.98);
  task.shown_progress = Math.max(task.shown_progress ?? 0, now);
  return task.shown_progress;
}
