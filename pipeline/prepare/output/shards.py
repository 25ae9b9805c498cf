"""Writes fbanks to immutable Parquet shards, and from the shards the index and `dataset.json`.

The shards are the source of truth: the index is made by reading them back, so a new run continues from what is on disk.
"""

import json
import logging
import posixpath
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ast_core.errors import DataError
from ast_core.frames import NUM_MEL_BINS, STORED_FLOOR
from ast_core.labels import LabelVocabulary
from pipeline import dataset, parquet, storage
from pipeline.os_errors import in_spite_of_errors
from pipeline.prepare.output import failures_table, membership
from pipeline.prepare.output.membership import Listed
from pipeline.prepare.output.samples import samples_dir
from pipeline.prepare.sources.own_outputs import has_clips
from pipeline.versions import tool_versions
from pipeline.weights import sample_weights

logger = logging.getLogger(__name__)

WRITTEN = pa.schema([("split", pa.string()), ("reason", pa.string()), ("clips", pa.int64())])
"""Output of `WriteShards` for a batch: number of clips by outcome. The reason is null for prepared clips."""


PUBLISHED = "the data set is whole, but cleaning up after it failed"


@dataclass(frozen=True)
class WriteShards:
    """Stage that writes rows with `fbank` to shards, and returns counts by outcome.

    A file is named after its clips, so a task that Ray repeats overwrites its own file.
    """

    output: str
    keep: Callable[[str, str, pa.Table], None] | None = None
    """Called with split, name and rows of a shard, before it is written."""

    def __call__(self, rows: pa.Table) -> pa.Table:
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
                _write_shard(dataset.shards_dir(self.output, split), prepared)
                written.append((split, None, len(prepared)))
            if len(failed):
                failures_table.write_part(self.output, split, failed)
                written += [(split, reason, n) for reason, n in Counter(failed["reason"].to_pylist()).items()]
        return pa.table(list(map(list, zip(*written, strict=True))), schema=WRITTEN)


@dataclass(frozen=True)
class SplitState:
    """The content of a split on disk."""

    prepared: pa.Table
    """`SCANNED`, shard and row of each clip, sorted by id."""
    failures: pa.Table
    """FAILURE_ROWS of earlier runs, without rows that the list itself caused."""


_INDEXED = [name for name in dataset.INDEX.names if name != "sample_weight"]


DELETE_SHARD = "restore it, or delete it, and its clips are prepared again"

SCANNED = pa.schema([field for field in dataset.SHARD if field.name != "fbank"])
"""The small columns of a shard. A preparation and its report read them once and need no others."""


def clean_up(output: str, split: str, known: pa.Table | None = None) -> SplitState:
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
        _remove_rows(output, split, stored.filter(pa.array(~is_first)))
        stored = scan_shards(output, split, stored.filter(pa.array(is_first)))
    return _state(output, split, stored, failures_table.compact(output, split, stored["clip_id"]))


def load_split(output: str, split: str) -> SplitState:
    """Read what earlier runs left, finished or not."""
    stored = scan_shards(output, split)
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


def label_text(rows: pa.Table) -> pa.ChunkedArray:
    """The labels as texts, because Arrow does not compare lists."""
    return pc.binary_join(rows["labels"].cast(pa.list_(pa.string())), ",")


def _is_first(names: pa.ChunkedArray) -> np.ndarray:
    """Whether each row is the first with its name."""
    rows = pa.table({"name": names, "row": np.arange(len(names))})
    first = np.zeros(len(names), bool)
    first[rows.group_by("name").aggregate([("row", "min")])["row_min"].to_numpy()] = True
    return first


def _remove_rows(output: str, split: str, surplus: pa.Table) -> None:
    """Write the affected shards again without these rows. The new file comes first, so a crash leaves both."""
    for name in pc.unique(surplus["shard"]).to_pylist():
        uri = storage.join(dataset.shards_dir(output, split), name)
        rows = surplus.filter(pc.equal(surplus["shard"], name))["row"]
        shard = dataset.read_table(uri, dataset.SHARD.names, remedy=DELETE_SHARD)
        rest = shard.filter(pc.invert(pc.is_in(pa.array(np.arange(len(shard)), pa.int32()), rows.combine_chunks())))
        if len(rest):
            _write_rows(dataset.shards_dir(output, split), _verified(rest, uri))
        storage.discard(uri)  # if it cannot be deleted, readers still take only one copy of each clip


