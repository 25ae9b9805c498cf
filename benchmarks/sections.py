"""Measure the decoding of a section by kind of file: CPU time of one process, and wall time.

    python -m benchmarks.sections [--sections 60] [--on-s3]

The sections are ten seconds at irregular positions of five-minute stereo recordings, as in a preparation from a folder.
With --on-s3 they are on an S3 server on loopback, and the columns are what a section costs there: requests, and bytes
in relation to the section's share of the file; and the same for files of ten seconds that are read whole.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jobs.demo.sounds import GENERATORS, mixture
from tests import fakes

try:
    from pipeline.prepare.audio.decode import decode_media
except ModuleNotFoundError:  # `benchmarks.against` copies this file into older commits
    from pipeline.prepare.decode import decode_media  # type: ignore[import-not-found, no-redef]

RECORDING_S, CLIP_S = 300, 10
KINDS = ("webm", "m4a", "mp3", "ogg", "flac", "wav")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", type=int, default=60, help="sections of each kind, in each of three rounds")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=sorted(fakes.CODECS))
    parser.add_argument("--on-s3", action="store_true", help="count requests and bytes to an S3 server")
    args = parser.parse_args(argv)
    rng = np.random.default_rng(0)
    classes = list(GENERATORS)
    sounds = [
        mixture(rng, rng.choice(classes, 2, replace=False).tolist(), 10.0, 16_000) for _ in range(RECORDING_S // 10)
    ]
    starts_s = rng.uniform(0, RECORDING_S - CLIP_S - 1, args.sections).round(3)
    with tempfile.TemporaryDirectory(prefix="ast-bench-") as folder:
        files = {
            kind: fakes.write_media(Path(folder, f"sound.{kind}"), np.concatenate(sounds), channels=2)
            for kind in args.kinds
        }
        if args.on_s3:
            say_requests(files, np.concatenate(sounds), starts_s)
            return 0
        spent = {kind: min(_spent_s(file, starts_s) for _ in range(3)) for kind, file in files.items()}
    print("| kind | CPU ms a section | clock ms a section |\n|---|---|---|")
    for kind, (cpu_s, clock_s) in spent.items():
        print(f"| {kind} | {1000 * cpu_s / len(starts_s):.2f} | {1000 * clock_s / len(starts_s):.2f} |")
    return 0


def say_requests(files: dict[str, Path], sound: np.ndarray, starts_s: np.ndarray) -> None:
    from tests.s3 import serve

    print("| kind | KB of a section | requests a section | KB read a section | of the section's |")
    print("|---|---|---|---|---|")
    with serve() as s3:
        os.environ.update(s3.env)
        for kind, file in files.items():
            say_cost(s3, kind, file, [(start_s, float(CLIP_S)) for start_s in starts_s.tolist()])
        for kind, file in files.items():
            clip = fakes.write_media(file.with_stem("clip"), sound[: CLIP_S * fakes.RATE_HZ], channels=2)
            say_cost(s3, f"{kind}, a whole file", clip, [(0.0, None)])


def say_cost(s3: Any, name: str, file: Path, sections: list[tuple[float, float | None]]) -> None:
    uri = fakes.upload(file, s3.uri(file.name))
    with s3.busy() as counts:
        for start_s, duration_s in sections:
            decode_media(uri, None, start_s, duration_s)
    of_section = file.stat().st_size * (1 if sections[0][1] is None else CLIP_S / RECORDING_S)
    requests, read = (counts[name] / len(sections) for name in ("requests", "sent_bytes"))
    print(f"| {name} | {of_section / 1e3:.0f} | {requests:.1f} | {read / 1e3:.0f} | {read / of_section:.2f} |")


def _spent_s(file: Path, starts_s: np.ndarray) -> tuple[float, float]:
    """Seconds of CPU time and of wall time for all sections."""
    cpu_s, clock_s = time.process_time(), time.perf_counter()
    for start_s in starts_s.tolist():
        decode_media(str(file), None, start_s, CLIP_S)
    return time.process_time() - cpu_s, time.perf_counter() - clock_s


if __name__ == "__main__":
    sys.exit(main())
