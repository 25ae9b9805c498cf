"""Events: from scores over time to times at which a class is heard. Pure functions.

1. The scores of windows become a timeline of segments without overlap: a segment has the mean of the windows over it.
   Frames of a model that has scores of frames are segments already.
2. A median filter over a class's segments removes what is shorter than half of it.
3. Hysteresis: a stretch in which the score stays at or above `release × threshold` is an event if the score reaches the
   threshold in it.
4. Events of a class with a gap of at most `merge_s` between them are one; those shorter than `min_s` are dropped.

W windows, S segments, C classes, E events.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ast_core.calibration import EventTuning
from ast_core.errors import ConfigError

TOUCHING_S = 0.005
"""Times that differ by less are equal: they are sums of frames that were rounded differently."""


@dataclass(frozen=True)
class EventSettings:
    release: float = 0.5
    """Share of the threshold down to which an event that has begun goes on."""
    median_s: float = 0.0
    """Length of the median filter; 0 is none."""
    merge_s: float = 0.0
    """Longest gap between two events of a class that are taken for one."""
    min_s: float = 0.0
    """Shortest event."""

    def __post_init__(self) -> None:
        if not 0 < self.release <= 1:
            raise ConfigError(f"--release is {self.release:g}; use more than 0 and at most 1")
        for name in ("median_s", "merge_s", "min_s"):
            if not 0 <= (value := getattr(self, name)) <= 3600:
                raise ConfigError(f"--{name.replace('_', '-')} is {value:g}; use 0 to 3600 s")

    @classmethod
    def of(cls, tuning: EventTuning | None, **given: float | None) -> "EventSettings":
        """The settings that are given, for others those that were tuned for the model, or the defaults."""
        tuned = {} if tuning is None else {name: getattr(tuning, name) for name in cls.__dataclass_fields__}
        return cls(**tuned | {name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class Timeline:
    """Scores over time. Between `end_s` of a segment and the `start_s` of the next one may be a gap."""

    start_s: np.ndarray
    end_s: np.ndarray
    scores_SC: np.ndarray

    def filtered(self, median_s: float) -> "Timeline":
        """The timeline after a median filter over about `median_s`."""
        if not median_s or not len(self.start_s):
            return self
        size = round(median_s / float(np.median(self.end_s - self.start_s)))
        return Timeline(self.start_s, self.end_s, median_filter(self.scores_SC, size))

    @classmethod
    def together(cls, parts: Sequence["Timeline"]) -> "Timeline":
        return cls(*(np.concatenate(values) for values in zip(*(vars(part).values() for part in parts), strict=True)))


@dataclass(frozen=True)
class Runs:
    """Stretches of time of a class, in the order of time within a class. All arrays are `[E]`."""

    label: np.ndarray
    start_s: np.ndarray
    end_s: np.ndarray
    peak: np.ndarray
    """The highest score of a segment."""
    score_s: np.ndarray
    """The integral of the score over time."""
    heard_s: np.ndarray
    """The time over which it was integrated."""

    def __len__(self) -> int:
        return len(self.label)

    @property
    def mean(self) -> np.ndarray:
        """The mean score, weighted by time."""
        return self.score_s / self.heard_s

    def take(self, which: np.ndarray) -> "Runs":
        return Runs(*(values[which] for values in vars(self).values()))

    @classmethod
    def together(cls, parts: Sequence["Runs"]) -> "Runs":
        return cls(*(np.concatenate(values) for values in zip(*(vars(part).values() for part in parts), strict=True)))


def timeline(start_s: np.ndarray, end_s: np.ndarray, scores_WC: np.ndarray) -> Timeline:
    """Segments of windows that may overlap, in the order of their starts."""
    if len(start_s) == 0 or (start_s[1:] >= end_s[:-1] - TOUCHING_S).all():
        return Timeline(start_s, end_s, scores_WC)
    edges = _distinct(np.concatenate([start_s, end_s]))
    totals = np.zeros((len(edges) - 1, scores_WC.shape[1]), np.float64)
    counts = np.zeros(len(edges) - 1, np.int64)
    firsts = np.searchsorted(edges, start_s - TOUCHING_S)
    lasts = np.searchsorted(edges, end_s - TOUCHING_S)
    for first, last, scores in zip(firsts, lasts, scores_WC, strict=True):
        totals[first:last] += scores
        counts[first:last] += 1
    covered = counts > 0
    scores_SC = (totals[covered] / counts[covered, None]).astype(np.float32)
    return Timeline(edges[:-1][covered], edges[1:][covered], scores_SC)


def owned_frames(
    start_s: float, own_start_s: float, own_end_s: float, frame_s: float, scores_TC: np.ndarray, median_s: float
) -> Timeline:
    """The frames of a window within the time for which it is responsible, after a median filter over all its frames.

    Frame i is about `frame_s` seconds from `start_s + i * frame_s` on. The first and the last segment are cut.
    """
    filtered = median_filter(scores_TC, round(median_s / frame_s))
    begin = start_s + frame_s * np.arange(len(filtered))
    own = (begin + frame_s > own_start_s + TOUCHING_S) & (begin < own_end_s - TOUCHING_S)
    begin, end = np.maximum(begin[own], own_start_s), np.minimum(begin[own] + frame_s, own_end_s)
    if len(end):
        end[-1] = own_end_s  # a model's last frames may be fewer than the window has time for
    return Timeline(begin, end, filtered[own])


def median_filter(scores_SC: np.ndarray, size: int) -> np.ndarray:
    """The median over `size` segments around each one, an odd number (or one more). The ends are repeated beyond."""
    half = size // 2
    if half == 0 or not len(scores_SC):
        return scores_SC
    padded = np.pad(scores_SC, ((half, half), (0, 0)), mode="edge")
    around = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1, axis=0)
    filtered: np.ndarray = np.median(around, axis=-1).astype(scores_SC.dtype)
    return filtered


def runs_above(line: Timeline, low_C: np.ndarray) -> Runs:
    """The stretches of touching segments in which a class's score is at least `low_C`."""
    num_classes = line.scores_SC.shape[1]
    above = line.scores_SC >= low_C
    if not above.any():
        return Runs(np.empty(0, np.int64), *(np.empty(0) for _ in range(5)))
    touches = np.append(False, line.start_s[1:] <= line.end_s[:-1] + TOUCHING_S)
    before = np.vstack([np.zeros((1, num_classes), bool), above[:-1]]) & touches[:, None]
    after = np.vstack([above[1:] & touches[1:, None], np.zeros((1, num_classes), bool)])
    label, first = np.nonzero((above & ~before).T)
    _, last = np.nonzero((above & ~after).T)
    duration = line.end_s - line.start_s
    integral = np.cumsum(line.scores_SC * duration[:, None], axis=0, dtype=np.float64)
    integral = np.vstack([np.zeros(num_classes), integral])
    elapsed = np.append(0.0, np.cumsum(duration))
    by_class = np.append(line.scores_SC.T.ravel(), -np.inf)
    bounds = np.stack([first, last + 1], axis=1) + (label * len(line.start_s))[:, None]
    peaks = np.maximum.reduceat(by_class, bounds.ravel())[::2]  # every second part lies between two runs
    return Runs(
        label,
        line.start_s[first],
        line.end_s[last],
        peaks.astype(np.float64),
        integral[last + 1, label] - integral[first, label],
        elapsed[last + 1] - elapsed[first],
    )