def _verified(rows: pa.Table, uri: str) -> pa.Table:
    """Rows of a shard as SHARD. Raises DataError if values do not match their hashes, before they get new checksums."""
    try:
        rows = rows.cast(dataset.SHARD)  # another program may have written other types
    except parquet.DAMAGE as err:
        raise DataError(f"{uri} is damaged or was changed ({err}); {DELETE_SHARD}") from err
    if not clip_facts(rows["fbank"].combine_chunks())["fbank_hash"].equals(rows["fbank_hash"]):
        raise DataError(f"{uri} is damaged: its values are not those of their hashes; {DELETE_SHARD}")
    return rows


def scan_shards(output: str, split: str, known: pa.Table | None = None) -> pa.Table:
    """`SCANNED` of all shards of a split, with `shard` and `row` as in INDEX. A clip in two shards has two rows.

    Shards never change, so those in `known` (an earlier result) are not opened again.

    Raises:
        DataError: a shard is damaged, or of an earlier schema version.
    """
    schema = pa.schema([*SCANNED, *map(dataset.INDEX.field, ("shard", "row"))])
    uris = storage.list_files(dataset.shards_dir(output, split), suffix=".parquet")
    uri_of = {posixpath.basename(uri): uri for uri in uris}
    if known is None:
        known = schema.empty_table()
    known = known.select(schema.names).filter(pc.is_in(known["shard"], pa.array(uri_of, pa.string())))
    unknown = sorted(uri_of.keys() - set(pc.unique(known["shard"]).to_pylist()))
    with ThreadPoolExecutor(16) as pool:
        scanned = pa.concat_tables([known, *pool.map(lambda name: _scan_shard(uri_of[name], schema), unknown)])
    return scanned.sort_by([("shard", "ascending"), ("row", "ascending")]) if len(known) else scanned


def start_output(output: str, labels: LabelVocabulary) -> bool:
    """Reserve a folder by writing the labels, and clean up outside its splits. Raises what `check_output` does.

    Returns:
        Whether these labels replaced others, with which nothing was prepared.
    """
    check_output(output, labels)
    storage.delete_unfinished(output)
    storage.delete_unfinished(samples_dir(output), recursive=True)
    is_claimed = storage.exists(dataset.labels_csv(output))
    if is_claimed and dataset.read_labels(output, dataset.read_info(output)) == labels:
        return False
    if is_claimed:
        storage.delete(dataset.dataset_json(output))  # it refers to the old labels, as all failures do
        storage.delete(dataset.work_dir(output))
        for name in ("index.parquet", "failures.parquet"):
            for uri in storage.list_files(output, suffix=f"/{name}", recursive=True):
                storage.delete(uri)
    storage.write_bytes(dataset.labels_csv(output), labels.to_csv().encode())
    return is_claimed


def check_output(output: str, labels: LabelVocabulary) -> None:
    """Refuse a folder that contains something else.

    Raises:
        DataError: the folder contains another data set, or files of another kind.
    """
    if storage.exists(dataset.labels_csv(output)):
        info = dataset.read_info(output)
        there = dataset.read_labels(output, info)
        if there != labels and has_clips(output):
            raise DataError(
                f"{output} contains a data set with other labels ({len(there)}, these are {len(labels)}); "
                "give another --output, or its labels.csv as --labels"
            )
        if info is not None and info["features"] != dataset.FEATURES:
            raise DataError(f"{output} contains features computed with other settings; give another --output")
        return
    if not storage.is_empty(output):
        raise DataError(f"{output} is not empty and contains no data set; give a new folder as --output")


