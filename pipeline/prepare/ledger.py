"""The clips that could not be prepared, `OUT/SPLIT/failures.parquet`: one row a clip, over all runs.

Tasks write parts below `OUT/_work`; whoever runs next gathers them. Of two million rows the words repeat, so they are
held as dictionaries and written a slice at a time.
"""

import functools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ast_core.errors import DataError
from pipeline import dataset, parquet, storage
from pipeline.prepare.clip import FAILED_AT, FAILURES, Reason
from pipeline.versions import in_words

WORDS = ["split", "stage", "reason", "message", "tool_versions"]
LEDGER = pa.schema([f.with_type(pa.dictionary(pa.int32(), pa.string())) if f.name in WORDS else f for f in FAILURES])
"""FAILURES in memory."""

ROWS_AT_ONCE = 1 << 16


def write_part(output: str, split: str, failed: pa.Table) -> None:
    """Rows under way that failed, under a name that a task which runs twice gives twice."""
    rows = [
        row
        | {
            "retry": Reason(row["reason"]).retry,
            "tool_versions": _versions_at(row["stage"]),
        }
        for row in failed.select(["clip_id", "split", "labels", *FAILED_AT.names]).to_pylist()
    ]
    uri = storage.join(_parts_dir(output, split), f"{dataset.name_of(failed['clip_id'])}.parquet")
    dataset.write_table(uri, pa.Table.from_pylist(rows, schema=FAILURES))


@functools.cache
def _versions_at(stage: str) -> str:
    of_stage = {"download": ("yt-dlp",), "decode": ("av", "soxr")}
    return in_words(of_stage[stage])


def gather(output: str, split: str, prepared: pa.ChunkedArray) -> pa.Table:
    """Rows of LEDGER: what is on record and what unfinished runs left, the newest reason, the attempts counted.

    Left out are clips that are `prepared` by now, and rows that the list itself caused: every run judges those anew.
    """
    parts = storage.list_files(_parts_dir(output, split), suffix=".parquet")
    tables = [LEDGER.empty_table()]
    if storage.exists(dataset.failures_file(output, split)):
        sha256 = dataset.published_sha256(output, split, "failures.parquet")
        tables.append(_read(dataset.failures_file(output, split), sha256))
    with ThreadPoolExecutor(16) as pool:
        rows = pa.concat_tables([*tables, *pool.map(_read, parts)]).unify_dictionaries()
    of_list = pc.equal(rows["stage"].cast(pa.string()), "source")
    rows = rows.filter(pc.invert(pc.or_(of_list, pc.is_in(rows["clip_id"], prepared))))
    numbered = pa.table({"clip_id": rows["clip_id"], "attempts": rows["attempts"], "row": np.arange(len(rows))})
    of_clip = numbered.group_by("clip_id").aggregate([("row", "max"), ("attempts", "sum")]).sort_by("row_max")
    attempts = LEDGER.get_field_index("attempts")
    gathered = rows.take(of_clip["row_max"])
    return gathered.set_column(attempts, LEDGER.field(attempts), of_clip["attempts_sum"].cast(pa.int32()))


def settle(output: str, split: str, prepared: pa.ChunkedArray) -> None:
    """Put what unfinished runs left on record."""
    if not storage.is_empty(_parts_dir(output, split)):
        write(output, split, gather(output, split, prepared))
        storage.delete(_parts_dir(output, split))


def add_refused(failures: pa.Table, refused: pa.Table, prepared: pa.ChunkedArray) -> pa.Table:
    """Rows of LEDGER and those that the list refused, but for files missing here that a run from another folder had.

    A row that is refused for itself keeps its row, though another one of the list may bear the same name and be well.
    """
    dealt_with = pa.concat_arrays([*prepared.chunks, *failures["clip_id"].chunks])
    is_missing = pc.equal(refused["reason"], str(Reason.MISSING_FILE))
    is_settled = pc.and_(is_missing, pc.is_in(refused["clip_id"], value_set=dealt_with))
    return pa.concat_tables([failures, refused.filter(pc.invert(is_settled)).cast(LEDGER)])


def write(output: str, split: str, failures: pa.Table) -> None:
    storage.write_bytes(dataset.unpublished_file(output, split), b"")
    storage.write_file(dataset.failures_file(output, split), partial(_write, failures))


def by_reason(failures: pa.Table) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for count in pc.value_counts(failures["reason"].cast(pa.string())).to_pylist():
        counts[count["values"]] += count["counts"]
    return dict(sorted(counts.items()))


def final(failures: pa.Table, retry: frozenset[Reason]) -> pa.ChunkedArray:
    """Names of the clips that are not to be tried again, `retry` being the reasons that are tried all the same."""
    asked_again = pc.is_in(failures["reason"].cast(pa.string()), pa.array(map(str, retry), pa.string()))
    return failures.filter(pc.invert(pc.or_(failures["retry"], asked_again)))["clip_id"]


def _read(uri: str, sha256: str | None = None) -> pa.Table:
    table = parquet.read_table(uri, sha256=sha256, remedy=dataset.FAILURES_REMEDY, read_dictionary=WORDS)
    if "labels" not in table.column_names:  # as an earlier program wrote it
        table = table.append_column(LEDGER.field("labels"), pa.nulls(len(table), LEDGER.field("labels").type))
    try:
        return table.select(LEDGER.names).cast(LEDGER)
    except (KeyError, pa.ArrowException) as err:
        raise DataError(f"{uri} is damaged or no file of ours ({err}); {dataset.FAILURES_REMEDY}") from err


def _write(failures: pa.Table, file: IO[bytes]) -> None:
    with pq.ParquetWriter(file, FAILURES, compression="zstd", **parquet.CHECKSUMS) as writer:
        for begin in range(0, len(failures), ROWS_AT_ONCE):
            writer.write_table(failures.slice(begin, ROWS_AT_ONCE).cast(FAILURES))


def _parts_dir(output: str, split: str) -> str:
    return storage.join(dataset.work_dir(output), split, "failures")
