// The one place that knows ONNX Runtime. It runs in the worker.

const LIBRARY = new URL("./lib/ort/", import.meta.url).href;
const PATIENCE = 60_000; // a thread that cannot start would otherwise keep us waiting for ever

/** Which files an engine needs beside its module; the page fetches them, so that starting again does not load them anew. */
export const BINARIES = {
  wasm: "lib/ort/ort-wasm-simd-threaded.wasm",
  webgpu: "lib/ort/ort-wasm-simd-threaded.asyncify.wasm",
};

/**
 * Opens graphs: { name: Blob } -> async (graph, inputs) -> [tensor].
 *
 * @param engine "wasm" or "webgpu"
 * @param threads of the WebAssembly part; more than one needs a cross-origin isolated page
 * @param binary Blob of BINARIES[engine]
 */
export async function openGraphs(graphs, { engine, threads }, binary) {
  const ort = await import(`${LIBRARY}ort.${engine}.min.mjs`);
  ort.env.wasm.wasmPaths = LIBRARY;
  ort.env.wasm.wasmBinary = await binary.arrayBuffer();
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.initTimeout = PATIENCE;
  // Errors only: else it warns of every node that WebGPU leaves on the CPU.
  const options = { executionProviders: [engine], graphOptimizationLevel: "all", logSeverityLevel: 3 };
  const sessions = {};
  for (const [name, blob] of Object.entries(graphs)) {
    sessions[name] = await ort.InferenceSession.create(new Uint8Array(await blob.arrayBuffer()), options);
  }
  return async (graph, inputs) => {
    const feeds = {};
    for (const [name, { data, dims }] of Object.entries(inputs)) {
      feeds[name] = new ort.Tensor(data instanceof Int32Array ? "int32" : "float32", data, dims);
    }
    const outputs = await sessions[graph].run(feeds);
    return sessions[graph].outputNames.map((name) => ({ data: outputs[name].data, dims: outputs[name].dims }));
  };
}
