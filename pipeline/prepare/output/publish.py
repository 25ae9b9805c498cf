"""Starts a data set and publishes it: index and failures table of each split, and then `dataset.json`.

The shards are the source of truth: the index is made by reading them back, so a new run continues from what is on disk.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ast_core.errors import DataError
from ast_core.features import KALDI128, FeatureSettings
from ast_core.labels import LabelVocabulary
from pipeline import dataset, storage
from pipeline.lease import Held
from pipeline.os_errors import in_spite_of_errors
from pipeline.prepare.output import failures_table, membership
from pipeline.prepare.output.membership import Listed
from pipeline.prepare.output.samples import samples_dir
from pipeline.prepare.output.shards import features_of_shard, scan_shards
from pipeline.prepare.output.split_state import SplitState, clean_up, load_split
from pipeline.prepare.sources.own_outputs import has_clips
from pipeline.versions import tool_versions
from pipeline.weights import sample_weights

PUBLISHED = "the data set is whole, but cleaning up after it failed"
CLIPPED_SHARE = 0.01
"""Clips with a larger share of clipped samples are pointed out. A resampler's overshoot stays far below it."""
_INDEXED = [name for name in dataset.INDEX.names if name != "sample_weight"]


def start_output(output: str, labels: LabelVocabulary, features: FeatureSettings = KALDI128) -> bool:
    """Reserve a folder by writing the labels, and clean up outside its splits. Raises what `check_output` does.

    Returns:
        Whether these labels replaced others, with which nothing was prepared.
    """
    check_output(output, labels, features)
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


def check_output(output: str, labels: LabelVocabulary, features: FeatureSettings = KALDI128) -> None:
    """Refuse a folder that contains something else.

    Raises:
        DataError: the folder contains another data set, or files of another kind.
    """
    if storage.exists(dataset.labels_csv(output)):
        info = dataset.read_info(output)
        if info is not None and "shards_of" in info:
            raise DataError(f"{output} has other labels for the clips of {info['shards_of']}; give another --output")
        there = dataset.read_labels(output, info)
        if there != labels and has_clips(output):
            raise DataError(
                f"{output} contains a data set with other labels ({len(there)}, these are {len(labels)}); "
                "give another --output, or its labels.csv as --labels"
            )
        stored = _stored_features(output, info)
        if stored is not None and (other := features.differences(stored)):
            raise DataError(
                f"{output} contains other features than these: {other}; give another --output, or "
                f"--features {stored.option}"
            )
        return
    if not storage.is_empty(output):
        raise DataError(f"{output} is not empty and contains no data set; give a new folder as --output")


def _stored_features(output: str, info: dict[str, Any] | None) -> FeatureSettings | None:
    """The features of a data set, finished or not; None if nothing was prepared."""
    if info is not None:
        return dataset.features_of(output, info)
    files = storage.list_files(output, suffix=".parquet", recursive=True)
    shard = next((uri for uri in files if "/shards/" in uri), None)  # each run begins with this check: all are alike
    return None if shard is None else features_of_shard(shard)


