"""Fbanks → immutable Parquet shards, and shards → index and `dataset.json`.

Shards are the truth: the index is made by reading them back, so a job that was killed goes on from what is on disk.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ast_core.augment import STORED_FLOOR
from ast_core.errors import DataError
from ast_core.frames import NUM_MEL_BINS
from ast_core.labels import LabelVocabulary
from pipeline import dataset, storage
from pipeline.prepare.clip import FAILED_AT, FAILURES, Reason
from pipeline.versions import tool_versions
from pipeline.weights import sample_weights

WRITTEN = pa.schema([("split", pa.string()), ("reason", pa.string()), ("clips", pa.int64())])
"""What `WriteShards` says of a batch: clips by outcome; the reason is null for prepared ones."""


@dataclass(frozen=True)
class WriteShards:
    """Rows with `fbank` in, shards on disk, a count by outcome out.

    A file is named after the clips in it, so a task that Ray runs twice writes the same file twice.
    """

    output: str
    keep: Callable[[str, str, pa.Table], None] | None = None
    """Called with split, name and rows of a shard, before it is written."""

    def __call__(self, rows: pa.Table) -> pa.Table:
        written = []
        for split in pc.unique(rows["split"]).to_pylist():
            of_split = rows.filter(pc.equal(rows["split"], split))
            failed = of_split.filter(pc.is_valid(of_split["reason"]))
            prepared = of_split.filter(pc.is_null(of_split["reason"]))
            if len(prepared):
                if self.keep is not None:
                    self.keep(split, name_of(prepared), prepared)
                _write_shard(dataset.shards_dir(self.output, split), prepared)
                written.append((split, None, len(prepared)))
            if len(failed):
                uri = storage.join(_parts_dir(self.output, split), f"{name_of(failed)}.parquet")
                dataset.write_table(uri, failures_of(failed))
                written += [(split, reason, n) for reason, n in Counter(failed["reason"].to_pylist()).items()]
        return pa.table(list(map(list, zip(*written, strict=True))), schema=WRITTEN)


def failures_of(rows: pa.Table) -> pa.Table:
    """`FAILURES` rows of rows under way that failed, at their first attempt."""
    of_stage = {"download": ("yt-dlp",), "decode": ("av", "soxr")}
    return pa.Table.from_pylist(
        [
            row
            | {
                "attempts": 1,
                "retry": Reason(row["reason"]).retry,
                "tool_versions": " ".join(map(" ".join, tool_versions(of_stage[row["stage"]]).items())),
            }
            for row in rows.select(["clip_id", "split", "labels", *FAILED_AT]).to_pylist()
        ],
        schema=FAILURES,
    )


@dataclass(frozen=True)
class SplitState:
    """What is on disk of a split."""

    prepared: pa.Table
    """One row a clip: the columns of INDEX but for the weight, and those that the split's totals are of."""
    failures: pa.Table
    """FAILURES of earlier runs, but for rows that the list itself caused."""


_INDEXED = [name for name in dataset.INDEX.names if name != "sample_weight"]


def load_split(output: str, split: str) -> SplitState:
    """Read back what earlier runs left, finished or not, and gather their failures into one file."""
    columns = ["clip_id", "num_frames", "labels", "num_clipped", "fbank_sum", "fbank_sum_sq"]
    stored = scan_shards(output, split, columns)
    first = np.unique(stored["clip_id"].to_numpy(zero_copy_only=False), return_index=True)[1]
    prepared = stored.take(np.sort(first))  # a kill may have left a clip in two shards
    return SplitState(prepared, _gather_failures(output, split, prepared))


def scan_shards(output: str, split: str, columns: list[str]) -> pa.Table:
    """These columns of all shards of a split, then `shard` and `row` as in INDEX; a clip in two shards has two rows.

    Raises:
        DataError: a shard is damaged, or of an earlier schema version.
    """
    schema = pa.schema([*map(dataset.SHARD.field, columns), *map(dataset.INDEX.field, ("shard", "row"))])
    uris = storage.list_files(dataset.shards_dir(output, split), suffix=".parquet")
    with ThreadPoolExecutor(16) as pool:
        return pa.concat_tables([schema.empty_table(), *pool.map(lambda uri: _scan_shard(uri, schema), uris)])


