"""Synthesised sounds of some AudioSet classes, using only numpy.

A generator makes one *instance* of its class: each call draws pitch, rate and timbre from `rng`. Waveforms are mono
float32. Their level is arbitrary until `mixture` sets it.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Waveform: TypeAlias = NDArray[np.float32]
Generator: TypeAlias = Callable[[np.random.Generator, int, int], Waveform]
Numbers: TypeAlias = Sequence[float] | NDArray

_FADE_S = 0.01
_LEVEL_RANGE_DB = 6.0  # between the loudest and the quietest class of a mixture
_BACKGROUND_DB = (-55.0, -40.0)  # relative to a class at full level
_PEAK = 0.9


# ---- building blocks ----


def _seconds(num_samples: int, sample_rate_hz: int) -> Waveform:
    return np.arange(num_samples, dtype=np.float32) / np.float32(sample_rate_hz)


def _noise(rng: np.random.Generator, num_samples: int) -> Waveform:
    return rng.standard_normal(num_samples, dtype=np.float32)


def _shape(waveform: Waveform, sample_rate_hz: int, gain: Callable[[NDArray], NDArray]) -> Waveform:
    """Multiply the spectrum by `gain(frequency in Hz)`. The length is rounded up to keep the FFT fast."""
    num_fft = -(-len(waveform) // 4096) * 4096
    spectrum = np.fft.rfft(waveform, num_fft)
    spectrum *= gain(np.fft.rfftfreq(num_fft, 1 / sample_rate_hz))
    return np.fft.irfft(spectrum, num_fft)[: len(waveform)].astype(np.float32)


def _band(low_hz: float, high_hz: float, slope: float = 4.0) -> Callable[[NDArray], NDArray]:
    """A band-pass gain: flat between the edges, `6 * slope` dB per octave outside."""

    def gain(hz: NDArray) -> NDArray:
        ratio = np.maximum(hz, 1.0)
        return 1 / np.sqrt((1 + (low_hz / ratio) ** (2 * slope)) * (1 + (ratio / high_hz) ** (2 * slope)))

    return gain


def _resonances(centres_hz: Numbers, widths_hz: Numbers) -> Callable[[NDArray], NDArray]:
    def gain(hz: NDArray) -> NDArray:
        peaks = [1 / (1 + ((hz - centre) / width) ** 2) for centre, width in zip(centres_hz, widths_hz, strict=True)]
        return np.sum(peaks, axis=0)

    return gain


def _wander(rng: np.random.Generator, num_samples: int, sample_rate_hz: int, rate_hz: float) -> Waveform:
    """A smooth random curve with a standard deviation of about 1 that turns about `rate_hz` times a second."""
    num_knots = max(3, int(num_samples / sample_rate_hz * rate_hz * 2) + 2)
    knots = np.linspace(0, num_samples, num_knots)
    return np.interp(np.arange(num_samples), knots, rng.standard_normal(num_knots)).astype(np.float32)


def _phase(hz: NDArray, sample_rate_hz: int) -> Waveform:
    """The running phase in radians of a tone whose frequency at each sample is `hz`."""
    turns = np.cumsum(hz, dtype=np.float64) / sample_rate_hz
    return (2 * np.pi * (turns % 1.0)).astype(np.float32)


def _partials(t: Waveform, hz: Numbers, gains: Numbers, decays_s: Numbers) -> Waveform:
    """A struck or plucked body: decaying sines. Those above the Nyquist frequency are left out."""
    nyquist_hz = 0.5 * len(t) / max(float(t[-1]), 1e-3)
    total = np.zeros_like(t)
    for f, gain, decay in zip(hz, gains, decays_s, strict=True):
        if f < nyquist_hz:
            total += np.float32(gain) * np.sin(np.float32(2 * np.pi * f) * t) * np.exp(t * np.float32(-1 / decay))
    return total


def _place(num_samples: int, events: Sequence[tuple[int, NDArray]]) -> Waveform:
    """The sum of events, each given with its first sample. Samples after the end are cut off."""
    out = np.zeros(num_samples, dtype=np.float32)
    for first, event in events:
        if first < num_samples:
            part = event[: num_samples - first]
            out[first : first + len(part)] += part
    return out


def _beats(
    rng: np.random.Generator, num_samples: int, sample_rate_hz: int, period_s: float, jitter: float
) -> list[int]:
    """First samples of events about `period_s` apart; the first comes within half a period."""
    count = int(num_samples / sample_rate_hz / period_s) + 2
    steps_s = period_s * (1 + jitter * rng.uniform(-1, 1, count))
    starts_s = np.cumsum(steps_s) - steps_s[0] + rng.uniform(0, 0.5 * period_s)
    return [int(start * sample_rate_hz) for start in starts_s if start * sample_rate_hz < num_samples]


# ---- the classes ----


def speech(rng: np.random.Generator, num_samples: int, sample_rate_hz: int) -> Waveform:
    """Vowels of one voice: a pulse train through three formants, syllable by syllable, with a hiss between some."""
    pitch_hz = rng.uniform(90, 240)
    tract = rng.uniform(0.9, 1.15)
    hz = pitch_hz * np.exp(0.12 * _wander(rng, num_samples, sample_rate_hz, 1.5))
    pulses = np.diff(np.floor(np.cumsum(hz, dtype=np.float64) / sample_rate_hz), prepend=0).astype(np.float32)
    pulses *= 10
    breath = 0.05 * _noise(rng, num_samples)
    events = []
    for first in _beats(rng, num_samples, sample_rate_hz, rng.uniform(0.18, 0.28), 0.3):
        length = int(rng.uniform(0.12, 0.2) * sample_rate_hz)
        source = (pulses + breath)[first : first + length]
        if len(source) < 2:
            continue
        formants = np.array([rng.uniform(300, 850), rng.uniform(900, 2200), rng.uniform(2400, 3000)]) * tract
        vowel = _shape(source, sample_rate_hz, _resonances(formants, (60, 90, 150)))
        events.append((first, vowel * np.hanning(len(vowel)).astype(np.float32)))
        if rng.random() < 0.3:
            hiss = _shape(0.25 * _noise(rng, length // 2), sample_rate_hz, _band(4000, 7500))
            events.append((first + length, hiss * np.hanning(len(hiss)).astype(np.float32)))
    return _place(num_samples, events)


def bark(rng: np.random.Generator, num_samples: int, sample_rate_hz: int) -> Waveform:
    """Short rough bursts: harmonics of a pitch that rises and falls, and noise of the same level."""
    peak_hz = rng.uniform(450, 600)
    length = int(rng.uniform(0.13, 0.18) * sample_rate_hz)
    x = np.linspace(0, 1, length, dtype=np.float32)
    events = []
    for first in _beats(rng, num_samples, sample_rate_hz, rng.uniform(0.3, 0.4), 0.15):
        phase = _phase(peak_hz * rng.uniform(0.95, 1.05) * (0.7 + 0.3 * np.sin(np.pi * x**0.7)), sample_rate_hz)
        tone = np.sum([np.sin(k * phase) / k**0.3 for k in range(1, 9)], axis=0)
        hoarse = 2 * _shape(_noise(rng, length), sample_rate_hz, _band(500, 4500))
        events.append((first, (tone + hoarse) * np.minimum(1, x * 15) * (1 - x)))
    return _place(num_samples, events)


def chirp(rng: np.random.Generator, num_samples: int, sample_rate_hz: int) -> Waveform:
    """A bird's phrases: quick whistled sweeps between 3 and 5 kHz."""
    low_hz, high_hz = rng.uniform(2800, 3200), rng.uniform(4300, 4800)
    length = int(rng.uniform(0.08, 0.12) * sample_rate_hz)
    x = np.linspace(0, 1, length, dtype=np.float32)
    rising = x if rng.random() < 0.5 else 1 - x
    note = np.sin(_phase(low_hz + (high_hz - low_hz) * rising, sample_rate_hz)) * np.sqrt(1 - (2 * x - 1) ** 2)
    starts = _beats(rng, num_samples, sample_rate_hz, rng.uniform(0.16, 0.24), 0.15)
    return _place(num_samples, [(first, note * rng.uniform(0.6, 1)) for first in starts])


