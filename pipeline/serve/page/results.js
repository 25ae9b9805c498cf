// What is shown.

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").className = isError ? "error" : "";
}
function progress(share) {
  $("progress").hidden = share === null;
  if (share !== null) $("progress").value = share;
}
const clock = (seconds) => `${Math.floor(seconds / 60)}:${(seconds % 60).toFixed(1).padStart(4, "0")}`;

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function showTop(scores) {
  const best = [...scores].sort((a, b) => b[1] - a[1]).slice(0, TOP);
  $("top").replaceChildren(...best.map(([c, score]) => {
    const row = element("li", undefined, score < model.thresholds[c] ? { class: "off" } : {});
    const bar = element("i");
    bar.style.setProperty("--share", score);
    const track = element("span");
    track.append(bar);
    row.append(element("span", model.labels[c]), track, element("span", score.toFixed(3)));
    return row;
  }));
}

function highest(windows) {
  const scores = new Map();
  for (const window of windows) {
    for (const [c, score] of window.scores) scores.set(c, Math.max(score, scores.get(c) ?? 0));
  }
  return scores;
}

// Runs of windows at or above a share of the class's threshold that reach it. A window counts up to where the next begins.
function eventsOf(windows) {
  const events = [];
  for (const c of highest(windows).keys()) {
    let open = null;
    windows.forEach((window, i) => {
      const score = window.scores.get(c) ?? 0, next = windows[i + 1];
      const end_s = next ? Math.min(window.end_s, next.start_s) : window.end_s;
      if (open && window.start_s > open.end_s) open = null; // the part between could not be read
      if (score < RELEASE * model.thresholds[c]) open = null;
      else if (open) Object.assign(open, { end_s, peak: Math.max(open.peak, score) });
      else events.push((open = { c, start_s: window.start_s, end_s, peak: score }));
    });
  }
  return events.filter(({ c, peak }) => peak >= model.thresholds[c]).sort((a, b) => a.start_s - b.start_s || b.peak - a.peak);
}

function showEvents(events, from_s, to_s, hasTable) {
  const heard = new Map();
  for (const { c, start_s, end_s, peak } of events) {
    if (end_s > from_s) heard.set(c, (heard.get(c) ?? 0) + (end_s - start_s) * peak);
  }
  const most = [...heard].sort((a, b) => b[1] - a[1]).slice(0, LANES).map(([c]) => c);
  $("lanes").replaceChildren(...most.map((c) => {
    const row = element("div", undefined, { class: "lane" }), track = element("div");
    for (const event of events.filter((one) => one.c === c && one.end_s > from_s)) {
      const bar = element("b", undefined, { title: `${clock(event.start_s)} to ${clock(event.end_s)}, ${event.peak.toFixed(3)}` });
      const left = Math.max(0, (event.start_s - from_s) / (to_s - from_s)), right = Math.min(1, (event.end_s - from_s) / (to_s - from_s));
      bar.style.left = `${100 * left}%`;
      bar.style.width = `${100 * (right - left)}%`;
      bar.style.opacity = 0.35 + 0.65 * event.peak;
      track.append(bar);
    }
    row.append(element("span", model.labels[c], { title: model.labels[c] }), track);
    return row;
  }));
  $("events-box").hidden = !hasTable || !events.length;
  $("none").hidden = events.length > 0;
  if (!hasTable) return;
  $("events").replaceChildren(...events.slice(0, 500).map(({ c, start_s, end_s, peak }) => {
    const row = element("tr");
    row.append(element("td", clock(start_s), { class: "number" }), element("td", clock(end_s), { class: "number" }),
      element("td", model.labels[c]), element("td", peak.toFixed(3), { class: "number" }));
    return row;
  }));
}

function showAxis(from_s, to_s) {
  const steps = 4;
  $("axis").replaceChildren(...Array.from({ length: steps + 1 }, (_, i) => {
    const mark = element("i", clock(from_s + (to_s - from_s) * i / steps));
    mark.style.left = `${100 * i / steps}%`;
    return mark;
  }));
}
