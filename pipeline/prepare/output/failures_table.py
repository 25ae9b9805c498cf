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
from pipeline.prepare.clip import FAILED_AT, FAILURES, MEDIA_STATE, Reason
from pipeline.versions import in_words

WORDS = ["split", "stage", "reason", "message", "tool_versions"]
LEDGER = pa.schema([f.with_type(pa.dictionary(pa.int32(), pa.string())) if f.name in WORDS else f for f in FAILURES])
"""FAILURES in memory."""

ROWS_AT_ONCE = 1 << 16

TIME = MEDIA_STATE.field("media_modified").type

CHUNK_STAGE = "prepare"
"""The stage of clips whose chunk failed as a whole: each of them may be well, so the next run tries them again."""

_ON_ITS_WAY = {"clip_id", "split", "labels", *FAILED_AT.names, *MEDIA_STATE.names}


def write_part(output: str, split: str, failed: pa.Table) -> None:
    """Rows under way that failed, under a name that a task which runs twice gives twice."""
    rows = [
        row
        | {
            "retry": Reason(row["reason"]).retry or row["stage"] == CHUNK_STAGE,
            "tool_versions": _versions_at(row["stage"]),
        }
        for row in failed.select(list(_ON_ITS_WAY & set(failed.column_names))).to_pylist()
    ]
    uri = storage.join(_parts_dir(output, split), f"{dataset.name_of(failed['clip_id'])}.parquet")
    dataset.write_table(uri, pa.Table.from_pylist(rows, schema=FAILURES))


@functools.cache
def _versions_at(stage: str) -> str:
    of_stage = {"download": ("yt-dlp",), "decode": ("av", "soxr"), CHUNK_STAGE: ("av", "soxr")}
    return in_words(of_stage[stage])


def gather(output: str, split: str, prepared: pa.ChunkedArray) -> pa.Table:
    """Rows of LEDGER: what is on record and what unfinished runs left, the newest reason, the attempts counted.

    Left out are clips that are `prepared` by now, and rows that the list itself caused: every run judges those anew.
    """
    return _gathered(output, split, prepared, _parts(output, split))


def _parts(output: str, split: str) -> list[str]:
    return storage.list_files(_parts_dir(output, split), suffix=".parquet")


def _gathered(output: str, split: str, prepared: pa.ChunkedArray, parts: list[str]) -> pa.Table:
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


def settle(output: str, split: str, prepared: pa.ChunkedArray) -> pa.Table:
    """Put what unfinished runs left on record; returns what `gather` does.

    Only files that were read are deleted: where the output is not locked, a task of another job may write one.
    """
    parts = _parts(output, split)
    failures = _gathered(output, split, prepared, parts)
    if parts:
        write(output, split, failures)
        for part in parts:
            storage.discard(part)
    return failures


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


def final(failures: pa.Table, retry: frozenset[Reason]) -> pa.Table:
    """The clips that are not to be tried again, `retry` being the reasons that are tried all the same."""
    asked_again = pc.is_in(failures["reason"].cast(pa.string()), pa.array(map(str, retry), pa.string()))
    return failures.filter(pc.invert(pc.or_(failures["retry"], asked_again)))


def has_changed(failures: pa.Table, clips: pa.Table) -> np.ndarray:
    """bool `[failures]`: whether the file that failed is another by now, by its size and time.

    Args:
        failures: rows of LEDGER.
        clips: rows of CLIPS, which have all these clips.
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
    return changed


def note_media(rows: pa.Table) -> pa.Table:
    """A stage: rows under way in; out come the same with what the file of each failed clip was like.

    It follows the decoder at once: what is noted has to be the file that failed, not the whole one that replaced it.
    """
    failed = pc.and_(pc.is_valid(rows["reason"]), pc.invert(pc.match_substring_regex(rows["media"], "(?i)^https?://")))
    states = states_of(pc.if_else(failed, rows["media"], pa.scalar(None, pa.string())))
    for field in MEDIA_STATE:
        rows = rows.append_column(field, states[field.name])
    return rows


def states_of(media: pa.ChunkedArray) -> pa.Table:
    """MEDIA_STATE of files; null for one that is not there, or of which nothing is asked (null)."""
    uris = pc.unique(media).drop_null().to_pylist()
    known = dict(zip(uris, storage.size_and_time(uris), strict=True)) if uris else {}
    states = [known.get(uri, (None, None)) for uri in media.to_pylist()]
    sizes, times_us = ([state[i] for state in states] for i in (0, 1))
    return pa.table([pa.array(sizes, pa.int64()), pa.array(times_us, pa.int64()).cast(TIME)], schema=MEDIA_STATE)


def _read(uri: str, sha256: str | None = None) -> pa.Table:
    table = parquet.read_table(uri, sha256=sha256, remedy=dataset.FAILURES_REMEDY, read_dictionary=WORDS)
    for name in {"labels", *MEDIA_STATE.names} - set(table.column_names):  # as an earlier program wrote it
        table = table.append_column(LEDGER.field(name), pa.nulls(len(table), LEDGER.field(name).type))
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
