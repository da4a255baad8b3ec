// What is painted of a mask: strokes on a canvas, which can be undone.

/** How it looks over the picture; the style sheet makes it half transparent. */
const COLOUR = "#ff5a1f";
/** Side of the small copy that is counted. */
const COUNTED = 96;
const OPAQUE = 128;

export class MaskDrawing {
  #base = null; // a canvas
  #strokes = []; // {erase, points: [[x, y, width]]} or "invert" or "clear"
  #context;

  constructor(width, height) {
    Object.assign(this, { width, height });
    this.canvas = canvasOf(width, height);
    this.#context = this.canvas.getContext("2d");
    this.#context.lineCap = this.#context.lineJoin = "round";
    this.#context.strokeStyle = this.#context.fillStyle = COLOUR;
  }

  /** Goes on from an earlier mask: its light parts are painted. */
  start(mask) {
    const { width, height } = this;
    this.#base = canvasOf(width, height);
    const context = this.#base.getContext("2d");
    context.drawImage(mask, 0, 0, width, height);
    const pixels = context.getImageData(0, 0, width, height);
    const { data } = pixels;
    const colour = [1, 3, 5].map((at) => parseInt(COLOUR.slice(at, at + 2), 16));
    for (let at = 0; at < data.length; at += 4) {
      const painted = data[at] >= OPAQUE && data[at + 3] >= OPAQUE;
      data.set([...colour, painted ? 255 : 0], at);
    }
    context.putImageData(pixels, 0, 0);
    this.#replay();
  }

  /** Starts a stroke. */
  begin(erase) {
    this.#strokes.push({ erase, points: [] });
  }

  /** Goes on with the stroke. width: of the brush, in pixels. */
  lineTo(x, y, width) {
    const stroke = this.#strokes.at(-1);
    stroke.points.push([x, y, width]);
    this.#line(stroke, stroke.points.length - 1);
  }

  invert() {
    this.#strokes.push("invert");
    this.#draw("invert");
  }

  clear() {
    this.#strokes.push("clear");
    this.#draw("clear");
  }

  undo() {
    if (this.#strokes.pop() !== undefined) this.#replay();
  }

  /** How much of the picture is painted, 0 to 1. */
  share() {
    const small = canvasOf(COUNTED, COUNTED);
    const context = small.getContext("2d");
    context.drawImage(this.canvas, 0, 0, COUNTED, COUNTED);
    const { data } = context.getImageData(0, 0, COUNTED, COUNTED);
    let sum = 0;
    for (let at = 3; at < data.length; at += 4) sum += data[at];
    return sum / 255 / COUNTED ** 2;
  }

  /** The mask as PNG: white where it is painted, else black. */
  blob() {
    const { width, height } = this;
    const canvas = canvasOf(width, height);
    const context = canvas.getContext("2d");
    context.drawImage(this.canvas, 0, 0);
    context.globalCompositeOperation = "source-in";
    context.fillStyle = "white";
    context.fillRect(0, 0, width, height);
    context.globalCompositeOperation = "destination-over";
    context.fillStyle = "black";
    context.fillRect(0, 0, width, height);
    return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  }

  #replay() {
    this.#draw("clear");
    if (this.#base) this.#context.drawImage(this.#base, 0, 0);
    for (const stroke of this.#strokes) this.#draw(stroke);
  }

  #draw(stroke) {
    const { width, height } = this;
    if (stroke === "clear") this.#context.clearRect(0, 0, width, height);
    else if (stroke === "invert") this.#compose("xor", () => this.#context.fillRect(0, 0, width, height));
    else stroke.points.forEach((_, index) => this.#line(stroke, index));
  }

  /** Draws the part of a stroke that leads to this point. */
  #line({ erase, points }, index) {
    const [x, y, width] = points[index];
    const [fromX, fromY] = points[Math.max(index - 1, 0)];
    this.#compose(erase ? "destination-out" : "source-over", () => {
      this.#context.lineWidth = width;
      this.#context.beginPath();
      this.#context.moveTo(fromX, fromY);
      this.#context.lineTo(x, y);
      this.#context.stroke();
      this.#context.beginPath(); // a line without a length is not drawn
      this.#context.arc(x, y, width / 2, 0, 2 * Math.PI);
      this.#context.fill();
    });
  }

  #compose(operation, draw) {
    this.#context.globalCompositeOperation = operation;
    draw();
    this.#context.globalCompositeOperation = "source-over";
  }
}

function canvasOf(width, height) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  return canvas;
}
