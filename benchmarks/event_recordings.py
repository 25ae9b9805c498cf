"""Recordings whose truth is known: sounds of the demo, and of ESC-10, at known times in quiet noise.

Training clips are short and have only labels, no times. Sounds of a split are never in another one: those of the demo
are drawn with other seeds, those of ESC-10 come from other folds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ast_core.labels import audioset_labels
from jobs.demo.sounds import GENERATORS, background
from pipeline.prepare.audio.decode import decode_media

RATE_HZ = 16_000
BACKGROUND_DB = -45.0
LEVEL_DB = (-8.0, 0.0)
FADE_S = 0.02
PEAK = 0.9

QUIET_DB = -40.0
"""Below this level, relative to its loudest 20 ms, the beginning and the end of a recorded sound are cut off."""

FOLD_OF_SPLIT = {"train": "123", "eval": "4", "recording": "5"}
"""Folds of ESC-10: the first character of its file names."""

Event = tuple[float, float, str]
"""Start and end in seconds, and class."""


@dataclass
class Sounds:
    """Sounds of each class. The classes are those of the demo, and those of ESC-10 if its folder is given."""

    split: str
    seed: int
    classes: Sequence[str] = ()
    """Those to use; empty: all."""
    esc10: Path | None = None
    _recorded: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = audioset_labels()
        made = {names.names[names.mids.index(mid)]: mid for mid in GENERATORS}
        self._made: Mapping[str, str] = {n: mid for n, mid in made.items() if not self.classes or n in self.classes}
        if self.esc10 is not None:
            for folder in sorted(self.esc10.glob("[0-9]*")):
                files = [file for file in sorted(folder.iterdir()) if file.name[0] in FOLD_OF_SPLIT[self.split]]
                name = f"ESC-10 {folder.name.partition(' - ')[2]}"
                self._recorded[name] = [_trimmed(decode_media(str(file), None, 0.0, None)[0]) for file in files]
        self.rng = np.random.default_rng([self.seed, sorted(FOLD_OF_SPLIT).index(self.split)])

    @property
    def names(self) -> list[str]:
        return [*self._made, *self._recorded]

    def sound(self, name: str, most_s: float) -> np.ndarray:
        """A sound of a class, of length `most_s`, or shorter if a recorded one is."""
        rng, num_samples = self.rng, round(most_s * RATE_HZ)
        if name in self._made:
            waveform = GENERATORS[self._made[name]](rng, num_samples, RATE_HZ)
        else:
            whole = self._recorded[name][int(rng.integers(len(self._recorded[name])))]
            begin = int(rng.integers(max(0, len(whole) - num_samples) + 1))
            waveform = whole[begin : begin + num_samples]
        waveform = waveform / max(float(np.sqrt(np.mean(waveform.astype(np.float64) ** 2))), 1e-6)
        ramp = np.minimum(1, np.arange(len(waveform)) / (FADE_S * RATE_HZ))
        level = 10 ** (rng.uniform(*LEVEL_DB) / 20)
        return (level * waveform * ramp * ramp[::-1]).astype(np.float32)


def training_clip(sounds: Sounds, names: Sequence[str], clip_s: float) -> np.ndarray:
    """A clip with a sound of each class somewhere in it, over the background."""
    rng = sounds.rng
    clip = _background(sounds, clip_s)
    for name in names:
        sound = sounds.sound(name, clip_s * rng.uniform(0.3, 1.0))
        begin = int(rng.integers(len(clip) - len(sound) + 1))
        clip[begin : begin + len(sound)] += sound
    return _scaled(clip)


def recording(sounds: Sounds, length_s: float, every_s: float = 8.0) -> tuple[np.ndarray, list[Event]]:
    """A long recording with an event every `every_s` seconds on average, and the times of the events.

    Events of different classes may overlap. Those of one class are 3 s apart or more.
    """
    rng = sounds.rng
    waveform, truth = _background(sounds, length_s), list[Event]()
    for _ in range(round(length_s / every_s)):
        name = sounds.names[int(rng.integers(len(sounds.names)))]
        sound = sounds.sound(name, float(rng.uniform(2, 8)))
        duration_s = len(sound) / RATE_HZ
        start_s = float(rng.uniform(0, length_s - duration_s))
        if any(e[2] == name and e[0] < start_s + duration_s + 3 and e[1] > start_s - 3 for e in truth):
            continue
        begin = round(start_s * RATE_HZ)
        waveform[begin : begin + len(sound)] += sound
        truth.append((start_s, start_s + duration_s, name))
    return _scaled(waveform), sorted(truth)


def _background(sounds: Sounds, length_s: float) -> np.ndarray:
    noise: np.ndarray = background(sounds.rng, round(length_s * RATE_HZ), RATE_HZ) * np.float32(
        10 ** (BACKGROUND_DB / 20)
    )
    return noise


def _scaled(waveform: np.ndarray) -> np.ndarray:
    return (PEAK / np.abs(waveform).max() * waveform).astype(np.float32)


def _trimmed(waveform: np.ndarray) -> np.ndarray:
    """A recorded sound without its quiet beginning and end."""
    step = RATE_HZ // 50
    blocks = waveform[: len(waveform) // step * step].reshape(-1, step)
    level = np.sqrt((blocks.astype(np.float64) ** 2).mean(axis=1))
    loud = np.flatnonzero(level > level.max() * 10 ** (QUIET_DB / 20))
    return waveform[loud[0] * step : (loud[-1] + 1) * step]
