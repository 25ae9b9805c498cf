"""Measure the preparation: CPU time per clip, compared with the serial minimum of the same run.

    python -m benchmarks.prepare [--kinds webm m4a flac] [--clips 2000] [--scale 1] [--rounds 5]

The clips are ten-second sections of five-minute recordings in WebM (Opus) or MP4 (AAC), or FLAC files of ten seconds,
on two CPUs. The minimum ("floor") is one process on one core that only does the work: decode the section, resample,
compute the fbank, write Parquet. "Workers" are Ray's worker processes with their children, with their start; "all" are
also the driver and Ray itself, which was started before. With --scale, a second job has so many times the clips, which
shows what the start of the processes costs. Ratios are medians over the rounds.

Two cores of a virtual machine may be two threads of one core. The same work then takes more CPU time if both are busy,
as they are in the job. So the floor is also measured with two such processes at once: the second ratio of each pair.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Self

import numpy as np
import psutil
import pyarrow as pa
import torch

from ast_core.labels import audioset_labels
from jobs.demo.sounds import GENERATORS, mixture
from jobs.prepare_audioset import main as prepare
from jobs.ray_session import ray_session
from pipeline import dataset
from pipeline.prepare.audio.decode import decode_media
from pipeline.prepare.audio.features import clip_fbank
from pipeline.prepare.sources import read_segments
from pipeline.prepare.sources.locate import AudioFolder
from tests import fakes

NUM_RECORDINGS, RECORDING_S, CLIP_S = 8, 300, 10
NUM_FILES = 40
"""Different FLAC files. The others are links to them."""
FLOOR_CLIPS = 256
"""Clips for the floor, half before and half after the job, because the machine's speed drifts."""
KINDS = ("webm", "m4a", "flac")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["webm"])
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument(
        "--scale", type=int, default=4, help="clips of a second job, as a multiple of --clips; 1 is no second job"
    )
    parser.add_argument("--rounds", type=int, default=1, help="runs of each job (default 1)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    numbers = [args.clips, args.clips * args.scale][: 1 + (args.scale > 1)]
    measured: dict[tuple[str, int], list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="ast-bench-") as folder:
        for kind in args.kinds:
            media = _media(Path(folder, kind), kind, max(numbers))
            for num_clips in numbers:
                segments = _list(Path(folder, f"{kind}{num_clips}_segments.csv"), kind, num_clips)
                for number in range(args.rounds):
                    before = _floors_ms(segments, media, Path(folder))
                    cost = _job_ms(segments, media, Path(folder, f"data-{kind}-{num_clips}-{number}"), num_clips)
                    alone_ms, both_ms = np.mean([before, _floors_ms(segments, media, Path(folder))], axis=0)
                    measured[kind, num_clips].append(cost | {"alone": alone_ms, "both": both_ms})
                    print(f"{kind}, {num_clips} clips: {measured[kind, num_clips][-1]}", flush=True)
    heads = ["clips", "floor ms: alone, two at once", "workers ms", "of the floor"]
    heads += ["all processes ms", "all of the floor"]
    print(f"\n| {' | '.join(heads)} | on the clock ms |")
    print("|---" * (len(heads) + 1) + "|")
    for (kind, num_clips), runs in measured.items():
        ms = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        cells = [f"{num_clips} {kind}", f"{ms['alone']:.1f}, {ms['both']:.1f}"]
        for name in ("workers", "all"):
            of_floors = (statistics.median(run[name] / run[floor] for run in runs) for floor in ("alone", "both"))
            cells += [f"{ms[name]:.1f}", ", ".join(f"{ratio:.2f}" for ratio in of_floors)]
        print(f"| {' | '.join(cells)} | {ms['wall']:.2f} |")
    return 0


def _media(folder: Path, kind: str, num_clips: int) -> Path:
    """Write recordings of the demo's sounds: stereo at 48 kHz, as on YouTube."""
    folder.mkdir()
    is_files = kind == "flac"
    for i in range(NUM_FILES if is_files else NUM_RECORDINGS):
        rng = np.random.default_rng(i)
        classes = list(GENERATORS)
        num_parts = 1 if is_files else RECORDING_S // CLIP_S
        pairs = [rng.choice(classes, 2, replace=False).tolist() for _ in range(num_parts)]
        parts = [mixture(rng, pair, float(CLIP_S), 16_000) for pair in pairs]
        fakes.write_media(folder / f"recording_{i}.{kind}", np.concatenate(parts), channels=2)
    for i in range(NUM_FILES, num_clips if is_files else 0):
        os.link(folder / f"recording_{i % NUM_FILES}.{kind}", folder / f"recording_{i}.{kind}")
    return folder


def _list(path: Path, kind: str, num_clips: int) -> Path:
    """Write a segment list: whole FLAC files, or many sections of each recording at irregular times."""
    rng = np.random.default_rng(0)
    mid = audioset_labels().mids[0]
    starts_ms = rng.permutation((RECORDING_S - CLIP_S) * 1000 - 1)[:num_clips] * (kind != "flac")
    with path.open("w") as file:
        for i, start_ms in enumerate(starts_ms):
            start_s, recording = start_ms / 1000, i if kind == "flac" else i % NUM_RECORDINGS
            file.write(f'recording_{recording}, {start_s:.3f}, {start_s + CLIP_S:.3f}, "{mid}"\n')
    return path


def _floors_ms(segments: Path, media: Path, folder: Path) -> tuple[float, float]:
    """Floor of one process, and of two at once."""
    alone_ms = _floor_ms(segments, media, folder / "floor")
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        both_ms = list(pool.map(_floor_ms, [segments] * 2, [media] * 2, [folder / "floor0", folder / "floor1"]))
    return alone_ms, sum(both_ms) / 2


def _floor_ms(segments: Path, media: Path, output: Path) -> float:
    """CPU milliseconds per clip of one process that only does the work."""
    torch.set_num_threads(1)
    clips = read_segments(str(segments), locate=AudioFolder(str(media))).clips.slice(0, FLOOR_CLIPS // 2)
    clip_fbank(np.zeros(16_000, np.float32))  # the start of PyTorch does not count
    began_s = time.process_time()
    waveforms = (decode_media(row["media"], None, row["start_s"], CLIP_S)[0] for row in clips.to_pylist())
    fbanks = list(map(clip_fbank, waveforms))
    frames = pa.FixedSizeListArray.from_arrays(
        np.concatenate(fbanks).reshape(-1), type=dataset.fbank_type(128).value_type
    )
    column = pa.ListArray.from_arrays(
        np.cumsum([0, *map(len, fbanks)]).astype(np.int32), frames, type=dataset.fbank_type(128)
    )
    shard = pa.table({"clip_id": clips["clip_id"], "fbank": column})
    dataset.write_table(str(output), shard, row_group_size=dataset.ROW_GROUP_CLIPS)
    return (time.process_time() - began_s) * 1000 / len(clips)


def _job_ms(segments: Path, media: Path, output: Path, num_clips: int) -> dict[str, float]:
    """Milliseconds per clip: CPU time of Ray's workers with their child processes, of all processes, and wall time."""
    with ray_session("local", 2):
        spent = Spent()
        began_s = time.monotonic()
        with spent:
            prepare(["--segments", str(segments), "--audio-dir", str(media), "--output", str(output)])
        wall_s = time.monotonic() - began_s
    return {name: s * 1000 / num_clips for name, s in spent.cpu_s().items()} | {"wall": wall_s * 1000 / num_clips}


Found = dict[tuple[int, float], tuple[bool, float]]
"""By process: whether it is a Ray worker or a child of one, and its CPU seconds."""


class Spent:
    """CPU seconds of this process's descendants, read every `every_s` because some end before the job does."""

    def __init__(self, every_s: float = 0.5) -> None:
        self._every_s = every_s

    def __enter__(self) -> Self:
        self._seen: Found = {}
        self._over = threading.Event()
        self._before = {key: s for key, (_, s) in self._look().items()}
        self._driver_s = time.process_time()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *ending: object) -> None:
        self._over.set()
        self._thread.join()
        self._seen |= self._look()
        self._driver_s = time.process_time() - self._driver_s

    def cpu_s(self) -> dict[str, float]:
        spent = {key: (is_worker, s - self._before.get(key, 0.0)) for key, (is_worker, s) in self._seen.items()}
        workers = sum(s for is_worker, s in spent.values() if is_worker)
        return {"workers": workers, "all": sum(s for _, s in spent.values()) + self._driver_s}

    def _watch(self) -> None:
        while not self._over.wait(self._every_s):
            self._seen |= self._look()

    def _look(self) -> Found:
        found: Found = {}
        for child in psutil.Process().children():
            self._descend(child, False, found)
        return found

    def _descend(self, process: psutil.Process, of_worker: bool, found: Found) -> None:
        try:
            of_worker = of_worker or " ".join(process.cmdline()).startswith("ray::")
            times = process.cpu_times()
            found[process.pid, process.create_time()] = (of_worker, times.user + times.system)
            children = process.children()
        except psutil.NoSuchProcess:
            return
        for child in children:
            self._descend(child, of_worker, found)


if __name__ == "__main__":
    sys.exit(main())