def plucked_string(rng: np.random.Generator, num_samples: int, sample_rate_hz: int) -> Waveform:
    """Plucked notes of one scale. Higher harmonics decay faster."""
    root_hz, decay_s = rng.uniform(180, 260), rng.uniform(0.4, 0.8)
    pick = rng.uniform(0.1, 0.35)  # where the string is plucked, as a fraction of its length
    t = _seconds(min(num_samples, int(2 * decay_s * sample_rate_hz)), sample_rate_hz)
    k = np.arange(1, 16)
    gains = np.abs(np.sin(np.pi * k * pick)) / k**0.7
    events = []
    for first in _beats(rng, num_samples, sample_rate_hz, rng.uniform(0.25, 0.45), 0.1):
        hz = root_hz * 2 ** (rng.choice([0, 2, 4, 7, 9, 12]) / 12)
        note = _partials(t, k * hz * np.sqrt(1 + 2e-4 * k**2), gains, decay_s / k**0.8)
        events.append((first, note * rng.uniform(0.6, 1)))
    return _place(num_samples, events)


def drum(rng: np.random.Generator, num_samples: int, sample_rate_hz: int) -> Waveform:
    """A drummed rhythm: a low membrane whose pitch drops, and the noise of the stroke."""
    skin_hz, decay_s = rng.uniform(70, 140), rng.uniform(0.06, 0.12)
    t = _seconds(int(0.4 * sample_rate_hz), sample_rate_hz)
    skin = np.sin(_phase(skin_hz * (1 + 1.2 * np.exp(-t / 0.03)), sample_rate_hz)) * np.exp(-t / decay_s)
    events = []
    for first in _beats(rng, num_samples, sample_rate_hz, rng.uniform(0.2, 0.4), 0.03):
        stroke = _shape(_noise(rng, len(t)), sample_rate_hz, _band(300, 2500)) * np.exp(-t / 0.03)
        events.append((first, (skin + 0.5 * stroke) * rng.uniform(0.4, 1)))
    return _place(num_samples, events)


