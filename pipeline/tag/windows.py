"""Windows: the pieces of a recording that a model scores, and their features.

A window has the model's input length, or the length that the user wants. Windows begin every `hop` seconds; the last
one ends with the recording, and so may overlap the one before it more than the others do. A recording that is shorter
than a window is one window, whose features are padded with 0 as in evaluation. A tail that is shorter than a frame is
no window. The features are those that a preparation would store for the window: its mean is subtracted, and they are
float16.

N windows, T frames, M mel bins.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ast_core.errors import ConfigError
from ast_core.features import FeatureSettings
from pipeline.prepare.audio.blocks import Block, Lost
from pipeline.prepare.audio.features import clip_fbank

BATCH_WINDOWS = 32
"""Windows of a batch: as many as the clips of a batch of evaluation, whose scores they then equal to the bit."""


@dataclass(frozen=True)
class WindowSettings:
    """Length and distance of windows, in the units that computing them needs."""

    features: FeatureSettings
    num_frames: int
    """Frames of a window."""
    hop_frames: int

    @classmethod
    def of(
        cls, features: FeatureSettings, input_frames: int, window_s: float | None, hop_s: float | None
    ) -> "WindowSettings":
        """Settings from seconds, rounded to frames. By default a window is the model's input, and the hop a window.

        Raises:
            ConfigError: a length is shorter than a frame, or a window longer than the model's input.
        """
        frame_s, longest_s = features.seconds(1), features.seconds(input_frames)
        num_frames = input_frames if window_s is None else round(window_s / frame_s)
        if not 1 <= num_frames <= input_frames:
            raise ConfigError(f"--window-s is {window_s:g}; use {frame_s:g} to {longest_s:g}, the model's input")
        hop_frames = num_frames if hop_s is None else round(hop_s / frame_s)
        if not 1 <= hop_frames <= num_frames:
            length_s = features.seconds(num_frames)
            raise ConfigError(
                f"--hop-s is {hop_s:g}; use {frame_s:g} to {length_s:g}, a window, so that none is missed"
            )
        return cls(features, num_frames, hop_frames)

    @property
    def window_s(self) -> float:
        return self.features.seconds(self.num_frames)

    @property
    def hop_s(self) -> float:
        return self.features.seconds(self.hop_frames)

    @property
    def window_samples(self) -> int:
        """The least samples that have all frames of a window. Its last frame reaches beyond `window_s`."""
        return self.features.num_samples(self.num_frames)


@dataclass(frozen=True)
class Window:
    """A part of a recording, in seconds from its beginning."""

    start_s: float
    end_s: float
    own_start_s: float
    """From here to `own_end_s`, no other window is responsible: overlaps are shared in their middle."""
    own_end_s: float
    fbank_TM: np.ndarray
    """float16, as many frames as there are, up to those of a window."""


def window_starts(length: int, window: int, hop: int, min_tail: int) -> list[int]:
    """The starts of the windows of a recording, in samples or frames.

    Args:
        length: of the recording, at least 1.
        min_tail: A tail behind the last window that is shorter than this gets no window.
    """
    starts = list(range(0, max(1, length - window + 1), hop))
    if length - (starts[-1] + window) >= min_tail:
        starts.append(length - window)
    return starts


class Windower:
    """Cuts blocks of a recording into windows. It keeps no more than two windows and a block in memory."""

    def __init__(self, settings: WindowSettings) -> None:
        self.settings = settings
        self.lost: list[Lost] = []
        """What could not be read so far."""
        features = settings.features
        self._window, self._hop = settings.window_samples, settings.hop_frames * features.frame_shift_samples
        self._rate_hz, self._min_tail = features.sample_rate_hz, features.frame_length_samples
        self._shared_s = (settings.window_s - settings.hop_s) / 2
        self._samples: np.ndarray  # of the run, from position `_dropped` on
        self._next: int  # position of the next window
        self._dropped: int
        self._held: Window | None  # until it is known whether another one follows
        self._start_run(0.0)

    def windows(self, blocks: Iterable[Block]) -> Iterator[Window]:
        """The windows of a recording. Behind a part that could not be read, the first window begins there."""
        for block in blocks:
            if block.begin_s is not None:
                yield from self._end_run()
                self._start_run(block.begin_s)
            self.lost += block.lost
            self._samples = np.concatenate([self._samples, np.clip(block.samples, -1, 1)])
            while len(self._samples) - (self._next - self._dropped) >= self._window:
                yield from self._window_at(self._next)
                self._next += self._hop
                self._drop(self._next - self._hop)
        yield from self._end_run()

    def _start_run(self, begin_s: float) -> None:
        self._begin_s = begin_s
        self._samples = np.empty(0, np.float32)
        self._dropped = self._next = 0
        self._held = None
        self._owned_s = begin_s

    def _end_run(self) -> Iterator[Window]:
        length = self._dropped + len(self._samples)
        starts = window_starts(length, self._window, self._hop, self._min_tail) if length else []
        if starts and (self._held is None or starts[-1] > self._next - self._hop):
            yield from self._window_at(starts[-1])
        if self._held is not None:
            yield self._owning(self._held, self._held.end_s)
        self._start_run(0.0)

    def _window_at(self, start: int) -> Iterator[Window]:
        """Compute a window, hold it, and yield the one before it."""
        samples = self._samples[start - self._dropped :][: self._window]
        fbank = clip_fbank(samples, self.settings.features)[: self.settings.num_frames]
        if not len(fbank):
            return
        start_s = round(self._begin_s + start / self._rate_hz, 6)
        end_s = round(start_s + min(self.settings.window_s, len(samples) / self._rate_hz), 6)
        if self._held is not None:
            yield self._owning(self._held, self._held.end_s - self._shared_s)
        self._held = Window(start_s, end_s, start_s, end_s, fbank)

    def _owning(self, window: Window, until_s: float) -> Window:
        begin_s, self._owned_s = max(window.start_s, self._owned_s), until_s
        return Window(window.start_s, window.end_s, begin_s, until_s, window.fbank_TM)

    def _drop(self, before: int) -> None:
        """Forget samples before a position of the run."""
        self._samples = self._samples[before - self._dropped :]
        self._dropped = before


def fbank_windows(fbank_TM: np.ndarray, settings: WindowSettings) -> list[Window]:
    """The windows of a prepared clip. The first one is what evaluation sees of the clip."""
    seconds, length = settings.features.seconds, len(fbank_TM)
    starts = window_starts(length, settings.num_frames, settings.hop_frames, 1)
    ends = [min(start + settings.num_frames, length) for start in starts]
    shared = (settings.num_frames - settings.hop_frames) / 2
    own_ends = [*(end - shared for end in ends[:-1]), ends[-1]]
    own_starts = [0, *own_ends[:-1]]
    return [
        Window(seconds(start), seconds(end), seconds(own_start), seconds(own_end), fbank_TM[start:end])
        for start, end, own_start, own_end in zip(starts, ends, own_starts, own_ends, strict=True)
    ]


def padded(windows: Sequence[Window], num_frames: int) -> np.ndarray:
    """float16 `[N, num_frames, M]`: the features, padded with 0 as in evaluation."""
    batch = np.zeros((len(windows), num_frames, windows[0].fbank_TM.shape[1]), np.float16)
    for row, window in zip(batch, windows, strict=True):
        row[: len(window.fbank_TM)] = window.fbank_TM
    return batch
