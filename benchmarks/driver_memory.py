"""Measure the peak memory of a preparation's driver, with a list of two million rows and trivial audio.

    python -m benchmarks.driver_memory [--rows 2000000] [--to-do 40000]

Each row names one of a few WAV files of 100 samples, too short for a frame. So every clip fails, and the failures table
has two million rows. For most rows the benchmark writes the failures as the tasks of a killed run would, so that it
takes minutes instead of an hour; `--to-do 2000000` runs all of them. The figure is the maximum resident set of the
job's process, including shared memory. The resident set at the first and last line of progress is printed too.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from ast_core.labels import audioset_labels
from pipeline.prepare.clip import FAILED_AT, in_progress
from pipeline.prepare.output.failures_table import write_part
from pipeline.prepare.output.publish import start_output
from tests import fakes

NUM_FILES, STUB_SAMPLES = 16, 100
PART_ROWS = 8192
"""Rows of a part of the failures table. A task writes 128; larger parts are faster, since each waits for the disk."""
DRIVER = """
import resource, sys
from jobs.common import run_job
from jobs.prepare_audioset import main
status = run_job(main, sys.argv[1:])  # 2: no clip was prepared
print(f"driver: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB at most", flush=True)
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--to-do", type=int, default=40_000, help="rows that the job itself prepares")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="ast-bench-") as folder:
        manifest = _manifest(Path(folder), args.rows)
        _leave_failures(f"{folder}/data", manifest, args.rows - args.to_do)
        job = [sys.executable, "-c", DRIVER, "--manifest", str(manifest), "--labels", f"{folder}/labels.csv"]
        with subprocess.Popen([*job, "--output", f"{folder}/data"], text=True, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            driver, at_work_mb = psutil.Process(process.pid), []
            for line in process.stdout:
                if line.startswith("done: "):  # a line of progress
                    at_work_mb.append(driver.memory_info().rss >> 20)
        failed = pq.read_metadata(f"{folder}/data/train/failures.parquet").num_rows
    print(
        f"{args.rows:,} rows, {failed:,} of them in the failures table; {line.strip()}; "
        f"{at_work_mb[0]} MB when work began, {at_work_mb[-1]} MB at its end"
    )
    return 0 if failed == args.rows and process.returncode == 0 else 1


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


def _leave_failures(output: str, manifest: Path, num_rows: int) -> None:
    """Write the failures of the first rows, as the tasks of a killed run would have."""
    start_output(output, audioset_labels())
    rows = pq.read_table(manifest, columns=["clip_id"]).slice(0, num_rows)
    for begin in range(0, num_rows, PART_ROWS):
        clip_ids = rows["clip_id"].slice(begin, min(PART_ROWS, num_rows - begin)).to_pylist()
        rows_of_chunk = [{"clip_id": clip_id, "media": "x", "labels": [1, 2, 3]} for clip_id in clip_ids]
        failed = in_progress(fakes.clips(*rows_of_chunk))
        for name, value in zip(FAILED_AT.names, ("decode", "too_short", "6.2 ms, less than one frame", 1), strict=True):
            column = pa.array([value] * len(failed), FAILED_AT.field(name).type)
            failed = failed.set_column(failed.column_names.index(name), name, column)
        write_part(output, "train", failed)


_SCHEMA = pa.schema([("clip_id", pa.string()), ("path", pa.string()), ("labels", pa.list_(pa.string()))])


if __name__ == "__main__":
    sys.exit(main())
