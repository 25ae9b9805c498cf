"""Immutable Parquet shards: the stage that writes them, and a scan that reads their small columns back."""

import json
import posixpath
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ast_core.errors import DataError
from ast_core.features import KALDI128, FeatureSettings
from pipeline import dataset, parquet, storage
from pipeline.dataset import SCANNED
from pipeline.lease import Held
from pipeline.prepare.output import failures_table
from pipeline.prepare.output.origins import ORIGIN, to_metadata, with_origins

WRITTEN = pa.schema([("split", pa.string()), ("reason", pa.string()), ("clips", pa.int64())])
"""Output of `WriteShards` for a batch: number of clips by outcome. The reason is null for prepared clips."""

DELETE_SHARD = "restore it, or delete it, and its clips are prepared again"

SCANNED_AT = pa.schema([*SCANNED, *ORIGIN, *map(dataset.INDEX.field, ("shard", "row"))])
"""What `scan_shards` returns."""

_FACTS = pa.schema(map(SCANNED.field, ("num_silent_frames", "fbank_sum", "fbank_sum_sq", "fbank_hash")))


@dataclass(frozen=True)
class WriteShards:
    """Stage that writes rows with `fbank` to shards, and returns counts by outcome.

    A file is named after its clips, so a task that Ray repeats overwrites its own file.
    """

    output: str
    keep: Callable[[str, str, pa.Table], None] | None = None
    """Called with split, name and rows of a shard, before it is written."""
    features: FeatureSettings = KALDI128
    held: Held | None = None
    """The lock of the output. A batch is not written after another job has taken over."""

    def __call__(self, rows: pa.Table) -> pa.Table:
        if self.held is not None:
            self.held.check()
        written = []
        splits = pc.unique(rows["split"]).to_pylist()
        for split in splits:
            # A filter copies every fbank, and usually no row has failed.
            of_split = rows if len(splits) == 1 else rows.filter(pc.equal(rows["split"], split))
            failed = of_split.filter(pc.is_valid(of_split["reason"]))
            prepared = of_split.filter(pc.is_null(of_split["reason"])) if len(failed) else of_split
            if len(prepared):
                if self.keep is not None:
                    self.keep(split, dataset.name_of(prepared["clip_id"]), prepared)
                _write_shard(dataset.shards_dir(self.output, split), prepared, self.features)
                written.append((split, None, len(prepared)))
            if len(failed):
                failures_table.write_part(self.output, split, failed)
                written += [(split, reason, n) for reason, n in Counter(failed["reason"].to_pylist()).items()]
        return pa.table(list(map(list, zip(*written, strict=True))), schema=WRITTEN)


def _write_shard(folder: str, prepared: pa.Table, features: FeatureSettings) -> None:
    facts = clip_facts(prepared["fbank"].combine_chunks(), features)
    names = dataset.shard_schema(features).names
    columns = {name: (facts if name in _FACTS.names else prepared)[name] for name in (*names, *ORIGIN.names)}
    write_rows(folder, pa.table(columns), features)


def write_rows(folder: str, shard: pa.Table, features: FeatureSettings) -> None:
    """Write a shard. `shard` may also have the columns ORIGIN."""
    uri = storage.join(folder, f"{dataset.name_of(shard['clip_id'])}.parquet")
    schema = dataset.shard_schema(features)
    rows = shard.select(schema.names).cast(schema.with_metadata(schema.metadata | to_metadata(shard)))
    dataset.write_table(uri, rows, row_group_size=dataset.ROW_GROUP_CLIPS)


def features_of_shard(uri: str) -> FeatureSettings:
    """The feature settings in a shard's metadata. Shards of earlier versions have none: they are of kaldi128.

    Raises:
        DataError: the shard is damaged, or this program cannot read its features.
    """
    damaged = f"{uri} is no shard of ours or damaged ({{}}); {DELETE_SHARD}"
    metadata = parquet.parse_file(
        uri, lambda source: parquet.open_checked(source).schema_arrow.metadata or {}, damaged=damaged
    )
    return dataset.parse_features(json.loads(metadata.get(dataset.FEATURES_KEY, "{}")), origin=uri)


def clip_facts(fbanks: pa.ListArray, features: FeatureSettings = KALDI128) -> pa.Table:
    """The columns of SCANNED that are computed from the stored values of each fbank.

    A frame is silent if all of its bins are at the floor. One bin is always there, because its mel filter lies between
    two points of the spectrum.
    """
    values = fbanks.flatten().flatten().to_numpy().reshape(-1, features.num_mel_bins)
    ends = np.cumsum([0, *fbanks.value_lengths().to_numpy()])
    facts = [_facts_of(values[begin:end], features.floor) for begin, end in pairwise(ends)]
    return pa.Table.from_pylist(facts, schema=_FACTS)