def church_bell(rng: np.random.Generator, num_samples: int, sample_rate_hz: int) -> Waveform:
    """Strokes of one bell: hum, prime, minor third, fifth, nominal and upper partials, ringing on."""
    prime_hz, period_s = rng.uniform(400, 480), rng.uniform(0.5, 0.9)
    ratios = np.array([0.5, 1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.4, 6.8, 8.2]) * rng.normal(1, 0.003, 11)
    t = _seconds(num_samples, sample_rate_hz)
    stroke = _partials(t, prime_hz * ratios, [1.0] * 7 + [0.7] * 4, 2.0 / np.sqrt(ratios + 0.5))
    return _place(num_samples, [(b, stroke) for b in _beats(rng, num_samples, sample_rate_hz, period_s, 0.02)])


def telephone_bell(rng: np.random.Generator, num_samples: int, sample_rate_hz: int) -> Waveform:
    """Two small gongs struck in turn by a clapper, in bursts."""
    low_hz, interval, rate_hz = rng.uniform(1300, 1600), rng.uniform(1.15, 1.25), rng.uniform(18, 26)
    t = _seconds(int(0.25 * sample_rate_hz), sample_rate_hz)
    gongs = [
        _partials(t, np.array([1, 1.6, 2.7, 3.6, 4.4]) * low_hz * ratio, [1, 0.9, 0.8, 0.7, 0.6], [0.08] * 5)
        for ratio in (1.0, interval)
    ]
    strikes = _beats(rng, num_samples, sample_rate_hz, 1 / rate_hz, 0.02)
    ring_s, pause_s = rng.uniform(0.7, 1.2), rng.uniform(0.2, 0.5)
    return _place(
        num_samples,
        [(s, gongs[i % 2]) for i, s in enumerate(strikes) if s / sample_rate_hz % (ring_s + pause_s) < ring_s],
    )


