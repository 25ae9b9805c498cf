"""The clips still to do, as Parquet below `OUT/_work`: tasks read them there, and the driver lets go of them.

A *chunk*, a row group of these files, becomes one shard. Its clips are of one split and follow each other in the list.
"""

from collections.abc import Iterator
from functools import partial
from typing import TypedDict

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import dataset, parquet, storage
from pipeline.prepare.archives import in_reading_order
from pipeline.prepare.clip import under_way

CHUNKS_PER_FILE = 64
"""A task reads the footer of a file for one chunk of it."""


class Chunk(TypedDict):
    uri: str
    row_group: int


def todo_dir(output: str) -> str:
    return storage.join(dataset.work_dir(output), "todo")


def write_todo(output: str, clips: pa.Table, clips_per_chunk: int) -> list[Chunk]:
    """Write rows of CLIPS, in place of what is there."""
    folder = todo_dir(output)
    storage.delete(folder)
    chunks: list[Chunk] = []
    splits = pc.unique(clips["split"]).to_pylist()
    for split in splits:
        of_split = in_reading_order(clips if len(splits) == 1 else clips.filter(pc.equal(clips["split"], split)))
        for rows in _pieces(of_split, clips_per_chunk * CHUNKS_PER_FILE):
            uri = storage.join(folder, f"{len(chunks):08d}.parquet")
            storage.write_file(uri, partial(pq.write_table, rows, row_group_size=clips_per_chunk, **parquet.CHECKSUMS))
            chunks += [Chunk(uri=uri, row_group=group) for group in range(-(-len(rows) // clips_per_chunk))]
    return chunks


def read_chunks(chunks: pa.Table) -> pa.Table:
    """A stage: rows of Chunk in, rows of CLIPS under way out."""
    return under_way(pa.concat_tables([_read(**chunk) for chunk in chunks.to_pylist()]))


def _read(uri: str, row_group: int) -> pa.Table:
    fs, path = storage.resolve(uri)
    with fs.open_input_file(path) as file:
        return parquet.opened(file).read_row_group(row_group, use_threads=False)


def _pieces(rows: pa.Table, size: int) -> Iterator[pa.Table]:
    for begin in range(0, len(rows), size):
        yield rows.slice(begin, size)
