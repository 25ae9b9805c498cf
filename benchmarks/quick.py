"""Print one page of ratios in under ten minutes: each figure with its floor or its peer, measured in one run.

    python -m benchmarks.quick [--json FILE] [--only TEXT …]

It runs other benchmarks of this folder at a small size, so its figures are rougher than theirs. --json writes the
figures for `python -m benchmarks.compare OLD NEW`, which looks for ratios that have become worse. They are written
after each benchmark, so those before one that fails are kept.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ast_core.execution import for_device
from ast_core.recipe import Recipe
from benchmarks.against import figures

ROOT = Path(__file__).resolve().parents[1]
HAS_BF16 = for_device(Recipe(precision="bf16"), torch.device("cpu")).precision == "bf16"
STEP = "bf16, compiled, parts of 2" if HAS_BF16 else "fp32, fused, parts of 2"
"""The fastest step of `train_step` on a CPU with and without instructions for bf16."""


@dataclass(frozen=True)
class Ratio:
    """One cell of a benchmark's table."""

    title: str
    beside: str
    """The floor or the peer that it is a ratio to."""
    row: str
    """The beginning of the row's name; empty for the first row."""
    column: str
    aim: float
    higher_is_better: bool = True


@dataclass(frozen=True)
class Benchmark:
    words: Sequence[str]
    ratios: Sequence[Ratio]


LIMIT = "limit"
"""In place of a floor or a peer: the figure is in seconds, so that it depends on the machine."""
QUICK = (
    Benchmark(
        ["startup", "--runs", "1", "--only", "help", "dry-run", "tag,"],
        [
            Ratio("prepare_audioset --help, s", LIMIT, "prepare_audioset --help", "on the clock, s", 1.5, False),
            Ratio("train --help, s", LIMIT, "train --help", "on the clock, s", 1.5, False),
            Ratio("--dry-run of 22,160 rows, s", LIMIT, "prepare_audioset --dry-run", "on the clock, s", 5.0, False),
            Ratio("tag one file, s", LIMIT, "tag, one file", "on the clock, s", 6.0, False),
        ],
    ),
    Benchmark(
        ["prepare", "--clips", "200", "--scale", "5"],  # the start of the workers is a quarter of the cost of 200 clips
        [Ratio("preparation, CPU time of workers", "a serial process", "1000", "of the floor", 1.15, False)],
    ),
    Benchmark(
        ["feed", "--clips", "2000", "--rounds", "1"],
        [Ratio("feed, clips/s of a core", "the original's loader", "feed, partners read", "of the original's", 10.0)],
    ),
    Benchmark(
        ["fbank"], [Ratio("log-mel fbank, ms", "torchaudio's", "ours, clip by clip", "of torchaudio's", 0.6, False)]
    ),
    Benchmark(
        ["train_step", "--device", "cpu", "--steps", "3", "--only", "original", STEP],
        [Ratio(f"training step, {STEP}", "the original's", STEP, "of the original's", 3.0 if HAS_BF16 else 2.5)],
    ),
    Benchmark(
        ["tag", "--recordings", "60"],
        [
            Ratio("tagging, CPU time of workers", "a serial process", "", "of the floor", 1.25, False),
            Ratio("tagging, clips/s of the network", "a bare loop", "", "of the bare loop", 0.9),
        ],
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="benchmarks with one of these texts")
    args = parser.parse_args(argv)
    found, began_s = dict[str, dict[str, float | bool]](), time.monotonic()
    print("| figure | beside | measured | aim | reached |\n|---|---|---|---|---|")
    for benchmark in QUICK:
        if not any(text in " ".join(benchmark.words) for text in args.only):
            continue
        print(f"{time.monotonic() - began_s:4.0f} s: {' '.join(benchmark.words)}", file=sys.stderr, flush=True)
        cells = figures(printed(benchmark.words))
        for ratio in benchmark.ratios:
            value = cell(cells, ratio, benchmark.words[0])
            reached = value >= ratio.aim if ratio.higher_is_better else value <= ratio.aim
            relation = "at least" if ratio.higher_is_better else "at most"
            verdict = "yes" if reached else "no"
            print(
                f"| {ratio.title} | {ratio.beside} | {value:.2f} | {relation} {ratio.aim:g} | {verdict} |", flush=True
            )
            found[ratio.title] = {"value": value, "higher_is_better": ratio.higher_is_better}
            if ratio.beside == LIMIT:
                found[ratio.title]["limit"] = ratio.aim
        if args.json:
            args.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def printed(words: Sequence[str]) -> str:
    """Run a benchmark in a process of its own. Returns what it printed."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", f"benchmarks.{words[0]}", *words[1:]]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def cell(cells: dict[tuple[str, str], float], ratio: Ratio, benchmark: str) -> float:
    for (row, column), value in cells.items():
        if row.startswith(ratio.row) and column == ratio.column:
            return value
    raise SystemExit(f"the table of benchmarks.{benchmark} has no row {ratio.row!r} with a column {ratio.column!r}")


if __name__ == "__main__":
    sys.exit(main())
