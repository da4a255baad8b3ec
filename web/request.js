// What is asked for: {fields, inputs}. Fields are those of POST /generate; inputs are lists of
// pictures by field, each {key, width, height} (of the store) or {task_id, index}.

import * as api from "./api.js";
import { keepPicture, picture, randomKey, read, write } from "./store.js";

const MOST_SIDE = 2560; // what a phone takes is larger than any model can use
const AS_THEY_ARE = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];
const LISTS = ["images"];

/** Of a file that was chosen, dropped or pasted. Throws an Error with words. */
export async function inputOfFile(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name || "This file"} is not a picture that this browser can read.`);
  }
  const shrink = Math.min(1, MOST_SIDE / Math.max(bitmap.width, bitmap.height));
  const width = Math.max(Math.round(bitmap.width * shrink), 1);
  const height = Math.max(Math.round(bitmap.height * shrink), 1);
  let blob = file;
  if (shrink < 1 || !AS_THEY_ARE.includes(file.type)) {
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
  if (!blob) throw new Error("A picture of this form is no longer in this browser: add it again.");
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error("A picture of this form cannot be read."));
    reader.readAsDataURL(blob);
  });
}

const blanks = new Map();

/** A forecast depends on the size of a picture alone: an empty one spares the upload. */
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
 * Submit, safely: what was sent without an answer (a broken line, a closed page) is sent again with
 * the same key, which answers with the same task.
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
    if (!(error instanceof api.Away)) settled(key);
    throw error;
  }
}

function settled(key) {
  const open = (read("sending") ?? []).filter((one) => one.key !== key);
  write("sending", open.length ? open : null);
}

/** Send what a closed page left without an answer; found(answer, request) for each. */
export async function sendAgain(found) {
  for (const { key, request } of read("sending") ?? []) {
    try {
      found(await api.generate(await bodyOf(request), key), request);
    } catch (error) {
      if (error instanceof api.Away) return;
    }
    settled(key);
  }
}
