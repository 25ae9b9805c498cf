"""From the body of a request to its tags: decoding in a sandbox, windows, network, events.

It has the stages of `jobs/tag.py` for one recording at a time, with limits. It runs without Ray.
"""

import queue
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ast_core.labels import LabelVocabulary
from pipeline.prepare.audio.blocks import Block
from pipeline.prepare.audio.decode import check_samples
from pipeline.prepare.audio.mono import Resampler
from pipeline.prepare.clip import ClipError, Reason
from pipeline.prepare.stream import RecordingReader, Source
from pipeline.serve.answers import tags_of
from pipeline.serve.limits import Limits
from pipeline.serve.refusals import refusal_of
from pipeline.serve.upload import PCM_DTYPES, Pcm, Upload
from pipeline.tag.collect import Collector, Scorer, Tagged
from pipeline.tag.pieces import Piece, pieces_of
from pipeline.tag.predictor import Predicted
from pipeline.tag.work import TagSettings

SANDBOX_BYTES = 1 << 30
"""Memory limit of a process that decodes."""

CALL_WINDOWS = 8
"""Windows of a recording that are scored together. The network forms larger batches from several recordings."""


class RecordingTagger:
    """Tags uploads. Several threads may call it; each call takes a sandbox of its own.

    Args:
        num_readers: sandboxes, and so the number of recordings that are decoded at the same time.
    """

    def __init__(
        self,
        settings: TagSettings,
        labels: LabelVocabulary,
        scorer: Scorer,
        limits: Limits,
        *,
        num_readers: int,
    ) -> None:
        self.settings, self.labels, self.scorer, self.limits = settings, labels, scorer, limits
        self._readers: queue.LifoQueue[RecordingReader] = queue.LifoQueue()
        for _ in range(num_readers):
            self._readers.put(RecordingReader(limit_s=limits.timeout_s, memory_bytes=SANDBOX_BYTES))

    def __call__(
        self,
        upload: Upload,
        on_read: Callable[[float], None] = lambda _: None,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> dict[str, Any]:
        """The answer as JSON.

        Args:
            on_read: called with the second up to which windows have been computed; those before it are scored.
            is_wanted: asked before windows are scored whether somebody still waits for the answer.

        Raises:
            Refusal: the recording cannot be read, is too long, has no window, or is not tagged in time.
        """
        ends_s = time.monotonic() + self.limits.timeout_s

        def check() -> None:
            if time.monotonic() >= ends_s or not is_wanted():
                raise refusal_of(Reason.TIMEOUT, f"not tagged within {self.limits.timeout_s:g} s")

        scorer = _CheckedScorer(self.scorer, check)
        if upload.pcm is not None:
            return self._answer(upload, self._pcm_pieces(upload.body, upload.pcm), scorer, on_read)
        reader = self._readers.get()
        try:
            with tempfile.NamedTemporaryFile(prefix="ast-upload-") as file:
                file.write(upload.body)
                file.flush()
                source = Source(file.name)
                blocks = self._bounded(reader.blocks(source, self.settings.windows.features.sample_rate_hz))
                return self._answer(upload, pieces_of(0, source, self.settings.windows, blocks), scorer, on_read)
        finally:
            self._readers.put(reader)

    def stop(self) -> None:
        """End the processes that decode."""
        while not self._readers.empty():
            self._readers.get().stop()

    def _answer(
        self, upload: Upload, pieces: Iterator[Piece], scorer: Scorer, on_read: Callable[[float], None]
    ) -> dict[str, Any]:
        settings = self.settings
        thresholds = settings.thresholds
        if upload.threshold is not None:
            thresholds = np.full(len(thresholds), upload.threshold)
        collect = Collector(scorer, thresholds, settings.events, settings.frame_s, CALL_WINDOWS)
        (tagged,) = collect.tagged(_told(pieces, on_read))
        _check(tagged)
        return tags_of(tagged, self.labels, top=upload.top, window_scores=upload.window_scores)

    def _bounded(self, blocks: Iterator[Block]) -> Iterator[Block]:
        """The blocks of a recording that is not too long."""
        rate_hz, num_samples = self.settings.windows.features.sample_rate_hz, 0
        for block in blocks:
            num_samples += len(block.samples)
            self._check_length(num_samples / rate_hz)
            yield block

    def _check_length(self, length_s: float) -> None:
        if length_s > self.limits.max_recording_s:
            raise ClipError(
                Reason.TOO_LONG,
                f"a request may have {self.limits.max_recording_s:g} s of sound; jobs/tag.py takes any length",
            )

    def _pcm_pieces(self, body: bytes, pcm: Pcm) -> Iterator[Piece]:
        return pieces_of(0, Source("the samples"), self.settings.windows, self._pcm_blocks(body, pcm))

    def _pcm_blocks(self, body: bytes, pcm: Pcm) -> Iterator[Block]:
        kind = np.dtype(PCM_DTYPES[pcm.format])
        if len(body) % kind.itemsize:
            raise ClipError(Reason.NOT_AUDIO, f"{len(body):,} bytes are no whole number of samples of {pcm.format}")
        self._check_length(len(body) / kind.itemsize / pcm.rate_hz)
        samples = np.frombuffer(body, kind).astype(np.float32)
        if kind.kind == "i":
            samples /= 2.0 ** (8 * kind.itemsize - 1)
        resampler = Resampler(self.settings.windows.features.sample_rate_hz)
        waveform = np.concatenate([resampler.add(pcm.rate_hz, samples), resampler.finish()])
        check_samples(waveform, level_share=1.0)
        yield Block(0.0, waveform, 1.0)


@dataclass(frozen=True)
class _CheckedScorer:
    """A scorer that calls `check` first. What that raises ends the tagging."""

    scorer: Scorer
    check: Callable[[], None]

    @property
    def input_frames(self) -> int:
        return self.scorer.input_frames

    def __call__(self, fbank_NTM: np.ndarray) -> Predicted:
        self.check()
        return self.scorer(fbank_NTM)


def _told(pieces: Iterator[Piece], on_read: Callable[[float], None]) -> Iterator[Piece]:
    """The pieces, with a call for each one that has windows."""
    for piece in pieces:
        if piece.windows:
            on_read(piece.windows[-1].end_s)
        yield piece


def _check(tagged: Tagged) -> None:
    """Raises Refusal for a recording that is not tagged."""
    too_long = [part for part in tagged.lost if part.reason is Reason.TOO_LONG]
    if too_long:
        raise refusal_of(Reason.TOO_LONG, too_long[0].message)
    if not len(tagged.start_s):
        if not tagged.lost:
            raise refusal_of(Reason.TOO_SHORT, "less sound than a frame of the features")
        raise refusal_of(tagged.lost[0].reason, tagged.lost[0].message)
