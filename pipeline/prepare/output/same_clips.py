"""Checks that the clips of a list are those that an earlier run prepared under the same ids.

A shard contains the labels and the section of each clip, and neither may change. It does not contain the file that was
read. A file that was written, or put in its place, later than the shard may contain another sound.
"""

import functools
import os
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ast_core.errors import DataError
from pipeline import dataset, storage
from pipeline.prepare.audio.decode import SHORTFALL_SHARE
from pipeline.prepare.sources import ClipList

ROWS_AT_ONCE = 1 << 14
"""Number of clips that are Python objects at a time, because a list may have two million."""

ROUNDING_S = 1e-3
"""Times of a list are rounded to milliseconds, and lengths to samples."""


def check_same_clips(split: str, of_split: pa.Table, listed: ClipList, prepared: pa.Table) -> None:
    """Refuse a list that turns a split into another one. Adding and removing clips is allowed.

    Args:
        of_split: rows of CLIPS of the list in this split.
        prepared: rows of the shards, with `clip_id`, `labels`, `start_s` and `end_s`.

    Raises:
        DataError: no clip is the same, or a clip has other labels or another section.
    """
    named = (listed.clips, listed.refused, listed.beyond)  # refused ones too, for example without a file in this folder
    if not any(
        pc.any(pc.is_in(table["clip_id"], value_set=prepared["clip_id"].combine_chunks())).as_py() for table in named
    ):
        raise DataError(
            f"split {split!r} there has {len(prepared)} clips, none of them in this list; give another --split"
        )
    position = pc.index_in(prepared["clip_id"], value_set=of_split["clip_id"].combine_chunks())
    known = prepared.filter(pc.is_valid(position))
    asked = of_split.select(["labels", "start_s", "end_s"]).take(position.drop_null())
    differs = pc.not_equal(_label_texts(known["labels"]), _label_texts(asked["labels"]))
    if pc.any(differs).as_py():
        of_other_labels = known["clip_id"].filter(differs)
        raise DataError(
            f"{len(of_other_labels)} clips of split {split!r} are prepared with other labels, {of_other_labels[0]} for "
            "one; give another --output"
        )
    is_other = _is_other_section(known, asked)
    if is_other.any():
        raise DataError(
            f"{is_other.sum()} clips of split {split!r} are prepared from another section than this list names, "
            f"{known['clip_id'][int(np.argmax(is_other))]} for one; give another --output, or these clips other ids"
        )


def _label_texts(labels: pa.ChunkedArray) -> pa.ChunkedArray:
    """The labels as texts, because Arrow does not compare lists."""
    return pc.binary_join(labels.cast(pa.list_(pa.string())), ",")


def _is_other_section(known: pa.Table, asked: pa.Table) -> np.ndarray:
    """bool `[clips]`: whether a clip was prepared from another section than the list names.

    A clip may be a little shorter than its section, if the recording ends there. Sections without an end are skipped.
    """
    start_s, asked_start_s = (table["start_s"].to_numpy() for table in (known, asked))
    length_s = known["end_s"].to_numpy() - start_s
    asked_length_s = pc.fill_null(asked["end_s"], np.nan).to_numpy() - asked_start_s
    has_other_length = np.abs(length_s - asked_length_s) > SHORTFALL_SHARE * asked_length_s + ROUNDING_S
    return (np.abs(start_s - asked_start_s) > ROUNDING_S) | has_other_length


def newer_media_lines(output: str, split: str, of_split: pa.Table, prepared: pa.Table) -> list[str]:
    """A line on prepared clips whose local file was written, or put in its place, after their shard was.

    They are not prepared again automatically, because copying a folder also changes the times of its files.
    """
    position = pc.index_in(prepared["clip_id"], value_set=of_split["clip_id"].combine_chunks())
    known = prepared.select(["clip_id", "shard"]).filter(pc.is_valid(position))
    known = known.append_column("media", of_split["media"].take(position.drop_null()))
    known = known.filter(pc.invert(pc.match_substring(known["media"], "://")))
    folder = dataset.shards_dir(output, split)
    shards = pc.unique(known["shard"]).to_pylist()
    states = storage.size_and_time([storage.join(folder, shard) for shard in shards])
    shard_us = {shard: time_us or 0 for shard, (_, time_us) in zip(shards, states, strict=True)}
    written_us = functools.lru_cache(1 << 10)(_written_us)  # an archive contains many clips
    num_newer, example = 0, ("", "")
    for batch in known.to_batches(max_chunksize=ROWS_AT_ONCE):
        for clip_id, shard, media in zip(*batch.to_pydict().values(), strict=True):
            if written_us(media) > shard_us[shard]:
                num_newer, example = num_newer + 1, example if num_newer else (clip_id, shard)
    if not num_newer:
        return []
    clip_id, shard = example
    return [
        f"{num_newer:,} prepared clips of split {split!r} have files that were written or copied later ({clip_id} for "
        f"one) and are not read again; if they are other sounds now, delete {dataset.index_file(output, split)} and "
        f"the clips' shards ({storage.join(folder, shard)} for one), or give another --output"
    ]


def _written_us(path: str) -> int:
    """Time at which a file was last written or put in its place; 0 for a missing file.

    Copying with `cp -p` or moving sets an old time of writing, but not an old time of the inode's change.
    """
    with suppress(OSError, ValueError):
        status = os.stat(path)
        return max(status.st_mtime_ns, status.st_ctime_ns) // 1000
    return 0
