// The microphone.

let live = null;

async function resampled(samples, rate) {
  if (rate === RATE || !samples.length) return samples;
  const length = Math.round((samples.length * RATE) / rate), context = new OfflineAudioContext(1, length, RATE);
  const buffer = context.createBuffer(1, samples.length, rate);
  buffer.copyToChannel(samples, 0);
  const node = context.createBufferSource();
  node.buffer = buffer;
  node.connect(context.destination);
  node.start();
  return (await context.startRendering()).getChannelData(0);
}

// A context at the model's rate, if the browser resamples microphones, else at the microphone's.
function contextFor(stream) {
  for (const options of [{ sampleRate: RATE }, {}]) {
    const context = new AudioContext(options);
    try {
      return [context, context.createMediaStreamSource(stream)];
    } catch (err) {
      context.close();
      if (!("sampleRate" in options)) throw err;
    }
  }
}

// Stops if the user turns to something else, so that `mine` is no longer the current run.
async function startMicrophone(mine) {
  if (!navigator.mediaDevices) throw new Error("browsers give the microphone only to pages over https or on this machine");
  begin("The microphone");
  say("waiting for the microphone …");
  const plain = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
  const stream = await navigator.mediaDevices.getUserMedia({ audio: plain });
  if (mine !== run) return release(stream);
  let context, microphone;
  try {
    [context, microphone] = contextFor(stream);
    await context.audioWorklet.addModule(blobUrl("recorder-source"));
  } catch (err) {
    release(stream, context);
    throw err;
  }
  if (mine !== run) return release(stream, context);
  const recorder = new AudioWorkletNode(context, "recorder", { numberOfOutputs: 0 });
  const keep = Math.round(LIVE_S * context.sampleRate);
  live = { stream, context, windows: [], pieces: [], kept: 0, total: 0 };
  recorder.port.onmessage = ({ data }) => {
    live?.pieces.push(data);
    if (!live) return;
    live.total += data.length;
    live.kept += data.length;
    while (live.kept - live.pieces[0].length >= keep) live.kept -= live.pieces.shift().length;
  };
  microphone.connect(recorder);
  $("microphone").textContent = "Stop";
  $("microphone").setAttribute("aria-pressed", "true");
  $("time").hidden = false;
  say("listening …");
  listen(mine).catch((err) => say(err.message, true));
}

// Score the last window again and again, until the microphone is stopped.
async function listen(mine) {
  while (live && mine === run) {
    const began = performance.now(), rate = live.context.sampleRate, total_s = live.total / rate;
    const all = new Float32Array(live.kept);
    let filled = 0;
    for (const piece of live.pieces) { all.set(piece, filled); filled += piece.length; }
    const samples = await resampled(all, rate);
    if (mine !== run) return;
    const from_s = Math.max(0, total_s - LIVE_S), to_s = Math.max(total_s, 5);
    drawSpectrogram(samples.length < 5 * RATE ? padded(samples, 5 * RATE) : samples);
    showAxis(from_s, to_s);
    if (samples.length >= RATE / 2) {
      try {
        const [window] = await chosen.score(samples.slice(-model.window_samples));
        if (mine !== run || !live) return;
        if (window) takeLive(window, total_s, from_s, to_s);
      } catch (err) {
        if (err instanceof Unreachable && browser.isLoaded) choose(browser);
        else if (mine === run) say(err.message, true);
      }
    }
    await new Promise((resolve) => setTimeout(resolve, Math.max(50, TICK_MS - (performance.now() - began))));
  }
}

function takeLive(window, total_s, from_s, to_s) {
  // The score is of the whole window before now; it is shown from the last one on.
  const start_s = live.windows.at(-1)?.end_s ?? Math.max(0, total_s - (window.end_s - window.start_s));
  live.windows.push({ start_s, end_s: total_s, scores: window.scores });
  while (live.windows[0].end_s < from_s) live.windows.shift();
  showTop(window.scores);
  showEvents(eventsOf(live.windows), from_s, to_s, false);
  say(`listening, ${clock(total_s)}; scored by ${chosen === browser ? "this browser" : "the server"}`);
  document.body.dataset.heard = String(Number(document.body.dataset.heard ?? 0) + 1);
}

function padded(samples, length) {
  const longer = new Float32Array(length);
  longer.set(samples);
  return longer;
}

// Gives the microphone back, so that the browser no longer shows that it is used.
async function release(stream, context) {
  for (const track of stream.getTracks()) track.stop();
  await context?.close();
}

async function stopMicrophone() {
  if (!live) return;
  const { stream, context, windows, total, kept } = live;
  live = null;
  const end_s = total / context.sampleRate, start_s = end_s - kept / context.sampleRate;
  await release(stream, context);
  $("microphone").textContent = "Use the microphone";
  $("microphone").setAttribute("aria-pressed", "false");
  showEvents(eventsOf(windows), start_s, Math.max(end_s, 5), true);
  say(`stopped after ${clock(end_s)}`);
}

$("microphone").onclick = async () => {
  const mine = ++run;
  try {
    if (live) await stopMicrophone(); else await startMicrophone(mine);
  } catch (err) {
    if (mine === run) say(err.name === "NotAllowedError" ? "the browser does not allow this page to use the microphone" : err.message, true);
  }
};
