// Zooming and moving a picture in the large view: wheel, pinch, drag, double click, keys, buttons. A swipe turns the page.

import { find, setText } from "./dom.js";
import { t } from "./language.js";

const MOST = 8;
const STEP = 1.5;
const SWIPE_PX = 60;
const CLOSE_TO = 0.01;

export class Zoom {
  #scale = 1;
  #x = 0;
  #y = 0;
  #pointers = new Map();
  #start = null;

  /** stage: the area; image: fills it as large as it fits at scale 1; turn(by): shows the next or the previous one. */
  constructor(stage, image, turn) {
    [this.stage, this.image, this.turn] = [stage, image, turn];
    find("zoom-in").addEventListener("click", () => this.#to(this.#scale * STEP));
    find("zoom-out").addEventListener("click", () => this.#to(this.#scale / STEP));
    find("zoom-fit").addEventListener("click", () => this.#toggle());
    stage.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    image.addEventListener("dblclick", (event) => this.#toggle(event));
    image.addEventListener("load", () => this.#apply());
    image.addEventListener("dragstart", (event) => event.preventDefault());
    image.addEventListener("pointerdown", (event) => this.#down(event));
    image.addEventListener("pointermove", (event) => this.#move(event));
    for (const kind of ["pointerup", "pointercancel"]) image.addEventListener(kind, (event) => this.#up(event));
    addEventListener("resize", () => this.#apply());
  }

  reset() {
    [this.#scale, this.#x, this.#y] = [1, 0, 0];
    this.#apply();
  }

  key(key) {
    if (key === "+" || key === "=") this.#to(this.#scale * STEP);
    if (key === "-") this.#to(this.#scale / STEP);
    if (key === "0") this.reset();
    if (key === "1") this.#to(this.#natural());
  }

  /** The scale at which a pixel of the picture is one of the screen. */
  #natural() {
    const { naturalWidth: width, naturalHeight: height } = this.image;
    const fits = Math.min(this.stage.clientWidth / width, this.stage.clientHeight / height);
    return width && fits ? 1 / (fits * devicePixelRatio) : 1;
  }

  #isFit() {
    return Math.abs(this.#scale - 1) < CLOSE_TO;
  }

  /** From the whole picture to its own pixels and back. */
  #toggle(event) {
    if (!this.#isFit()) return this.reset();
    const natural = this.#natural();
    this.#to(Math.abs(natural - 1) < CLOSE_TO ? 2 : natural, event);
  }

  /** at: the event whose place stays where it is; default: the middle. */
  #to(scale, at = null) {
    const least = Math.min(1, this.#natural());
    const next = Math.min(Math.max(scale, least), Math.max(MOST, this.#natural() * 2));
    const box = this.stage.getBoundingClientRect();
    const x = at ? at.clientX - box.left - box.width / 2 : 0;
    const y = at ? at.clientY - box.top - box.height / 2 : 0;
    this.#x = x - ((x - this.#x) * next) / this.#scale;
    this.#y = y - ((y - this.#y) * next) / this.#scale;
    this.#scale = next;
    this.#apply();
  }

  /** Keeps the picture on the stage, and shows where it is. */
  #apply() {
    const reach = (size) => Math.max((size * (this.#scale - 1)) / 2, 0);
    const within = (value, most) => Math.min(Math.max(value, -most), most);
    this.#x = within(this.#x, reach(this.stage.clientWidth));
    this.#y = within(this.#y, reach(this.stage.clientHeight));
    const moved = `translate(${this.#x}px, ${this.#y}px) scale(${this.#scale})`;
    this.image.style.transform = this.#isFit() ? "" : moved;
    this.stage.classList.toggle("zoomed", this.#scale > 1 + CLOSE_TO);
    const percent = Math.round((100 * this.#scale) / this.#natural());
    setText(find("zoom-fit"), this.#isFit() ? "1:1" : `${percent}\u00a0%`);
    find("zoom-fit").setAttribute("aria-label", this.#isFit() ? t("viewer.zoom_natural") : t("viewer.zoom_fit", { percent }));
    find("zoom-out").disabled = this.#scale <= Math.min(1, this.#natural()) + CLOSE_TO;
  }

  #wheel(event) {
    if (!find("compare").hidden) return;
    event.preventDefault();
    this.#to(this.#scale * Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.002)), event);
  }

  // Pointers: one moves the picture or swipes, two zoom it.

  #down(event) {
    this.image.setPointerCapture(event.pointerId);
    this.#pointers.set(event.pointerId, event);
    this.#begin();
  }

  #begin() {
    const [one, other] = [...this.#pointers.values()];
    this.#start = one && {
      x: this.#x,
      y: this.#y,
      scale: this.#scale,
      at: other ? middle(one, other) : one,
      apart: other ? distance(one, other) : 0,
      single: !other,
    };
  }

  #move(event) {
    if (!this.#pointers.has(event.pointerId)) return;
    this.#pointers.set(event.pointerId, event);
    const [one, other] = [...this.#pointers.values()];
    const start = this.#start;
    if (other) {
      const at = middle(one, other);
      this.#to((start.scale * distance(one, other)) / start.apart, at);
    } else if (this.#scale > 1 + CLOSE_TO) {
      this.#x = start.x + one.clientX - start.at.clientX;
      this.#y = start.y + one.clientY - start.at.clientY;
      this.#apply();
    }
  }

  #up(event) {
    const start = this.#start;
    this.#pointers.delete(event.pointerId);
    const [x, y] = [event.clientX - start.at.clientX, event.clientY - start.at.clientY];
    const swiped = start.single && event.type === "pointerup" && event.pointerType !== "mouse";
    if (swiped && this.#isFit() && Math.abs(x) > SWIPE_PX && Math.abs(x) > 2 * Math.abs(y)) this.turn(x < 0 ? 1 : -1);
    this.#begin();
  }
}

const distance = (one, other) => Math.max(Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY), 1);
const middle = (one, other) => ({
  clientX: (one.clientX + other.clientX) / 2,
  clientY: (one.clientY + other.clientY) / 2,
});
