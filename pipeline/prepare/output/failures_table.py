"""The failures table `OUT/SPLIT/failures.parquet`: one row per clip that could not be prepared, over all runs.

Tasks write parts below `OUT/_work`, and the next run adds them to the table. In two million rows the same texts repeat,
so in memory they are dictionary-encoded, and the table is written in slices.
"""

import functools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ast_core.errors import DataError
from pipeline import dataset, parquet, storage
from pipeline.prepare.clip import FAILED_AT, FAILURES, MEDIA_STATE, Reason
from pipeline.prepare.output.origins import section_hashes
from pipeline.versions import in_words

WORDS = ["split", "stage", "reason", "message", "tool_versions"]
FAILURE_ROWS = pa.schema(
    [f.with_type(pa.dictionary(pa.int32(), pa.string())) if f.name in WORDS else f for f in FAILURES]
)
"""FAILURES as kept in memory."""

ROWS_AT_ONCE = 1 << 16

TIME = MEDIA_STATE.field("media_modified").type

CHUNK_STAGE = "prepare"
"""Stage of clips whose chunk failed as a whole. Each clip may be valid, so the next run tries it again."""

_LATER_COLUMNS = ["labels", *MEDIA_STATE.names, "section_hash", "start_s", "end_s"]
"""Columns that tables of earlier versions may lack."""

_IN_PROGRESS = {"clip_id", "split", *FAILED_AT.names, *_LATER_COLUMNS}


def write_part(output: str, split: str, failed: pa.Table) -> None:
    """Write the failed rows of a chunk. The file name depends only on the clips, so a repeated task overwrites it."""
    rows = [
        row
        | {
            "retry": _is_tried_again(row),
            "tool_versions": _versions_at(row["stage"]),
        }
        for row in failed.select(list(_IN_PROGRESS & set(failed.column_names))).to_pylist()
    ]
    uri = storage.join(_parts_dir(output, split), f"{dataset.name_of(failed['clip_id'])}.parquet")
    dataset.write_table(uri, pa.Table.from_pylist(rows, schema=FAILURES))


def _is_tried_again(row: dict[str, Any]) -> bool:
    """Whether the next run tries a failed clip again, although nothing has changed.

    A file that is too short stays so until it changes, and then it is tried again anyway. A fetch may have been cut.
    """
    is_short_file = row["reason"] == Reason.TRUNCATED and row.get("media_bytes") is not None
    return row["stage"] == CHUNK_STAGE or (Reason(row["reason"]).retry and not is_short_file)


@functools.cache
def _versions_at(stage: str) -> str:
    of_stage = {"download": ("yt-dlp",), "decode": ("av", "soxr"), CHUNK_STAGE: ("av", "soxr")}
    return in_words(of_stage[stage])


def collect(output: str, split: str, prepared: pa.ChunkedArray) -> pa.Table:
    """Combine the failures table with the parts of unfinished runs: the newest reason, and the sum of the attempts.

    Returns rows of FAILURE_ROWS. Left out are clips that are `prepared` by now, and rows that the list itself caused,
    because every run checks the list again.
    """
    return _collected(output, split, prepared, _parts(output, split))


def read(output: str, split: str) -> pa.Table:
    """The failures table of a split as it is on disk, as FAILURE_ROWS."""
    return _read(dataset.failures_file(output, split), dataset.published_sha256(output, split, "failures.parquet"))


def _parts(output: str, split: str) -> list[str]:
    return storage.list_files(_parts_dir(output, split), suffix=".parquet")


def _collected(output: str, split: str, prepared: pa.ChunkedArray, parts: list[str]) -> pa.Table:
    tables = [FAILURE_ROWS.empty_table()]
    if storage.exists(dataset.failures_file(output, split)):
        tables.append(read(output, split))
    with ThreadPoolExecutor(16) as pool:
        rows = pa.concat_tables([*tables, *pool.map(_read, parts)]).unify_dictionaries()
    of_list = pc.equal(rows["stage"].cast(pa.string()), "source")
    rows = rows.filter(pc.invert(pc.or_(of_list, pc.is_in(rows["clip_id"], prepared))))
    numbered = pa.table({"clip_id": rows["clip_id"], "attempts": rows["attempts"], "row": np.arange(len(rows))})
    of_clip = numbered.group_by("clip_id").aggregate([("row", "max"), ("attempts", "sum")]).sort_by("row_max")
    attempts = FAILURE_ROWS.get_field_index("attempts")
    collected = rows.take(of_clip["row_max"])
    return collected.set_column(attempts, FAILURE_ROWS.field(attempts), of_clip["attempts_sum"].cast(pa.int32()))


def compact(output: str, split: str, prepared: pa.ChunkedArray) -> pa.Table:
    """Write the parts of unfinished runs into the failures table, and return what `collect` returns.

    Only files that were read are deleted, because without a lock on the output another job may write one meanwhile.
    """
    parts = _parts(output, split)
    failures = _collected(output, split, prepared, parts)
    if parts:
        write(output, split, failures)
        for part in parts:
            if not storage.discard(part):  # it would count again, and might hide a newer reason
                dataset.write_table(part, FAILURES.empty_table())
    return failures