def publish(
    output: str,
    labels: LabelVocabulary,
    refused: dict[str, pa.Table],
    listed: Mapping[str, Listed] | None = None,
    known: Mapping[str, pa.Table] | None = None,
    features: FeatureSettings = KALDI128,
    held: Held | None = None,
) -> tuple[dict[str, Any], list[str], dict[str, pa.Table]]:
    """Write index and failures table of this run's splits (the keys of `refused`), then dataset.json.

    Args:
        listed: the clips that the last list names for each of these splits; None takes the clips of the shards.
        known: rows of these splits that were read from their shards before (`SplitState.prepared`).
        held: the lock of the output. Nothing is deleted or written after another job has taken over.

    Returns:
        The content of dataset.json, lines for the user, and the stored rows of each of these splits.

    Raises:
        DataError: another job wrote dataset.json at the same time, or has taken over.
    """
    held = held or Held(output, "preparing", None)
    held.check()
    known = known or {}
    # It is slow, so it precedes the writing.
    scanned = {split: scan_shards(output, split, known.get(split), features) for split in refused}
    states = {split: clean_up(output, split, scanned.pop(split), features) for split in refused}
    prepared = {split: state.prepared for split, state in states.items()}
    marked = _marked_elsewhere(output, states)
    interrupted = {split: _indexed_clips(output, split) for split in marked if _is_newer(output, split)}
    if listed is None:
        listed = {split: _as_stored(states[split], refused[split]) for split in refused}
        members = membership.as_stored(prepared)
    else:
        others = interrupted | _same_ids_elsewhere(output, states, {*states, *interrupted})
        members = membership.resolve(prepared, listed, others)
    lines = [*members.lines]
    for split in states:
        lines += _clipped_lines(split, members.indexed[split], features)
    held.check()  # the scan of the shards may have taken minutes
    infos: dict[str, dict[str, Any]] = {}
    for split, state in states.items():
        indexed = members.indexed[split]
        failures = _failures(state, listed[split], refused[split], indexed, members.twice.get(split))
        failures_table.write(output, split, failures)
        infos[split] = {
            "failures": failures_table.by_reason(failures),
            "tried_again": failures_table.num_tried_again(failures),
            "left_out": len(state.prepared) - len(indexed),
            "listed": listed[split].num_rows + _num_done(listed[split].beyond, indexed, failures),
            "no_longer_listed": members.no_longer_listed[split],
            "moved": members.moved[split],
        }
    splits = _published_splits(output)  # read late, because another cluster may have added a split
    changed = interrupted | members.indexed
    for split, indexed in changed.items():
        storage.write_bytes(dataset.unpublished_file(output, split), b"")
        published = splits.get(split, {})
        splits[split] = (
            published
            | (infos.get(split) or _of_other_split(output, split, published, len(indexed)))
            | _publish_index(output, split, indexed, labels, features.num_mel_bins)
        )
    info = {
        "schema_version": dataset.SCHEMA_VERSION,
        "features": features.to_dict(),
        "labels": {"count": len(labels), "sha256": labels.sha256},
        "row_group_clips": dataset.ROW_GROUP_CLIPS,
        "splits": splits,
        "tool_versions": tool_versions(),
    }
    held.check()
    dataset.write_info(output, info)
    there = _published_splits(output)
    if any(json.dumps(there.get(split)) != json.dumps(splits[split]) for split in states):
        raise DataError(f"another job wrote to {output} at the same time; run the same command again when it has ended")
    with in_spite_of_errors(PUBLISHED):
        for split in {*changed, *marked}:
            storage.discard(dataset.unpublished_file(output, split))
        storage.delete_unfinished(dataset.work_dir(output), recursive=True)
        storage.delete_if_empty(dataset.work_dir(output))
    return info, lines, prepared


def _of_other_split(output: str, split: str, published: dict[str, Any], num_clips: int) -> dict[str, Any]:
    """What changes in dataset.json for a split that the list does not name, apart from its index.

    Args:
        published: its entry until now.
        num_clips: the number of clips that stay in it.
    """
    num_moved = max(0, published.get("clips", 0) - num_clips)
    failures = failures_table.read(output, split)
    return {
        "failures": failures_table.by_reason(failures),
        "tried_again": failures_table.num_tried_again(failures),
        "left_out": published.get("left_out", 0) + num_moved,
        "no_longer_listed": 0,
        "moved": num_moved,
    }


def _published_splits(output: str) -> dict[str, Any]:
    info: dict[str, Any] = dataset.read_info(output) or {"splits": {}}
    splits: dict[str, Any] = info["splits"]
    return splits


def _as_stored(state: SplitState, refused: pa.Table) -> Listed:
    ids = pa.concat_arrays([*state.prepared["clip_id"].chunks, *state.failures["clip_id"].chunks])
    return Listed(len(ids) + len(refused), ids, ids.slice(0, 0))


def _marked_elsewhere(output: str, states: Mapping[str, SplitState]) -> list[str]:
    """Published splits that the run does not name, and whose files may be newer than dataset.json."""
    others = _published_splits(output).keys() - states.keys()
    return sorted(split for split in others if storage.exists(dataset.unpublished_file(output, split)))