def publish(
    output: str,
    labels: LabelVocabulary,
    refused: dict[str, pa.Table],
    listed: Mapping[str, Listed] | None = None,
    known: Mapping[str, pa.Table] | None = None,
) -> tuple[dict[str, Any], list[str], dict[str, pa.Table]]:
    """Write index and failures table of this run's splits (the keys of `refused`), then dataset.json.

    Args:
        listed: the clips that the last list names for each of these splits; None takes the clips of the shards.
        known: rows of these splits that were read from their shards before (`SplitState.prepared`).

    Returns:
        The content of dataset.json, lines for the user, and the stored rows of each of these splits.

    Raises:
        DataError: another job wrote dataset.json at the same time.
    """
    known = known or {}
    states = {split: clean_up(output, split, known.get(split)) for split in refused}  # slow, so it precedes the writing
    prepared = {split: state.prepared for split, state in states.items()}
    if listed is None:
        listed = {split: _as_stored(states[split], refused[split]) for split in refused}
        members = membership.as_stored(prepared)
    else:
        members = membership.resolve(prepared, listed, _same_ids_elsewhere(output, states))
    infos: dict[str, dict[str, Any]] = {}
    for split, state in states.items():
        indexed = members.indexed[split]
        failures = _failures(state, listed[split], refused[split], indexed, members.twice.get(split))
        failures_table.write(output, split, failures)
        infos[split] = {
            "failures": failures_table.by_reason(failures),
            "left_out": len(state.prepared) - len(indexed),
            "listed": listed[split].num_rows + _num_done(listed[split].beyond, indexed, failures),
        }
    splits = _published_splits(output)  # read late, because another cluster may have added a split
    for split, indexed in members.indexed.items():
        storage.write_bytes(dataset.unpublished_file(output, split), b"")
        splits[split] = (
            splits.get(split, {})
            | infos.get(split, _without_moved(splits.get(split, {}), members.moved[split]))
            | _publish_index(output, split, indexed, labels)
            | {"no_longer_listed": members.no_longer_listed[split], "moved": members.moved[split]}
        )
    info = {
        "schema_version": dataset.SCHEMA_VERSION,
        "features": dataset.FEATURES,
        "labels": {"count": len(labels), "sha256": labels.sha256},
        "row_group_clips": dataset.ROW_GROUP_CLIPS,
        "splits": splits,
        "tool_versions": tool_versions(),
    }
    dataset.write_info(output, info)
    there = _published_splits(output)
    if any(json.dumps(there.get(split)) != json.dumps(splits[split]) for split in states):
        raise DataError(f"another job wrote to {output} at the same time; run the same command again when it has ended")
    with in_spite_of_errors(PUBLISHED):
        for split in members.indexed:
            storage.discard(dataset.unpublished_file(output, split))
        storage.delete_unfinished(dataset.work_dir(output), recursive=True)
        storage.delete_if_empty(dataset.work_dir(output))
    return info, members.lines, prepared


def _without_moved(info: dict[str, Any], num_moved: int) -> dict[str, Any]:
    """What changes in dataset.json for a split that the list does not name, apart from its index."""
    return {"left_out": info.get("left_out", 0) + num_moved}


def _published_splits(output: str) -> dict[str, Any]:
    info: dict[str, Any] = dataset.read_info(output) or {"splits": {}}
    splits: dict[str, Any] = info["splits"]
    return splits


def _as_stored(state: SplitState, refused: pa.Table) -> Listed:
    ids = pa.concat_arrays([*state.prepared["clip_id"].chunks, *state.failures["clip_id"].chunks])
    return Listed(len(ids) + len(refused), ids, ids.slice(0, 0))


def _same_ids_elsewhere(output: str, states: Mapping[str, SplitState]) -> dict[str, pa.Table]:
    """Clips in the indexes of splits that the run does not name, if they share an id with clips of the run."""
    found = {}
    for split in _published_splits(output).keys() - states.keys():
        ids = dataset.read_table(dataset.index_file(output, split), ["clip_id"])["clip_id"].combine_chunks()
        if any(pc.any(pc.is_in(state.prepared["clip_id"], value_set=ids)).as_py() for state in states.values()):
            prepared = load_split(output, split).prepared
            found[split] = prepared.filter(pc.is_in(prepared["clip_id"], value_set=ids))
    return found


def _failures(
    state: SplitState, listed: Listed, refused: pa.Table, indexed: pa.Table, twice: pa.Table | None
) -> pa.Table:
    """The failures of the listed clips, from the runs and from the list."""
    known = state.failures.filter(pc.is_in(state.failures["clip_id"], value_set=listed.may_stay))
    if twice is not None:
        refused = pa.concat_tables([refused, twice])
    return failures_table.add_refused(known, refused, indexed["clip_id"])


def _num_done(clip_ids: pa.Array, indexed: pa.Table, failures: pa.Table) -> int:
    done = pa.concat_arrays([*indexed["clip_id"].chunks, *failures["clip_id"].chunks])
    return pc.sum(pc.is_in(clip_ids, value_set=done)).as_py() or 0


