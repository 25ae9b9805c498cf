"""Measure tagging: CPU time of all workers per window and clips/s of the network, compared with serial loops of the
same run, and memory.

    python -m benchmarks.tag [--recordings 400] [--hours 10]

The recordings are 20 to 60 s of WebM/Opus and FLAC. The minimum ("floor") is one process with one thread that only does
the work: decode, resample, compute the fbank, run the network on batches of 32. It is measured before and after the
job, alone and with two such processes at once, as the job keeps both cores busy. The job tags the same files with one
worker of one CPU on Ray. The model is a small AST with random weights, so that decoding is a large part of the work;
with a large model the network is nearly all of it, and both are equal.

The bare loop is the network alone on batches of 32. The network's clips/s in the job are the windows of all parts but
the first, by the time from the first part to the last one: so the beginnings of chunks count, and the start of Ray does
not.

With --hours, a file of that length (FLAC, written by FFmpeg) is tagged in a process of its own, and the resident memory
of that process and of the one that decodes is printed as it goes on.
"""

import argparse
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import psutil
import pyarrow.parquet as pq
import torch

from ast_core.batch import Norm
from ast_core.checkpoints import ModelConfig, save_model
from ast_core.labels import audioset_labels
from ast_core.models import create_model
from ast_core.recipe import Recipe
from benchmarks.prepare import Spent
from jobs.demo.sounds import GENERATORS, mixture
from jobs.ray_session import ray_session
from jobs.tag import main as tag
from pipeline.prepare.audio.blocks import Block
from pipeline.prepare.audio.decode import decode_media
from pipeline.tag.predictor import Predictor, read_members
from pipeline.tag.windows import BATCH_WINDOWS, Windower, WindowSettings, padded
from tests import fakes

NUM_SOUNDS = 8
"""Different recordings; the others are copies of them."""

FLOOR_RECORDINGS = 24
BARE_BATCHES = 8
MEMORY_EVERY_S = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=int, default=400)
    parser.add_argument("--hours", type=float, default=0.0, help="length of the long file; 0 leaves it out")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="ast-bench-") as folder:
        checkpoint = small_ast(Path(folder, "model"))
        media = _recordings(Path(folder, "media"), args.recordings)
        before = _floors_ms(checkpoint, media), _bare_per_s(checkpoint)
        job = _job(checkpoint, media, Path(folder, "tags"))
        after = _floors_ms(checkpoint, media), _bare_per_s(checkpoint)
        alone_ms, both_ms = np.mean([before[0], after[0]], axis=0)
        bare_per_s = (before[1] + after[1]) / 2
        workers_ms = 1000 * job.workers_s / job.num_windows
        print(
            "\n| recordings | windows | floor, ms a window: alone, two at once | workers | of the floor "
            "| on the clock | bare loop, clips/s | network in the job | of the bare loop |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        print(
            f"| {args.recordings} | {job.num_windows} | {alone_ms:.1f}, {both_ms:.1f} | {workers_ms:.1f} "
            f"| {workers_ms / alone_ms:.2f}, {workers_ms / both_ms:.2f} | {1000 * job.wall_s / job.num_windows:.1f} "
            f"| {bare_per_s:.2f} | {job.network_per_s:.2f} | {job.network_per_s / bare_per_s:.2f} |"
        )
        if args.hours:
            _long(checkpoint, Path(folder), args.hours)
    return 0


def small_ast(folder: Path) -> str:
    """A small AST for 10 s, with random weights and AudioSet's classes."""
    recipe = Recipe(
        label_dim=527, model_size="tiny224", fstride=16, tstride=16, imagenet_pretrain=False, precision="fp32"
    )
    config = ModelConfig(recipe, Norm(-4.27, 4.57), audioset_labels())
    torch.manual_seed(0)
    save_model(folder, create_model(**recipe.model_args()).state_dict(), config)
    return str(folder)


def _recordings(folder: Path, number: int) -> Path:
    folder.mkdir()
    made = []
    for i in range(min(number, NUM_SOUNDS)):
        rng = np.random.default_rng(i)
        pairs = [rng.choice(list(GENERATORS), 2, replace=False).tolist() for _ in range(2 + i % 5)]
        waveform = np.concatenate([mixture(rng, pair, 10.0, 16_000) for pair in pairs])
        made.append(fakes.write_media(folder / f"r{i:05d}.{('webm', 'flac')[i % 2]}", waveform, channels=2))
    for i in range(len(made), number):
        source = made[i % len(made)]
        (folder / f"r{i:05d}{source.suffix}").write_bytes(source.read_bytes())
    return folder


def _floors_ms(checkpoint: str, media: Path) -> tuple[float, float]:
    """Floor of one process, and of two at once."""
    alone_ms = _floor_ms(checkpoint, media)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        both_ms = list(pool.map(_floor_ms, [checkpoint] * 2, [media] * 2))
    return alone_ms, sum(both_ms) / 2


