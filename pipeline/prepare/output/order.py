"""The order in which clips are prepared and stored: random but reproducible, and independent of the list's order.

A shard is a part of this order, and training shuffles only within windows of row groups. In the order of a list sorted
by class, a window would contain few classes. The order depends only on the clip ids, so a resumed run and a run on
another machine have the same order.

Rows of Parquet archives are an exception, because reading one row means reading its row group. They are cut into runs
of consecutive rows, and the runs are put in random order. The clips of a chunk are shuffled when its shard is written.
"""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.prepare.sources import archives

SEED = b"ast-ray 1"

READS_OF_A_ROW_GROUP = 4
"""How often a row group of an archive may be read: it is cut into so many runs if it has more than `RUN_CLIPS` rows."""

RUN_CLIPS = 16
"""Rows of an archive that stay together. An audio store has row groups of this size."""


def sort_keys(clip_ids: pa.ChunkedArray) -> np.ndarray:
    """uint64 `[clips]`: hashes of the ids, the same on every machine."""
    digests = (hashlib.blake2b(clip_id.encode(), digest_size=8, key=SEED).digest() for clip_id in clip_ids.to_pylist())
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)


def shuffled(rows: pa.Table) -> pa.Table:
    """Rows with `clip_id` in the seeded order. If they are in this order already, they are not copied."""
    keys = sort_keys(rows["clip_id"])
    if (keys[1:] >= keys[:-1]).all():
        return rows
    return rows.take(pa.array(np.argsort(keys, kind="stable")))


def in_work_order(clips: pa.Table) -> pa.Table:
    """Rows of CLIPS in the order in which chunks are cut from them."""
    is_row = pc.fill_null(pc.starts_with(clips["member"], archives.ROW), False).to_numpy()
    if not is_row.any():
        return shuffled(clips)
    row = np.zeros(len(clips), np.int64)
    run = np.arange(len(clips))  # a clip outside a Parquet archive is a run of its own
    rows = clips.filter(pa.array(is_row))
    row[is_row] = pc.utf8_slice_codeunits(rows["member"], len(archives.ROW)).cast(pa.int64()).to_numpy()
    run[is_row] = len(clips) + _runs(rows["media"], row[is_row])
    keys = sort_keys(clips["clip_id"])
    in_runs = np.lexsort((row, run))
    _, first, of_run = np.unique(run[in_runs], return_index=True, return_inverse=True)
    key_of_run = keys[in_runs[first]]
    return clips.take(pa.array(in_runs[np.lexsort((of_run, key_of_run[of_run]))]))


def _runs(media: pa.ChunkedArray, row: np.ndarray) -> np.ndarray:
    """`[rows]`: the number of the run to which each row of a Parquet archive belongs."""
    archive = media.combine_chunks().dictionary_encode()
    of_archive = archive.indices.to_numpy()
    names = np.empty((len(row), 3), np.int64)
    for i, first_rows in enumerate(archives.ahead(archives.first_rows, archive.dictionary.to_pylist())):
        here = np.flatnonzero(of_archive == i)
        group = np.searchsorted(first_rows, row[here], side="right") - 1
        begins, ends = np.array(first_rows), np.array([*first_rows[1:], np.iinfo(np.int64).max])
        size = np.minimum(ends[group] - begins[group], 1 << 30)
        run_clips = np.maximum(RUN_CLIPS, -(-size // READS_OF_A_ROW_GROUP))
        names[here] = np.stack([np.full(len(here), i), group, (row[here] - begins[group]) // run_clips], axis=1)
    return np.unique(names, axis=0, return_inverse=True)[1]
