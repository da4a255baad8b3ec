// Keeps up with the server: by its events where they can be had, else by asking again and again.

import * as api from "./api.js";

const WITH_EVENTS_MS = { busy: 5_000, idle: 20_000 };
const BY_ASKING_MS = { busy: 1_000, idle: 4_000 };
const HIDDEN_MS = 10_000;
const AWAY_MS = 2_000;
const EVENTS_AGAIN_MS = 30_000;
const HEALTH_EVERY_MS = 10_000;
const REFRESH_MS = 1_000;
const KINDS = ["waiting", "running", "step", "image", "done", "failed", "cancelled"];
const MOST_ASKED = 20;

/** Dispatches "queue" (detail: QueueAnswer), "health" (HealthAnswer), "step", "away", "back". */
export class Live extends EventTarget {
  #tasks;
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
  away = false;

  constructor(tasks) {
    super();
    this.#tasks = tasks;
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) this.#close();
      else this.now();
    });
    addEventListener("online", () => this.now());
    addEventListener("pagehide", () => this.#close());
    addEventListener("pageshow", (event) => event.persisted && this.now());
  }

  /** Ask now; while an answer is on its way, once more after it. */
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
      if (this.away) {
        this.away = false;
        this.#tell("back");
      }
    } catch (error) {
      if (!(error instanceof api.Away || error instanceof api.Refused)) console.error(error);
      this.#healthAt = -Infinity;
      if (error instanceof api.Away && !this.away) {
        this.away = true;
        this.#tell("away");
      }
    }
    this.#asking = false;
    const again = this.#again;
    this.#again = false;
    this.#timer = setTimeout(() => this.now(), again ? 0 : this.#pause());
  }

  /** A countdown is over or was wrong: the others may be, too. At most once a second. */
  refresh() {
    if (performance.now() - this.#askedAt > REFRESH_MS) this.soon();
  }

  /** Soon, and not once for each of many reasons. */
  soon() {
    this.#soonTimer ??= setTimeout(() => {
      this.#soonTimer = null;
      this.now();
    }, 150);
  }

  #pause() {
    if (this.away) return AWAY_MS;
    if (document.hidden) return HIDDEN_MS;
    if (this.#restless()) return BY_ASKING_MS.busy;
    if (this.#healthChanged) return REFRESH_MS;
    const pauses = this.#streaming ? WITH_EVENTS_MS : BY_ASKING_MS;
    return this.#busy ? pauses.busy : pauses.idle;
  }

  /** Whether what it says changes by the second. */
  #restless() {
    return this.#health?.status === "loading" || this.#health?.download !== undefined;
  }

  async #ask() {
    const age = performance.now() - this.#healthAt;
    const due = age > (this.#healthChanged ? REFRESH_MS : HEALTH_EVERY_MS);
    const [queue, health] = await Promise.all([
      api.queue(),
      due || this.#restless() || this.#health?.status === "failed" ? api.health() : this.#health,
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
      // The list has no version: it may be older than what an event told.
      const older = found?.status === "waiting" && task.status === "running";
      if (found && !older) this.#tasks.follow(task.id, found);
      if (!found || older || (found.status === "running" && !this.#streaming)) unknown.push(task.id);
    }
    this.#tell("queue", queue);
    this.#tell("health", health);
    await Promise.all(unknown.slice(0, MOST_ASKED).map((id) => this.#askFor(id)));
  }

  async #askFor(id) {
    try {
      const before = this.#tasks.get(id)?.steps_done ?? 0;
      const told = await api.status(id);
      this.#tasks.follow(id, told);
      if (this.#streaming) return;
      if (told.phase === "denoising" || told.status === "done") this.#runs(id);
      if (told.status === "running" && told.steps_done > before) {
        this.#tasks.previewed(id, told.version ?? told.steps_done);
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
      this.soon(); // what happened before it began
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
        const told = JSON.parse(event.data);
        this.#tasks.follow(told.task_id, told);
        if (kind === "step") {
          this.#runs(told.task_id);
          this.#tell("step", told);
        } else {
          if (kind === "done") this.#healthChanged = true; // another model may have enlarged it
          this.soon();
        }
      });
    }
    stream.addEventListener("preview", (event) => {
      const told = JSON.parse(event.data);
      this.#tasks.follow(told.task_id, told);
      this.#tasks.previewed(told.task_id, told.version ?? event.lastEventId);
    });
    stream.addEventListener("queue", () => this.soon());
  }

  /** The first step of a task: its model is loaded by now, perhaps in place of another one. */
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

  #tell(kind, detail) {
    this.dispatchEvent(new CustomEvent(kind, { detail }));
  }
}