def _floor_ms(checkpoint: str, media: Path) -> float:
    """CPU milliseconds a window of one process that only does the work, without its start."""
    torch.set_num_threads(1)
    predict, settings = _predictor(checkpoint)
    predict(_batch(predict))
    began_s, num_windows, waiting = time.process_time(), 0, []
    for path in sorted(media.iterdir())[:FLOOR_RECORDINGS]:
        waveform, _ = decode_media(str(path), None, 0.0, None)
        waiting += Windower(settings).windows([Block(0.0, waveform, 1.0)])
        while len(waiting) >= BATCH_WINDOWS:
            predict(padded(waiting[:BATCH_WINDOWS], predict.input_frames))
            num_windows += BATCH_WINDOWS
            del waiting[:BATCH_WINDOWS]
    if waiting:
        predict(padded(waiting, predict.input_frames))
    return 1000 * (time.process_time() - began_s) / (num_windows + len(waiting))


def _bare_per_s(checkpoint: str) -> float:
    """Windows a second of the network alone, with one thread."""
    predict, _ = _predictor(checkpoint)
    batch = _batch(predict)
    predict(batch)
    began_s = time.monotonic()
    for _ in range(BARE_BATCHES):
        predict(batch)
    return BARE_BATCHES * len(batch) / (time.monotonic() - began_s)


def _predictor(checkpoint: str) -> tuple[Predictor, WindowSettings]:
    members = read_members([checkpoint])
    predict = Predictor(members, torch.device("cpu"), embeddings=False, frames=False)
    return predict, WindowSettings.of(members[0].config.features, predict.input_frames, None, None)


def _batch(predict: Predictor) -> np.ndarray:
    noise = np.random.default_rng(0).normal(-4, 4, (BATCH_WINDOWS, predict.input_frames, 128))
    return noise.astype(np.float16)


@dataclass(frozen=True)
class Spending:
    workers_s: float
    """CPU seconds of the workers with their child processes."""
    wall_s: float
    num_windows: int
    network_per_s: float
    """Windows a second, from the first part to the last one."""


def _job(checkpoint: str, media: Path, output: Path) -> Spending:
    argv = ["--checkpoint", checkpoint, "--input", str(media), "--output", str(output)]
    with ray_session("local", 2):
        spent = Spent()
        began_s = time.monotonic()
        with spent:
            tag([*argv, "--num-workers", "1", "--cpus-per-worker", "1"])
        wall_s = time.monotonic() - began_s
    parts = sorted((path.stat().st_mtime, pq.ParquetFile(path).metadata.num_rows) for path in output.glob("scores/*"))
    num_windows = sum(rows for _, rows in parts)
    rate = (num_windows - parts[0][1]) / (parts[-1][0] - parts[0][0])
    return Spending(spent.cpu_s()["workers"], wall_s, num_windows, rate)


def _long(checkpoint: str, folder: Path, hours: float) -> None:
    """Tag a long file, and print the memory of the process that tags and of its child that decodes."""
    path = folder / "long.flac"
    source = f"anoisesrc=color=pink:sample_rate=32000:duration={hours * 3600:g}"
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    subprocess.run([ffmpeg, "-loglevel", "error", "-f", "lavfi", "-i", source, str(path)], check=True)
    argv = ["--checkpoint", checkpoint, "--input", str(path), "--output", str(folder / "long"), "--num-workers", "0"]
    began_s = time.monotonic()
    with subprocess.Popen([sys.executable, "jobs/tag.py", *argv], stdout=subprocess.DEVNULL) as job:
        process, peaks = psutil.Process(job.pid), list[tuple[float, float]]()
        while job.poll() is None:
            peaks.append(_resident_mb(process))
            time.sleep(MEMORY_EVERY_S)
    tenth = max(1, len(peaks) // 10)
    print(f"\n{hours:g} h in {time.monotonic() - began_s:.0f} s; resident MB of the tagging process, the decoder:")
    for begin in range(0, len(peaks), tenth):
        own, of_child = (max(column) for column in zip(*peaks[begin : begin + tenth], strict=True))
        print(f"  {begin * MEMORY_EVERY_S:5.0f} s: {own:.0f}, {of_child:.0f}")
    if job.returncode:
        raise SystemExit(f"the job ended with status {job.returncode}")


def _resident_mb(process: psutil.Process) -> tuple[float, float]:
    try:
        children = [child.memory_info().rss for child in process.children(recursive=True)]
        return process.memory_info().rss / 1e6, max(children, default=0) / 1e6
    except psutil.NoSuchProcess:
        return 0.0, 0.0


if __name__ == "__main__":
    sys.exit(main())
