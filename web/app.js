// The page: connects form, tasks, queue and gallery with the server.

import * as api from "./api.js";
import { find, icon, setText } from "./dom.js";
import { Form } from "./form.js";
import { Gallery, seedOf } from "./gallery.js";
import { Live } from "./live.js";
import { Queue } from "./queue.js";
import { sendAgain, submit } from "./request.js";
import { forgetPictures } from "./store.js";
import { Tasks, isLive, stored } from "./tasks.js";
import { say, toast } from "./toasts.js";
import { Viewer } from "./viewer.js";
import { downloadWords, place, plain, short, some } from "./words.js";

const TICK_MS = 500;
const DOUBLE_CLICK_MS = 500;
const FORECAST_EVERY_MS = 3_000;

const tasks = new Tasks();
const live = new Live(tasks);
const form = new Form();
const queue = new Queue(tasks);
const act = { open: (item) => viewer.open(item), again, vary, use, remove, cancel, endAfter, lost };
const gallery = new Gallery(tasks, act);
const viewer = new Viewer(() => gallery.pictures(), act);

// Asking for pictures

const sending = new Set(); // what a double click sends twice is meant once

async function draw(request, what = JSON.stringify(request)) {
  if (sending.has(what)) return;
  sending.add(what);
  form.sending = true;
  try {
    const answer = await submit(request);
    tasks.add(answer, request);
    say(`Your picture is in the queue: ${place(answer.pos)}.`);
    if (matchMedia("(max-width: 60rem)").matches) find("yours").scrollIntoView({ block: "start" });
    live.now();
  } catch (error) {
    if (error instanceof api.Away) {
      live.now();
      form.fail(new Error("The server is away. Nothing is lost: press Draw again when it is back."));
    } else form.fail(error);
  } finally {
    form.sending = false;
    setTimeout(() => sending.delete(what), DOUBLE_CLICK_MS);
  }
}

form.addEventListener("submit", (event) => draw(event.detail));

// What can be done with one's own

function settings({ task, index }) {
  const { n, ...fields } = task.fields;
  if (index !== null) return [{ fields, inputs: task.inputs }, { seed: seedOf(task, index) }];
  return [{ fields: n ? { ...fields, n } : fields, inputs: task.inputs }, task.params];
}

function again(item) {
  const undo = form.load(...settings(item));
  form.focus();
  toast("Its settings are in the form.", { action: { words: "Undo", run: undo } });
}

function vary({ task }) {
  const { n, seed, ...fields } = task.fields;
  draw({ fields, inputs: task.inputs }, `vary ${task.id}`);
}

function use({ task, index }) {
  if (form.addPicture({ task_id: task.id, index })) {
    form.focus();
    toast("It is in the form.");
  } else toast("The chosen model takes no pictures: choose another one first.", { bad: true });
}

function cancel({ task }) {
  return tryToEnd(() => api.remove(task.id));
}

function endAfter({ task }) {
  return tryToEnd(async () => {
    await api.endAfterPicture(task.id);
    tasks.follow(task.id, await api.status(task.id));
  });
}

async function tryToEnd(ask) {
  try {
    await ask();
  } catch (error) {
    if (error instanceof api.Away) toast("The server is away: it could not be cancelled.", { bad: true });
    else if (error.status !== 404 && error.status !== 410) toast(plain(error), { bad: true });
  }
  live.now();
}

/** At once for the eye, on the server when it can no longer be undone. */
function remove({ task, index }) {
  const left = Array.from({ length: stored(task) }, (_, one) => one).filter(
    (one) => one !== index && !task.hidden?.includes(one),
  );
  const whole = index === null || (left.length === 0 && !isLive(task));
  const before = task.hidden ?? [];
  if (whole) tasks.set(task.id, { removed: true });
  else tasks.set(task.id, { hidden: [...before, index] });
  find("yours").focus({ preventScroll: true });
  toast("Removed.", {
    action: {
      words: "Undo",
      run: () => tasks.set(task.id, { removed: false, hidden: tasks.get(task.id).hidden?.filter((one) => one !== index) }),
    },
    onGone: () => (whole ? removeForGood(task) : api.removeOne(task.id, index).catch(() => {})),
  });
}

async function removeForGood(task) {
  try {
    if (task.status !== "gone") await api.remove(task.id);
  } catch (error) {
    if (error instanceof api.Away) return; // at the next visit
  }
  tasks.forget(task.id);
}

/** Its picture could not be shown: is it gone, or only the server away? */
async function lost({ task }) {
  try {
    const { images_done: images } = await api.status(task.id);
    if (!images) tasks.lost(task.id);
  } catch (error) {
    if (error instanceof api.Refused && [404, 410].includes(error.status)) tasks.lost(task.id);
  }
}

// What is shown

