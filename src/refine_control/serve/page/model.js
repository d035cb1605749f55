// A model of the site: what its manifest says, its files, and the worker that runs it. Where a way of running it fails,
// the next humbler one is tried: WebGPU, then WebAssembly with threads, then with one.

import { BINARIES } from "./engine.js";
import { Fault, getBlob, getJson } from "./files.js";

const FORMAT = 1;
const MOST_THREADS = 4; // and at most every other core: threads wait by spinning, and on busy cores that costs more
const WORTH_A_GPU = 1e9; // multiplications a step; below, sending the work takes longer than doing it
const binaries = new Map(); // engine -> Promise of its Blob, shared by all models
const opened = new Set(); // models that have a worker, and so memory

let adapter;
/** Whether there is a GPU that this page may use. */
export const hasGpu = () => (adapter ??= Promise.resolve(navigator.gpu?.requestAdapter()).then(Boolean, () => false));

/** The ways of running a model, best first. wanted: "auto", "wasm" or "webgpu". */
export async function rungsFor(wanted, macs) {
  const worthOne = wanted === "auto" && macs >= WORTH_A_GPU;
  const gpu = wanted === "webgpu" || (worthOne && (await hasGpu()));
  const threads = self.crossOriginIsolated ? Math.min(Math.ceil(navigator.hardwareConcurrency / 2) || 1, MOST_THREADS) : 1;
  const counts = threads > 1 ? [threads, 1] : [1];
  const rungs = counts.map((count) => ({ engine: "wasm", threads: count, lacksGpu: worthOne && !gpu }));
  return gpu ? [{ engine: "webgpu", threads: 1 }, ...rungs] : rungs;
}

export class Model {
  static async named(name) {
    const folder = `models/${encodeURIComponent(name)}/`;
    const manifest = await getJson(`${folder}refine-control.json`);
    if (manifest.format !== FORMAT) throw new Fault(`“${name}” is of another format than ${FORMAT}; export it again.`);
    return new Model(name, folder, manifest);
  }

  #worker = null;
  #rungs = null;
  #files = null; // Promise of { file: Blob }; kept, so that starting again does not load them anew
  #stopped = false;

  constructor(name, folder, manifest) {
    Object.assign(this, { name, folder, manifest, msPerStep: null });
    const { text, graphs } = manifest;
    this.needs = [...text.tokenizers, ...Object.keys(graphs).filter((g) => g !== "vae_encoder").map((g) => graphs[g].file)];
    this.bytes = this.needs.reduce((sum, file) => sum + manifest.files[file], 0);
  }

  get isOpen() {
    return this.#worker !== null;
  }

  /** How it runs, or is going to: { engine, threads }. */
  get rung() {
    return this.#rungs?.[0] ?? null;
  }

  /**
   * Ready to fill after this.
   *
   * @param wanted "auto", "wasm" or "webgpu"
   * @param tell.progress (part in [0, 1]) while files arrive
   * @param tell.lowered (why, rung) when a humbler way has to do
   */
  async open(wanted, tell) {
    if (this.manifest.text.tokenizers.length !== 1) {
      throw new Fault(`“${this.name}” has two text encoders (SDXL); this page runs models with one.`);
    }
    if (this.#worker) return;
    this.#rungs ??= await rungsFor(wanted, this.manifest.macs);
    for (;;) {
      const files = await this.#fetch(tell.progress);
      try {
        return await this.#start(files);
      } catch (error) {
        this.#lower(error, tell);
      }
    }
  }

  /** The filled picture and what it took: { pixels, ms }, or null when stopped. onStep: ({ number, ms, pixels }). */
  async fill(request, wanted, tell, onStep) {
    this.#stopped = false;
    for (;;) {
      await this.open(wanted, tell);
      if (this.#stopped) return null;
      try {
        return await this.#ask({ kind: "fill", request }, onStep);
      } catch (error) {
        this.#lower(error, tell);
      }
    }
  }

  stop() {
    this.#stopped = true; // it may be loading still, or again
    this.#worker?.postMessage({ kind: "stop" });
  }

  /** Gives worker and memory back; the files stay. */
  close() {
    this.#worker?.terminate();
    this.#worker = this.#rungs = null;
    opened.delete(this);
  }

  #fetch(onProgress) {
    const sizes = this.manifest.files;
    const whole = this.bytes;
    let received = 0;
    const onBytes = (bytes) => onProgress((received += bytes) / whole);
    this.#files ??= Promise.all(
      this.needs.map(async (file) => [file, await getBlob(this.folder + file, sizes[file], onBytes)]),
    ).then(Object.fromEntries);
    this.#files.catch(() => (this.#files = null)); // asked again, it is fetched again
    return this.#files;
  }

  async #start(files) {
    const rung = this.#rungs[0];
    if (!binaries.has(rung.engine)) binaries.set(rung.engine, getBlob(BINARIES[rung.engine]));
    const binary = await binaries.get(rung.engine).catch((error) => {
      binaries.delete(rung.engine);
      throw error;
    });
    const graphs = {};
    for (const [name, { file }] of Object.entries(this.manifest.graphs)) if (files[file]) graphs[name] = files[file];
    this.#worker = new Worker("worker.js", { type: "module" });
    opened.add(this);
    const tokenizer = files[this.manifest.text.tokenizers[0]];
    await this.#ask({ kind: "load", manifest: this.manifest, tokenizer, graphs, rung, binary });
  }

  #ask(message, onStep = () => {}) {
    return new Promise((resolve, reject) => {
      const worker = this.#worker;
      worker.onmessage = ({ data }) => {
        if (data.kind === "step") onStep(data);
        else if (data.kind === "fault") reject(new Error(data.message));
        else resolve(data.kind === "stopped" ? null : data);
      };
      worker.onerror = (event) => {
        event.preventDefault();
        reject(new Error(event.message || "a script of the page could not be loaded; does the server send .mjs as JavaScript?"));
      };
      worker.postMessage(message);
    });
  }

  /** Where memory is short the other models give theirs; else one rung down; where there is none, the error in words. */
  #lower(error, tell) {
    if (error instanceof Fault) throw error;
    const rungs = this.#rungs;
    this.close();
    const others = isOfMemory(error) ? [...opened] : [];
    for (const other of others) other.close();
    const left = others.length ? rungs : rungs.slice(1);
    if (!left.length) throw new Fault(readable(error, this.name));
    this.#rungs = left;
    const closed = others.map(({ name }) => name).join(", ");
    const why = closed ? `Memory was short, so ${closed} was closed` : `${describe(rungs[0])} failed (${error.message.slice(0, 120)})`;
    tell.lowered(why, left[0]);
  }
}

/** "WebAssembly, 2 threads" */
export function describe({ engine, threads }) {
  if (engine === "webgpu") return "WebGPU";
  return `WebAssembly, ${threads === 1 ? "one thread" : `${threads} threads`}`;
}

const isOfMemory = ({ message }) => /memory|alloc|RangeError|out of bounds/i.test(message);

function readable(error, name) {
  const message = error.message.slice(0, 300);
  if (isOfMemory(error)) {
    return `There is not enough memory to run “${name}” here (${message}). Close other tabs, or choose a smaller model.`;
  }
  return `“${name}” does not run here: ${message}`;
}
