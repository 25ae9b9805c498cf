"""Compare two runs of `benchmarks.quick --json`, and end with status 1 if a figure has become worse.

    python -m benchmarks.compare OLD NEW [--noise 1.25]

Nearly all figures are ratios to a floor or a peer of the same run, so files of two machines, or of two days, can be
compared. On a busy machine of two cores, ratios of one commit differ by up to a fifth; so worse by less than --noise is
no change. A figure that only one of the two has is listed and counts as no change.
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
            print(f"| {title} | {'' if title not in old else 'there'} | {'' if title not in new else 'there'} | | |")
            continue
        before, after = old[title]["value"], new[title]["value"]
        factor = before / after if new[title]["higher_is_better"] else after / before
        verdict = "WORSE" if factor > args.noise else "better" if factor < 1 / args.noise else ""
        is_worse |= factor > args.noise
        print(f"| {title} | {before:.2f} | {after:.2f} | {factor:.2f} | {verdict} |")
    return int(is_worse)


if __name__ == "__main__":
    sys.exit(main())
