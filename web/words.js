// What numbers and states are called, for people.

/** 0.4 -> "1 s", 75 -> "75 s", 200 -> "3 min" */
export function duration(seconds) {
  const whole = Math.max(Math.ceil(seconds), 1);
  if (whole < 100) return `${whole} s`;
  const minutes = Math.round(whole / 60);
  if (minutes < 100) return `${minutes} min`;
  return `${(whole / 3600).toFixed(1)} h`;
}

export function countdown(seconds) {
  return seconds < 0.5 ? "any moment" : duration(seconds);
}

export function some(number, one, many) {
  return number === 1 ? `1 ${one}` : `${number} ${many}`;
}

/** ["a", "b", "c"], "or" -> "a, b or c" */
export function listed(names, last) {
  const most = names.slice(0, -1).join(", ");
  return most ? `${most} ${last} ${names.at(-1)}` : (names[0] ?? "");
}

/** Tasks waiting before it -> its place. */
export function place(pos) {
  return pos === 0 ? "it is next" : `number ${pos + 1} in line`;
}

/** How far the weights of a model are that come from Hugging Face. */
export function downloadWords({ model, bytes_done: done, bytes_total: total }) {
  const gb = (bytes) => (bytes / 1e9).toFixed(1);
  return `Downloading ${model}: ${gb(done)}${total ? ` of ${gb(total)}` : ""} GB`;
}

export const size = (width, height) => `${width} × ${height}`;

/** The first part of a title: what follows a colon explains. */
export function modelName(model) {
  return model.title === "not described yet" ? model.name : model.title.split(":")[0];
}

export const REASONS = {
  overtaken: "An urgent picture went first.",
  model_switch: "Another model has to be loaded first.",
  slower_than_expected: "It is slower than expected.",
};

export const PHASES = {
  loading: "loading the model",
  text_encoding: "reading the prompt",
  denoising: "drawing",
  decoding: "finishing",
  image_encoding: "writing the file",
};

/** Without what stands in brackets for the operator: "(ConnectionError: ...)". */
export const short = (error) => plain(error).replace(/ \(\w+: .*\)(?=[:.])/, "");

export function plain(error) {
  return error?.message || "Something went wrong on the server.";
}
