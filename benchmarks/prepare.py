"""Measure the preparation: CPU time of all Ray workers per clip, compared with the serial minimum of the same run.

    python -m benchmarks.prepare [--clips 2000]

The clips are ten-second sections of five-minute WebM/Opus recordings, from files, on two CPUs. The minimum ("floor") is
one process on one core that only does the work: decode the section, resample, compute the fbank, write Parquet. A
second job has four times the clips.

Two cores of a virtual machine may be two threads of one core. The same work then takes more CPU time if both are busy,
as they are in the job. So the floor is also measured with two such processes at once.
"""

import argparse
import multiprocessing
import sys
import tempfile
import threading
import time
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
FLOOR_CLIPS = 256
"""Clips for the floor, half before and half after the job, because the machine's speed drifts."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument(
        "--scale", type=int, default=4, help="clips of a second job, as a multiple of --clips; 1 is no second job"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="ast-bench-") as folder:
        media = _recordings(Path(folder, "media"))
        costs, floors = [], []
        for num_clips in [args.clips, args.clips * args.scale][: 1 + (args.scale > 1)]:
            segments = _list(Path(folder, f"of{num_clips}_segments.csv"), num_clips)
            before = _floors_ms(segments, media, Path(folder))
            costs.append(_job_ms(segments, media, Path(folder, f"data{num_clips}"), num_clips))
            floors.append(np.mean([before, _floors_ms(segments, media, Path(folder))], axis=0))
            print(f"{num_clips} clips: {costs[-1]}", flush=True)
    print("\n| clips | floor ms: alone, two at once | workers ms | of the floor | all processes ms | on the clock ms |")
    print("|---|---|---|---|---|---|")
    for num_clips, cost, (alone_ms, both_ms) in zip([args.clips, args.clips * args.scale], costs, floors, strict=False):
        print(
            f"| {num_clips} | {alone_ms:.1f}, {both_ms:.1f} | {cost['workers']:.1f} "
            f"| {cost['workers'] / alone_ms:.2f}, {cost['workers'] / both_ms:.2f} "
            f"| {cost['all']:.2f} | {cost['wall']:.2f} |"
        )
    return 0


def _recordings(folder: Path) -> Path:
    """Write recordings of the demo's sounds: stereo at 48 kHz, as on YouTube."""
    folder.mkdir()
    for i in range(NUM_RECORDINGS):
        rng = np.random.default_rng(i)
        classes = list(GENERATORS)
        pairs = [rng.choice(classes, 2, replace=False).tolist() for _ in range(RECORDING_S // 10)]
        parts = [mixture(rng, pair, 10.0, 16_000) for pair in pairs]
        fakes.write_media(folder / f"recording_{i}.webm", np.concatenate(parts), channels=2)
    return folder


def _list(path: Path, num_clips: int) -> Path:
    """Write a segment list with many sections of each recording, at irregular times."""
    rng = np.random.default_rng(0)
    mid = audioset_labels().mids[0]
    starts = rng.permutation((RECORDING_S - CLIP_S) * 1000 - 1)[:num_clips]
    with path.open("w") as file:
        for i, start_ms in enumerate(starts):
            start_s = start_ms / 1000
            file.write(f'recording_{i % NUM_RECORDINGS}, {start_s:.3f}, {start_s + CLIP_S:.3f}, "{mid}"\n')
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
