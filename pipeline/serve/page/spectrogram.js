// The spectrogram: 512-point FFTs, mel rows, decibels. It is for the eye; scores come from the model's own features.

const FFT = 512, ROWS = 128, FLOOR_DB = -85, CEILING_DB = 0;
const hann = Float32Array.from({ length: FFT }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / FFT));
const mel = (hz) => 1127 * Math.log(1 + hz / 700), hz = (m) => 700 * (Math.exp(m / 1127) - 1);
const binOfRow = Array.from({ length: ROWS + 1 }, (_, row) => (hz((mel(RATE / 2) * row) / ROWS) * FFT) / RATE);
const COLOURS = [[0, 0, 4], [40, 11, 84], [101, 21, 110], [159, 42, 99], [212, 72, 66], [245, 125, 21], [250, 193, 39], [252, 255, 164]];

function powers(samples, from) {
  const re = new Float32Array(FFT), im = new Float32Array(FFT);
  for (let i = 0, j = 0; i < FFT; i++) {
    re[j] = (samples[from + i] ?? 0) * hann[i];
    for (let bit = FFT >> 1; (j ^= bit) < bit; bit >>= 1);
  }
  for (let size = 2; size <= FFT; size <<= 1) {
    const half = size >> 1, step = (-2 * Math.PI) / size;
    for (let k = 0; k < half; k++) {
      const c = Math.cos(step * k), s = Math.sin(step * k);
      for (let i = k; i < FFT; i += size) {
        const j = i + half, r = re[j] * c - im[j] * s, q = re[j] * s + im[j] * c;
        re[j] = re[i] - r; im[j] = im[i] - q; re[i] += r; im[i] += q;
      }
    }
  }
  return re.map((value, i) => (value * value + im[i] * im[i]) / (FFT * FFT / 16));
}

function drawColumn(image, column, samples, from) {
  const power = powers(samples, from);
  for (let row = 0; row < ROWS; row++) {
    const low = Math.floor(binOfRow[row]), high = Math.max(low + 1, Math.ceil(binOfRow[row + 1]));
    let most = 1e-12;
    for (let bin = low; bin < high; bin++) most = Math.max(most, power[bin]);
    const share = Math.min(1, Math.max(0, (10 * Math.log10(most) - FLOOR_DB) / (CEILING_DB - FLOOR_DB)));
    const place = share * (COLOURS.length - 1), at = Math.min(COLOURS.length - 2, Math.floor(place)), part = place - at;
    const pixel = 4 * ((ROWS - 1 - row) * image.width + column);
    for (let c = 0; c < 3; c++) image.data[pixel + c] = COLOURS[at][c] + part * (COLOURS[at + 1][c] - COLOURS[at][c]);
    image.data[pixel + 3] = 255;
  }
}

function drawSpectrogram(samples) {
  const canvas = $("spectrogram"), context = canvas.getContext("2d");
  canvas.width = Math.max(64, Math.min(1200, Math.ceil(samples.length / 160)));
  const image = context.createImageData(canvas.width, ROWS);
  for (let column = 0; column < canvas.width; column++) {
    drawColumn(image, column, samples, Math.floor((column * Math.max(0, samples.length - FFT)) / canvas.width));
  }
  context.putImageData(image, 0, 0);
}

function begin(name) {
  $("result").hidden = false;
  $("name").textContent = name;
  $("top").replaceChildren();
  $("lanes").replaceChildren();
  $("events-box").hidden = $("none").hidden = $("player").hidden = true;
  $("playhead")?.remove();
  delete document.body.dataset.done;
}
