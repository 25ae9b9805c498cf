"""From windows of many recordings to the scores, events and embeddings of each one.

Batches are formed across recordings, so that short ones do not leave the network half empty. A recording leaves as soon
as its last window is scored.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from pipeline.prepare.audio.blocks import Lost
from pipeline.tag.events import EventSettings, Runs, Timeline, events_of, owned_frames, runs_above, window_events
from pipeline.tag.pieces import Piece
from pipeline.tag.predictor import Predicted
from pipeline.tag.windows import BATCH_WINDOWS, Window, padded


@dataclass(frozen=True)
class Tagged:
    """The results of a recording. A recording without windows failed."""

    recording: int
    start_s: np.ndarray
    end_s: np.ndarray
    scores_WC: np.ndarray
    """float32."""
    embeddings_WD: np.ndarray | None
    events: Runs
    lost: tuple[Lost, ...]
    frames: Timeline | None = None
    """The scores of frames, if they are kept."""


class Scorer(Protocol):
    """A `Predictor`, or what asks one elsewhere."""

    @property
    def input_frames(self) -> int:
        """Frames of a window's features."""

    def __call__(self, fbank_NTM: np.ndarray) -> Predicted:
        """The results for raw log-mel, float16, padded with 0 to `input_frames`."""


@dataclass
class _InProgress:
    windows: list[tuple[float, float]] = field(default_factory=list)
    scores: list[np.ndarray] = field(default_factory=list)
    embeddings: list[np.ndarray] = field(default_factory=list)
    runs: list[Runs] = field(default_factory=list)
    frames: list[Timeline] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)
    num_expected: int | None = None


class Collector:
    """Scores windows in batches and puts the results of each recording together."""

    def __init__(
        self,
        predictor: Scorer,
        thresholds_C: np.ndarray,
        settings: EventSettings,
        frame_s: float | None,
        batch_windows: int = BATCH_WINDOWS,
        *,
        keeps_frames: bool = False,
    ) -> None:
        """Args:
        frame_s: seconds from one frame score to the next; None takes events from scores of windows.
        keeps_frames: whether the scores of frames are part of the results: 76 MB an hour for AudioSet's classes.
        """
        self._predictor, self._thresholds, self._settings = predictor, thresholds_C, settings
        self._frame_s, self._batch_windows, self._keeps_frames = frame_s, batch_windows, keeps_frames
        self._waiting: deque[tuple[int, Window]] = deque()
        self._open: dict[int, _InProgress] = {}

    def tagged(self, pieces: Iterable[Piece]) -> Iterator[Tagged]:
        """The results of all recordings of `pieces`, in the order in which they are complete."""
        for piece in pieces:
            of = self._open.setdefault(piece.recording, _InProgress())
            of.lost += piece.lost
            of.windows += [(window.start_s, window.end_s) for window in piece.windows]
            if piece.is_last:
                of.num_expected = len(of.windows)
            self._waiting.extend((piece.recording, window) for window in piece.windows)
            while len(self._waiting) >= self._batch_windows:
                self._score(self._batch_windows)
            yield from self._complete()
        while self._waiting:
            self._score(min(self._batch_windows, len(self._waiting)))
        yield from self._complete()

    def _score(self, num_windows: int) -> None:
        batch = [self._waiting.popleft() for _ in range(num_windows)]
        windows = [window for _, window in batch]
        predicted = self._predictor(padded(windows, self._predictor.input_frames))
        for i, (recording, window) in enumerate(batch):
            of = self._open[recording]
            of.scores.append(predicted.scores_NC[i])
            if predicted.embeddings_ND is not None:
                of.embeddings.append(predicted.embeddings_ND[i].astype(np.float16))
            if self._frame_s is not None:
                line = self._frames(predicted, i, window, self._frame_s)
                of.runs.append(runs_above(line, self._settings.release * self._thresholds))
                of.frames += [line] if self._keeps_frames else []

    def _frames(self, predicted: Predicted, i: int, window: Window, frame_s: float) -> Timeline:
        assert predicted.frame_scores_NTC is not None
        num_frames = max(1, round((window.end_s - window.start_s) / frame_s))  # the rest is padding
        return owned_frames(
            window.start_s,
            window.own_start_s,
            window.own_end_s,
            frame_s,
            predicted.frame_scores_NTC[i][:num_frames],
            self._settings.median_s,
        )

    def _complete(self) -> Iterator[Tagged]:
        done = [number for number, of in self._open.items() if of.num_expected == len(of.scores)]
        for number in done:
            of = self._open.pop(number)
            start_s, end_s = np.array(of.windows).reshape(-1, 2).T
            scores = np.stack(of.scores) if of.scores else np.empty((0, len(self._thresholds)), np.float32)
            if self._frame_s is None:
                events = window_events(start_s, end_s, scores, self._thresholds, self._settings)
            else:
                runs = Runs.together(of.runs) if of.runs else _NO_RUNS
                events = events_of(runs, self._thresholds, self._settings)
            embeddings = np.stack(of.embeddings) if of.embeddings else None
            frames = Timeline.together(of.frames) if of.frames else None
            yield Tagged(number, start_s, end_s, scores, embeddings, events, tuple(of.lost), frames)


_NO_RUNS = Runs(np.empty(0, np.int64), *(np.empty(0) for _ in range(5)))
