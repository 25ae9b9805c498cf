"""Measure the decoding of a section by kind of file: CPU time of one process, and wall time.

    python -m benchmarks.sections [--sections 60]

The sections are ten seconds at irregular positions of five-minute stereo recordings, as in a preparation from a folder.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

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
        spent = {kind: min(_spent_s(file, starts_s) for _ in range(3)) for kind, file in files.items()}
    print("| kind | CPU ms a section | clock ms a section |\n|---|---|---|")
    for kind, (cpu_s, clock_s) in spent.items():
        print(f"| {kind} | {1000 * cpu_s / len(starts_s):.2f} | {1000 * clock_s / len(starts_s):.2f} |")
    return 0


def _spent_s(file: Path, starts_s: np.ndarray) -> tuple[float, float]:
    """Seconds of CPU time and of wall time for all sections."""
    cpu_s, clock_s = time.process_time(), time.perf_counter()
    for start_s in starts_s.tolist():
        decode_media(str(file), None, start_s, CLIP_S)
    return time.process_time() - cpu_s, time.perf_counter() - clock_s


if __name__ == "__main__":
    sys.exit(main())
