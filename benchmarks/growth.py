"""Measure what each job costs as the work grows: 1, 4 and 16 times the clips.

    python -m benchmarks.growth [--clips 200] [--times 1 4 16] [--jobs prepare train evaluate tag]

Prepares short FLAC files into an S3 server on loopback, trains and evaluates a small linear model on the data set, and
tags the files, each job as a process of its own with a Ray of two CPUs. Columns: the CPU time of all processes for each
clip more than in the row before, without what every run costs; the largest memory of the driver's process; and the
requests to S3, for each shard that the job wrote or read.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.prepare import Spent
from pipeline import storage
from tests import fakes
from tests.s3 import S3Server, serve

ROOT = Path(__file__).resolve().parents[1]
CLIP_S = 0.5
DRIVER = """
import importlib, resource, sys
from jobs import entry
entry.begin()
from jobs.common import run_job
status = run_job(importlib.import_module(f"jobs.{sys.argv[1]}").main, sys.argv[2:])
print(f"driver: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB", flush=True)
sys.exit(status)
"""
JOBS = ("prepare", "train", "evaluate", "tag")


@dataclass(frozen=True)
class Cost:
    clips: int
    wall_s: float
    cpu_s: float
    driver_mb: int
    requests: int
    shards: int


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--times", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS)
    args = parser.parse_args(argv)
    costs: dict[str, list[Cost]] = {job: [] for job in JOBS}
    with tempfile.TemporaryDirectory(prefix="ast-bench-") as name, serve() as s3:
        os.environ.update(s3.env)
        for times in args.times:
            folder = Path(name) / str(times)
            write_clips(folder, times * args.clips)
            for job in JOBS:
                if job in args.jobs or job == "prepare":
                    costs[job].append(cost_of(job, folder, times * args.clips, s3))
                    print(f"{job}: {costs[job][-1]}", file=sys.stderr, flush=True)
    columns = ["job", "clips", "on the clock, s", "CPU, s", "CPU ms for each clip more", "driver, MB", "shards"]
    columns += ["requests to S3", "for each shard"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for job in args.jobs:
        for before, cost in zip([None, *costs[job]], costs[job], strict=False):
            more = "" if before is None else f"{1000 * (cost.cpu_s - before.cpu_s) / (cost.clips - before.clips):.1f}"
            cells = [job, f"{cost.clips:,}", f"{cost.wall_s:.1f}", f"{cost.cpu_s:.1f}", more, cost.driver_mb]
            cells += [cost.shards, f"{cost.requests:,}", f"{cost.requests / cost.shards:.1f}"]
            print(f"| {' | '.join(map(str, cells))} |")
    return 0


def write_clips(folder: Path, num_clips: int) -> None:
    (folder / "clips").mkdir(parents=True)
    rows = ["path,labels,split"]
    for i in range(num_clips):
        waveform = fakes.tone(300.0 * 2 ** (i % 4), CLIP_S) + fakes.noise(CLIP_S, seed=i)
        path = fakes.write_media(folder / "clips" / f"{i:06}.flac", waveform)
        rows.append(f"clips/{path.name},tone {i % 4},{'train' if i % 10 else 'eval'}")
    (folder / "list.csv").write_text("\n".join(rows) + "\n")


def command(job: str, folder: Path, data: str, output: str) -> list[str]:
    run = f"{output}-run"
    if job == "prepare":
        return ["prepare_audioset", "--manifest", str(folder / "list.csv"), "--output", data]
    if job == "evaluate":
        return ["evaluate", "--checkpoint", f"{run}/best", "--data", data, "--split", "train", "--bootstrap", "0"]
    if job == "tag":
        words = ["tag", "--checkpoint", f"{run}/best", "--input", str(folder / "clips"), "--window-s", "0.4"]
        return [*words, "--output", f"{output}-tags"]
    keys = fakes.LINEAR_RECIPE | {"norm_stats": "data", "batch_size": "8", "epochs": "1"}
    keys |= {"wa_start": "null", "wa_end": "null"}
    words = ["train", "--recipe", "audioset-full", "--data", data, "--output", run, "--device", "cpu"]
    words += ["--train-splits", "train", "--eval-splits", "eval"]
    return [*words, *(word for key, value in keys.items() for word in (f"--{key}", value))]


def cost_of(job: str, folder: Path, num_clips: int, s3: S3Server) -> Cost:
    data, output = s3.uri(folder.name, "data"), s3.uri(folder.name, "out")
    words = [sys.executable, "-c", DRIVER, *command(job, folder, data, output), "--num-cpus", "2"]
    spent, began_s = Spent(), time.monotonic()
    with s3.busy() as counts, spent:
        done = subprocess.run(words, cwd=ROOT, env=os.environ | s3.env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{job} ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    match = re.search(r"^driver: (\d+) MB$", done.stdout, re.MULTILINE)
    assert match is not None
    return Cost(
        num_clips, time.monotonic() - began_s, spent.cpu_s()["all"], int(match[1]), counts["requests"], num_shards(data)
    )


def num_shards(data: str) -> int:
    listed = storage.list_files(data, suffix=".parquet", recursive=True)
    return sum("/shards/" in uri for uri in listed)


if __name__ == "__main__":
    sys.exit(main())
