"""What earlier runs left of a split: its shards, compared with the published index, and its failures.

After a crash a clip may be in two shards. `clean_up` removes the second copies; every other reader takes the first one.
"""

import logging
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ast_core.errors import DataError
from ast_core.features import KALDI128, FeatureSettings
from pipeline import dataset, parquet, storage
from pipeline.prepare.output import failures_table
from pipeline.prepare.output.origins import ORIGIN, with_origins
from pipeline.prepare.output.shards import DELETE_SHARD, clip_facts, label_text, scan_shards, write_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitState:
    """The content of a split on disk."""

    prepared: pa.Table
    """`SCANNED`, shard and row of each clip, sorted by id."""
    failures: pa.Table
    """FAILURE_ROWS of earlier runs, without rows that the list itself caused."""


def clean_up(
    output: str, split: str, known: pa.Table | None = None, features: FeatureSettings = KALDI128
) -> SplitState:
    """Remove what an interrupted run left, and read the rest. No task may write at the same time.

    `known` is the result of an earlier call (`SplitState.prepared`); its shards are not opened again.

    It removes unfinished files and second copies of a clip. Copies arise if a repeated task writes a different shard
    because other clips failed the second time. Failures are compacted into one file.
    """
    storage.delete_unfinished(storage.join(output, split), recursive=True)
    scanned = scan_shards(output, split, known)
    _check_against_index(output, split, scanned)  # before any row is removed
    stored = _indexed_first(output, split, scanned)
    is_first = _is_first(stored["clip_id"])
    if not is_first.all():
        _remove_rows(output, split, stored.filter(pa.array(~is_first)), features)
        stored = scan_shards(output, split, stored.filter(pa.array(is_first)))
    return _state(output, split, stored, failures_table.compact(output, split, stored["clip_id"]))


def load_split(output: str, split: str, features: FeatureSettings | None = None) -> SplitState:
    """Read what earlier runs left, finished or not. Raises DataError as `scan_shards` does."""
    stored = scan_shards(output, split, features=features)
    return _state(output, split, stored, failures_table.collect(output, split, stored["clip_id"]))


def _state(output: str, split: str, stored: pa.Table, failures: pa.Table) -> SplitState:
    _check_against_index(output, split, stored)
    is_first = _is_first(stored["clip_id"])
    prepared = stored if is_first.all() else stored.filter(pa.array(is_first))
    prepared = prepared.take(pc.sort_indices(prepared["clip_id"]))  # the order must not depend on the shards' order
    return SplitState(prepared, failures)


def _indexed_first(output: str, split: str, stored: pa.Table) -> pa.Table:
    """Prefer the shards of a published index, because a training may be reading from them."""
    index = _published_index(output, split)
    if index is None:
        return stored
    is_indexed = pc.is_in(stored["shard"], pc.unique(index["shard"]))
    return pa.concat_tables([stored.filter(is_indexed), stored.filter(pc.invert(is_indexed))])


def _published_index(output: str, split: str) -> pa.Table | None:
    """The index, if it exists and is undamaged. It is made again from the shards in any case."""
    uri = dataset.index_file(output, split)
    if not storage.exists(uri):
        return None
    try:
        return dataset.read_table(uri, sha256=dataset.published_sha256(output, split, "index.parquet"))
    except DataError as err:
        logger.warning(f"{err.args[0].partition(';')[0]}; it is made again from the shards")
        return None


def _check_against_index(output: str, split: str, stored: pa.Table) -> None:
    """Compare the shards with the published index.

    The footer of a shard has no checksum. If it is damaged, clips would be lost or get the values of others.

    Raises:
        DataError: a clip is missing in its shard, or has other frames, labels or values there.
    """
    index = _published_index(output, split)
    if index is None or "fbank_hash" not in index.column_names:
        return
    index = index.filter(pc.is_in(index["shard"], pc.unique(stored["shard"])))
    # After a crash a clip may be in two shards. Each is compared with its own row of the index.
    at = pc.index_in(place(index), value_set=place(stored).combine_chunks())
    found = stored.take(at.fill_null(0)) if len(stored) else stored
    differs = pc.is_null(at)
    for name in ("num_frames", "fbank_hash"):
        differs = pc.or_(differs, pc.not_equal(index[name], found[name]))
    differs = pc.or_(differs, pc.not_equal(label_text(index), label_text(found)))
    if pc.any(differs).as_py():
        clip = index.filter(differs).slice(0, 1).to_pylist()[0]
        uri = storage.join(dataset.shards_dir(output, split), clip["shard"])
        raise DataError(
            f"{uri} is damaged or was changed: clip {clip['clip_id']} is not in it as the index has it; {DELETE_SHARD}"
        )


def place(rows: pa.Table) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(rows["shard"], rows["clip_id"], "/")


def _is_first(names: pa.ChunkedArray) -> np.ndarray:
    """Whether each row is the first with its name."""
    rows = pa.table({"name": names, "row": np.arange(len(names))})
    first = np.zeros(len(names), bool)
    first[rows.group_by("name").aggregate([("row", "min")])["row_min"].to_numpy()] = True
    return first


def _remove_rows(output: str, split: str, surplus: pa.Table, features: FeatureSettings) -> None:
    """Write the affected shards again without these rows. The new file comes first, so a crash leaves both.

    A shard's name depends on its clips. So the rest of one shard may be another shard, which then stays.
    """
    written: set[str] = set()
    for name in pc.unique(surplus["shard"]).to_pylist():
        if name in written:
            continue
        uri = storage.join(dataset.shards_dir(output, split), name)
        rows = surplus.filter(pc.equal(surplus["shard"], name))["row"]
        shard = dataset.read_table(uri, dataset.shard_schema(features).names, remedy=DELETE_SHARD)
        shard = with_origins(shard, shard.schema.metadata)
        rest = shard.filter(pc.invert(pc.is_in(pa.array(np.arange(len(shard)), pa.int32()), rows.combine_chunks())))
        if len(rest):
            write_rows(dataset.shards_dir(output, split), _verified(rest, uri, features), features)
            written.add(f"{dataset.name_of(rest['clip_id'])}.parquet")
        storage.discard(uri)  # if it cannot be deleted, readers still take only one copy of each clip


def _verified(rows: pa.Table, uri: str, features: FeatureSettings) -> pa.Table:
    """Rows with the columns of a shard and ORIGIN, before they get new checksums.

    Raises:
        DataError: values and hashes differ.
    """
    schema = pa.schema([*dataset.shard_schema(features), *ORIGIN])
    try:
        rows = rows.cast(schema)  # another program may have written other types
    except parquet.DAMAGE as err:
        raise DataError(f"{uri} is damaged or was changed ({err}); {DELETE_SHARD}") from err
    if not clip_facts(rows["fbank"].combine_chunks(), features)["fbank_hash"].equals(rows["fbank_hash"]):
        raise DataError(f"{uri} is damaged: its values are not those of their hashes; {DELETE_SHARD}")
    return rows
