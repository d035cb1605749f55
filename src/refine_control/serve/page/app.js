// The page: what is pressed, dropped and typed -> picture, hole and words -> the models -> results.

import { Fault, getBlob, getJson } from "./files.js";
import { Model, describe, hasGpu } from "./model.js";
import { Painter } from "./paint.js";
import { readPicture } from "./picture.js";
import { paste } from "./student.js";
import { $, isWaiting, listExamples, listModels, listResults, say, seconds, setProgress, setState } from "./view.js";
import { tellEngine, tellModel } from "./view.js";

// The smallest module with a SIMD instruction, as in GoogleChromeLabs/wasm-feature-detect.
const SIMD = new Uint8Array([
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11,
]);

let models = [];
let chosen = null;
const painter = new Painter($("hole"), tellHole);
let source = null; // { blob, name } of the picture: read again for a model of another resolution
let reading = 0; // counts the pictures asked for; of two at once the later one wins
let stopped = false;
const typed = new Map(); // "steps", "guidance" -> what was typed: it goes for every model

/** Does it, and shows what goes wrong: the page is never left blank or waiting. */
async function safely(action) {
  try {
    await action();
  } catch (error) {
    complain(error);
    setState(chosen ? "error" : "failed", chosen ? "Ready to try again." : "The page could not start.");
  }
}

function complain(error) {
  if (!(error instanceof Fault)) console.error(error);
  say(error instanceof Fault ? error.message : `Something went wrong: ${error?.message ?? error}`);
}

async function start() {
  if (typeof WebAssembly !== "object" || !WebAssembly.validate(SIMD)) {
    throw new Fault("This browser's WebAssembly has no SIMD, which the models need. Use one of 2023 or later.");
  }
  const examplesOrNone = getJson("examples/examples.json").catch(() => []); // a site may do without
  const [names, examples] = await Promise.all([getJson("models.json"), examplesOrNone]);
  const faults = [];
  models = await usable(names, (name) => Model.named(name), faults);
  if (!models.length) throw faults[0] ?? new Fault("This site has no models. Export one into it.");
  listModels(models, (model) => safely(() => choose(model)));
  $("compare-label").hidden = models.length < 2;
  const { resolution } = models[0].manifest;
  const read = async (example) => {
    const blob = await getBlob(example.image);
    return { ...example, blob, pixels: await readPicture(blob, resolution, example.image) };
  };
  const shown = await usable(examples, read, faults);
  listExamples(shown, (example) => takeExample(example).catch(complain));
  chosen = models[0];
  if (shown.length) await takeExample(shown[0]);
  await choose(chosen);
  if (faults.length) say(faults.map(({ message }) => message).join(" "));
  if (!(await hasGpu())) Object.assign($("engine").querySelector('[value="webgpu"]'), { disabled: true, text: "WebGPU: not here" });
}

/** What `make` makes of each, without those that fail; their errors are added to `faults`. */
async function usable(each, make, faults) {
  const made = await Promise.allSettled(each.map(make));
  faults.push(...made.filter(({ status }) => status === "rejected").map(({ reason }) => reason));
  return made.filter(({ status }) => status === "fulfilled").map(({ value }) => value);
}

/** With the words that belong to it. Refused, picture and words that were there stay. */
async function takePicture(blob, name, prompt = "") {
  const turn = ++reading;
  const side = chosen.manifest.resolution;
  const pixels = await readPicture(blob, side, name);
  if (turn !== reading) return;
  source = { blob, name };
  if (prompt !== null) $("prompt").value = prompt;
  if (!isWaiting()) forgetResults();
  painter.load(pixels, side);
  Object.assign($("brush"), { max: Math.max(2, Math.round(side / 2)), value: painter.brush });
  say("");
}

/** What was drawn for another picture. */
function forgetResults() {
  listResults([]);
  setProgress(0);
  setState("ready");
}

function tellHole() {
  if (isWaiting()) return; // the line tells for what
  if (painter.share) say("");
  const percent = Math.ceil(100 * painter.share);
  $("status").textContent = percent ? `The hole covers ${percent} % of the picture.` : "Paint over what is to be filled.";
}

/** What a model is asked for: as it is used, but for what was typed. */
function settingsOf({ manifest: { defaults, only_steps: only } }) {
  const asked = (id, usual) => (typed.get(id) ?? usual);
  return {
    steps: only ?? asked("steps", defaults.num_inference_steps), // all that it has learnt
    guidance: asked("guidance", defaults.guidance_scale),
  };
}

