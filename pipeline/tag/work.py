"""What a worker does with a chunk of recordings, and the settings that decide the results. It runs without Ray."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from ast_core.errors import ConfigError
from pipeline.embeddings.stored import EmbeddingsOf
from pipeline.prepare.clip import Reason
from pipeline.prepare.fetch.private_hosts import endpoint_of
from pipeline.prepare.fetch.rate_limiter import Permits
from pipeline.tag.collect import Collector, Tagged
from pipeline.tag.events import EventSettings
from pipeline.tag.inputs import Inputs
from pipeline.tag.output import WriteParts
from pipeline.tag.pieces import Chunk, Piece, Readers, chunks_of, clip_pieces, merged
from pipeline.tag.predictor import Member, Predictor, seconds_per_frame
from pipeline.tag.progress import TAGGED, Tally
from pipeline.tag.windows import BATCH_WINDOWS, WindowSettings

MAX_CHUNK = 256
"""Recordings of a chunk. Its parts are committed one by one, so a kill loses minutes, whatever its size."""

PART_WINDOWS = 2048
"""A part is written once its complete recordings have this many windows: 2 MB of scores of AudioSet's classes."""

MAX_DEATHS = 3
"""The rest of a chunk fails if workers died on it this often."""


@dataclass(frozen=True, kw_only=True)
class TagSettings:
    """What decides the results."""

    windows: WindowSettings
    thresholds: np.ndarray
    """`[C]`"""
    events: EventSettings = field(default_factory=EventSettings)
    frame_s: float | None = None
    """Seconds between frame scores, from which events are taken; None takes them from windows."""
    top: int | None = None
    embeddings: EmbeddingsOf | None = None
    label_format: str | None = None

    def to_dict(self, members: Sequence[Member]) -> dict[str, Any]:
        """The settings in tags.json. Results of other settings do not go into the same folder."""
        calibrations = [m.calibration and m.calibration.to_dict(m.config.labels) for m in members]
        return {
            "models": [member.sha256 for member in members],
            "calibrated": members[0].calibration is not None,
            "features": self.windows.features.to_dict(),
            "window_s": self.windows.window_s,
            "hop_s": self.windows.hop_s,
            "events": asdict(self.events) | {"from": "windows" if self.frame_s is None else "frames"},
            "thresholds": [round(float(value), 6) for value in self.thresholds],
            "top": self.top,
            "embeddings": self.embeddings,
            "format": self.label_format,
            "calibrations": None if calibrations[0] is None else calibrations,
        }


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Where and how the work is done. None of this changes the results, except for rounding."""

    number: int
    """0: in this process, without Ray."""
    device: str = "cpu"
    cpus: float = 1
    gpus: float = 0
    num_readers: int = 1
    """Readers of a worker."""
    read: Callable[..., Iterator[Piece]] | None = None
    """What a reader does, if it is not `Readers.pieces` in the worker's process: `on_ray.remote_pieces`."""
    batch_windows: int = BATCH_WINDOWS


def settings_for(
    members: Sequence[Member], thresholds: np.ndarray, *, window_s: float | None, hop_s: float | None, **others: Any
) -> TagSettings:
    """Settings that fit the models. Events come from frames if all models have them, with the same distance.

    Raises:
        ConfigError: a length that does not fit, or models with inputs of several lengths and no length of the window.
    """
    shortest = min(members, key=lambda member: member.config.recipe.input_tdim)
    longest = max(members, key=lambda member: member.config.recipe.input_tdim)
    input_frames, features = shortest.config.recipe.input_tdim, members[0].config.features
    least_s, most_s = (features.seconds(member.config.recipe.input_tdim) for member in (shortest, longest))
    if window_s is None and least_s != most_s:
        raise ConfigError(
            f"{shortest.uri} takes {least_s:g} s and {longest.uri} {most_s:g} s; give --window-s of at most "
            f"{least_s:g}, so that both hear all of a window"
        )
    windows = WindowSettings.of(features, input_frames, window_s, hop_s)
    return TagSettings(windows=windows, thresholds=thresholds, frame_s=seconds_per_frame(members), **others)


@dataclass
class Job:
    """What a worker needs. It travels to the workers."""

    members: Sequence[Member]
    settings: TagSettings
    workers: Workers
    write: WriteParts | None
    run: str
    permits: Permits | None = None
    """Permits from the rate limiter, for recordings at URLs."""


