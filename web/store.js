// What this browser stores: its tasks and the form in localStorage, input images in IndexedDB.
// Each task has a key of its own, so that two tabs do not overwrite each other.

const PREFIX = `mflux:${location.pathname}:`;
const TASK = `${PREFIX}task:`;
const MAX_TASKS = 1000;
const memory = new Map(); // used if the browser stores nothing

export function read(name) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + name) ?? memory.get(name) ?? "null");
  } catch {
    return null;
  }
}

export function write(name, value) {
  try {
    if (value === null) localStorage.removeItem(PREFIX + name);
    else localStorage.setItem(PREFIX + name, JSON.stringify(value));
  } catch {
    memory.set(name, JSON.stringify(value));
  }
}

const storedNames = () => {
  try {
    return Object.keys(localStorage);
  } catch {
    return [];
  }
};

/** The latest first. */
export function storedTasks() {
  const tasks = storedNames()
    .filter((name) => name.startsWith(TASK))
    .map((name) => read(name.slice(PREFIX.length)))
    .filter((task) => task?.id && task.params)
    .sort((one, other) => other.created - one.created);
  for (const old of tasks.splice(MAX_TASKS)) writeTask(old.id, null);
  return tasks;
}

const readTask = (id) => read(`task:${id}`);
export const writeTask = (id, task) => write(`task:${id}`, task);

/** Calls listener(id, task) when another tab changes a task; task is null if it was removed. */
export function onTaskChanged(listener) {
  addEventListener("storage", (event) => {
    if (event.key?.startsWith(TASK)) {
      const id = event.key.slice(TASK.length);
      listener(id, readTask(id));
    }
  });
}

/** A random key. crypto.randomUUID exists only on https and localhost. */
export function randomKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Pictures

let opened = null;

function database() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(`${PREFIX}pictures`, 1);
    request.onupgradeneeded = () => request.result.createObjectStore("pictures");
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

const kept = new Map(); // pictures of this visit, also if there is no IndexedDB

async function inStore(mode, use) {
  const request = use((await database()).transaction("pictures", mode).objectStore("pictures"));
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

export async function keepPicture(blob) {
  const key = randomKey();
  kept.set(key, blob);
  await inStore("readwrite", (store) => store.put(blob, key)).catch(() => {});
  return key;
}

/** The Blob, or null if it is no longer in this browser. */
export async function picture(key) {
  if (!kept.has(key)) {
    const found = await inStore("readonly", (store) => store.get(key)).catch(() => null);
    if (!found) return null;
    kept.set(key, found);
  }
  return kept.get(key);
}

/** Delete all pictures but those with the keys in `named`. */
export async function forgetPictures(named) {
  const keys = await inStore("readonly", (store) => store.getAllKeys()).catch(() => []);
  for (const key of keys) {
    if (!named.has(key)) await inStore("readwrite", (store) => store.delete(key)).catch(() => {});
  }
}