/** Makes a model ready, its picture at its resolution. */
async function choose(model) {
  chosen = model;
  $("steps").max = Math.min(100, model.manifest.scheduler.alphas_cumprod.length);
  const { steps, guidance } = settingsOf(model);
  [$("steps").value, $("guidance").value] = [steps, guidance];
  say("");
  if (source && painter.side !== model.manifest.resolution) await takePicture(source.blob, source.name, null);
  await open(model);
  tellEngine(models);
  setState("ready", `${model.name} is ready.`);
}

/** What is told while a model gets going. */
const tell = {
  progress: (part) => setProgress(part),
  lowered: (why, rung) => say(`${why}; it goes on with ${describe(rung)}.`, false),
};

async function open(model) {
  if (model.isOpen) return;
  setState("loading", `Loading ${model.name}…`);
  await model.open($("engine").value, tell);
  setProgress(0);
}

async function fill() {
  if (!source) throw new Fault("Open a picture first.");
  if (!painter.share) throw new Fault("Paint over the part that is to be filled first.");
  say("");
  stopped = false;
  const side = painter.side;
  const asked = $("compare").checked ? models.filter(({ manifest }) => manifest.resolution === side) : [chosen];
  const request = {
    picture: painter.pixels.slice(),
    hole: painter.hole.slice(),
    prompt: $("prompt").value.trim(),
    seed: Number($("seed").value),
  };
  const settings = asked.map(settingsOf);
  const left = models.filter((model) => $("compare").checked && !asked.includes(model)).map(({ name }) => name);
  if (left.length) say(`Left out, made for pictures of another size: ${left.join(", ")}.`, false);
  const frames = listResults(asked, side);
  const grey = new Float32Array(3 * side * side);
  for (const frame of frames) frame.draw(paste(grey, request.picture, request.hole));
  $("results").firstElementChild.scrollIntoView({ block: "nearest" }); // on a phone it is below what is seen
  for (const [i, model] of asked.entries()) {
    await open(model);
    if (!stopped) await fillWith(model, { ...request, ...settings[i] }, frames[i]);
    if (stopped) return setState("ready", "Stopped.");
  }
  setState("done", "Done.");
}

async function fillWith(model, request, frame) {
  let spent = 0;
  setState("busy", `${model.name} draws…`);
  setProgress(0);
  const answer = await model.fill(request, $("engine").value, tell, ({ number, ms, pixels }) => {
    spent = number ? spent + ms : ms; // from the start again, where it had to begin anew
    setProgress((number + 1) / request.steps);
    frame.tell(`step ${number + 1} of ${request.steps}, ${seconds(ms)}`);
    if (pixels) frame.draw(pixels);
  });
  tellEngine(models);
  if (!answer) return;
  frame.draw(answer.pixels);
  model.msPerStep = spent / request.steps;
  tellModel(model);
  frame.tell(`${seconds(answer.ms)}, ${seconds(model.msPerStep)} a step`);
  frame.allow();
}

const takeExample = ({ blob, image, prompt }) => takePicture(blob, `“${image}”`, prompt);

/** The first picture among files that were picked, dropped or pasted. */
function takeFile(files) {
  const [file] = files;
  if (file && chosen) takePicture(file, `“${file.name}”`).catch(complain);
}

function listen() {
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!isWaiting()) safely(fill);
  });
  $("stop").addEventListener("click", () => {
    stopped = true;
    $("fill").focus(); // Stop is about to go
    for (const model of models) model.stop();
    $("status").textContent = "Stopping after this step…";
  });
  $("engine").addEventListener("change", () => {
    for (const model of models) model.close();
    safely(() => choose(chosen));
  });
  for (const id of ["steps", "guidance"]) $(id).addEventListener("input", () => typed.set(id, Number($(id).value)));
  $("undo").addEventListener("click", () => painter.undo());
  $("clear").addEventListener("click", () => painter.clear());
  $("brush").addEventListener("input", () => (painter.brush = Number($("brush").value)));
  $("tool").addEventListener("change", ({ target }) => (painter.erasing = target.value === "erase"));
  $("file").addEventListener("change", () => {
    takeFile($("file").files);
    $("file").value = ""; // the same file may be picked again
  });
  document.addEventListener("paste", (event) => takeFile(event.clipboardData?.files ?? []));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    takeFile(event.dataTransfer.files);
  });
  self.addEventListener("unhandledrejection", (event) => complain(event.reason));
}

listen();
safely(start);
