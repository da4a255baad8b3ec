// A request: {fields, inputs}. `fields` are those of POST /generate; `inputs` are lists of images by
// field, each {key, width, height} (in the store) or {task_id, index}.

import * as api from "./api.js";
import { keepPicture, picture, randomKey, read, write } from "./store.js";

const MAX_SIDE = 2560; // photos of phones are larger than any model can use
const SENT_UNCHANGED = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];
const LISTS = ["images"];

/** The input for a file, scaled down if it is large. Throws an Error with a message for the user. */
export async function inputOfFile(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name || "This file"} is not an image that this browser can read.`);
  }
  const shrink = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  const width = Math.max(Math.round(bitmap.width * shrink), 1);
  const height = Math.max(Math.round(bitmap.height * shrink), 1);
  let blob = file;
  if (shrink < 1 || !SENT_UNCHANGED.includes(file.type)) {
    const canvas = canvasOf(width, height);
    canvas.getContext("2d").drawImage(bitmap, 0, 0, width, height);
    blob = await new Promise((resolve) =>
      canvas.toBlob(resolve, file.type === "image/jpeg" ? "image/jpeg" : "image/png", 0.95),
    );
  }
  bitmap.close();
  return { key: await keepPicture(blob), width, height };
}

function canvasOf(width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas;
}

async function sent(input, blank) {
  if (input.task_id) return { task_id: input.task_id, index: input.index };
  if (blank) return blankOf(input.width, input.height);
  const blob = await picture(input.key);
  if (!blob) throw new Error("An image of this form is no longer in this browser: add it again.");
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error("An image of this form cannot be read."));
    reader.readAsDataURL(blob);
  });
}

const blanks = new Map();

/** An empty image of this size: a forecast depends on the size only, so the upload is saved. */
function blankOf(width, height) {
  const name = `${width}x${height}`;
  if (!blanks.has(name)) {
    const url = canvasOf(width, height).toDataURL("image/png");
    blanks.set(name, url.slice(url.indexOf(",") + 1));
  }
  return blanks.get(name);
}

async function bodyOf({ fields, inputs }, blank = false) {
  const body = { ...fields };
  for (const [name, list] of Object.entries(inputs)) {
    const pictures = await Promise.all(list.map((input) => sent(input, blank)));
    if (pictures.length) body[name] = LISTS.includes(name) ? pictures : pictures[0];
  }
  return body;
}

export async function estimate(request, signal) {
  return api.estimate(await bodyOf(request, true), signal);
}

/**
 * Submit a request. If no answer arrives (lost connection, closed page), it is sent again with the
 * same idempotency key, and the server answers with the same task.
 */
export async function submit(request) {
  const body = await bodyOf(request);
  const open = read("sending") ?? [];
  const same = open.find((one) => JSON.stringify(one.request) === JSON.stringify(request));
  const key = same?.key ?? randomKey();
  write("sending", [...open.filter((one) => one.key !== key), { key, request }]);
  try {
    return await api.generate(body, key).then((answer) => (settled(key), answer));
  } catch (error) {
    if (!(error instanceof api.Unreachable)) settled(key);
    throw error;
  }
}

function settled(key) {
  const open = (read("sending") ?? []).filter((one) => one.key !== key);
  write("sending", open.length ? open : null);
}

/** Send the requests again that have no answer yet; calls found(answer, request) for each. */
export async function sendAgain(found) {
  for (const { key, request } of read("sending") ?? []) {
    try {
      found(await api.generate(await bodyOf(request), key), request);
    } catch (error) {
      if (error instanceof api.Unreachable) return;
    }
    settled(key);
  }
}
