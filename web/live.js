// Follows the server: by its events, or by polling if there are none.

import * as api from "./api.js";

const WITH_EVENTS_MS = { busy: 5_000, idle: 20_000 };
const POLLING_MS = { busy: 1_000, idle: 4_000 };
const HIDDEN_MS = 10_000;
const UNREACHABLE_MS = 2_000;
const EVENTS_AGAIN_MS = 30_000;
const HEALTH_EVERY_MS = 10_000;
const REFRESH_MS = 1_000;
const KINDS = ["waiting", "running", "step", "image", "done", "failed", "cancelled"];
const MAX_STATUS_CALLS = 20;

/** Dispatches "queue" (detail: {queue: QueueAnswer, forecast}), "health" (HealthAnswer), "step", "unreachable", "reachable". */
export class Live extends EventTarget {
  #tasks;
  #askForecast;
  #timer = null;
  #asking = false;
  #again = false;
  #stream = null;
  #streaming = false;
  #streamAgainAt = 0;
  #health = null;
  #healthAt = -Infinity;
  #healthChanged = false;
  #running = null;
  #busy = false;
  #soonTimer = null;
  #askedAt = 0;
  unreachable = false;

  /** askForecast(): of the button. It is asked for together with the queue, so that both agree. */
  constructor(tasks, askForecast) {
    super();
    this.#tasks = tasks;
    this.#askForecast = askForecast;
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) this.#close();
      else this.now();
    });
    addEventListener("online", () => this.now());
    addEventListener("pagehide", () => this.#close());
    addEventListener("pageshow", (event) => event.persisted && this.now());
  }

  /** Ask the server now; if a request is under way, once more after it. */
  async now() {
    if (this.#asking) {
      this.#again = true;
      return;
    }
    clearTimeout(this.#timer);
    this.#asking = true;
    this.#askedAt = performance.now();
    try {
      await this.#ask();
      this.#open();
      if (this.unreachable) {
        this.unreachable = false;
        this.#dispatch("reachable");
      }
    } catch (error) {
      if (!(error instanceof api.Unreachable || error instanceof api.Refused)) console.error(error);
      this.#healthAt = -Infinity;
      if (error instanceof api.Unreachable && !this.unreachable) {
        this.unreachable = true;
        this.#dispatch("unreachable");
      }
    }
    this.#asking = false;
    const again = this.#again;
    this.#again = false;
    this.#timer = setTimeout(() => this.now(), again ? 0 : this.#pause());
  }

  /** Ask again because a countdown ended or was wrong. At most once a second. */
  refresh() {
    if (performance.now() - this.#askedAt > REFRESH_MS) this.soon();
  }

  /** Ask in a moment; several calls make one request. */
  soon() {
    this.#soonTimer ??= setTimeout(() => {
      this.#soonTimer = null;
      this.now();
    }, 150);
  }

  #pause() {
    if (this.unreachable) return UNREACHABLE_MS;
    if (document.hidden) return HIDDEN_MS;
    if (this.#changesOften()) return POLLING_MS.busy;
    if (this.#healthChanged) return REFRESH_MS;
    const pauses = this.#streaming ? WITH_EVENTS_MS : POLLING_MS;
    return this.#busy ? pauses.busy : pauses.idle;
  }

  /** Whether /health changes every second: while a model is loaded or downloaded. */
  #changesOften() {
    return this.#health?.status === "loading" || this.#health?.download !== undefined;
  }

  async #ask() {
    const age = performance.now() - this.#healthAt;
    const due = age > (this.#healthChanged ? REFRESH_MS : HEALTH_EVERY_MS);
    const [queue, health, forecast] = await Promise.all([
      api.queue(),
      due || this.#changesOften() || this.#health?.status === "failed" ? api.health() : this.#health,
      this.#askForecast(),
    ]);
    if (health !== this.#health) {
      this.#health = health;
      this.#healthAt = performance.now();
      this.#healthChanged = false;
    }
    this.#busy = queue.length > 0;
    const listed = new Map(queue.tasks.map((task) => [task.task_id, task]));
    const unknown = [];
    for (const task of this.#tasks.live()) {
      const found = listed.get(task.id);
      // The list has no version: it may be older than the latest event.
      const older = found?.status === "waiting" && task.status === "running";
      if (found && !older) this.#tasks.follow(task.id, found);
      if (!found || older || (found.status === "running" && !this.#streaming)) unknown.push(task.id);
    }
    this.#dispatch("queue", { queue, forecast });
    this.#dispatch("health", health);
    await Promise.all(unknown.slice(0, MAX_STATUS_CALLS).map((id) => this.#askFor(id)));
  }

  async #askFor(id) {
    try {
      const before = this.#tasks.get(id)?.steps_done ?? 0;
      const answer = await api.status(id);
      this.#tasks.follow(id, answer);
      if (this.#streaming) return;
      if (answer.phase === "denoising" || answer.status === "done") this.#runs(id);
      if (answer.status === "running" && answer.steps_done > before) {
        this.#tasks.previewed(id, answer.version ?? answer.steps_done);
      }
    } catch (error) {
      if (!(error instanceof api.Refused)) throw error;
      if (error.status === 404 || error.status === 410) this.#tasks.lost(id);
    }
  }

  #open() {
    if (this.#stream || document.hidden || performance.now() < this.#streamAgainAt) return;
    const stream = api.events();
    this.#stream = stream;
    stream.addEventListener("open", () => {
      this.#streaming = true;
      this.soon(); // what changed before the stream was open
    });
    stream.addEventListener("error", () => {
      this.#streaming = false;
      if (stream.readyState === EventSource.CLOSED) {
        this.#close();
        this.#streamAgainAt = performance.now() + EVENTS_AGAIN_MS;
      }
      this.soon();
    });
    for (const kind of KINDS) {
      stream.addEventListener(kind, (event) => {
        const data = JSON.parse(event.data);
        this.#tasks.follow(data.task_id, data);
        if (kind === "step") {
          this.#runs(data.task_id);
          this.#dispatch("step", data);
        } else {
          // A new task may start a download; an upscaler may have been loaded for one that is done.
          if (kind === "waiting" || kind === "done") this.#healthChanged = true;
          this.soon();
        }
      });
    }
    stream.addEventListener("preview", (event) => {
      const data = JSON.parse(event.data);
      this.#tasks.follow(data.task_id, data);
      this.#tasks.previewed(data.task_id, data.version ?? event.lastEventId);
    });
    stream.addEventListener("queue", () => this.soon());
  }

  /** A task has started: its model is loaded, perhaps in place of another one, so /health has changed. */
  #runs(id) {
    if (id === this.#running) return;
    this.#running = id;
    this.#healthChanged = true;
    this.soon();
  }

  #close() {
    this.#stream?.close();
    this.#stream = null;
    this.#streaming = false;
  }

  #dispatch(kind, detail) {
    this.dispatchEvent(new CustomEvent(kind, { detail }));
  }
}
