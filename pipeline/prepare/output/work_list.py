"""The clips still to do, as Parquet below `OUT/_work/todo`: tasks read them there, and the driver lets go of them.

A *chunk*, a row group of these files, becomes one shard. Its clips are of one split, in the order of
`pipeline.prepare.output.order`. Each run has a folder of its own, so that no task ever reads another run's list.

The files contain URLs without their keys. A chunk brings URLs with keys to its task through Ray's memory.
"""

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypedDict

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import dataset, parquet, storage
from pipeline.prepare.clip import under_way
from pipeline.prepare.output.order import in_work_order
from pipeline.redaction import without_secrets

CHUNKS_PER_FILE = 64
"""A task reads the footer of a file for one chunk of it."""

ALIVE = "alive"
"""The file that a run writes again and again while it needs its list."""

ALIVE_EVERY_S = 60.0
DEAD_AFTER_S = 900.0
"""A list on shared storage whose run has not said for so long that it lives is left over from a run that was killed."""


class Chunk(TypedDict):
    uri: str
    row_group: int
    media_with_keys: list[str | None] | None
    """Of each clip, where one has any."""


def todo_dir(output: str) -> str:
    return storage.join(dataset.work_dir(output), "todo")


@contextmanager
def work_list(output: str) -> Iterator[str]:
    """A folder for this run's list, which goes when the run is over, and with it those of dead runs.

    On a local disk, where an output has one writer, all others are of dead runs. On an object store another cluster may
    be at work; there a run is taken for dead by the time of its last sign of life, by the store's own clock.
    """
    folder = storage.join(todo_dir(output), uuid.uuid4().hex)
    over = threading.Event()
    storage.write_bytes(storage.join(folder, ALIVE), b"")
    with suppress(OSError):  # a list that is left over harms nobody: a later run deletes it
        _delete_dead(output, folder)

    def stay_alive() -> None:
        while not over.wait(ALIVE_EVERY_S):
            with suppress(OSError):  # the next sign may get through
                storage.write_bytes(storage.join(folder, ALIVE), b"")

    clock = threading.Thread(target=stay_alive, daemon=True)
    clock.start()
    try:
        yield folder
    finally:
        over.set()
        clock.join(ALIVE_EVERY_S)  # or it would write its sign after the folder has gone
        with suppress(OSError):  # what was prepared is to be published all the same
            storage.delete(folder)


def _delete_dead(output: str, own: str) -> None:
    folder = todo_dir(output)
    latest = storage.modified_s_below(folder)
    now_s = latest.pop(own.rsplit("/", 1)[1])
    alone = storage.is_local(output)
    for name, modified_s in latest.items():
        if alone or now_s - modified_s > DEAD_AFTER_S:
            storage.discard(storage.join(folder, name))


def write_todo(folder: str, clips: pa.Table, clips_per_chunk: int) -> list[Chunk]:
    """Write rows of CLIPS into the folder of a `work_list`."""
    chunks: list[Chunk] = []
    splits = pc.unique(clips["split"]).to_pylist()
    for split in splits:
        of_split = in_work_order(clips if len(splits) == 1 else clips.filter(pc.equal(clips["split"], split)))
        for rows in _pieces(of_split, clips_per_chunk * CHUNKS_PER_FILE):
            uri = storage.join(folder, f"{len(chunks):08d}.parquet")
            shown, with_keys = _apart_from_keys(rows["media"])
            rows = rows.set_column(rows.column_names.index("media"), rows.schema.field("media"), shown)
            storage.write_file(uri, partial(pq.write_table, rows, row_group_size=clips_per_chunk, **parquet.CHECKSUMS))
            for group, begin in enumerate(range(0, len(rows), clips_per_chunk)):
                own = with_keys.slice(begin, clips_per_chunk)
                media = own.to_pylist() if own.null_count < len(own) else None
                chunks.append(Chunk(uri=uri, row_group=group, media_with_keys=media))
    return chunks


def _apart_from_keys(media: pa.ChunkedArray) -> tuple[pa.Array, pa.Array]:
    """What may be written of each URL, and the URLs with keys, null for all others."""
    if not pc.any(pc.match_substring_regex(media, "://.*[@?]")).as_py():
        return media.combine_chunks(), pa.nulls(len(media), media.type)
    given = media.to_pylist()
    shown = [without_secrets(uri) for uri in given]
    with_keys = [uri if uri != without else None for uri, without in zip(given, shown, strict=True)]
    return pa.array(shown, media.type), pa.array(with_keys, media.type)


def read_chunks(chunks: pa.Table) -> pa.Table:
    """A stage: rows of Chunk in, rows of CLIPS under way out."""
    return under_way(pa.concat_tables([_read(**chunk) for chunk in chunks.to_pylist()]))


def _read(uri: str, row_group: int, media_with_keys: list[str | None] | None) -> pa.Table:
    fs, path = storage.resolve(uri)
    with fs.open_input_file(path) as file:
        rows = parquet.open_checked(file).read_row_group(row_group, use_threads=False)
    if media_with_keys is None:
        return rows
    field = rows.schema.field("media")
    media = pc.coalesce(pa.array(media_with_keys, field.type), rows["media"].combine_chunks())
    return rows.set_column(rows.column_names.index("media"), field, media)


def _pieces(rows: pa.Table, size: int) -> Iterator[pa.Table]:
    for begin in range(0, len(rows), size):
        yield rows.slice(begin, size)