def _is_newer(output: str, split: str) -> bool:
    """Whether a run was killed after it wrote this split's files and before it wrote dataset.json."""
    return _sha256(output, split) != _published_splits(output)[split].get("sha256")


def _same_ids_elsewhere(
    output: str, states: Mapping[str, SplitState], but_not_in: Collection[str]
) -> dict[str, pa.Table]:
    """Clips in the indexes of other splits, if they share an id with clips of the run."""
    found = {}
    for split in _published_splits(output).keys() - but_not_in:
        ids = dataset.read_table(dataset.index_file(output, split), ["clip_id"])["clip_id"].combine_chunks()
        if any(pc.any(pc.is_in(state.prepared["clip_id"], value_set=ids)).as_py() for state in states.values()):
            found[split] = _indexed_clips(output, split)
    return found


def _indexed_clips(output: str, split: str) -> pa.Table:
    """The stored rows of the clips in a split's index.

    Raises:
        DataError: a shard with one of them is missing. A new index would lack its clips.
    """
    index = dataset.read_table(dataset.index_file(output, split), ["clip_id", "shard"])
    prepared = load_split(output, split).prepared
    lost = index.filter(pc.invert(pc.is_in(index["clip_id"], value_set=prepared["clip_id"].combine_chunks())))
    if len(lost):
        shard = storage.join(dataset.shards_dir(output, split), lost["shard"][0].as_py())
        raise DataError(
            f"{len(lost):,} clips of split {split!r} are in its index and in no shard, {lost['clip_id'][0]} of {shard} "
            f"for one; restore the shards, or prepare split {split!r} again first"
        )
    return prepared.filter(pc.is_in(prepared["clip_id"], value_set=index["clip_id"].combine_chunks()))


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


def _publish_index(
    output: str, split: str, prepared: pa.Table, labels: LabelVocabulary, num_mel_bins: int
) -> dict[str, Any]:
    """Write the index of these clips, and return their part of dataset.json."""
    weight = sample_weights(prepared["labels"].combine_chunks(), len(labels))
    index = prepared.select(_INDEXED).append_column(dataset.INDEX.field("sample_weight"), pa.array(weight))
    dataset.write_table(dataset.index_file(output, split), index.select(dataset.INDEX.names).cast(dataset.INDEX))
    frames = int(_total(prepared["num_frames"]))
    mean, mean_sq = (_total(prepared[sums]) / max(frames * num_mel_bins, 1) for sums in ("fbank_sum", "fbank_sum_sq"))
    return {
        "clips": len(prepared),
        "frames": frames,
        "clipped_samples": int(_total(prepared["num_clipped"])),
        "norm": {"mean": mean, "std": max(mean_sq - mean**2, 0.0) ** 0.5},
        "fingerprint": dataset.fingerprint(prepared["clip_id"], prepared["labels"]),
        "sha256": _sha256(output, split),
    }


def _clipped_lines(split: str, indexed: pa.Table, features: FeatureSettings) -> list[str]:
    """A line on clips of which a good part was cut to ±1, because their samples probably have another scale."""
    samples = pc.multiply(indexed["num_frames"].cast(pa.float64()), features.frame_shift_samples)
    is_clipped = pc.greater(indexed["num_clipped"], pc.multiply(samples, CLIPPED_SHARE))
    clipped = indexed["clip_id"].filter(is_clipped)
    if not len(clipped):
        return []
    return [
        f"{len(clipped):,} prepared clips of split {split!r} have more than {100 * CLIPPED_SHARE:g} % of their samples "
        f"beyond full scale, which are cut to ±1 ({clipped[0]} for one)"
    ]


def _sha256(output: str, split: str) -> dict[str, str]:
    return {
        "index.parquet": storage.sha256(dataset.index_file(output, split)),
        "failures.parquet": storage.sha256(dataset.failures_file(output, split)),
    }


def _total(column: pa.ChunkedArray) -> float:
    return pc.sum(column.cast(pa.float64())).as_py() or 0.0
