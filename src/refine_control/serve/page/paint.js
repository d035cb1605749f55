// The canvas on which the hole is painted: by mouse, pen, finger or keyboard, in the model's own pixels.

import { show } from "./picture.js";

const SHOWN = 512; // canvas pixels a side, or the model's where that is more
const MOST_UNDO = 50;
const [HOLE, STRIPE] = ["#5546d6e0", "#8f83ffe0"]; // striped, so that no picture hides it
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

const STRIPES = stripes();

export class Painter {
  #picture = document.createElement("canvas");
  #past = [];
  #cursor = null; // where the brush is, in model pixels; null while it is elsewhere
  #last = null; // the stroke's last point; null between strokes
  #erases = false; // this stroke

  /** onChange is called after every stroke, undo, clear and new picture. */
  constructor(canvas, onChange) {
    Object.assign(this, { canvas, onChange, side: 0, brush: 1, erasing: false });
    this.#listen();
  }

  /** A new picture (RGBA bytes), with a disk in its middle as first hole: there is something to fill at once. */
  load(pixels, side) {
    const { canvas } = this;
    if (side !== this.side) this.brush = Math.max(1, Math.round(side / 6));
    Object.assign(this, { pixels, side, zoom: Math.max(1, Math.round(SHOWN / side)), hole: new Uint8Array(side * side) });
    canvas.width = canvas.height = side * this.zoom;
    show(this.#picture, pixels, side);
    this.#past = [];
    this.#stamp(side / 2, side / 2, side * 0.45, 1);
    this.#changed();
  }

  get share() {
    return this.side && this.hole.reduce((sum, pixel) => sum + pixel, 0) / this.hole.length;
  }

  undo() {
    if (!this.#past.length || this.#last) return;
    this.hole = this.#past.pop();
    this.#changed();
  }

  clear() {
    if (!this.share) return;
    this.#remember();
    this.hole.fill(0);
    this.#changed();
  }

  #listen() {
    const { canvas } = this;
    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      return [((event.clientX - box.left) / box.width) * this.side, ((event.clientY - box.top) / box.height) * this.side];
    };
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || !event.isPrimary || !this.side) return;
      canvas.setPointerCapture(event.pointerId);
      this.#begin(at(event), this.erasing || event.shiftKey);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!event.isPrimary) return;
      const passed = event.getCoalescedEvents?.() ?? [];
      for (const point of passed.length ? passed : [event]) this.#move(at(point));
    });
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => this.#end());
    canvas.addEventListener("pointerleave", () => this.#leave());
    canvas.addEventListener("blur", () => (this.#end(), this.#leave()));
    canvas.addEventListener("focus", () => {
      // Only from the keyboard: a mouse brings its own place.
      if (canvas.matches(":focus-visible")) this.#move(this.#cursor ?? [this.side / 2, this.side / 2]);
    });
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("keyup", (event) => event.key === " " && this.#end());
  }

  #key(event) {
    if (!this.side) return;
    const [x, y] = this.#cursor ?? [this.side / 2, this.side / 2];
    const stride = Math.max(1, this.side / 32);
    if (ARROWS[event.key]) {
      const [dx, dy] = ARROWS[event.key];
      const within = (place) => Math.min(this.side - 0.5, Math.max(0.5, place));
      this.#move([within(x + dx * stride), within(y + dy * stride)]);
    } else if (event.key === " ") {
      if (!event.repeat) this.#begin([x, y], this.erasing || event.shiftKey);
    } else if (event.key === "z" && (event.ctrlKey || event.metaKey)) {
      this.undo();
    } else return;
    event.preventDefault();
  }

  #begin(point, erases) {
    this.#remember();
    this.#erases = erases;
    this.#last = point;
    this.#move(point);
  }

  #move(point) {
    this.#cursor = point;
    if (this.#last) {
      const [[x0, y0], [x1, y1]] = [this.#last, point];
      const pieces = Math.max(1, Math.ceil(2 * Math.hypot(x1 - x0, y1 - y0)));
      for (let i = 1; i <= pieces; i++) {
        const part = i / pieces;
        this.#stamp(x0 + part * (x1 - x0), y0 + part * (y1 - y0), this.brush, this.#erases ? 0 : 1);
      }
      this.#last = point;
    }
    this.#draw();
  }

  #end() {
    if (!this.#last) return;
    this.#last = null;
    this.#changed();
  }

  #leave() {
    if (this.#last) return;
    this.#cursor = null;
    this.#draw();
  }

  #remember() {
    this.#past = [...this.#past.slice(1 - MOST_UNDO), this.hole.slice()];
  }

  /** A disk; a pixel belongs to it by its centre, and the pixel under the brush always does. */
  #stamp(x, y, width, value) {
    const { side, hole } = this;
    const radius = width / 2;
    for (let row = Math.max(0, Math.floor(y - radius)); row < Math.min(side, y + radius); row++) {
      for (let column = Math.max(0, Math.floor(x - radius)); column < Math.min(side, x + radius); column++) {
        const under = row === Math.floor(y) && column === Math.floor(x);
        if (under || Math.hypot(column + 0.5 - x, row + 0.5 - y) <= radius) hole[row * side + column] = value;
      }
    }
  }

  #changed() {
    this.#draw();
    this.onChange();
  }

  #draw() {
    if (!this.side) return;
    const { canvas, side, zoom } = this;
    const pen = canvas.getContext("2d");
    pen.imageSmoothingEnabled = false;
    pen.drawImage(this.#picture, 0, 0, canvas.width, canvas.height);
    pen.fillStyle = pen.createPattern(STRIPES, "repeat");
    for (let row = 0; row < side; row++) {
      for (let first = 0; first < side; first++) {
        let end = first;
        while (end < side && this.hole[row * side + end]) end++;
        if (end > first) pen.fillRect(first * zoom, row * zoom, (end - first) * zoom, zoom);
        first = end;
      }
    }
    if (this.#cursor) this.#ring(pen, ...this.#cursor.map((place) => place * zoom), (this.brush / 2) * zoom);
  }

  /** The brush, in two colours so that it is seen on every picture. */
  #ring(pen, x, y, radius) {
    for (const [width, colour] of [[5, "#000a"], [2, "#fff"]]) {
      Object.assign(pen, { lineWidth: width, strokeStyle: colour });
      pen.beginPath();
      pen.arc(x, y, radius, 0, 2 * Math.PI);
      pen.stroke();
    }
  }
}

function stripes() {
  const tile = Object.assign(document.createElement("canvas"), { width: 16, height: 16 });
  const pen = tile.getContext("2d");
  pen.fillStyle = HOLE;
  pen.fillRect(0, 0, 16, 16);
  Object.assign(pen, { strokeStyle: STRIPE, lineWidth: 3 });
  for (const shift of [-16, 0, 16]) {
    pen.beginPath();
    pen.moveTo(shift - 4, 20);
    pen.lineTo(shift + 20, -4);
    pen.stroke();
  }
  return tile;
}
