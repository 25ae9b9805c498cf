"""The work list: the clips still to prepare, as Parquet below `OUT/_work/todo`, so that the driver can free its memory.

A *chunk*, a row group of these files, becomes one shard. Its clips are of one split, in the order of
`pipeline.prepare.output.order`. Each run has its own folder, so no task reads another run's list.

The files contain URLs without secrets. URLs with secrets reach the task of a chunk through Ray's memory.
"""

import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypedDict

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ast_core.errors import DataError
from pipeline import dataset, parquet, storage
from pipeline.prepare.clip import in_progress
from pipeline.prepare.output.order import in_work_order
from pipeline.prepare.output.origins import record_origin
from pipeline.redaction import without_secrets

CHUNKS_PER_FILE = 64
"""Limits the size of a file's footer, which a task reads for each chunk."""

ALIVE = "alive"
"""The file that a run rewrites regularly while it needs its list."""

ALIVE_EVERY_S = 60.0
DEAD_AFTER_S = 900.0
"""On shared storage a list without a sign of life for so long belongs to a run that was killed."""


class Chunk(TypedDict):
    uri: str
    row_group: int
    media_with_keys: list[str | None] | None
    """The URLs with secrets; null for all other clips."""


def work_lists_dir(output: str) -> str:
    return storage.join(dataset.work_dir(output), "todo")


@contextmanager
def work_list(output: str) -> Iterator[str]:
    """Make a folder for this run's list, and delete it at the end. Lists of dead runs are deleted too.

    On a local disk an output has one writer, so all other runs are dead. On an object store another cluster may be
    running. There a run counts as dead by the time of its last sign of life, on the store's clock.
    """
    folder = storage.join(work_lists_dir(output), uuid.uuid4().hex)
    over = threading.Event()
    storage.write_bytes(storage.join(folder, ALIVE), b"")
    with suppress(OSError):  # a list that is left over is harmless; a later run deletes it
        _delete_dead(output, folder)

    def stay_alive() -> None:
        while not over.wait(ALIVE_EVERY_S):
            with suppress(OSError):  # the next sign may succeed
                storage.write_bytes(storage.join(folder, ALIVE), b"")

    clock = threading.Thread(target=stay_alive, daemon=True)
    clock.start()
    try:
        yield folder
    finally:
        over.set()
        clock.join(ALIVE_EVERY_S)  # otherwise it could write its sign after the folder is deleted
        with suppress(OSError):  # the prepared clips are published in any case
            storage.delete(folder)


def _delete_dead(output: str, own: str) -> None:
    folder = work_lists_dir(output)
    latest = storage.modified_s_below(folder)
    now_s = latest.pop(own.rsplit("/", 1)[1], 0.0)  # missing if another job has deleted it just now
    is_only_writer = storage.is_local(output)
    for name, modified_s in latest.items():
        if is_only_writer or now_s - modified_s > DEAD_AFTER_S:
            storage.discard(storage.join(folder, name))


def write_chunks(folder: str, clips: pa.Table, clips_per_chunk: int) -> list[Chunk]:
    """Write rows of CLIPS into the folder of a `work_list`."""
    chunks: list[Chunk] = []
    splits = pc.unique(clips["split"]).to_pylist()
    for split in splits:
        of_split = in_work_order(clips if len(splits) == 1 else clips.filter(pc.equal(clips["split"], split)))
        for rows in _pieces(of_split, clips_per_chunk * CHUNKS_PER_FILE):
            uri = storage.join(folder, f"{len(chunks):08d}.parquet")
            shown, with_keys = _without_keys(rows["media"])
            rows = rows.set_column(rows.column_names.index("media"), rows.schema.field("media"), shown)
            storage.write_file(uri, partial(pq.write_table, rows, row_group_size=clips_per_chunk, **parquet.CHECKSUMS))
            for group, begin in enumerate(range(0, len(rows), clips_per_chunk)):
                own = with_keys.slice(begin, clips_per_chunk)
                media = own.to_pylist() if own.null_count < len(own) else None
                chunks.append(Chunk(uri=uri, row_group=group, media_with_keys=media))
    return chunks


def _without_keys(media: pa.ChunkedArray) -> tuple[pa.Array, pa.Array]:
    """The URLs without secrets, and the URLs with secrets, null for all others."""
    if not pc.any(pc.match_substring_regex(media, "://.*[@?]")).as_py():
        return media.combine_chunks(), pa.nulls(len(media), media.type)
    given = media.to_pylist()
    shown = [without_secrets(uri) for uri in given]
    with_keys = [uri if uri != without else None for uri, without in zip(given, shown, strict=True)]
    return pa.array(shown, media.type), pa.array(with_keys, media.type)


def read_chunks(chunks: pa.Table) -> pa.Table:
    """Stage that turns rows of Chunk into rows of CLIPS in progress."""
    return record_origin(in_progress(pa.concat_tables([_read(**chunk) for chunk in chunks.to_pylist()])))


def _read(uri: str, row_group: int, media_with_keys: list[str | None] | None) -> pa.Table:
    fs, path = storage.resolve(uri)
    try:
        with fs.open_input_file(path) as file:
            rows = parquet.open_checked(file).read_row_group(row_group, use_threads=False)
    except FileNotFoundError as err:
        raise DataError(
            f"the node {socket.gethostname()} does not see {uri}; give a folder that all nodes see as --output, unless "
            "another job with this output has deleted the file"
        ) from err
    if media_with_keys is None:
        return rows
    field = rows.schema.field("media")
    media = pc.coalesce(pa.array(media_with_keys, field.type), rows["media"].combine_chunks())
    return rows.set_column(rows.column_names.index("media"), field, media)


def _pieces(rows: pa.Table, size: int) -> Iterator[pa.Table]:
    for begin in range(0, len(rows), size):
        yield rows.slice(begin, size)
