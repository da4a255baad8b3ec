// The values of the form's fields, as they are kept in the browser.

export const UPSCALES = [1.5, 2, 3, 4];
export const EMPTY = {
  prompt: "",
  lines: false,
  expand_wildcards: true,
  model: null,
  shape: "1:1",
  scale: "Large",
  width: null,
  height: null,
  n: 1,
  steps: null,
  guidance: null,
  upscale: "",
  negative_prompt: "",
  seed_mode: "random",
  seed: "",
  format: "JPEG",
  image_strength: 0.4,
  mask_feather: 8,
  control_strength: null,
  control_type: "",
  loras: {},
  tags: "",
};
export const NUMBERS = ["n", "steps", "guidance", "width", "height", "image_strength", "mask_feather", "control_strength"];
export const CHECKS = ["lines", "expand_wildcards"];
export const TEXTS = ["prompt", "negative_prompt", "seed", "upscale", "format", "control_type", "tags"];

/** Twice for a model that only upscales, if nothing was chosen. */
export function upscaleOf(state, model) {
  return state.upscale || (model.needs.includes("upscale") ? "2" : "");
}