def start_output(output: str, labels: LabelVocabulary) -> None:
    """Refuse a folder that holds something else; claim an empty one by writing the labels.

    Raises:
        DataError: another data set, or files of another kind, are there.
    """
    if storage.exists(dataset.labels_csv(output)):
        there = LabelVocabulary.from_csv(storage.read_bytes(dataset.labels_csv(output)).decode())
        if there != labels:
            raise DataError(
                f"{output} holds a data set with other labels ({len(there)}, these are {len(labels)}); "
                "give another --output, or its labels.csv as --labels"
            )
        if storage.exists(dataset.dataset_json(output)):
            info = storage.read_json(dataset.dataset_json(output))
            if info.get("schema_version") != dataset.SCHEMA_VERSION:
                raise DataError(
                    f"{output} has schema version {info.get('schema_version')}, this program writes "
                    f"{dataset.SCHEMA_VERSION}; give another --output"
                )
            if info.get("features") != dataset.FEATURES:
                raise DataError(f"{output} holds features computed with other settings; give another --output")
        return
    if not storage.is_empty(output):
        raise DataError(f"{output} is not empty and holds no data set; give a new folder as --output")
    storage.write_bytes(dataset.labels_csv(output), labels.to_csv().encode())


def publish(output: str, labels: LabelVocabulary, refused: dict[str, pa.Table]) -> dict[str, Any]:
    """Index, failures and norm of this run's splits (the keys of `refused`), then dataset.json; returns its content."""
    info: dict[str, Any] = {"splits": {}}
    if storage.exists(dataset.dataset_json(output)):
        info = storage.read_json(dataset.dataset_json(output))
    states = {split: load_split(output, split) for split in refused}  # slow; the writing after it is quick
    for split, state in states.items():
        failures = pa.concat_tables([state.failures, _not_prepared(refused[split], state)])
        dataset.write_table(dataset.failures_file(output, split), failures)
        info["splits"][split] = _publish_split(output, split, state, failures, labels)
    info = {
        "schema_version": dataset.SCHEMA_VERSION,
        "features": dataset.FEATURES,
        "labels": {"count": len(labels), "sha256": labels.sha256},
        "splits": info["splits"],
        "tool_versions": tool_versions(),
    }
    storage.write_json(dataset.dataset_json(output), info)
    for split in states:
        storage.delete(storage.join(_work_dir(output), split))
    if storage.is_empty(_work_dir(output)):
        storage.delete(_work_dir(output))
    return info


def _not_prepared(refused: pa.Table, state: SplitState) -> pa.Table:
    """Rows that the list refused, but for clips that an earlier run, from another folder, say, has dealt with.

    A duplicate bears the name of the clip that stays, and keeps its row.
    """
    dealt_with = pa.concat_tables([state.prepared.select(["clip_id"]), state.failures.select(["clip_id"])])["clip_id"]
    is_dealt_with = pc.is_in(refused["clip_id"], value_set=dealt_with.combine_chunks())
    is_duplicate = pc.equal(refused["reason"], str(Reason.DUPLICATE))
    return refused.filter(pc.or_(is_duplicate, pc.invert(is_dealt_with)))


def _publish_split(
    output: str, split: str, state: SplitState, failures: pa.Table, labels: LabelVocabulary
) -> dict[str, Any]:
    prepared = state.prepared
    weight = sample_weights(prepared["labels"].combine_chunks(), len(labels))
    index = prepared.select(_INDEXED).append_column(dataset.INDEX.field("sample_weight"), pa.array(weight))
    dataset.write_table(dataset.index_file(output, split), index.cast(dataset.INDEX))
    frames = int(_total(prepared["num_frames"]))
    mean, mean_sq = (_total(prepared[sums]) / max(frames * NUM_MEL_BINS, 1) for sums in ("fbank_sum", "fbank_sum_sq"))
    return {
        "clips": len(prepared),
        "frames": frames,
        "clipped_samples": int(_total(prepared["num_clipped"])),
        "norm": {"mean": mean, "std": max(mean_sq - mean**2, 0.0) ** 0.5},
        "fingerprint": dataset.fingerprint(prepared["clip_id"], prepared["labels"]),
        "failures": dict(sorted(Counter(failures["reason"].to_pylist()).items())),
    }


def _total(column: pa.ChunkedArray) -> float:
    return pc.sum(column.cast(pa.float64())).as_py() or 0.0


