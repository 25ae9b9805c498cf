// In a worker: the model by onnxruntime-web. Messages have an id, and the answer has the same.
let session;
const work = {
  async load({ runtime, model, threads }) {
    importScripts(runtime + "ort.wasm.min.js");
    ort.env.wasm.wasmPaths = runtime;
    ort.env.wasm.numThreads = threads;
    ort.env.logLevel = "error";
    session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] });
    return {};
  },
  async score({ samples }) {
    const results = await session.run({ waveform: new ort.Tensor("float32", samples, [samples.length]) });
    const [start_s, end_s, scores] = ["start_s", "end_s", "scores"].map((name) => results[name].data);
    return { start_s, end_s, scores };
  },
};
onmessage = async ({ data }) => {
  try {
    postMessage({ id: data.id, result: await work[data.work](data) });
  } catch (err) {
    postMessage({ id: data.id, error: String(err?.message ?? err) });
  }
};