def _facts_of(fbank: np.ndarray, floor: float) -> dict[str, Any]:
    wide = fbank.astype(np.float64)
    frame_sums = wide.sum(axis=1)
    return {
        # No value is below the floor, and float64 adds a thousand float16 values without rounding.
        "num_silent_frames": int((frame_sums <= fbank.shape[1] * floor).sum()),
        "fbank_sum": frame_sums.sum(),
        "fbank_sum_sq": np.vdot(wide, wide),
        "fbank_hash": dataset.hash_fbank(fbank),
    }


def scan_shards(
    output: str, split: str, known: pa.Table | None = None, features: FeatureSettings | None = None
) -> pa.Table:
    """`SCANNED` of all shards of a split, with `shard` and `row` as in INDEX. A clip in two shards has two rows.

    Shards never change, so those in `known` (an earlier result) are not opened again.

    Raises:
        DataError: a shard is damaged, of an earlier schema version, or of other features than `features`.
    """
    names = _names_of_shards(output, split)
    if known is None:
        known = SCANNED_AT.empty_table()
    known = known.select(SCANNED_AT.names).filter(pc.is_in(known["shard"], pa.array(names, pa.string())))
    scanned = pa.concat_tables([known, scan_some(output, split, _unknown(names, known), features)])
    return scanned.sort_by([("shard", "ascending"), ("row", "ascending")]) if len(known) else scanned


def unknown_shards(output: str, split: str, known: pa.Table) -> list[str]:
    """The names of the shards that are not in an earlier result of `scan_shards`."""
    return _unknown(_names_of_shards(output, split), known)


def scan_some(output: str, split: str, names: Sequence[str], features: FeatureSettings | None = None) -> pa.Table:
    """`scan_shards` of the shards with these names."""
    folder = dataset.shards_dir(output, split)
    with ThreadPoolExecutor(16) as pool:
        tables = pool.map(lambda name: _scan_shard(storage.join(folder, name), SCANNED_AT, features), names)
        return pa.concat_tables([SCANNED_AT.empty_table(), *tables])


def _names_of_shards(output: str, split: str) -> list[str]:
    return [posixpath.basename(uri) for uri in storage.list_files(dataset.shards_dir(output, split), suffix=".parquet")]


def _unknown(names: Sequence[str], known: pa.Table) -> list[str]:
    return sorted(set(names) - set(pc.unique(known["shard"]).to_pylist()))


def _scan_shard(uri: str, schema: pa.Schema, features: FeatureSettings | None) -> pa.Table:
    def parse(source: pa.NativeFile) -> tuple[set[str], Any, pa.Table]:
        file = parquet.open_checked(source)
        missing = {*SCANNED.names, "fbank"} - set(file.schema_arrow.names)
        # the other columns are added below
        table = file.read(columns=SCANNED.names, use_threads=False)
        metadata = file.schema_arrow.metadata or {}
        return missing, json.loads(metadata.get(dataset.FEATURES_KEY, "null")), with_origins(table, metadata)

    missing, own_features, table = parquet.parse_file(
        uri, parse, damaged=f"{uri} is no shard of ours or damaged ({{}}); {DELETE_SHARD}"
    )
    if missing:
        raise DataError(
            f"{uri} lacks {', '.join(sorted(missing))}, as shards of an earlier version do; "
            "prepare the data again into another folder"
        )
    if features is not None and own_features is not None:  # programs that rewrite shards may leave out the metadata
        _check_features(uri, features, own_features)
    table = table.append_column("shard", pa.array([uri.rsplit("/", 1)[1]] * len(table), pa.string()))
    table = table.append_column("row", pa.array(np.arange(len(table)), pa.int32()))
    if other := [field.name for field in table.schema if not _same_kind(field.type, schema.field(field.name).type)]:
        raise DataError(f"{uri} is damaged or was changed: {other[0]} is of another type; {DELETE_SHARD}")
    return table.select(schema.names).cast(schema)


def _check_features(uri: str, features: FeatureSettings, stored: Any) -> None:
    if differences := features.differences(dataset.parse_features(stored, origin=uri)):
        raise DataError(
            f"{uri} contains other features than these: {differences}; delete it, and its clips are prepared again, or "
            "give another --output"
        )


def _same_kind(there: pa.DataType, ours: pa.DataType) -> bool:
    """Whether a column has our type, apart from width and layout, which other programs may change."""
    if pa.types.is_string(ours):
        return pa.types.is_string(there) or pa.types.is_large_string(there) or pa.types.is_string_view(there)
    if pa.types.is_integer(ours):
        return pa.types.is_integer(there)
    if pa.types.is_list(ours):
        return pa.types.is_nested(there) and _same_kind(there.value_type, ours.value_type)
    return there == ours


def label_text(rows: pa.Table) -> pa.ChunkedArray:
    """The labels as texts, because Arrow does not compare lists."""
    return pc.binary_join(rows["labels"].cast(pa.list_(pa.string())), ",")
