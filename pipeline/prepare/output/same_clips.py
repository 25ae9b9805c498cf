"""Checks that the clips of a list are those that an earlier run prepared under the same ids.

A shard contains the labels and the section of each clip, and neither may change. Whether the file is the same can only
be guessed: it may have another path because its folder was moved, and it may be newer because it was copied. So these
are pointed out, and not refused.
"""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ast_core.errors import DataError
from pipeline import dataset, storage
from pipeline.prepare.audio.decode import SHORTFALL_SHARE
from pipeline.prepare.clip import FAILURES
from pipeline.prepare.output.origins import read_otherwise, section_hashes, source_hashes
from pipeline.prepare.output.shards import label_text
from pipeline.prepare.sources import ClipList
from pipeline.prepare.sources.rows import without_file

ROWS_AT_ONCE = 1 << 14
"""Number of clips that are Python objects at a time, because a list may have two million."""

SAID_ABOVE = 100_000
"""Looking at the files of more clips than this takes seconds or minutes, so a line says so beforehand."""

FILES_AT_ONCE, FILES_A_TASK = 32, 64
"""Threads that ask for the times of files, and files that one of them takes at a time."""

ROUNDING_S = 1e-3
"""Times of a list are rounded to milliseconds, and lengths to samples."""


_COMPARED = pa.schema([*map(FAILURES.field, ("labels", "start_s", "end_s")), pa.field("clip_id", pa.string())])
"""Columns of CLIPS and of FAILURES. A section is null if the list was refused before it was known."""


def check_same_clips(split: str, of_split: pa.Table, listed: ClipList, prepared: pa.Table) -> None:
    """Refuse a list that turns a split into another one. Adding and removing clips is allowed.

    Args:
        of_split: rows of CLIPS of the list in this split.
        prepared: rows of the shards, with `clip_id`, `labels`, `start_s` and `end_s`.

    Raises:
        DataError: no clip is the same, or a clip has other labels or another section.
    """
    # Refused ones too, for example without a file in this folder.
    named = (listed.clips, listed.refused, listed.beyond, listed.missing_beyond)
    has_known_id = any(
        pc.any(pc.is_in(table["clip_id"], value_set=prepared["clip_id"].combine_chunks())).as_py() for table in named
    )
    beyond = listed.beyond.filter(pc.equal(listed.beyond["split"], split))
    if not has_known_id and not _under_other_ids(pa.concat_tables([of_split, beyond]), prepared):
        raise DataError(
            f"split {split!r} there has {len(prepared)} clips, none of them in this list; give another --split"
        )
    # Clips beyond --limit and without a file in this folder stay in the data set, so they must be the same too.
    others = (listed.beyond, without_file(listed.refused), listed.missing_beyond)
    stay = [of_split, *(table.filter(pc.equal(table["split"], split)) for table in others)]
    compared = pa.concat_tables([table.select(_COMPARED.names).cast(_COMPARED) for table in stay])
    position = pc.index_in(prepared["clip_id"], value_set=compared["clip_id"].combine_chunks())
    known = prepared.filter(pc.is_valid(position))
    asked = compared.take(position.drop_null())
    differs = pc.not_equal(label_text(known), label_text(asked))
    if pc.any(differs).as_py():
        of_other_labels = known["clip_id"].filter(differs)
        raise DataError(
            f"{len(of_other_labels)} clips of split {split!r} are prepared with other labels, {of_other_labels[0]} for "
            "one; give another --output"
        )
    has_section = pc.is_valid(asked["start_s"])
    known = known.filter(has_section)
    is_other = is_other_section(known, asked.filter(has_section))
    if is_other.any():
        raise DataError(
            f"{is_other.sum()} clips of split {split!r} are prepared from another section than this list names, "
            f"{known['clip_id'][int(np.argmax(is_other))]} for one; give another --output, or these clips other ids"
        )


def other_id_lines(split: str, of_split: pa.Table, prepared: pa.Table) -> list[str]:
    """A line on clips that are prepared under other ids than the list gives them now.

    Ids contain folders only where names are equal, so a list that grows or shrinks may change them. Or its column
    `clip_id` was changed.
    """
    if not (pairs := _under_other_ids(of_split, prepared)):
        return []
    old, new = pairs[0]
    return [
        f"{len(pairs):,} clips of split {split!r} are prepared under other ids ({old} for one, which is {new} in this "
        "list) and are prepared again: ids contain folders if files have equal names, or the list gives other ids"
    ]


def _under_other_ids(asked: pa.Table, prepared: pa.Table) -> list[tuple[str, str]]:
    """The id in the shards and the id in the list of each section that has two. Shards of earlier versions have none
    of these, because they do not say what they were made from."""
    old = prepared.select(["clip_id", "section_hash"])
    old = old.filter(pc.invert(pc.is_in(old["clip_id"], value_set=asked["clip_id"].combine_chunks())))
    if not len(old):  # nearly always, and hashes of two million clips take seconds
        return []
    new = asked.filter(pc.invert(pc.is_in(asked["clip_id"], value_set=prepared["clip_id"].combine_chunks())))
    position = pc.index_in(section_hashes(new), value_set=old["section_hash"].combine_chunks())
    known = pc.is_valid(position)
    ids = (old["clip_id"].take(position.drop_null()), new["clip_id"].filter(known))
    return list(zip(*(column.to_pylist() for column in ids), strict=True))