def joined(runs: Runs, gap_s: float) -> Runs:
    """Runs of a class with at most `gap_s` between them become one."""
    if not len(runs):
        return runs
    runs = runs.take(np.lexsort((runs.start_s, runs.label)))
    gap = runs.start_s[1:] - runs.end_s[:-1]
    begins = np.append(True, (runs.label[1:] != runs.label[:-1]) | (gap > max(gap_s, 0) + TOUCHING_S))
    at = np.flatnonzero(begins)
    return Runs(
        runs.label[at],
        runs.start_s[at],
        np.maximum.reduceat(runs.end_s, at),
        np.maximum.reduceat(runs.peak, at),
        np.add.reduceat(runs.score_s, at),
        np.add.reduceat(runs.heard_s, at),
    )


def events_of(runs: Runs, threshold_C: np.ndarray, settings: EventSettings) -> Runs:
    """The events among runs above `release × threshold`, in the order of time."""
    whole = joined(runs, 0.0)
    events = joined(whole.take(whole.peak >= threshold_C[whole.label]), settings.merge_s)
    events = events.take(events.end_s - events.start_s >= settings.min_s - TOUCHING_S)
    return events.take(np.lexsort((events.label, events.start_s)))


def window_events(
    start_s: np.ndarray, end_s: np.ndarray, scores_WC: np.ndarray, threshold_C: np.ndarray, settings: EventSettings
) -> Runs:
    """The events of a recording from the scores of its windows."""
    line = timeline(start_s, end_s, scores_WC).filtered(settings.median_s)
    return events_of(runs_above(line, settings.release * threshold_C), threshold_C, settings)


def _distinct(times: np.ndarray) -> np.ndarray:
    """Sorted times without those that are equal to the one before."""
    ordered = np.sort(times)
    return ordered[np.append(True, np.diff(ordered) > TOUCHING_S)]
