// The entry point of the operator's view: what the server does and how well, and the operator's routes.

import * as api from "./api.js";
import { bars, scatter } from "./charts.js";
import { find, setText } from "./dom.js";
import { keyDialog } from "./key_dialog.js";
import { languageField, t } from "./language.js";
import { stateName, verdict } from "./operator_words.js";
import * as tables from "./operator_tables.js";
import { themeButton } from "./theme_button.js";
import { toast } from "./toasts.js";
import { plain } from "./words.js";

const EVERY_MS = 5_000;
const KEY = `mflux:${location.pathname}:key`;
const WIDEST = 720;

const act = {
  pause: (paused) => change("POST", `queue/${paused ? "pause" : "resume"}`),
  front: (id) => change("POST", `tasks/${encodeURIComponent(id)}/front`),
  cancel: (id) => change("DELETE", `delete?${new URLSearchParams({ task_id: id })}`),
  drain: (name, drained) =>
    change("POST", `machines/${encodeURIComponent(name)}/${drained ? "drain" : "resume"}`),
};

async function change(method, path) {
  try {
    await api.ask(path, { method });
  } catch (error) {
    toast(plain(error), { bad: true });
  }
  refresh();
}

// Signing in: with the key of an operator, which is kept until the tab is closed

async function isOperator(key) {
  api.useKey(key);
  return (await api.session()).operator;
}

async function signedIn() {
  for (const key of new Set([sessionStorage.getItem(KEY), null])) {
    if (await isOperator(key).catch(refused)) return;
  }
  await keyDialog({
    title: t("operator.key_title"),
    hint: t("operator.key_hint"),
    async check(key) {
      if (!(await isOperator(key).catch(refused))) throw new Error(t("operator.key_wrong"));
      sessionStorage.setItem(KEY, key);
    },
  });
}

function refused(error) {
  if (error instanceof api.Refused && error.status === 401) return false;
  throw error;
}

// Showing

let shown = "";

/** The charts are drawn again only when their data or the width have changed. */
function showCharts({ last_tasks: tasks, busy_hours: hours }) {
  const width = Math.min(find("plot").clientWidth, WIDEST);
  const now = JSON.stringify([tasks, hours, width]);
  if (now === shown) return;
  shown = now;
  find("plot").replaceChildren(...(tasks.length ? [scatter(tasks, width)] : []));
  find("legend").hidden = !tasks.length;
  find("bars").replaceChildren(
    ...hours.flatMap((one) => {
      const name = document.createElement("h3");
      name.textContent = one.machine;
      return [name, bars(one, Math.min(find("bars").clientWidth, WIDEST))];
    }),
  );
  tables.showLastTasks(tasks);
  tables.showHours(hours);
}

async function show() {
  const [stats, health, machines, clients, queue] = await Promise.all([
    api.ask("stats"),
    api.health(),
    api.ask("machines"),
    api.ask("clients"),
    api.queue(),
  ]);
  setText(find("verdict"), verdict(stats));
  tables.showQueue(queue, act);
  tables.showMachines(machines, stats, act);
  tables.showClients(clients);
  tables.showSteps(stats.step_seconds);
  tables.showHealth(health, machines.machines);
  showCharts(stats);
  const state = queue.length && health.status === "ready" ? "busy" : health.status;
  document.body.dataset.state = state;
  const words = stateName(state);
  setText(find("state-words"), queue.paused ? t("operator.state_paused", { state: words }) : words);
}

let timer = null;
let latest = 0;

/** Asks the server now, and then every few seconds. Of several calls the last one goes on. */
async function refresh() {
  clearTimeout(timer);
  const own = ++latest;
  let problem = "";
  try {
    await show();
  } catch (error) {
    if (error instanceof api.Refused) problem = t("operator.load_again", { error: plain(error) });
    else if (error instanceof api.Unreachable) problem = t("operator.unreachable");
    else throw error;
  }
  setText(find("unreachable"), problem);
  find("unreachable").hidden = !problem;
  if (own === latest && !document.hidden) timer = setTimeout(refresh, EVERY_MS);
}

themeButton();
languageField(find("language"));
await signedIn().catch((error) => toast(plain(error), { bad: true }));
find("content").hidden = false;
document.addEventListener("visibilitychange", () => !document.hidden && refresh());
addEventListener("resize", () => refresh());
refresh();