def siren(rng: np.random.Generator, num_samples: int, sample_rate_hz: int) -> Waveform:
    """A rich tone that wails up and down between about 600 and 1500 Hz."""
    low_hz, high_hz, rate_hz = rng.uniform(550, 750), rng.uniform(1200, 1600), rng.uniform(0.5, 2.0)
    t = _seconds(num_samples, sample_rate_hz)
    sweep = 0.5 + 0.5 * np.sin(2 * np.pi * (rate_hz * t + rng.random()))
    phase = _phase(low_hz * (high_hz / low_hz) ** sweep, sample_rate_hz)
    return np.sum([np.sin(k * phase) / k**0.5 for k in range(1, 7)], axis=0)


def train_horn(rng: np.random.Generator, num_samples: int, sample_rate_hz: int) -> Waveform:
    """Five horns that sound one chord, each rich in harmonics."""
    root_hz = rng.uniform(290, 335)
    t = _seconds(num_samples, sample_rate_hz)
    phases = [2 * np.pi * (root_hz * ratio * rng.normal(1, 0.003) * t) for ratio in (1, 1.19, 1.33, 1.59, 2)]
    return np.sum([np.sin(k * phase) / k**0.4 for phase in phases for k in range(1, 9)], axis=0)


def engine(rng: np.random.Generator, num_samples: int, sample_rate_hz: int) -> Waveform:
    """A running motor: many harmonics of its firing rate (25 to 60 Hz), and rumble that pulses with it."""
    firing_hz = rng.uniform(25, 60)
    phase = _phase(firing_hz * np.exp(0.06 * _wander(rng, num_samples, sample_rate_hz, 0.7)), sample_rate_hz)
    pulse = np.exp(6 * (np.cos(phase) - 1)) + 0.5 * np.exp(6 * (np.cos(phase / 2 + rng.uniform(0, 6)) - 1))
    source = pulse - pulse.mean() + 0.5 * pulse * _noise(rng, num_samples)
    return _shape(source, sample_rate_hz, _band(40, rng.uniform(200, 350), 1.0))


def rain(rng: np.random.Generator, num_samples: int, sample_rate_hz: int) -> Waveform:
    """A steady bright hiss, with single drops above it."""
    hiss = _shape(_noise(rng, num_samples), sample_rate_hz, _band(rng.uniform(3500, 4500), 9000, 1.0))
    t = _seconds(int(0.01 * sample_rate_hz), sample_rate_hz)
    starts = rng.integers(0, num_samples, int(num_samples / sample_rate_hz * rng.uniform(20, 60)))
    drops = [
        (int(s), (rng.exponential(1.5) * np.sin(2 * np.pi * rng.uniform(2000, 6000) * t) * np.exp(-t / 0.002)))
        for s in starts
    ]
    return hiss + _place(num_samples, drops)


def wind(rng: np.random.Generator, num_samples: int, sample_rate_hz: int) -> Waveform:
    """Gusts: low noise with a wide resonance, swelling and falling slowly."""
    howl_hz = rng.uniform(300, 450)
    noise = _shape(_noise(rng, num_samples), sample_rate_hz, _resonances((howl_hz, 1.5 * howl_hz), (90, 90)))
    return noise * np.exp(0.4 * _wander(rng, num_samples, sample_rate_hz, rng.uniform(0.5, 1.5)))


