"""Compare two runs of `benchmarks.quick --json`, and end with status 1 if a figure has become worse.

    python -m benchmarks.compare OLD NEW [--noise 1.25]

Ratios to a floor or a peer of the same run can be compared between two machines or days. On a busy machine of two
cores, ratios of one commit differ by up to a fifth; so worse by less than --noise is no change. Figures in seconds
depend on the machine, so they are worse only if they miss their limit and did not before. A figure that the new file
lacks is worse, and one that it adds is no change.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--noise", type=float, default=1.25, help="factor that is no change yet (default 1.25)")
    args = parser.parse_args(argv)
    if args.noise < 1:
        parser.error(f"--noise is {args.noise}; it is a factor, at least 1")
    old, new = (json.loads(path.read_text()) for path in (args.old, args.new))
    print("| figure | old | new | worse by | |\n|---|---|---|---|---|")
    is_worse = False
    for title in dict.fromkeys([*old, *new]):
        if title not in old or title not in new:
            in_old, in_new = ("there" if title in found else "MISSING" for found in (old, new))
            print(f"| {title} | {in_old} | {in_new} | | |")
            is_worse |= title not in new
            continue
        before, after, limit = old[title]["value"], new[title]["value"], new[title].get("limit")
        factor = before / after if new[title]["higher_is_better"] else after / before
        is_over = factor > args.noise if limit is None else before <= limit < after
        is_worse |= is_over
        verdict = "WORSE" if is_over else "better" if factor < 1 / args.noise and limit is None else ""
        print(f"| {title} | {before:.2f} | {after:.2f} | {factor:.2f} | {verdict} |")
    return int(is_worse)


if __name__ == "__main__":
    sys.exit(main())
