"""Decode files of all kinds with our decoder and with FFmpeg's program, and compare the samples.

    python -m benchmarks.decode_campaign [--files 5000] [--first 0] [--processes 2]

Prints a table by the kind of defect in the files, and each file whose difference no stated rule explains. If there is
one, the exit status is 1. `python -m benchmarks.decode_campaign --first 57 --files 1 --keep DIR` keeps file 57 in DIR.
"""

import argparse
import functools
import multiprocessing
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.prepare.differential import ODDS, Maker, verdict


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0, help="number of the first file, which is also its seed")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--keep", help="a folder where the files are kept")
    args = parser.parse_args(argv)
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    unexplained = []
    with tempfile.TemporaryDirectory(prefix="ast-bench-") as folder:
        judge = functools.partial(_judged, args.keep or folder, args.keep is not None)
        numbers = range(args.first, args.first + args.files)
        with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
            for number, (odd, name, outcome) in enumerate(pool.imap_unordered(judge, numbers, chunksize=62), 1):
                kind = outcome.partition(":")[0] if outcome.startswith("UNEXPLAINED") else outcome
                outcomes[odd][kind] += 1
                if kind == "UNEXPLAINED":
                    unexplained.append(f"{name}: {outcome}")
                    print(unexplained[-1], flush=True)
                if number % 500 == 0:
                    print(f"{number} files, {len(unexplained)} unexplained", flush=True)
    _print(outcomes)
    return 1 if unexplained else 0


@functools.cache
def _maker(folder: str, process: str) -> Maker:
    return Maker(Path(folder, process))


def _judged(folder: str, keep: bool, number: int) -> tuple[str, str, str]:
    np.seterr(all="ignore")  # correlations with silence
    made = _maker(folder, multiprocessing.current_process().name).make(number)
    try:
        outcome = verdict(made)
    except Exception as err:
        outcome = f"UNEXPLAINED: {type(err).__name__}: {err}"
    if not keep:
        made.path.unlink()
    return made.odd, made.name, outcome


def _print(outcomes: dict[str, Counter[str]]) -> None:
    columns = sorted({kind for counts in outcomes.values() for kind in counts} | {"UNEXPLAINED"})
    print("\n| what is odd | files | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 2) + "|")
    total: Counter[str] = sum(outcomes.values(), Counter())
    for odd, counts in [*((odd, outcomes[odd]) for odd in ODDS if odd in outcomes), ("all", total)]:
        print(f"| {odd} | {counts.total()} | " + " | ".join(str(counts[kind]) for kind in columns) + " |")


if __name__ == "__main__":
    sys.exit(main())
