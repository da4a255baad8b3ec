// Numbers, states and errors as text.

/** 0.4 -> "1 s", 75 -> "75 s", 200 -> "3 min" */
export function duration(seconds) {
  const whole = Math.max(Math.ceil(seconds), 1);
  if (whole < 100) return `${whole} s`;
  const minutes = Math.round(whole / 60);
  if (minutes < 100) return `${minutes} min`;
  return `${(whole / 3600).toFixed(1)} h`;
}

export function countdown(seconds) {
  return seconds < 0.5 ? "soon" : duration(seconds);
}

export function some(number, one, many) {
  return number === 1 ? `1 ${one}` : `${number} ${many}`;
}

/** ["a", "b", "c"], "or" -> "a, b or c" */
export function listed(names, last) {
  const most = names.slice(0, -1).join(", ");
  return most ? `${most} ${last} ${names.at(-1)}` : (names[0] ?? "");
}

/** The number of tasks ahead as text: 0 -> "next in the queue". */
export function place(pos) {
  return pos === 0 ? "next in the queue" : `number ${pos + 1} in the queue`;
}

/** Progress of a download of weights. */
export function downloadWords({ model, bytes_done: done, bytes_total: total }) {
  const gb = (bytes) => (bytes / 1e9).toFixed(1);
  return `Downloading ${model}: ${gb(done)}${total ? ` of ${gb(total)}` : ""} GB`;
}

/** The size of the picture, after upscaling: even sides, as the upscaler makes them. */
export function drawnSize({ width, height, upscale }) {
  if (!upscale) return size(width, height);
  const shorter = Math.min(width, height);
  const by = Math.round(shorter * upscale) / shorter;
  return size(...[width, height].map((side) => Math.floor(Math.floor(side * by) / 2) * 2));
}

const EXTENSIONS = { JPEG: "jpg", PNG: "png", WEBP: "webp" };

/** The name of a file that is downloaded: "a lighthouse in the fog 42.png". */
export function fileName(title, seed, format) {
  const words = title.normalize("NFC").replace(/[^\p{L}\p{M}\p{N}]+/gu, " ").trim();
  const short = [...words].slice(0, 60).join("").trim() || "picture";
  return `${short} ${seed}.${EXTENSIONS[format] ?? "png"}`;
}

export const size = (width, height) => `${width} × ${height}`;

/** The title of a model up to the colon. */
export function modelName(model) {
  return model.title === "not described yet" ? model.name : model.title.split(":")[0];
}

export const REASONS = {
  overtaken: "A task with higher priority runs first.",
  model_switch: "Another model has to be loaded first.",
  slower_than_expected: "Slower than expected.",
};

export const PHASES = {
  prompt_expansion: "writing the prompt",
  loading: "loading the model",
  text_encoding: "encoding the prompt",
  denoising: "generating",
  paused: "paused while another task is generated",
  decoding: "decoding the image",
  image_encoding: "encoding the file",
};

/** An error without the details for the operator in brackets: "(ConnectionError: ...)". */
export const short = (error) => plain(error).replace(/ \(\w+: .*\)(?=[:.])/, "");

/** Why a task failed, with the LoRAs it used: one of them is often the reason. */
export function failure({ error, params }) {
  const names = params.loras?.map(({ name }) => name) ?? [];
  return names.length ? `${short(error)} LoRAs of the task: ${names.join(", ")}.` : short(error);
}

const FIELDS = {
  init_image: "input image",
  control_image: "control image",
  negative_prompt: "negative prompt",
  image_strength: "image strength",
  control_strength: "control strength",
  control_type: "control type",
  loras: "LoRAs",
};

/** Names of the API's fields as the form names them. */
const asInForm = (words) =>
  words.replace(/\b[a-z]+_[a-z]+\b|\bloras\b/g, (word) => FIELDS[word] ?? word);

export function plain(error) {
  return asInForm(error?.message || "Something went wrong on the server.");
}