def add_refused(failures: pa.Table, refused: pa.Table, prepared: pa.ChunkedArray) -> pa.Table:
    """Append the rows that the list refused to rows of FAILURE_ROWS.

    A `missing_file` row is dropped if an earlier run, with another audio folder, already prepared or recorded that
    clip. Other refused rows are always kept, even if a valid row has the same name.
    """
    known_ids = pa.concat_arrays([*prepared.chunks, *failures["clip_id"].chunks])
    is_missing = pc.equal(refused["reason"], str(Reason.MISSING_FILE))
    is_known = pc.and_(is_missing, pc.is_in(refused["clip_id"], value_set=known_ids))
    return pa.concat_tables([failures, refused.filter(pc.invert(is_known)).cast(FAILURE_ROWS)])


def write(output: str, split: str, failures: pa.Table) -> None:
    storage.write_bytes(dataset.unpublished_file(output, split), b"")
    storage.write_file(dataset.failures_file(output, split), partial(_write, failures))


def by_reason(failures: pa.Table) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for count in pc.value_counts(failures["reason"].cast(pa.string())).to_pylist():
        counts[count["values"]] += count["counts"]
    return dict(sorted(counts.items()))


def num_tried_again(failures: pa.Table) -> int:
    """How many of these clips the next run tries again without being asked: those whose reason says so, and those whose
    chunk failed as a whole."""
    num_tried_again: int = pc.sum(failures["retry"]).as_py() or 0
    return num_tried_again


def final(failures: pa.Table, retry: frozenset[Reason]) -> pa.Table:
    """The clips that are not tried again. Those with a reason in `retry` are tried again."""
    asked_again = pc.is_in(failures["reason"].cast(pa.string()), pa.array(map(str, retry), pa.string()))
    return failures.filter(pc.invert(pc.or_(failures["retry"], asked_again)))


def has_changed(failures: pa.Table, clips: pa.Table) -> np.ndarray:
    """bool `[failures]`: whether the file that failed has changed since, according to its size and time, or the list
    names another file or section for the clip, or reads the file in another way.

    Args:
        failures: rows of FAILURE_ROWS.
        clips: rows of CLIPS, which contain all these clips.
    """
    changed = np.zeros(len(failures), bool)
    known = np.flatnonzero(pc.is_valid(failures["media_bytes"]).to_numpy())
    if len(known):
        then = failures.take(pa.array(known))
        row = pc.index_in(then["clip_id"], value_set=clips["clip_id"].combine_chunks())
        now = states_of(clips["media"].take(row))
        pairs = ((then[name], now[name]) for name in MEDIA_STATE.names)
        differs = [pc.fill_null(pc.not_equal(one, other), True).to_numpy() for one, other in pairs]
        changed[known] = np.logical_or.reduce(differs)
    known = np.flatnonzero(pc.is_valid(failures["section_hash"]).to_numpy())
    if len(known):
        then = failures.take(pa.array(known))
        now = clips.take(pc.index_in(then["clip_id"], value_set=clips["clip_id"].combine_chunks()))
        hashes = (section_hashes(now), section_hashes(now, with_place=False))  # now, and in earlier versions
        changed[known] |= ~pc.or_(*(pc.equal(then["section_hash"], one) for one in hashes)).to_numpy()
    return changed


def record_media_state(rows: pa.Table) -> pa.Table:
    """Stage that records size and time of the file of each failed clip.

    It follows the decoder directly, so that it records the file that failed and not a later replacement.
    """
    failed = pc.and_(pc.is_valid(rows["reason"]), pc.invert(pc.match_substring_regex(rows["media"], "(?i)^https?://")))
    if pc.any(failed).as_py():
        states = states_of(pc.if_else(failed, rows["media"], pa.scalar(None, pa.string())))
    else:  # in most batches
        states = pa.table([pa.nulls(len(rows), field.type) for field in MEDIA_STATE], schema=MEDIA_STATE)
    for field in MEDIA_STATE:
        rows = rows.append_column(field, states[field.name])
    return rows


def states_of(media: pa.ChunkedArray) -> pa.Table:
    """MEDIA_STATE of files; null for a missing file and for null."""
    uris = pc.unique(media).drop_null().to_pylist()
    known = dict(zip(uris, storage.size_and_time(uris), strict=True)) if uris else {}
    states = [known.get(uri, (None, None)) for uri in media.to_pylist()]
    sizes, times_us = ([state[i] for state in states] for i in (0, 1))
    return pa.table([pa.array(sizes, pa.int64()), pa.array(times_us, pa.int64()).cast(TIME)], schema=MEDIA_STATE)


def _read(uri: str, sha256: str | None = None) -> pa.Table:
    table = parquet.read_table(uri, sha256=sha256, remedy=dataset.FAILURES_REMEDY, read_dictionary=WORDS)
    for name in set(_LATER_COLUMNS) - set(table.column_names):
        table = table.append_column(FAILURE_ROWS.field(name), pa.nulls(len(table), FAILURE_ROWS.field(name).type))
    try:
        return table.select(FAILURE_ROWS.names).cast(FAILURE_ROWS)
    except (KeyError, pa.ArrowException) as err:
        raise DataError(f"{uri} is damaged or no file of ours ({err}); {dataset.FAILURES_REMEDY}") from err


def _write(failures: pa.Table, file: IO[bytes]) -> None:
    with pq.ParquetWriter(file, FAILURES, compression="zstd", **parquet.CHECKSUMS) as writer:
        for begin in range(0, len(failures), ROWS_AT_ONCE):
            writer.write_table(failures.slice(begin, ROWS_AT_ONCE).cast(FAILURES))


def _parts_dir(output: str, split: str) -> str:
    return storage.join(dataset.work_dir(output), split, "failures")