tasks.addEventListener("change", () => gallery.show());
tasks.addEventListener("ended", ({ detail: task }) => {
  if (task.status === "done") say("Your picture is ready.");
  if (task.status === "cancelled" && stored(task)) say(`Cancelled. ${some(stored(task), "picture is", "pictures are")} ready.`);
  if (task.status === "failed") toast(`It failed: ${short(task.error)}`, { bad: true });
});

let length = null;
let forecastAt = 0;

live.addEventListener("queue", ({ detail }) => {
  queue.show(detail);
  if (detail.length !== length || (length && performance.now() - forecastAt > FORECAST_EVERY_MS)) {
    length = detail.length;
    forecastAt = performance.now();
    form.forecastSoon();
  }
});

live.addEventListener("step", ({ detail }) => {
  if (queue.step(detail)) live.refresh();
});

let loaded = null;

live.addEventListener("health", ({ detail: health }) => {
  const now = String(health.loaded_models);
  if (now !== loaded && form.model) {
    loaded = now;
    api.models().then((models) => form.refresh(models), () => (loaded = null));
  }
  gallery.download = health.download;
  const words = {
    ready: health.download ? downloadWords(health.download) : "Ready",
    busy: `${some(length, "task", "tasks")} in the queue`,
    loading: loadingWords(health),
    draining: "The server is stopping",
    failed: `The server has a problem: ${health.last_error ?? "see its log"}`,
  };
  const works = ["ready", "busy"].includes(health.status);
  const state = works ? (length ? "busy" : "ready") : health.status;
  showState(state, words[state] ?? state);
});

function loadingWords({ loading_model: model, download }) {
  return download ? downloadWords(download) : `Loading ${model ?? "the model"}`;
}

function showState(state, words) {
  document.body.dataset.state = state;
  setText(find("state-words"), words);
}

live.addEventListener("away", () => {
  showState("away", "Server away");
  setText(find("away"), "The server is away. Nothing is lost: this page asks again every few seconds.");
  find("away").hidden = false;
});

live.addEventListener("back", () => {
  find("away").hidden = true;
  setText(find("away"), "");
  toast("The server is back.");
  if (!form.model) begin();
  gallery.loadAgain();
  form.forecastSoon();
});

setInterval(() => {
  if (document.hidden) return;
  if (queue.tick() && !live.away) live.refresh();
  gallery.tick();
}, TICK_MS);

// Pictures from outside

const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
const files = (list) => [...(list ?? [])].filter((file) => file.type.startsWith("image/"));
let inside = 0;

function shield(shown) {
  if (!shown) inside = 0;
  find("drop").hidden = !shown;
}

function takeFiles(list) {
  const slot = form.mainSlot();
  if (!list.length) toast("That is not a picture.", { bad: true });
  else if (slot) slot.addFiles(list);
  else toast("The chosen model takes no pictures: choose another one first.", { bad: true });
}

addEventListener("dragenter", (event) => {
  if (!carriesFiles(event)) return;
  inside += 1;
  shield(true);
});
addEventListener("dragleave", (event) => {
  if (carriesFiles(event) && --inside <= 0) shield(false);
});
addEventListener("dragover", (event) => carriesFiles(event) && event.preventDefault());
addEventListener("drop", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  shield(false);
  takeFiles(files(event.dataTransfer.files));
});
document.addEventListener("dropped", () => shield(false));
document.addEventListener("paste", (event) => {
  const pasted = files(event.clipboardData?.files);
  if (!pasted.length) return;
  event.preventDefault();
  takeFiles(pasted);
});

// The theme

const root = document.documentElement;

function showTheme() {
  const dark = root.dataset.theme === "dark";
  find("theme").setAttribute("aria-pressed", String(dark));
  find("theme").replaceChildren(icon(dark ? "light" : "dark"));
}

find("theme").addEventListener("click", () => {
  const next = root.dataset.theme === "dark" ? "light" : "dark";
  root.dispatchEvent(new CustomEvent("theme-chosen", { detail: next }));
});
root.addEventListener("theme", showTheme);

// The keyboard

if (navigator.platform.startsWith("Mac")) {
  setText(find("key-with"), "\u2318");
  setText(find("key"), "Return");
}

// Beginning

async function begin() {
  try {
    const [models, specification] = await Promise.all([
      api.models(),
      api.specification().catch(() => null),
    ]);
    form.setModels(models, specification);
  } catch {
    // the page says that the server is away, and comes back here when it is back
  }
}

showTheme();
gallery.show();
for (const task of tasks.all()) if (task.removed) removeForGood(task);
await Promise.all([begin(), live.now()]);
await sendAgain((answer, request) => {
  tasks.add(answer, request);
  live.soon();
});
const named = tasks.all().flatMap((task) => Object.values(task.inputs ?? {}).flat().map((one) => one.key));
await forgetPictures(new Set([...named, ...form.pictureKeys()]));
