// The entry point: connects form, tasks, queue and gallery with the server.

import * as api from "./api.js";
import { find, setText } from "./dom.js";
import { takeDropped } from "./dropped.js";
import { Form } from "./form.js";
import { formTools } from "./form_tools.js";
import { seedOf } from "./cards.js";
import { Gallery } from "./gallery.js";
import { Grids } from "./grids.js";
import { Keeping } from "./keeping.js";
import { languageField, t } from "./language.js";
import { Live } from "./live.js";
import { Queue } from "./queue.js";
import { Notice } from "./notice.js";
import { Pending, refusal } from "./pending.js";
import { askForKey, signedIn } from "./sign_in.js";
import { forgetPictures } from "./store.js";
import { Tasks, isLive, stored } from "./tasks.js";
import { themeButton } from "./theme_button.js";
import { announce, toast } from "./toasts.js";
import { Viewer } from "./viewer.js";
import { downloadWords, failure, place, plain } from "./words.js";

const TICK_MS = 500;
const DOUBLE_CLICK_MS = 500;
/** The page says what still runs this long after a cancel. */
const LONG_STEP_S = 3;

const tasks = new Tasks();
const form = new Form();
const live = new Live(tasks, () => form.askForecast());
const queue = new Queue(tasks);
const pending = new Pending();
const notice = new Notice(tasks);
const keeping = new Keeping(tasks);
const act = {
  again, vary, use, cancel, endAfter, lost,
  open: (item) => viewer.open(item),
  compare: (one, other) => viewer.compare(one, other),
  star: (item) => keeping.star(item),
  starAll: (items) => keeping.starAll(items),
  remove: (items) => keeping.remove([items].flat()),
};
const gallery = new Gallery(tasks, act);
const viewer = new Viewer(() => gallery.pictures(), act);
const grids = new Grids(tasks, act.open);

// Submitting

const sending = new Set(); // requests under way: a double click submits once

/** Returns "accepted"; "later": the server cannot be reached; "refused", or "dropped": not sent. */
async function generate(request, what = JSON.stringify(request)) {
  if (sending.has(what)) return "dropped";
  sending.add(what);
  form.sending = true;
  try {
    const answer = await pending.submit(request);
    tasks.add(answer, request);
    if (!request.grid) announce(t("app.in_queue", { place: place(answer.pos) }));
    if (matchMedia("(max-width: 60rem)").matches) find("yours").scrollIntoView({ block: "start" });
    live.now();
    return "accepted";
  } catch (error) {
    if (error instanceof api.Unreachable) {
      live.now();
      announce(t("app.sent_later"));
      return "later";
    }
    if (error.name === "AbortError") return "dropped";
    form.fail(error);
    return "refused";
  } finally {
    form.sending = false;
    setTimeout(() => sending.delete(what), DOUBLE_CLICK_MS);
  }
}

form.addEventListener("submit", (event) => generate(event.detail));
form.addEventListener("grid", async ({ detail: cells }) => {
  for (const [index, cell] of cells.entries()) {
    const outcome = await generate(cell);
    if (outcome === "later") pending.later(cells.slice(index + 1));
    if (outcome === "refused") toast(t("xy.not_all", { n: cells.length - index }), { bad: true });
    if (outcome !== "accepted") break;
    if (index === 0) grids.view(cell.grid.id);
  }
});
pending.addEventListener("accepted", ({ detail: { answer, request } }) => {
  tasks.add(answer, request);
  live.soon();
});
pending.addEventListener("refused", ({ detail }) => toast(refusal(detail), { bad: true }));

// Actions on a task

function settings({ task, index }) {
  const { n, ...fields } = task.fields;
  if (index !== null) return [{ fields, inputs: task.inputs }, { seed: seedOf(task, index) }];
  return [{ fields: n ? { ...fields, n } : fields, inputs: task.inputs }, task.params];
}

function again(item) {
  const undo = form.load(...settings(item));
  form.focus();
  toast(t("app.settings_loaded"), { action: { words: t("app.undo"), run: undo } });
}

function vary({ task }) {
  const { n, seed, ...fields } = task.fields;
  generate({ fields, inputs: task.inputs }, `vary ${task.id}`);
}

function use({ task, index }) {
  if (form.addPicture({ task_id: task.id, index })) {
    form.focus();
    toast(t("app.picture_loaded"));
  } else toast(t("app.takes_no_images"), { bad: true });
}

function cancel({ task }) {
  return tryToEnd(async () => {
    const answer = await api.remove(task.id);
    if (answer.stopping_s >= LONG_STEP_S) toast(answer.message);
  });
}

function endAfter({ task }) {
  return tryToEnd(async () => {
    const answer = await api.endAfterPicture(task.id);
    if (answer.stopping_s >= LONG_STEP_S) toast(answer.message);
    tasks.follow(task.id, await api.status(task.id));
  });
}

