"""The most memory that the driver of a preparation takes, for a list of two million rows whose audio is a stub.

    python -m benchmarks.driver_memory [--rows 2000000]

Each row names one of a few WAV files of 100 samples, too short for a frame: every clip goes all the way and ends in the
ledger, which is then two million rows long. It takes half an hour on two cores; the figure is the process's own maximum
resident set, shared memory included.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ast_core.labels import audioset_labels
from tests import fakes

NUM_FILES, STUB_SAMPLES = 16, 100
DRIVER = """
import resource, sys
from jobs.common import run_job
from jobs.prepare_audioset import main
status = run_job(main, sys.argv[1:])  # 2: no clip was prepared
print(f"driver: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB", flush=True)
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="ast-bench-") as folder:
        manifest = _manifest(Path(folder), args.rows)
        job = [sys.executable, "-c", DRIVER, "--manifest", str(manifest), "--labels", str(Path(folder, "labels.csv"))]
        said = subprocess.run(
            [*job, "--output", f"{folder}/data"], text=True, stdout=subprocess.PIPE, check=True
        ).stdout
        failed = pq.read_metadata(f"{folder}/data/train/failures.parquet").num_rows
    print(f"{args.rows:,} rows, {failed:,} of them in the ledger; {said.strip().splitlines()[-1]}")
    return 0 if failed == args.rows else 1


def _manifest(folder: Path, num_rows: int) -> Path:
    labels = audioset_labels()
    (folder / "labels.csv").write_text(labels.to_csv(), encoding="utf-8")
    paths = [fakes.write_media(folder / f"{i}.wav", np.zeros(STUB_SAMPLES, np.float32)) for i in range(NUM_FILES)]
    rng = np.random.default_rng(0)
    mids = np.array(labels.mids)
    with pq.ParquetWriter(folder / "list.parquet", _SCHEMA) as writer:
        for begin in range(0, num_rows, 100_000):
            rows = range(begin, min(begin + 100_000, num_rows))
            table = pa.table(
                {
                    "clip_id": [f"{i:011d}_{i % 600}.000" for i in rows],
                    "path": [str(paths[i % NUM_FILES]) for i in rows],
                    "labels": mids[rng.integers(len(mids), size=(len(rows), 3))].tolist(),
                },
                _SCHEMA,
            )
            writer.write_table(table)
    return folder / "list.parquet"


_SCHEMA = pa.schema([("clip_id", pa.string()), ("path", pa.string()), ("labels", pa.list_(pa.string()))])


if __name__ == "__main__":
    sys.exit(main())
