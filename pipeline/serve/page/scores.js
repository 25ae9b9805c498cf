"use strict";
const $ = (id) => document.getElementById(id);
const model = JSON.parse($("model").textContent);
const RATE = model.rate_hz, TOP = 5, LANES = 6, LIVE_S = 30, TICK_MS = 400, RELEASE = 0.5;

// Scores: by the server, or by the model in this browser. Both give windows [{start_s, end_s, scores: Map}]. A class is
// its number in model.labels, because names may be equal.
const classOf = new Map(model.mids.map((mid, c) => [mid, c]));

function blobUrl(id) {
  return URL.createObjectURL(new Blob([$(id).textContent], { type: "text/javascript" }));
}

const server = {
  async post(body, query, onProgress) {
    const answer = await new Promise((resolve, reject) => {
      const request = new XMLHttpRequest();
      request.open("POST", `/tag?windows=1&top=${Math.min(model.labels.length, 1000)}${query}`);
      request.responseType = "json";
      request.upload.onprogress = (event) => onProgress?.(event.loaded / event.total);
      request.onload = () => resolve(request.response ?? { error: { message: `status ${request.status}` } });
      request.onerror = () => reject(new Unreachable("the server does not answer"));
      request.send(body);
    });
    if (answer.error) throw new Error(answer.error.message);
    return {
      windows: answer.windows.map(({ start_s, end_s, classes }) => (
        { start_s, end_s, scores: new Map(classes.map(({ mid, score }) => [classOf.get(mid), score])) }
      )),
      events: answer.events.map(({ mid, start_s, end_s, peak }) => ({ c: classOf.get(mid), start_s, end_s, peak })),
      lost: answer.lost,
    };
  },
  async score(samples) {
    return (await this.post(samples, `&pcm=f32le&rate=${RATE}`)).windows;
  },
};
class Unreachable extends Error {}

const browser = {
  isLoaded: false,
  waiting: new Map(),
  ask(message, transfer = []) {
    return new Promise((resolve, reject) => {
      const id = this.waiting.size ? Math.max(...this.waiting.keys()) + 1 : 0;
      this.waiting.set(id, { resolve, reject });
      this.worker.postMessage({ id, ...message }, transfer);
    });
  },
  async load() {
    this.worker = new Worker(blobUrl("engine-source"));
    this.worker.onmessage = ({ data: { id, result, error } }) => {
      const { resolve, reject } = this.waiting.get(id);
      this.waiting.delete(id);
      if (error === undefined) resolve(result); else reject(new Error(error));
    };
    this.worker.onerror = (event) => {
      for (const { reject } of this.waiting.values()) reject(new Error(event.message || "its worker ended"));
      this.waiting.clear();
    };
    const bytes = await download("/model.onnx", (share) => progress(share));
    const threads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
    await this.ask({ work: "load", runtime: new URL("/ort/", location).href, model: bytes, threads }, [bytes]);
    this.isLoaded = true;
  },
  async score(samples) {
    const { start_s, end_s, scores } = await this.ask({ work: "score", samples });
    const size = model.labels.length;
    return Array.from(start_s, (start, w) => ({
      start_s: start, end_s: end_s[w],
      scores: new Map(model.labels.map((_, c) => [c, scores[w * size + c]])),
    }));
  },
};

async function download(path, onProgress) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`${path} could not be loaded`);
  const total = Number(answer.headers.get("content-length")), parts = [];
  let loaded = 0;
  for (const reader = answer.body.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    onProgress((loaded += value.length) / total);
  }
  return new Blob(parts).arrayBuffer();
}

let chosen = server;
function choose(engine) {
  chosen = engine;
  $("engine").value = engine === browser ? "browser" : "server";
}
$("engine").onchange = () => choose($("engine").value === "browser" ? browser : server);

async function fastest() {
  const noise = Float32Array.from({ length: Math.round(RATE * Math.min(model.window_s, 2)) }, () => 0.1 * (Math.random() - 0.5));
  const times = [];
  for (const engine of [server, browser]) {
    let best = Infinity;
    try {
      for (let i = 0; i < 3 && (i === 0 || best < 1000); i++) {
        const began = performance.now();
        await engine.score(noise.slice());
        best = Math.min(best, performance.now() - began);
      }
    } catch (err) {
      if (engine === browser) throw err;
    }
    times.push(best);
  }
  const [ofServer, ofBrowser] = times;
  choose(ofBrowser <= ofServer ? browser : server);
  const words = (ms) => (ms === Infinity ? "does not answer" : `${ms.toFixed(0)} ms`);
  $("speed").textContent = `a window takes ${words(ofBrowser)} in this browser, ${words(ofServer)} with the server: ` +
    (chosen === browser ? "this browser is faster, and sounds do not leave it" : "the server is faster");
}

async function prepare() {
  $("load").hidden = true;
  $("speed").textContent = "loading the model into this browser …";
  try {
    await browser.load();
    $("engine").options[1].disabled = false;
    await fastest();
  } catch (err) {
    $("speed").textContent = `the model does not run in this browser (${err.message})`;
  }
  progress(null);
  document.body.dataset.ready = "yes";
}

if (!model.in_browser) {
  $("speed").textContent = "this server has no model for browsers";
  document.body.dataset.ready = "yes";
} else if (model.bytes > model.most_bytes) {
  $("speed").textContent = "";
  $("load").hidden = false;
  $("load").textContent = `load the model into this browser (${(model.bytes / 1e6).toFixed(0)} MB)`;
  $("load").onclick = prepare;
  document.body.dataset.ready = "yes";
} else {
  prepare();
}
