// Painting a mask over the picture that it belongs to, with a mouse, a pen, a finger or the keyboard.

import { el } from "./dom.js";
import { t } from "./language.js";
import { MaskDrawing } from "./mask_drawing.js";
import { openPanel, sheet } from "./panel.js";

/** Of the longer side of the picture. */
const SIZES = { least: 0.01, usual: 0.08, most: 0.5 };
const KEY_STEP = 0.25; // of the brush
const PEN_LEAST = 0.25; // of the brush, with a pen that hardly presses
const DIRECTIONS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/**
 * Lets the visitor paint. source: a Blob; before: the Blob of an earlier mask, or null.
 * Resolves to {blob, width, height} of a PNG with the size of the source, white where it was painted;
 * null: cancelled, or nothing was painted.
 */
export async function paintMask(source, before) {
  await sheet("./mask_brush.css");
  const bitmap = await createImageBitmap(source);
  const drawing = new MaskDrawing(bitmap.width, bitmap.height);
  if (before) drawing.start(await createImageBitmap(before));
  const brush = new Brush(bitmap, drawing);
  let wanted = false;
  const use = () => {
    wanted = true;
    brush.node.closest("dialog").close();
  };
  const actions = el(
    "div",
    { class: "actions" },
    el("p", { class: "hint keys-hint" }, t("mask.keys")),
    el("button", { type: "button", class: "generate", on: { click: use } }, t("mask.use")),
  );
  await openPanel("mask-brush", t("mask.paint"), [brush.tools, brush.node, actions]);
  const painted = wanted && drawing.share() > 0;
  return painted ? { blob: await drawing.blob(), width: drawing.width, height: drawing.height } : null;
}

class Brush {
  #longer;
  #erase = false;
  #pressed = null; // the pointer that paints
  #keyDown = false; // whether the keyboard's brush is on the picture
  #at;
  #ring = el("div", { class: "ring", hidden: true });
  #words = el("output", { class: "hint" });

  constructor(bitmap, drawing) {
    this.drawing = drawing;
    this.#longer = Math.max(bitmap.width, bitmap.height);
    this.#at = [bitmap.width / 2, bitmap.height / 2];
    const picture = el("canvas", { width: bitmap.width, height: bitmap.height, "aria-hidden": "true" });
    picture.getContext("2d").drawImage(bitmap, 0, 0);
    const canvas = drawing.canvas;
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "application");
    canvas.setAttribute("aria-label", t("mask.canvas"));
    this.node = el("div", { class: "paint" }, picture, canvas, this.#ring);
    this.node.style.setProperty("--ratio", bitmap.width / bitmap.height);
    this.tools = this.#buildTools();
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, (event) => this.#up(event));
    canvas.addEventListener("pointerleave", () => this.#pressed === null && (this.#ring.hidden = true));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => this.#lift());
    this.#show();
  }

  get size() {
    return Number(this.slider.value) * this.#longer;
  }

  #buildTools() {
    const tool = (name, erase) =>
      el(
        "label",
        {},
        el("input", { type: "radio", name: "mask-tool", checked: !erase, on: { change: () => (this.#erase = erase) } }),
        el("span", {}, t(name)),
      );
    this.radios = [tool("mask.brush", false), tool("mask.eraser", true)];
    this.slider = el("input", {
      type: "range",
      min: SIZES.least,
      max: SIZES.most,
      step: 0.005,
      value: SIZES.usual,
      "aria-label": t("mask.size"),
    });
    const button = (name, run) =>
      el("button", { type: "button", class: "quiet", on: { click: () => (run(), this.#show()) } }, t(name));
    return el(
      "div",
      { class: "mask-tools" },
      el("div", { class: "choice", role: "radiogroup", "aria-label": t("mask.tool") }, ...this.radios),
      this.slider,
      button("app.undo", () => this.drawing.undo()),
      button("mask.invert", () => this.drawing.invert()),
      button("mask.clear", () => this.drawing.clear()),
      this.#words,
    );
  }

  // Pointers

  #place(event) {
    const box = this.drawing.canvas.getBoundingClientRect();
    return [
      ((event.clientX - box.left) / box.width) * this.drawing.width,
      ((event.clientY - box.top) / box.height) * this.drawing.height,
    ];
  }

  /** Pixels of the brush: a pen paints the wider, the more it presses. */
  #width(event) {
    if (event.pointerType !== "pen") return this.size;
    return this.size * (PEN_LEAST + (1 - PEN_LEAST) * event.pressure);
  }

  #down(event) {
    if (this.#pressed !== null || event.button > 0) return;
    this.#lift();
    this.#pressed = event.pointerId;
    this.drawing.canvas.setPointerCapture(event.pointerId);
    this.#at = this.#place(event);
    // The other end of a pen is its eraser: button 5.
    this.drawing.begin(this.#erase || event.button === 5 || (event.buttons & 32) > 0);
    this.drawing.lineTo(...this.#at, this.#width(event));
    this.#show();
  }

  #move(event) {
    if (this.#pressed !== null && event.pointerId !== this.#pressed) return;
    this.#at = this.#place(event);
    if (event.pointerId === this.#pressed) {
      const events = event.getCoalescedEvents?.() ?? [];
      for (const one of events.length ? events : [event]) this.drawing.lineTo(...this.#place(one), this.#width(one));
      this.#show();
    }
    this.#showRing();
  }

  /** A second finger paints nothing, and ends no stroke. */
  #up({ pointerId }) {
    if (pointerId === this.#pressed) this.#pressed = null;
  }

  // The keyboard

  #key(event) {
    const { key } = event;
    if (key in DIRECTIONS) this.#step(DIRECTIONS[key], event.shiftKey ? 4 : 1);
    else if (key === " " || key === "Enter") this.#press();
    else if (key === "z" && (event.ctrlKey || event.metaKey)) this.drawing.undo();
    else if (key === "b" || key === "e") this.radios[key === "e" ? 1 : 0].querySelector("input").click();
    else if (key === "[" || key === "]") this.slider[key === "]" ? "stepUp" : "stepDown"](2);
    else if (key === "i") this.drawing.invert();
    else return;
    event.preventDefault();
    this.#show();
    this.#showRing();
  }

  #step([across, down], times) {
    const by = this.size * KEY_STEP * times;
    const within = (value, most) => Math.min(Math.max(value, 0), most);
    const { width, height } = this.drawing;
    this.#at = [within(this.#at[0] + across * by, width), within(this.#at[1] + down * by, height)];
    if (this.#keyDown) this.drawing.lineTo(...this.#at, this.size);
  }

  #press() {
    if (this.#keyDown) return this.#lift();
    this.#keyDown = true;
    this.drawing.begin(this.#erase);
    this.drawing.lineTo(...this.#at, this.size);
  }

  #lift() {
    this.#keyDown = false;
    this.#showRing();
  }

  // Showing

  #show() {
    this.#words.textContent = t("mask.share", { n: Math.ceil(this.drawing.share() * 100) });
  }

  #showRing() {
    const { width, height } = this.drawing;
    this.#ring.hidden = false;
    this.#ring.classList.toggle("down", this.#keyDown);
    this.#ring.style.setProperty("left", `${(this.#at[0] / width) * 100}%`);
    this.#ring.style.setProperty("top", `${(this.#at[1] / height) * 100}%`);
    this.#ring.style.setProperty("width", `${(this.size / width) * 100}%`);
  }
}
