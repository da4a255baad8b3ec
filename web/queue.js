// The queue: all tasks in the order in which they run. Prompts of other people are not shown.

import { el, find, follow, setText } from "./dom.js";
import { t } from "./language.js";
import { isLive, remaining } from "./tasks.js";
import { countdown, drawnSize } from "./words.js";

const MAX_ROWS = 12;

export class Queue {
  #list = find("queue");
  #words = find("queue-words");
  #rows = [];
  #length = 0;
  #answeredAt = 0;

  constructor(tasks) {
    this.tasks = tasks;
  }

  /** answer: of GET /queue. */
  show(answer) {
    this.#answeredAt = performance.now();
    this.#length = answer.length;
    this.#rows = answer.tasks.map((task, index) => ({ ...task, key: task.task_id ?? `other ${index}` }));
    const shown = this.#rows.filter((row, index) => index < MAX_ROWS || this.tasks.get(row.task_id));
    follow(this.#list, shown, (row) => row.key, () => this.#row(), (node, row) => this.#fill(node, row));
    const hidden = answer.length - shown.length;
    this.#list.dataset.more = hidden > 0 ? t("queue.more", { n: hidden }) : "";
    this.tick();
  }

  /** By how many seconds a task ends later than its row says, if it is the only one that runs. event: of one of its steps. */
  lateness({ task_id: id, wait_remaining: seconds }) {
    const running = this.#rows.filter((row) => row.status === "running");
    const known = running.length === 1 && running[0].task_id === id && seconds !== undefined;
    return known ? seconds - this.#left(running[0]) : 0;
  }

  postpone(seconds) {
    this.#answeredAt += seconds * 1000;
  }

  /** Forecast seconds that remain of a row. */
  #left(row) {
    return row.wait_remaining - (performance.now() - this.#answeredAt) / 1000;
  }

  /** Updates the countdowns. Returns whether one has ended. */
  tick() {
    const lefts = this.#rows.map((row) => {
      const own = this.tasks.get(row.task_id);
      return own && isLive(own) ? remaining(own) : this.#left(row); // as on the card
    });
    this.#rows.forEach((row, index) => {
      if (row.left) setText(row.left, countdown(lefts[index]));
    });
    const empty = this.#length === 0;
    setText(this.#words, empty ? t("queue.empty") : t("queue.tasks", { n: this.#length }));
    return lefts.some((seconds) => seconds <= 0);
  }

  #row() {
    return el(
      "li",
      { class: "row" },
      el("span", { class: "number" }),
      el("span", { class: "what" }, el("span", { class: "who", dir: "auto" }), el("span", { class: "hint" })),
      el("span", { class: "left" }),
    );
  }

  #fill(node, row) {
    const own = this.tasks.get(row.task_id);
    const running = row.status === "running";
    node.classList.toggle("own", Boolean(own));
    node.classList.toggle("running", running);
    const [number, what, seconds] = node.children;
    setText(number, running ? t("queue.now") : String(row.pos + 1));
    setText(what.children[0], own ? row.params.prompt || t("queue.upscaling") : t("queue.someone"));
    const { count, model } = row.params;
    const many = count > 1 ? ` · ${t("queue.pictures", { n: count })}` : "";
    const mine = own ? `${t("queue.yours")} · ` : "";
    const urgent = row.params.priority === true ? ` · ${t("queue.urgent")}` : "";
    setText(what.children[1], `${mine}${drawnSize(row.params)} · ${model}${many}${urgent}`);
    row.left = seconds;
  }
}
