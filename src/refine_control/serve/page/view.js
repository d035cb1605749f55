// What the page shows beside the picture being painted: its state, the models, the results.

import { describe } from "./model.js";
import { show } from "./picture.js";

export const $ = (id) => document.getElementById(id);

let wasFocused = null; // what the keyboard was on when it was disabled

/** state: loading, ready, busy, done, error, or failed where nothing goes on; tests and style.css read it. words replace the status line. */
export function setState(state, words) {
  document.body.dataset.state = state;
  $("stop").hidden = state !== "busy";
  $("fill").setAttribute("aria-disabled", isWaiting()); // not disabled: that would take the keyboard's focus from it
  const focused = document.activeElement;
  for (const part of [$("models"), $("engine"), $("compare")]) part.disabled = isWaiting();
  if (isWaiting() && focused.matches(":disabled")) wasFocused = focused;
  if (!isWaiting() && wasFocused) {
    if (document.activeElement === document.body) wasFocused.focus();
    wasFocused = null;
  }
  if (words !== undefined) $("status").textContent = words;
}

/** Whether nothing new can be begun now. */
export const isWaiting = () => ["loading", "busy", "failed"].includes(document.body.dataset.state);

export function setProgress(part) {
  $("progress").value = part;
}

/** One line that has to be read: a fault, or a way that had to be left. Empty takes it away. */
export function say(message, fault = true) {
  $("message").textContent = message;
  $("message").hidden = !message;
  $("message").classList.toggle("fault", fault);
  if (message) $("message").scrollIntoView({ block: "nearest" });
}

export const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 1)} s`);
const millions = (count) => `${(count / 1e6).toFixed(count < 1e7 ? 1 : 0)} M`;
const megabytes = (count) => `${(count / 1e6).toFixed(count < 1e7 ? 1 : 0)} MB`;

/** A radio button for each model. onChoose: (model). */
export function listModels(models, onChoose) {
  for (const model of models) {
    const label = $("one-model").content.cloneNode(true);
    const radio = label.querySelector("input");
    Object.assign(radio, { value: model.name, checked: model === models[0] });
    radio.addEventListener("change", () => onChoose(model));
    label.querySelector("strong").textContent = model.name;
    model.small = label.querySelector("small");
    $("models").append(label);
    tellModel(model);
  }
}

/** What a model weighs, and what a step of it takes once that is known. */
export function tellModel(model) {
  const { params } = model.manifest;
  const pace = model.msPerStep === null ? "" : ` · ${seconds(model.msPerStep)} a step`;
  model.small.textContent = `${megabytes(model.bytes)} · ${millions(params)} parameters${pace}`;
}

/** How each of the models that were opened runs, and why not faster. */
export function tellEngine(models) {
  const opened = models.filter((model) => model.rung);
  const lines = opened.map(({ name, rung }) => `${name} runs on ${describe(rung)}${whyNotFaster(rung)}.`);
  $("runs").textContent = lines.join(" ");
}

function whyNotFaster({ engine, threads, lacksGpu }) {
  if (engine !== "wasm") return "";
  const reasons = [lacksGpu && "this browser offers no WebGPU", threads === 1 && whyOneThread()].filter(Boolean);
  return reasons.length ? `: ${reasons.join("; ")}` : "";
}

function whyOneThread() {
  if (!self.isSecureContext) return "threads need https, or a page of this machine (localhost)";
  if (!self.crossOriginIsolated) return "the server does not isolate this page (COOP and COEP headers), and threads need that";
  return navigator.hardwareConcurrency === 2 && "the second of two cores is left to the rest of the device";
}

/** A frame for each model's result: [{ draw(pixels), tell(words), allow() }]. */
export function listResults(models, side) {
  $("results").replaceChildren();
  return models.map((model) => {
    const figure = $("one-result").content.cloneNode(true).firstElementChild;
    const canvas = figure.querySelector("canvas");
    const button = figure.querySelector("button");
    const frame = {
      draw: (pixels) => show(canvas, pixels, side),
      tell: (words) => (figure.querySelector("small").textContent = words),
      allow: () => (button.disabled = false),
    };
    canvas.setAttribute("aria-label", `Result of ${model.name}`);
    figure.querySelector("strong").textContent = model.name;
    button.addEventListener("click", () => download(canvas, `filled-by-${model.name}.png`));
    $("results").append(figure);
    return frame;
  });
}

function download(canvas, name) {
  canvas.toBlob((blob) => {
    const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // Safari reads it late
  }, "image/png");
}

/** A button for each example, its picture on it. onChoose: (example). */
export function listExamples(examples, onChoose) {
  $("examples").replaceChildren();
  for (const example of examples) {
    const button = Object.assign(document.createElement("button"), { type: "button", title: example.prompt });
    const canvas = document.createElement("canvas");
    button.setAttribute("aria-label", `Example: ${example.prompt}`);
    show(canvas, example.pixels, Math.sqrt(example.pixels.length / 4));
    button.append(canvas);
    button.addEventListener("click", () => onChoose(example));
    $("examples").append(button);
  }
}