def is_other_section(known: pa.Table, asked: pa.Table) -> np.ndarray:
    """bool `[clips]`: whether a clip was prepared from another section than the list names.

    A clip may be a little shorter than its section, if the recording ends there. If the list gives no end now, the clip
    must have been prepared without one. Another end than before is the same if the recording ends before both.
    """
    start_s, asked_start_s = (table["start_s"].to_numpy() for table in (known, asked))
    length_s = known["end_s"].to_numpy() - start_s
    asked_length_s = pc.fill_null(asked["end_s"], np.nan).to_numpy() - asked_start_s
    has_other_length = np.abs(length_s - asked_length_s) > SHORTFALL_SHARE * asked_length_s + ROUNDING_S
    had_end = pc.fill_null(pc.invert(known["is_to_end"]), False).to_numpy()
    lost_end = had_end & pc.is_null(asked["end_s"]).to_numpy()
    listed_end_s, asked_end_s = (
        pc.fill_null(column, np.nan).to_numpy() for column in (known["listed_end_s"], asked["end_s"])
    )
    end_s = known["end_s"].to_numpy()
    is_cut_short = end_s < listed_end_s - ROUNDING_S  # by the end of the recording
    is_same_end = np.where(asked_end_s < listed_end_s, end_s <= asked_end_s + ROUNDING_S, is_cut_short)
    has_other_end = (np.abs(listed_end_s - asked_end_s) > ROUNDING_S) & ~is_same_end
    return (np.abs(start_s - asked_start_s) > ROUNDING_S) | has_other_length | lost_end | has_other_end


def other_media_lines(
    output: str, split: str, of_split: pa.Table, prepared: pa.Table, say: Callable[[str], None] = print
) -> list[str]:
    """Lines on prepared clips that may be other sounds now.

    The list names another recording for them, or their file was read in another way, or their local file was written,
    or put in its place, after their shard was. They are not prepared again automatically, because moving or copying a
    folder does the same.
    """
    position = pc.index_in(prepared["clip_id"], value_set=of_split["clip_id"].combine_chunks())
    known = prepared.select(["clip_id", "shard", "source_hash", "section_hash"]).filter(pc.is_valid(position))
    asked = of_split.drop_columns(["clip_id", "split", "labels"]).take(position.drop_null())
    if len(known) > SAID_ABOVE:
        say(f"looking for changes in the files of {len(known):,} prepared clips of split {split!r}")
    folder = dataset.shards_dir(output, split)
    shards = pc.unique(known["shard"])
    states = storage.size_and_time([storage.join(folder, shard) for shard in shards.to_pylist()])
    shard_us = np.array([time_us or 0 for _, time_us in states], np.int64)
    num_clips, example = Counter[str](), dict[str, tuple[str, str]]()
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        for begin in range(0, len(known), ROWS_AT_ONCE):
            clips, rows = (table.slice(begin, ROWS_AT_ONCE) for table in (known, asked))
            is_other, is_otherwise = _have_other_origins(clips, rows)
            is_later = ~(is_other | is_otherwise)
            shard = pc.index_in(clips["shard"], value_set=shards).to_numpy()
            is_later[is_later] = _written_us(rows["media"].filter(pa.array(is_later)), pool) > shard_us[shard[is_later]]
            for why, is_so in (
                ("are prepared from other files or URLs than this list names", is_other),
                ("are of files that only one of the two runs reads with --files-are-clips", is_otherwise),
                ("have files that were written or copied later", is_later),
            ):
                if is_so.any():
                    num_clips[why] += int(is_so.sum())
                    first = int(np.argmax(is_so))
                    example.setdefault(why, (clips["clip_id"][first].as_py(), clips["shard"][first].as_py()))
    return [
        f"{num:,} prepared clips of split {split!r} {why} ({example[why][0]} for one) and are not read again; if they "
        f"are other sounds now, delete {dataset.index_file(output, split)} and the clips' shards "
        f"({storage.join(folder, example[why][1])} for one), or give another --output"
        for why, num in num_clips.items()
    ]


def _have_other_origins(known: pa.Table, asked: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """bool `[clips]`, twice: whether the list names another recording for a prepared clip, and whether its file is only
    read in another way. False for shards of earlier versions, which do not say what they were made from."""
    is_other, is_otherwise = np.zeros((2, len(known)), bool)
    # Most clips are the same section of the same file, so one hash for each of them is enough.
    is_same = pc.fill_null(pc.equal(known["section_hash"], section_hashes(asked)), False).to_numpy()
    if len(rest := np.flatnonzero(~is_same)):
        known, asked = known.take(rest), asked.take(rest)
        has_other = pc.not_equal(known["source_hash"], source_hashes(asked))
        has_otherwise = pc.equal(known["section_hash"], section_hashes(read_otherwise(asked)))
        is_other[rest], is_otherwise[rest] = (pc.fill_null(has, False).to_numpy() for has in (has_other, has_otherwise))
    return is_other, is_otherwise & ~is_other


def _written_us(media: pa.ChunkedArray, pool: ThreadPoolExecutor) -> np.ndarray:
    """int64 `[clips]`: `storage.written_us` of each file. On a network drive each takes half a millisecond, so many are
    asked for at a time."""
    files = pc.unique(media)
    parts = (files[begin : begin + FILES_A_TASK].to_pylist() for begin in range(0, len(files), FILES_A_TASK))
    times_us = pool.map(lambda some: list(map(storage.written_us, some)), parts)
    return np.array([*chain.from_iterable(times_us)], np.int64)[pc.index_in(media, value_set=files).to_numpy()]