def _publish_index(output: str, split: str, prepared: pa.Table, labels: LabelVocabulary) -> dict[str, Any]:
    """Write the index of these clips, and return their part of dataset.json."""
    weight = sample_weights(prepared["labels"].combine_chunks(), len(labels))
    index = prepared.select(_INDEXED).append_column(dataset.INDEX.field("sample_weight"), pa.array(weight))
    dataset.write_table(dataset.index_file(output, split), index.select(dataset.INDEX.names).cast(dataset.INDEX))
    frames = int(_total(prepared["num_frames"]))
    mean, mean_sq = (_total(prepared[sums]) / max(frames * NUM_MEL_BINS, 1) for sums in ("fbank_sum", "fbank_sum_sq"))
    return {
        "clips": len(prepared),
        "frames": frames,
        "clipped_samples": int(_total(prepared["num_clipped"])),
        "norm": {"mean": mean, "std": max(mean_sq - mean**2, 0.0) ** 0.5},
        "fingerprint": dataset.fingerprint(prepared["clip_id"], prepared["labels"]),
        "sha256": {
            "index.parquet": storage.sha256(dataset.index_file(output, split)),
            "failures.parquet": storage.sha256(dataset.failures_file(output, split)),
        },
    }


def _total(column: pa.ChunkedArray) -> float:
    return pc.sum(column.cast(pa.float64())).as_py() or 0.0


def _write_shard(folder: str, prepared: pa.Table) -> None:
    facts = clip_facts(prepared["fbank"].combine_chunks())
    _write_rows(
        folder, pa.table({name: (facts if name in _FACTS.names else prepared)[name] for name in dataset.SHARD.names})
    )


def _write_rows(folder: str, shard: pa.Table) -> None:
    uri = storage.join(folder, f"{dataset.name_of(shard['clip_id'])}.parquet")
    dataset.write_table(uri, shard.cast(dataset.SHARD), row_group_size=dataset.ROW_GROUP_CLIPS)


def clip_facts(fbanks: pa.ListArray) -> pa.Table:
    """The columns of SHARD that are computed from the stored values of each fbank.

    A frame is silent if all of its bins are at the floor. One bin is always there, because its mel filter lies between
    two points of the spectrum.
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
        # No value is below the floor, and float64 adds 128 float16 values without rounding.
        "num_silent_frames": int((frame_sums <= NUM_MEL_BINS * STORED_FLOOR).sum()),
        "fbank_sum": frame_sums.sum(),
        "fbank_sum_sq": np.vdot(wide, wide),
        "fbank_hash": dataset.hash_fbank(fbank),
    }


def _scan_shard(uri: str, schema: pa.Schema) -> pa.Table:
    def parse(source: pa.NativeFile) -> tuple[set[str], pa.Table]:
        file = parquet.open_checked(source)
        missing = set(dataset.SHARD.names) - set(file.schema_arrow.names)
        # shard and row are added below
        return missing, file.read(columns=schema.names, use_threads=False)

    missing, table = parquet.parse_file(
        uri, parse, damaged=f"{uri} is no shard of ours or damaged ({{}}); delete it, and its clips are prepared again"
    )
    if missing:
        raise DataError(
            f"{uri} lacks {', '.join(sorted(missing))}, as shards of an earlier version do; "
            "prepare the data again into another folder"
        )
    table = table.append_column("shard", pa.array([uri.rsplit("/", 1)[1]] * len(table), pa.string()))
    table = table.append_column("row", pa.array(np.arange(len(table)), pa.int32()))
    if other := [field.name for field in table.schema if not _same_kind(field.type, schema.field(field.name).type)]:
        raise DataError(f"{uri} is damaged or was changed: {other[0]} is of another type; {DELETE_SHARD}")
    return table.select(schema.names).cast(schema)


def _same_kind(there: pa.DataType, ours: pa.DataType) -> bool:
    """Whether a column has our type, apart from width and layout, which other programs may change."""
    if pa.types.is_string(ours):
        return pa.types.is_string(there) or pa.types.is_large_string(there) or pa.types.is_string_view(there)
    if pa.types.is_integer(ours):
        return pa.types.is_integer(there)
    if pa.types.is_list(ours):
        return pa.types.is_nested(there) and _same_kind(there.value_type, ours.value_type)
    return there == ours
