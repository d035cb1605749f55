// One model in its own thread, so that the page never freezes. Messages in: load, fill, stop.
// Messages out: loaded, step (number, ms, pixels where a decode is cheap), filled (pixels, ms), stopped, fault (message).

import { openGraphs } from "./engine.js";
import { Student, paste } from "./student.js";
import { makeEncode } from "./words.js";

const CHEAP = 250; // ms; a dearer decode is done once, at the end
let student = null;
let stopping = false;

self.onmessage = async ({ data }) => {
  try {
    if (data.kind === "stop") stopping = true;
    else if (data.kind === "load") await load(data);
    else await fill(data.request);
  } catch (error) {
    self.postMessage({ kind: "fault", message: String(error?.message ?? error) });
  }
};

async function load({ manifest, tokenizer, graphs, rung, binary }) {
  const encode = makeEncode(JSON.parse(await tokenizer.text()));
  student = new Student(manifest, encode, await openGraphs(graphs, rung, binary));
  self.postMessage({ kind: "loaded" });
}

async function fill(request) {
  stopping = false;
  const began = performance.now();
  let since = began;
  let decoding = 0;
  const onStep = async (number, x0) => {
    const ms = performance.now() - since;
    let pixels = null;
    if (decoding < CHEAP && number < request.steps - 1) {
      const before = performance.now();
      pixels = paste(await student.decode(x0), request.picture, request.hole);
      decoding = performance.now() - before;
    }
    self.postMessage({ kind: "step", number, ms, pixels });
    await breath();
    if (stopping) throw new Stopped();
    since = performance.now();
  };
  try {
    const pixels = await student.fill(request, onStep);
    self.postMessage({ kind: "filled", pixels, ms: performance.now() - began });
  } catch (error) {
    if (!(error instanceof Stopped)) throw error;
    self.postMessage({ kind: "stopped" });
  }
}

/** Lets a stop in. A timer would do too, but takes 4 ms. */
function breath() {
  return new Promise((next) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => (port1.close(), next());
    port2.postMessage(null);
  });
}

class Stopped extends Error {}
