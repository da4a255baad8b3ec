// The size of a picture: its shape and its scale, or width and height.

import { el, find, icon, setText } from "./dom.js";
import { t } from "./language.js";
import { drawnSize } from "./words.js";

const SHAPES = [
  ["1:1", 1, 1],
  ["4:3", 4, 3],
  ["3:4", 3, 4],
  ["16:9", 16, 9],
  ["9:16", 9, 16],
];
const SCALES = [
  ["Small", 0.5],
  ["Medium", 0.75],
  ["Large", 1],
];
/** Until the models are known. */
const USUAL_SIDES = { side_step: 16, least_side: 16, most_side: 8192 };

/** [width, height] of a state of the form. side: of the largest square picture. */
export function sidesOf({ shape, scale, width, height }, model, side) {
  if (shape === "custom") return [width ?? side, height ?? side];
  const [, across, down] = SHAPES.find(([name]) => name === shape) ?? SHAPES[0];
  const [, share] = SCALES.find(([name]) => name === scale) ?? SCALES[2];
  const pixels = (side * share) ** 2;
  const { side_step: step, least_side: least, most_side: most } = model ?? USUAL_SIDES;
  return [Math.sqrt((pixels * across) / down), Math.sqrt((pixels * down) / across)].map((exact) =>
    Math.min(Math.max(Math.floor(exact / step) * step, least), most),
  );
}

/** The choice that stands for this width and height: {shape, scale}. */
export function shapeOf(width, height, model, side) {
  if (!width) return { shape: "input", scale: "Large" };
  for (const [shape] of SHAPES) {
    for (const [scale] of SCALES) {
      const [across, down] = sidesOf({ shape, scale }, model, side);
      if (across === width && down === height) return { shape, scale };
    }
  }
  return { shape: "custom", scale: "Large" };
}

export function buildSizes() {
  const radio = (name, value, ...words) =>
    el("label", {}, el("input", { type: "radio", name, value }), el("span", {}, ...words));
  const shape = (words, value, across, down) => {
    const frame = el("i", { class: "shape" });
    frame.style.setProperty("--across", across / Math.max(across, down));
    frame.style.setProperty("--down", down / Math.max(across, down));
    return radio("shape", value, frame, words);
  };
  const input = shape(t("form.shape_input"), "input", 4, 4);
  input.id = "shape-input";
  input.querySelector("i").replaceWith(icon("picture"));
  const custom = shape(t("form.shape_custom"), "custom", 4, 4);
  custom.querySelector("i").classList.add("dashed");
  find("shapes").append(input, ...SHAPES.map(([name, a, d]) => shape(name, name, a, d)), custom);
  find("scales").append(...SCALES.map(([name]) => radio("scale", name, t(`form.scale_${name.toLowerCase()}`))));
}

/** sized: whether the model draws at a chosen size; sides: of the state; hasInput: whether a picture gives the size. */
export function showSize({ shape, upscale }, { sized, sides: [width, height], hasInput }) {
  find("size").hidden = !sized;
  find("custom").hidden = shape !== "custom";
  find("scales").hidden = ["custom", "input"].includes(shape);
  find("shape-input").hidden = !hasInput;
  const drawn = drawnSize({ width, height });
  const result = upscale ? `${drawn} → ${drawnSize({ width, height, upscale: Number(upscale) })}` : drawn;
  setText(find("size-words"), shape === "input" ? t("form.as_input_image") : result);
}
