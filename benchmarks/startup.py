"""Measure the first minute: how long a newcomer's commands take, with Ray's share and the share of imports.

    python -m benchmarks.startup [--runs 5] [--only TEXT …] [--processes]

Each command is typed as in the README, as a process of its own, in turns with the others. The table has the median time
on the clock, its limit, and the CPU time of all its processes. The last rows are what the commands have in common: a
Ray of two CPUs that starts, runs one empty task and ends, and the imports of a job. `python -X importtime -m MODULE`
shows which modules they are. With --processes, each command runs once, and the table has its processes: when they begin
and end, and their CPU time.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from ast_core.labels import audioset_labels
from benchmarks.prepare import Spent
from benchmarks.tag import small_ast
from tests import fakes

ROOT = Path(__file__).resolve().parents[1]
NUM_LISTED = 22_160
"""Number of clips of AudioSet's balanced list."""
NUM_FILES = 10
LOOK_S, LEAST_CPU_S = 0.1, 0.3

JUST_RAY = """
import ray
from jobs.ray_session import ray_session
with ray_session("local", 2):
    ray.get(ray.remote(lambda: None).remote())
"""
IMPORTS = "import ray.data, ray.train.torch, timm"


@dataclass(frozen=True)
class Command:
    name: str
    words: Sequence[str]
    """Arguments of Python. OUT is an output that no earlier run has written."""
    limit_s: float | None = None
    """The longest time that is acceptable on an idle machine."""


@dataclass
class Took:
    wall_s: list[float]
    cpu_s: list[float]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="runs of each command (default 5)")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="commands with one of these in the name"
    )
    parser.add_argument("--processes", action="store_true", help="show the processes of each command")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="ast-bench-") as name:
        folder = Path(name)
        every = [each for each in commands(folder) if any(text in each.name for text in args.only)]
        if args.processes:
            for i, command in enumerate(every):
                say_processes(command, folder / f"out-{i}")
            return 0
        took = {each.name: Took([], []) for each in every}
        for number in range(args.runs + 1):  # the first run compiles files and fills caches, and does not count
            for i, command in enumerate(every):
                wall_s, cpu_s = run(command, folder / f"out-{number}-{i}")
                print(f"{command.name}: {wall_s:.1f} s, {cpu_s:.1f} s of CPU time", file=sys.stderr, flush=True)
                if number:
                    took[command.name].wall_s.append(wall_s)
                    took[command.name].cpu_s.append(cpu_s)
    print("| command | on the clock, s | lowest, highest | limit, s | CPU time of all processes, s |")
    print("|---|---|---|---|---|")
    for command in every:
        wall_s, cpu_s = took[command.name].wall_s, took[command.name].cpu_s
        limit = "–" if command.limit_s is None else f"{command.limit_s:g}"
        print(
            f"| {command.name} | {statistics.median(wall_s):.1f} | {min(wall_s):.1f}, {max(wall_s):.1f} | {limit} "
            f"| {statistics.median(cpu_s):.1f} |"
        )
    return 0


def commands(folder: Path) -> list[Command]:
    """The commands, and in `folder` what they read."""
    sounds, segments, data, model = (folder / name for name in ("sounds", "balanced_segments.csv", "data", "model"))
    sounds.mkdir()
    manifest = ["path,labels"]
    for i in range(NUM_FILES):
        fakes.write_media(sounds / f"{i}.wav", fakes.noise(10.0, seed=i))
        manifest.append(f"{sounds / f'{i}.wav'},{'dog' if i % 2 else 'cat'}")
    (folder / "mine.csv").write_text("\n".join(manifest) + "\n")
    mids = audioset_labels().mids
    with segments.open("w") as file:
        for i in range(NUM_LISTED):
            file.write(f'video{i:06d}, {i % 300}.000, {i % 300 + 10}.000, "{mids[i % len(mids)]}"\n')
    fakes.write_data(str(data), splits=(("train", 8), ("eval", 8)), num_classes=2)
    small_ast(model)
    train = ["jobs/train.py", "--recipe", "esc10", "--data", str(data), "--train-splits", "train"]
    train += ["--eval-splits", "eval", "--output", "OUT", "--epochs", "1", "--batch_size", "8", "--loss", "BCE"]
    train += [word for key, value in fakes.SMALL_RECIPE.items() for word in (f"--{key}", value)]
    prepare = ["jobs/prepare_audioset.py", "--output", "OUT"]
    helps = [
        Command(f"{job} --help", [f"jobs/{job}.py", "--help"], 1.5) for job in ("prepare_audioset", "train", "tag")
    ]
    dry_run = [*prepare, "--segments", str(segments), "--dry-run"]
    tag = ["jobs/tag.py", "--checkpoint", str(model), "--input", str(sounds / "0.wav")]
    return [
        *helps,
        Command(f"prepare_audioset --dry-run, {NUM_LISTED:,} rows", dry_run, 5),
        Command(f"prepare_audioset, {NUM_FILES} files", [*prepare, "--manifest", str(folder / "mine.csv")], 15),
        Command("train, one step", train, 25),
        Command("tag, one file", tag, 6),
        Command("Ray alone", ["-c", JUST_RAY]),
        Command("imports alone", ["-c", IMPORTS]),
    ]


def say_processes(command: Command, output: Path) -> None:
    words = [str(output) if word == "OUT" else word for word in command.words]
    began_s, found = time.time(), dict[int, tuple[float, float, float, str]]()
    with subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL) as job:
        root = psutil.Process(job.pid)
        while job.poll() is None:
            for process in [root, *root.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    times, title = process.cpu_times(), " ".join(process.cmdline())
                    begin_s = process.create_time() - began_s
                    found[process.pid] = (begin_s, time.time() - began_s, times.user + times.system, title)
            time.sleep(LOOK_S)
    print(f"\n{command.name}\n\n| begins, s | ends, s | CPU, s | process |\n|---|---|---|---|")
    for begin_s, end_s, cpu_s, title in sorted(found.values()):
        if cpu_s >= LEAST_CPU_S:
            shown = re.sub(r"\S*/", "", title.removeprefix(sys.executable))[:60].strip()
            print(f"| {begin_s:.1f} | {end_s:.1f} | {cpu_s:.1f} | {shown} |")


def run(command: Command, output: Path) -> tuple[float, float]:
    """Seconds on the clock, and CPU seconds of all processes of the command."""
    words = [str(output) if word == "OUT" else word for word in command.words]
    with Spent(every_s=0.1) as spent:
        began_s = time.monotonic()
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
        wall_s = time.monotonic() - began_s
    if done.returncode:
        raise SystemExit(f"{command.name} ended with status {done.returncode}: {done.stdout}{done.stderr}")
    return wall_s, spent.cpu_s()["all"]


if __name__ == "__main__":
    sys.exit(main())
