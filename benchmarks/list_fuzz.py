"""Fuzz the sources: read seeded mutations of valid lists of each kind with the sources and an independent reader.

    python -m benchmarks.list_fuzz [--mutations 2000] [--seed 0] [--kinds segments labels …]

Prints a table: accepted lists, with their clips and refused rows, lists that were refused as a whole, and faults, which
are disagreements of the two readers. The exit status is 1 if there is a fault.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.list_fuzz import KINDS, Trial, trial


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mutations", type=int, default=2000, metavar="N", help="mutations of each kind (default 2000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the first mutation (default 0)")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    args = parser.parse_args(argv)
    print("| kind | lists | accepted | clips in them | rows refused in them | refused as a whole | faults | s |")
    print("|---|---|---|---|---|---|---|---|")
    faults: list[Trial] = []
    for kind in args.kinds:
        begun = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="list-fuzz-") as folder:
            seeds = range(args.seed, args.seed + args.mutations)
            trials = [trial(kind, seed, Path(folder) / kind) for seed in seeds]
        accepted = [one for one in trials if one.accepted]
        found = [one for one in trials if one.fault]
        clips, refused = (sum(getattr(one, name) for one in accepted) for name in ("num_clips", "num_refused"))
        figures = (len(trials), len(accepted), clips, refused, len(trials) - len(accepted), len(found))
        print(f"| {kind} | {' | '.join(f'{n:,}' for n in figures)} | {time.monotonic() - begun:.0f} |", flush=True)
        faults += found
    for one in faults:
        print(f"{one.kind} {one.seed}: {', '.join(one.mutations)}: {one.fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