async function tryToEnd(ask) {
  try {
    await ask();
  } catch (error) {
    if (error instanceof api.Unreachable) toast(t("app.not_cancelled"), { bad: true });
    else if (error.status !== 404 && error.status !== 410) toast(plain(error), { bad: true });
  }
  live.now();
}

/** A picture failed to load: asks the server whether it still exists. */
async function lost({ task }) {
  try {
    const { images_done: images } = await api.status(task.id);
    if (!images) tasks.lost(task.id);
  } catch (error) {
    if (error instanceof api.Refused && [404, 410].includes(error.status)) tasks.lost(task.id);
  }
}

// Showing changes

tasks.addEventListener("change", ({ detail: task }) => {
  gallery.show();
  queue.tick(); // a row shows the seconds of its card
  if (task) viewer.refresh(task);
});
tasks.addEventListener("ended", ({ detail: task }) => {
  notice.ended(task);
  if (task.status === "done") announce(t("app.ready"));
  if (task.status === "cancelled" && stored(task)) announce(t("app.cancelled_ready", { n: stored(task) }));
  if (task.status === "failed") toast(t("app.failed", { error: failure(task) }), { bad: true });
});

let length = null;

live.addEventListener("queue", ({ detail: { queue: answer, forecast } }) => {
  length = answer.length;
  queue.show(answer);
  if (forecast) form.forecast.show(forecast);
  pending.sendAll(false);
});
form.addEventListener("changed", () => live.now());

/** What is behind a running task moves with it. Where that is much, the server is asked, too. */
live.addEventListener("step", ({ detail }) => {
  const late = queue.lateness(detail);
  for (const shown of [queue, form.forecast, tasks]) shown.postpone(late);
  for (const shown of [queue, form.forecast, gallery]) shown.tick();
  if (Math.abs(late) > 1 + detail.wait_remaining / 10) live.refresh();
});

let loaded = null;

live.addEventListener("health", ({ detail: health }) => {
  const now = String(health.loaded_models);
  if (now !== loaded && form.model) {
    loaded = now;
    api.models().then((models) => form.refresh(models), () => (loaded = null));
  }
  gallery.download = health.download;
  const version = [health.version, health.commit].filter(Boolean).join(" ");
  setText(find("version"), version && `mflux-server ${version}`);
  const words = {
    ready: health.download ? downloadWords(health.download) : t("state.ready"),
    busy: t("form.tasks_in_queue", { n: length }),
    loading: loadingWords(health),
    draining: t("state.draining"),
    failed: t("state.failed", { error: health.last_error ?? t("state.see_log") }),
  };
  const works = ["ready", "busy"].includes(health.status);
  const state = works ? (length ? "busy" : "ready") : health.status;
  const machines = works && health.machines > 1 ? ` · ${t("state.machines", { n: health.machines })}` : "";
  showState(state, (words[state] ?? state) + machines);
});

function loadingWords({ loading_model: model, download }) {
  return download ? downloadWords(download) : t("state.loading", { model: model ?? t("state.the_model") });
}

function showState(state, words) {
  document.body.dataset.state = state;
  setText(find("state-words"), words);
}

live.addEventListener("unreachable", () => {
  showState("unreachable", t("state.unreachable"));
  setText(find("unreachable"), t("app.unreachable"));
  find("unreachable").hidden = false;
});

live.addEventListener("reachable", () => {
  find("unreachable").hidden = true;
  setText(find("unreachable"), "");
  toast(t("app.reachable"));
  if (!form.model) begin();
  pending.sendAll();
  gallery.loadAgain();
});

setInterval(() => {
  notice.tick();
  if (document.hidden) return;
  if (queue.tick() && !live.unreachable) live.refresh();
  form.forecast.tick();
  gallery.tick();
}, TICK_MS);

// The keyboard

if (navigator.platform.startsWith("Mac")) {
  setText(find("key-with"), "\u2318");
  setText(find("key"), "Return");
}

// Start

async function begin() {
  try {
    const [models, specification] = await Promise.all([
      api.models(),
      api.specification().catch(() => null),
    ]);
    form.setModels(models, specification);
  } catch {
    // the page shows that the server cannot be reached, and calls this again later
  }
}

themeButton();
takeDropped(form);
formTools(form);
languageField(find("language"));
gallery.show();
api.onSignedOut(async () => {
  await askForKey();
  if (!form.model) begin();
  live.now();
});
const session = await signedIn();
find("operator").hidden = !session?.operator;
for (const task of tasks.all()) if (task.removed) keeping.removeForGood(task);
await Promise.all([begin(), live.now()]);
await pending.sendAll();
if (session?.name) await keeping.follow().catch(() => {}); // else at the next visit
const named = tasks.all().flatMap((task) => Object.values(task.inputs ?? {}).flat().map((one) => one.key));
await forgetPictures(new Set([...named, ...form.pictureKeys(), ...pending.pictureKeys()]));
