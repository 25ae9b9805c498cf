// Files.

let run = 0;

async function decoded(file) {
  const audio = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(await file.arrayBuffer());
  const samples = new Float32Array(audio.length);
  for (let c = 0; c < audio.numberOfChannels; c++) {
    const channel = audio.getChannelData(c);
    for (let i = 0; i < samples.length; i++) samples[i] += channel[i] / audio.numberOfChannels;
  }
  return samples;
}

async function tagFile(file) {
  const mine = ++run;
  await stopMicrophone();
  begin(file.name);
  say("reading …");
  let samples = null;
  try {
    samples = await decoded(file);
  } catch {
    // a format that the browser does not read; the server may
  }
  if (mine !== run) return;
  $("time").hidden = samples === null;
  if (samples) {
    drawSpectrogram(samples);
    showAxis(0, samples.length / RATE);
    showPlayer(file, samples.length / RATE);
  }
  try {
    const isHere = samples && chosen === browser;
    const { windows, events, lost } = isHere ? await scoreHere(samples, mine) : await scoreByServer(file, samples, mine);
    if (mine !== run) return;
    if (!windows.length) throw new Error("the recording is too short");
    const end_s = Math.max(...windows.map((window) => window.end_s));
    showTop(highest(windows));
    showEvents(events ?? eventsOf(windows), 0, samples ? samples.length / RATE : end_s, true);
    const what = `${clock(end_s)} of sound, scored by ${events ? "the server" : "this browser"}`;
    say(lost?.length ? `${what}; ${lost.map(lostPart).join("; ")}` : what, lost?.length > 0);
  } catch (err) {
    if (mine !== run) return;
    say(err.message, true);
  }
  progress(null);
  document.body.dataset.done = "yes";
}

function lostPart({ start_s, end_s, message }) {
  return `not read from ${clock(start_s)}${end_s === null ? " on" : ` to ${clock(end_s)}`}: ${message}`;
}

async function scoreByServer(file, samples, mine) {
  say("sending …");
  try {
    return await server.post(file, "", (share) => {
      progress(share < 1 ? share : null);
      if (share === 1) say("scoring …");
    });
  } catch (err) {
    if (!(err instanceof Unreachable) || !browser.isLoaded || !samples) throw err;
    choose(browser);
    return scoreHere(samples, mine);
  }
}

async function scoreHere(samples, mine) {
  const windows = [], size = Math.round(model.window_s * RATE), hop = Math.round(model.hop_s * RATE);
  const last = Math.max(0, samples.length - model.window_samples);
  const starts = [];
  for (let start = 0; start <= last; start += hop) starts.push(start);
  if (last > starts.at(-1) && samples.length - starts.at(-1) - model.window_samples >= model.frame_samples) starts.push(last);
  for (const [i, start] of starts.entries()) {
    say("scoring …");
    progress(i / starts.length);
    const [window] = await browser.score(samples.slice(start, start + model.window_samples));
    if (mine !== run) return { windows };
    if (!window) break;
    const begin_s = start / RATE;
    windows.push({ start_s: begin_s, end_s: Math.min(begin_s + size / RATE, samples.length / RATE), scores: window.scores });
    showTop(highest(windows));
    showEvents(eventsOf(windows), 0, samples.length / RATE, true);
  }
  return { windows };
}

let source = null;
function showPlayer(file, length_s) {
  if (source) URL.revokeObjectURL(source);
  const player = $("player");
  player.src = source = URL.createObjectURL(file);
  player.hidden = false;
  const canvas = $("spectrogram"), head = element("div", undefined, { id: "playhead" });
  const follow = () => {
    const box = canvas.getBoundingClientRect(), around = $("time").getBoundingClientRect();
    head.style.left = `${box.left - around.left + (box.width * player.currentTime) / length_s}px`;
    $("time").append(head);
    if (!player.paused) requestAnimationFrame(follow);
  };
  player.onplay = player.onseeked = follow;
  canvas.onclick = (event) => {
    player.currentTime = (event.offsetX / canvas.clientWidth) * length_s;
  };
}

$("file").onchange = () => $("file").files.length && tagFile($("file").files[0]).finally(() => { $("file").value = ""; });
const drop = $("drop");
document.ondragover = (event) => { event.preventDefault(); drop.classList.add("over"); };
document.ondragleave = (event) => event.relatedTarget || drop.classList.remove("over");
document.ondrop = (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  if (event.dataTransfer.files.length) tagFile(event.dataTransfer.files[0]);
};
