// A request: {fields, inputs}. `fields` are those of POST /generate; `inputs` are lists of images by
// field, each {key, width, height} (in the store) or {task_id, index}.

import * as api from "./api.js";
import { t } from "./language.js";
import { keepPicture, picture } from "./store.js";

const MAX_SIDE = 2560; // photos of phones are larger than any model can use
const SENT_UNCHANGED = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];
const LEAST_PIXELS = 2 ** 20;
const LEAST_REFERENCE_PIXELS = 4 * 2 ** 20; // models look at reference images at up to this size
const LISTS = ["images"];

/** The input for a file, scaled down if it is large. Throws an Error with a message for the user. */
export async function inputOfFile(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(unreadable(file));
  }
  const shrink = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  const unchanged = shrink === 1 && SENT_UNCHANGED.includes(file.type);
  const [width, height] = scaledSides(bitmap, shrink);
  const blob = unchanged ? file : await encoded(bitmap, width, height, file.type);
  bitmap.close();
  return { key: await keepPicture(blob), width, height };
}

function unreadable(file) {
  const heic = /\.hei[cf]$/i.test(file.name) || /^image\/hei[cf]/.test(file.type);
  return t(heic ? "slot.heic" : "slot.unreadable", { name: file.name || t("slot.this_file") });
}

const scaledSides = ({ width, height }, by) => [width, height].map((side) => Math.max(Math.round(side * by), 1));

/** Draws a bitmap at this size. Photos become JPEG, everything else PNG, which keeps transparency. */
async function encoded(bitmap, width, height, type) {
  const canvas = canvasOf(width, height);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  const photo = ["image/jpeg", "image/heic", "image/heif"].includes(type);
  return new Promise((resolve) => canvas.toBlob(resolve, photo ? "image/jpeg" : "image/png", 0.95));
}

function canvasOf(width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas;
}

/** The picture, no larger than a task of this size can use: the upload is most of the time on a slow line. */
async function fitted(blob, { width, height }, leastPixels) {
  const bitmap = await createImageBitmap(blob);
  const least = Math.sqrt(leastPixels / (bitmap.width * bitmap.height));
  const by = Math.max(width / bitmap.width, height / bitmap.height, least);
  const small = by < 1 ? await encoded(bitmap, ...scaledSides(bitmap, by), blob.type) : blob;
  bitmap.close();
  return small.size < blob.size ? small : blob;
}

/** The file of an input. Throws an Error with a message for the user if it is gone. */
export async function blobOf(input) {
  if (!input.task_id) return (await picture(input.key)) ?? Promise.reject(new Error(t("slot.lost")));
  const answer = await fetch(api.imageUrl(input.task_id, input.index));
  return answer.ok ? answer.blob() : Promise.reject(new Error(t("slot.lost")));
}

async function sent(input, name, size, blank) {
  if (input.task_id) return { task_id: input.task_id, index: input.index };
  if (blank) return blankOf(input.width, input.height);
  let blob = await blobOf(input);
  const least = LISTS.includes(name) ? LEAST_REFERENCE_PIXELS : LEAST_PIXELS;
  if (size.width && size.height) blob = await fitted(blob, size, least);
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error(t("slot.lost")));
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

/** The body of POST /generate. blank: with empty pictures, for a forecast. */
export async function bodyOf({ fields, inputs }, blank = false) {
  const body = { ...fields };
  for (const [name, list] of Object.entries(inputs)) {
    const pictures = await Promise.all(list.map((input) => sent(input, name, fields, blank)));
    if (pictures.length) body[name] = LISTS.includes(name) ? pictures : pictures[0];
  }
  return body;
}

export async function estimate(request, signal) {
  return api.estimate(await bodyOf(request, true), signal);
}
