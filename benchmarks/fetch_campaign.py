"""Fetch sections from a host that misbehaves, and compare them with the same sections of the file on disk.

    python -m benchmarks.fetch_campaign [--containers wav mp3 …] [--turns 1 2 3 4] [--every N] [--seed 0]

The campaign tries every container with every misbehaviour, at each of the first requests in turn and at all of them,
through yt-dlp's client and our own HTTP reader. A section is right (equal to the bit), has a reason, or is WRONG: it
has other samples, or a permanent reason that blames the clip. The exit status is 1 if one is wrong.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.prepare.audio.decode import decode_section
from pipeline.prepare.clip import ClipError, Reason
from pipeline.prepare.fetch.ytdlp import fetch_with_ytdlp
from pipeline.prepare.fetch.ytdlp_settings import YtDlp
from tests.bad_host import BadHost
from tests.prepare.containers import CONTAINERS, write_container

START_S, DURATION_S = 20.0, 4.0
SETTINGS = YtDlp(timeout_s=1.0, allow_private_hosts=True)
STALL_S = 1.5

MISBEHAVIOURS = (
    *("rst", "rstmid", "stall", "norange", "nolength", "chunked", "chunked40", "brokenchunks"),
    *("gzip", "gzipchunked", "gzipcut", "deflate", "br", "gziprange", "gziplie"),
    *("longlength", "shortlength", "early", "capped", "empty", "html", "redirect"),
    *("wrongrange", "lyingrange", "fromstart", "wrongheader", "wrongtotal", "norangeheader", "otherfile"),
    *("404", "416", "429", "503"),
)
"""Misbehaviours, by their names in `tests.bad_host`."""

PASSING = {Reason.NETWORK, Reason.TRUNCATED, Reason.THROTTLED, Reason.SETUP, Reason.TIMEOUT}
"""Temporary reasons: the next run tries the clip again."""

FINAL = {
    "404": {Reason.UNAVAILABLE},
    "empty": {Reason.NOT_AUDIO},
    "otherfile": {Reason.NOT_AUDIO},
}
"""Reasons that are right for these misbehaviours, because the host says so."""


@dataclass(frozen=True)
class Case:
    kind: str
    misbehaviour: str
    turn: int
    """Number of the request at which it happens; 0 is every request."""

    @property
    def path(self) -> str:
        return f"{self.misbehaviour}{f'@{self.turn}' if self.turn else ''}/sound.{self.kind}"


def cases(kinds: Sequence[str], turns: Sequence[int]) -> Iterator[Case]:
    return (Case(kind, bad, turn) for kind in kinds for bad in MISBEHAVIOURS for turn in (0, *turns))


def outcome(host: BadHost, case: Case, expected: np.ndarray | Reason, settings: YtDlp = SETTINGS) -> str:
    """The outcome of one fetch: `right`, a reason, or what is wrong."""
    try:
        got = fetch_with_ytdlp(f"{host.url}/{case.path}", START_S, DURATION_S, settings=settings)
    except ClipError as err:
        allowed = (
            PASSING | FINAL.get(case.misbehaviour, set()) | ({expected} if isinstance(expected, Reason) else set())
        )
        return str(err.reason) if err.reason in allowed else f"WRONG: {err}"
    except Exception as err:  # in a job, the reason would be `unforeseen`
        return f"unforeseen: {type(err).__name__}: {err}"
    if isinstance(expected, np.ndarray) and np.array_equal(got, expected):
        return "right"
    return f"WRONG: {len(got)} other samples"


def section_on_disk(path: Path) -> np.ndarray | Reason:
    try:
        return decode_section(str(path), START_S, DURATION_S)
    except ClipError as err:
        return err.reason


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--containers", nargs="+", default=list(CONTAINERS), choices=list(CONTAINERS))
    parser.add_argument("--turns", nargs="*", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take one case in N, drawn with the seed")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chosen = list(cases(args.containers, args.turns))
    chosen = random.Random(args.seed).sample(chosen, len(chosen) // args.every)
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in args.containers}
    wrong = []
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ast-fetch-campaign-") as name:
        folder = Path(name)
        expected = {kind: section_on_disk(write_container(folder, kind)) for kind in args.containers}
        with BadHost(folder, stall_s=STALL_S) as elsewhere, BadHost(folder, STALL_S) as host:
            host.elsewhere = f"{elsewhere.url}/good"
            for case in sorted(chosen, key=lambda case: case.path):
                result = outcome(host, case, expected[case.kind])
                counts[case.kind][result.partition(":")[0]] += 1
                if result.startswith(("WRONG", "unforeseen")):
                    wrong.append(f"{case.path}: {result}")
    print(f"| container | {' | '.join(names := sorted({name for count in counts.values() for name in count}))} |")
    print(f"|---|{'---|' * len(names)}")
    for kind, count in counts.items():
        print(f"| {kind} | {' | '.join(str(count[name]) for name in names)} |")
    print(f"\n{len(chosen)} fetches in {time.monotonic() - began_s:.0f} s, {len(wrong)} wrong")
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
