"""Measure tagging: CPU time of all workers per window, compared with the serial minimum of the same run, and memory.

    python -m benchmarks.tag [--recordings 200] [--hours 10]

The recordings are 20 to 60 s of WebM/Opus and FLAC. The minimum ("floor") is one process with one thread that only does
the work: decode, resample, compute the fbank, run the network on batches of 32. The job tags the same files with one
worker on Ray. The model is a small AST with random weights, so that decoding is a large part of the work; with a large
model the network is nearly all of it, and both are equal.

With --hours, a file of that length (FLAC, written by FFmpeg) is tagged in a process of its own, and the resident memory
of that process and of the one that decodes is printed as it goes on.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import psutil
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
from pipeline.tag.windows import Windower, WindowSettings, padded
from tests import fakes

NUM_SOUNDS = 8
"""Different recordings; the others are copies of them."""

MEMORY_EVERY_S = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=int, default=200)
    parser.add_argument("--hours", type=float, default=0.0, help="length of the long file; 0 leaves it out")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="ast-bench-") as folder:
        checkpoint = small_ast(Path(folder, "model"))
        media = _recordings(Path(folder, "media"), args.recordings)
        before = _floor(checkpoint, media)
        spent_s, wall_s = _job(checkpoint, media, Path(folder, "tags"))
        after = _floor(checkpoint, media)
        num_windows = before[1]
        floor_ms = 1000 * (before[0] + after[0]) / 2 / num_windows
        print("\n| recordings | windows | floor, ms a window | workers | of the floor | on the clock |")
        print("|---|---|---|---|---|---|")
        workers_ms = 1000 * spent_s / num_windows
        print(
            f"| {args.recordings} | {num_windows} | {floor_ms:.1f} | {workers_ms:.1f} | {workers_ms / floor_ms:.2f} "
            f"| {1000 * wall_s / num_windows:.1f} |"
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


def _floor(checkpoint: str, media: Path) -> tuple[float, int]:
    """CPU seconds of one process that only does the work, and its number of windows."""
    members = read_members([checkpoint])
    predict = Predictor(members, torch.device("cpu"), embeddings=False, frames=False)
    settings = WindowSettings.of(members[0].config.features, predict.input_frames, None, None)
    began_s, num_windows, waiting = time.process_time(), 0, []
    for path in sorted(media.iterdir()):
        waveform, _ = decode_media(str(path), None, 0.0, None)
        waiting += Windower(settings).windows([Block(0.0, waveform, 1.0)])
        while len(waiting) >= 32:
            predict(padded(waiting[:32], predict.input_frames))
            num_windows += 32
            del waiting[:32]
    if waiting:
        predict(padded(waiting, predict.input_frames))
    return time.process_time() - began_s, num_windows + len(waiting)


def _job(checkpoint: str, media: Path, output: Path) -> tuple[float, float]:
    """CPU seconds of the workers with their child processes, and seconds on the clock."""
    argv = ["--checkpoint", checkpoint, "--input", str(media), "--output", str(output)]
    with ray_session("local", 2):
        spent = Spent()
        began_s = time.monotonic()
        with spent:
            tag([*argv, "--num-workers", "1", "--cpus-per-worker", "1"])
        wall_s = time.monotonic() - began_s
    return spent.cpu_s()["workers"], wall_s


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