def _write_shard(folder: str, prepared: pa.Table) -> None:
    facts = clip_facts(prepared["fbank"].combine_chunks())
    shard = pa.table({name: (facts if name in _FACTS.names else prepared)[name] for name in dataset.SHARD.names})
    uri = storage.join(folder, f"{name_of(prepared)}.parquet")
    dataset.write_table(uri, shard.cast(dataset.SHARD), row_group_size=dataset.ROW_GROUP_CLIPS)


def clip_facts(fbanks: pa.ListArray) -> pa.Table:
    """Of each fbank the columns of SHARD that are computed from its stored values.

    A frame is silent when all of its bins are at the floor: one bin is always there, as its mel filter lies between two
    points of the spectrum. The hash is the first 8 bytes of BLAKE2b of the values.
    """
    values = fbanks.flatten().flatten().to_numpy().reshape(-1, NUM_MEL_BINS)
    ends = np.cumsum([0, *fbanks.value_lengths().to_numpy()])
    facts = [_facts_of(values[begin:end]) for begin, end in pairwise(ends)]
    return pa.Table.from_pylist(facts, schema=_FACTS)


_FACTS = pa.schema(map(dataset.SHARD.field, ("num_silent_frames", "fbank_sum", "fbank_sum_sq", "fbank_hash")))


def _facts_of(fbank: np.ndarray) -> dict[str, Any]:
    wide = fbank.astype(np.float64)
    frame_sums = wide.sum(axis=1)
    return {
        # Nothing is below the floor, and float64 adds 128 float16 values without rounding.
        "num_silent_frames": int((frame_sums <= NUM_MEL_BINS * STORED_FLOOR).sum()),
        "fbank_sum": frame_sums.sum(),
        "fbank_sum_sq": np.vdot(wide, wide),
        "fbank_hash": int.from_bytes(hashlib.blake2b(fbank.data).digest()[:8], "little", signed=True),
    }


def _scan_shard(uri: str, schema: pa.Schema) -> pa.Table:
    fs, path = storage.resolve(uri)
    try:
        with fs.open_input_file(path) as file:
            parquet = pq.ParquetFile(file)
            missing = set(dataset.SHARD.names) - set(parquet.schema_arrow.names)
            table = parquet.read(columns=schema.names, use_threads=False)  # shard and row are not there, and come below
    except pa.ArrowInvalid as err:
        raise DataError(f"{uri} is no shard of ours or damaged; delete it, and its clips are prepared anew") from err
    if missing:
        raise DataError(
            f"{uri} lacks {', '.join(sorted(missing))}, as shards of an earlier version do; "
            "prepare the data anew into another folder"
        )
    table = table.append_column("shard", pa.array([uri.rsplit("/", 1)[1]] * len(table), pa.string()))
    table = table.append_column("row", pa.array(np.arange(len(table)), pa.int32()))
    return table.cast(schema)


def _gather_failures(output: str, split: str, prepared: pa.Table) -> pa.Table:
    """Merge the failures of unfinished runs into those on record: the newest reason, the attempts counted."""
    parts = storage.list_files(_parts_dir(output, split), suffix=".parquet")
    on_record = FAILURES.empty_table()
    if storage.exists(dataset.failures_file(output, split)):
        on_record = dataset.read_table(dataset.failures_file(output, split))
    newest: dict[str, dict[str, Any]] = {}
    for row in _rows([on_record, *map(dataset.read_table, parts)]):
        attempts = newest[row["clip_id"]]["attempts"] if row["clip_id"] in newest else 0
        newest[row["clip_id"]] = row | {"attempts": attempts + row["attempts"]}
    for clip_id in newest.keys() & set(prepared["clip_id"].to_pylist()):
        del newest[clip_id]
    failures = pa.Table.from_pylist(list(newest.values()), schema=FAILURES)
    if parts:
        dataset.write_table(dataset.failures_file(output, split), failures)
        storage.delete(_parts_dir(output, split))
    return failures


def _rows(tables: Iterable[pa.Table]) -> Iterable[dict[str, Any]]:
    """Rows of all tables, without those that the list itself caused: they are judged anew in every run."""
    for table in tables:
        yield from table.filter(pc.not_equal(table["stage"], "source")).to_pylist()


def name_of(rows: pa.Table) -> str:
    return hashlib.sha256("\n".join(rows["clip_id"].to_pylist()).encode()).hexdigest()[:20]


def _work_dir(output: str) -> str:
    return storage.join(output, "_work")


def _parts_dir(output: str, split: str) -> str:
    return storage.join(_work_dir(output), split, "failures")
