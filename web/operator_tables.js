// The tables of the operator's view.

import { exact, hourWords, isLate, percent } from "./charts.js";
import { el, find, follow, setText } from "./dom.js";
import { LOCALE, t } from "./language.js";
import { bytes, clientName, pace, stateName } from "./operator_words.js";
import { countdown, downloadWords, duration, size } from "./words.js";

/** Shows rows in the body of a table. Rows that stay keep their elements, and the focus.
 * columns: functions from a row to a text; buttons: a function to [{words, label, run}]. */
function fill(id, rows, keyOf, columns, buttons = null) {
  const cell = (_, index) => (index ? el("td") : el("th", { scope: "row" }));
  follow(
    find(id),
    rows,
    keyOf,
    () => el("tr", {}, ...columns.map(cell), buttons && el("td", { class: "actions" })),
    (node, row) => {
      columns.forEach((column, index) => setText(node.children[index], String(column(row))));
      if (buttons) showButtons(node.lastElementChild, buttons(row));
    },
  );
  find(id).closest("table").hidden = rows.length === 0;
}

function showButtons(cell, buttons) {
  follow(
    cell,
    buttons,
    (button) => button.words,
    (button) => el("button", { type: "button", class: "quiet" }, button.words),
    (node, button) => {
      node.setAttribute("aria-label", button.label);
      node.onclick = button.run;
    },
  );
}

/** what: the row that it belongs to, for screen readers. */
const button = (words, what, run) => ({ words, label: t("operator.button_of", { action: words, what }), run });

function taskWords({ params }) {
  return params.prompt || t("queue.upscaling");
}

export function showQueue({ tasks, length, paused }, act) {
  setText(find("queue-words"), queueWords(length, tasks.length, paused));
  setText(find("pause"), t(paused ? "operator.resume_queue" : "operator.pause"));
  find("pause").onclick = () => act.pause(!paused);
  fill(
    "tasks",
    tasks,
    (task) => task.task_id,
    [
      (task) => (task.status === "running" ? t("queue.now") : task.pos + 1),
      (task) => clientName(task.client),
      taskWords,
      (task) => task.params.model,
      ({ params }) => `${size(params.width, params.height)}${params.count > 1 ? ` · ${t("queue.pictures", { n: params.count })}` : ""}`,
      (task) => countdown(task.wait_remaining),
    ],
    (task) => {
      const which = `${taskWords(task)}, ${clientName(task.client)}`;
      const front = button(t("operator.front"), which, () => act.front(task.task_id));
      const cancel = button(t("gallery.cancel"), which, () => act.cancel(task.task_id));
      return task.status === "waiting" ? [front, cancel] : [cancel];
    },
  );
}

function queueWords(length, shown, paused) {
  const tasks = t("queue.tasks", { n: length });
  const all = length > shown ? t("operator.queue_shown", { tasks, n: shown }) : tasks;
  return [paused && t("operator.paused"), length ? all : t("operator.queue_empty")].filter(Boolean).join(" ");
}

export function showMachines({ machines }, { drift }, act) {
  fill(
    "machines",
    machines,
    (machine) => machine.name,
    [
      (machine) => machine.name,
      ({ state, drained }) => (drained ? t("operator.drained", { state: stateName(state) }) : stateName(state)),
      (machine) => machine.loading_model ?? (machine.loaded_models.join(", ") || t("operator.none")),
      (machine) => machine.tasks_last_hour,
      (machine) => percent(machine.busy_share),
      (machine) => pace(drift[machine.name]),
    ],
    ({ name, drained }) => [
      button(t(drained ? "operator.resume" : "operator.drain"), name, () => act.drain(name, !drained)),
    ],
  );
}

export function showClients({ clients }) {
  fill("clients", clients, (client) => client.name, [
    (client) => clientName(client.name),
    (client) => client.waiting,
    (client) => client.running,
    (client) => exact(client.gpu_seconds_today),
    (client) => percent(client.share_today),
    (client) => exact(client.gpu_seconds),
  ]);
}

export function showSteps(rows) {
  const several = new Set(rows.map((row) => row.machine)).size > 1;
  fill("steps", rows, (row) => `${row.machine} ${row.model} ${row.width} ${row.height}`, [
    (row) => (several ? t("operator.model_on", { model: row.model, machine: row.machine }) : row.model),
    (row) => size(row.width, row.height),
    (row) => exact(row.step_s),
    (row) => row.pictures,
  ]);
}

const when = (unix) =>
  unix ? new Date(unix * 1000).toLocaleString(LOCALE, { dateStyle: "short", timeStyle: "short" }) : "";

/** The points of the plot as a table, newest first. */
export function showLastTasks(tasks) {
  const numbered = tasks.map((task, index) => ({ ...task, key: String(index) })).reverse();
  fill("last-tasks", numbered, (task) => task.key, [
    (task) => when(task.ended_at),
    (task) => task.model ?? "",
    (task) => task.machine ?? "",
    (task) => exact(task.forecast_s),
    (task) => exact(task.p90_s),
    (task) => (isLate(task) ? t("operator.late", { time: exact(task.actual_s) }) : exact(task.actual_s)),
  ]);
}

/** The bars as a table: one row for each hour, newest first. */
export function showHours(machines) {
  const rows = machines.flatMap(({ machine, starts_at: start, shares }) =>
    shares.map((share, hour) => ({ machine, at: start + hour * 3600, share })),
  );
  fill("hours", rows.reverse(), (row) => `${row.machine} ${row.at}`, [
    (row) => hourWords(row.at),
    (row) => row.machine,
    (row) => percent(row.share),
  ]);
}

export function showHealth(health, machines) {
  const { memory } = health;
  const none = t("operator.none");
  const state = stateName(health.status);
  setText(find("status"), t("operator.since", { state, time: duration(health.uptime_s) }));
  setText(find("models"), health.loading_model ?? (health.loaded_models.join(", ") || none));
  const used = { active: memory.active_bytes, cache: memory.cache_bytes, peak: memory.peak_bytes };
  const sizes = Object.fromEntries(Object.entries(used).map(([name, count]) => [name, bytes(count)]));
  setText(find("memory"), t("operator.memory_of", sizes));
  const [free, pictures] = [bytes(health.disk_free_bytes), bytes(health.images_bytes)];
  setText(find("disk"), t("operator.disk_of", { n: health.done, free, used: pictures }));
  setText(find("download"), health.download ? downloadWords(health.download) : none);
  const error = health.last_error && `${when(health.last_error_at)} ${health.last_error}`.trim();
  const own = [error, health.worker_restarts && t("operator.restarts", { n: health.worker_restarts })];
  const theirs = machines.map(
    ({ name, last_error: last }) => last && t("operator.error_of", { machine: name, error: last }),
  );
  setText(find("errors"), [...own, ...theirs].filter(Boolean).join("; ") || none);
}