class Worker:
    """Tags chunk after chunk: it has the models on its device, and readers that go on from chunk to chunk."""

    def __init__(self, job: Job) -> None:
        self.job = job
        device, settings = torch.device(job.workers.device), job.settings
        has_embeddings, has_frames = settings.embeddings is not None, settings.frame_s is not None
        self._predictor = Predictor(job.members, device, embeddings=has_embeddings, frames=has_frames)
        self._readers = Readers(job.permits)
        remote = job.workers.read
        self._read = self._readers.pieces if remote is None else partial(remote, permits=job.permits)

    def stop(self) -> None:
        """End the processes that decode. Otherwise they end together with this one."""
        self._readers.stop()

    def results(
        self, chunk: Chunk, on_windows: Callable[[float], None] = lambda _: None, *, keeps_frames: bool = False
    ) -> Iterator[Tagged]:
        """The results of a chunk's recordings. `on_windows` is called with the seconds of windows as they are read."""
        settings = self.job.settings
        collect = Collector(
            self._predictor,
            settings.thresholds,
            settings.events,
            settings.frame_s,
            self.job.workers.batch_windows,
            keeps_frames=keeps_frames,
        )
        return collect.tagged(_counted(self._pieces(chunk), on_windows))

    def _pieces(self, chunk: Chunk) -> Iterator[Piece]:
        windows = self.job.settings.windows
        if chunk.clips is not None:
            return merged([partial(clip_pieces, chunk.clips, windows)])
        num_readers = min(self.job.workers.num_readers, len(chunk.names))
        lanes = [chunk.lane(i, num_readers) for i in range(num_readers)]
        return merged([partial(self._read, numbers, sources, windows) for numbers, sources in lanes])

    def tag_chunk(self, chunk: Chunk, tally: Tally) -> None:
        """Tag the recordings of a chunk that an earlier attempt has not tagged."""
        write, name, read_us = self.job.write, f"{chunk.name}-{self.job.run[:8]}", time.time_ns() // 1000
        assert write is not None
        num_deaths = write.begin_attempt(self.job.run, name)
        written, number = write.written(name)
        left = chunk.without(written)
        if num_deaths >= MAX_DEATHS:
            names = [recording for recording in left.names if recording not in left.done]
            message = f"the worker that tagged it and up to {len(names) - 1} others died {num_deaths} times"
            write.fail(name, number, names, message, read_us)
            return tally.add({str(Reason.CRASHED): len(names)}, 0.0)
        part: list[tuple[str, Tagged]] = []
        for tagged in self.results(left, lambda seconds: tally.add({}, seconds)):
            recording = left.names[tagged.recording]
            if recording in left.done:
                continue
            part.append((recording, tagged))
            tally.add({_outcome(tagged): 1}, 0.0)
            if sum(len(one.start_s) for _, one in part) >= PART_WINDOWS:
                write.write(name, number, part, read_us)
                number, part = number + 1, []
        if part:
            write.write(name, number, part, read_us)


def _outcome(tagged: Tagged) -> str:
    if len(tagged.start_s):
        return TAGGED
    return str(tagged.lost[0].reason if tagged.lost else Reason.TOO_SHORT)


def _counted(pieces: Iterator[Piece], on_windows: Callable[[float], None]) -> Iterator[Piece]:
    for piece in pieces:
        on_windows(sum(window.own_end_s - window.own_start_s for window in piece.windows))
        yield piece


def tag_here(
    inputs: Inputs,
    members: Sequence[Member],
    settings: TagSettings,
    device: str,
    *,
    keeps_frames: bool = False,
    batch_windows: int = BATCH_WINDOWS,
) -> Iterator[tuple[str, Tagged]]:
    """The results of each recording, without an output and without Ray."""
    workers = Workers(number=0, device=device, batch_windows=batch_windows)
    worker = Worker(Job(members, settings, workers, None, ""))
    try:
        for chunk in chunks_of(inputs, lambda _: False, most=MAX_CHUNK, own_hosts=own_hosts(inputs)):
            for tagged in worker.results(chunk, keeps_frames=keeps_frames):
                yield chunk.names[tagged.recording], tagged
    finally:
        worker.stop()


def own_hosts(inputs: Inputs) -> tuple[tuple[str, int], ...]:
    """The hosts of the URLs that the user gave."""
    rows = inputs.recordings.select(["media", "is_own"]).to_pylist()
    return tuple({endpoint_of(row["media"]) for row in rows if row["is_own"]})


def local_device(wanted: str) -> str:
    """The device in this process. Raises ConfigError if it is to be a GPU and there is none."""
    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise ConfigError("--device cuda needs a GPU, this machine has none; use cpu")
    return "cuda" if has_gpu and wanted != "cpu" else "cpu"