def applause(rng: np.random.Generator, num_samples: int, sample_rate_hz: int) -> Waveform:
    """Many hands: short bursts of noise around 1 to 2 kHz at random times, 40 to 120 a second."""
    clap_s = rng.uniform(0.008, 0.014)
    rate_hz = rng.uniform(40, 120)
    impulses = np.zeros(num_samples, dtype=np.float32)
    starts = rng.integers(0, num_samples, int(rate_hz * num_samples / sample_rate_hz))
    np.add.at(impulses, starts, rng.uniform(0.2, 1.0, len(starts)).astype(np.float32))
    kernel = np.exp(-_seconds(int(4 * clap_s * sample_rate_hz), sample_rate_hz) / np.float32(clap_s))
    num_fft = -(-(num_samples + len(kernel)) // 4096) * 4096
    envelope = np.fft.irfft(np.fft.rfft(impulses, num_fft) * np.fft.rfft(kernel, num_fft), num_fft)[:num_samples]
    claps = _noise(rng, num_samples) * np.maximum(envelope, 0).astype(np.float32)
    return _shape(claps, sample_rate_hz, _band(rng.uniform(700, 850), rng.uniform(1500, 1800), 1.5))


def tick_tock(rng: np.random.Generator, num_samples: int, sample_rate_hz: int) -> Waveform:
    """A clock: dry clicks of two kinds in turn, at regular times."""
    t = _seconds(int(0.06 * sample_rate_hz), sample_rate_hz)
    low_hz, decay_s = rng.uniform(1800, 2200), rng.uniform(0.008, 0.012)
    clicks = [
        _shape(_noise(rng, len(t)), sample_rate_hz, _band(low_hz * ratio, 3200)) * np.exp(-t / decay_s)
        for ratio in (1.0, 0.7)
    ]
    starts = _beats(rng, num_samples, sample_rate_hz, 1 / rng.uniform(4.0, 6.0), 0.01)
    return _place(num_samples, [(first, clicks[i % 2]) for i, first in enumerate(starts)])


GENERATORS: Mapping[str, Generator] = MappingProxyType(
    {
        "/m/09x0r": speech,
        "/m/05tny_": bark,
        "/m/07pggtn": chirp,
        "/m/0fx80y": plucked_string,
        "/m/026t6": drum,
        "/m/03w41f": church_bell,
        "/m/07pp8cl": telephone_bell,
        "/m/03kmc9": siren,
        "/m/0284vy3": train_horn,
        "/m/02mk9": engine,
        "/m/06mb1": rain,
        "/m/03m9d0z": wind,
        "/m/028ght": applause,
        "/m/07qjznl": tick_tock,
    }
)
"""MID → generator `(rng, num_samples, sample_rate_hz) -> waveform`, in the order of AudioSet's ontology."""


# ---- mixtures ----


def background(rng: np.random.Generator, num_samples: int, sample_rate_hz: int) -> Waveform:
    """Noise of unit RMS. Its spectrum is between white and a little steeper than pink."""
    slope = rng.uniform(0, 0.6)
    return _unit_rms(_shape(_noise(rng, num_samples), sample_rate_hz, lambda hz: np.maximum(hz, 30.0) ** -slope))


def mixture(rng: np.random.Generator, mids: Sequence[str], duration_s: float, sample_rate_hz: int) -> Waveform:
    """One clip with a sound of each class of `mids`, with random level, onset and length, over a low background."""
    num_samples = round(duration_s * sample_rate_hz)
    clip = _gain(rng.uniform(*_BACKGROUND_DB)) * background(rng, num_samples, sample_rate_hz)
    for mid in mids:
        length = int(num_samples * rng.uniform(0.8, 1.0))
        first = int(rng.integers(0, num_samples - length + 1))
        sound = _unit_rms(GENERATORS[mid](rng, length, sample_rate_hz))
        fade = np.minimum(1, _seconds(length, sample_rate_hz) / _FADE_S)
        clip[first : first + length] += _gain(-rng.uniform(0, _LEVEL_RANGE_DB)) * sound * fade * fade[::-1]
    loudest = np.abs(clip).max()
    return (clip * (_PEAK * _gain(-rng.uniform(0, 6)) / loudest)).astype(np.float32)


def _gain(decibel: float) -> np.float32:
    return np.float32(10 ** (decibel / 20))


def _unit_rms(waveform: Waveform) -> Waveform:
    return waveform / np.float32(max(np.sqrt(np.mean(waveform.astype(np.float64) ** 2)), 1e-6))
