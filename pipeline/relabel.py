"""A view of a data set: its clips, in its shards, with other labels."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from ast_core.errors import DataError
from pipeline import dataset, storage
from pipeline.dataset import PreparedDataset
from pipeline.weights import flatten_labels, sample_weights


def target_of(labels: pa.ListArray, num_classes: int) -> np.ndarray:
    """bool `[clips, classes]` for the labels of an index."""
    target = np.zeros((len(labels), num_classes), bool)
    classes, clips = flatten_labels(labels)
    target[clips, classes] = True
    return target


def labels_of(target: np.ndarray) -> pa.ListArray:
    """The labels of an index for bool `[clips, classes]`."""
    ends = np.concatenate([[0], target.sum(axis=1).cumsum()]).astype(np.int32)
    return pa.ListArray.from_arrays(ends, pa.array(np.nonzero(target)[1], pa.int16()), type=dataset.LABELS)


def check_output(output: str) -> None:
    """Raise DataError if a folder is in use."""
    if not storage.is_empty(output):
        raise DataError(f"{output} is not empty; give a new folder as --output")


def write_view(data: PreparedDataset, output: str, split: str, labels: pa.ListArray, about: Mapping[str, Any]) -> None:
    """Write a data set with all splits of `data`, of which `split` has other labels, in the order of its index.

    dataset.json names the data set whose shards have the clips (`shards_of`), and has `about` in the split's entry.

    Raises:
        DataError: `data` is of a schema version without checksums.
    """
    storage.write_bytes(dataset.labels_csv(output), data.labels.to_csv().encode())
    splits = {}
    for name in data.splits:
        index = data.index(name)
        if "fbank_hash" not in index.column_names:
            raise DataError(f"{data.uri} has no checksums; {dataset.PREPARE_AGAIN}, which adds them")
        entry = {key: value for key, value in data.info["splits"][name].items() if key != "sha256"}
        if name == split:
            index = index.drop_columns(["labels", "sample_weight"])
            index = index.append_column(dataset.INDEX.field("labels"), labels)
            weight = pa.array(sample_weights(labels, len(data.labels)))
            index = index.append_column(dataset.INDEX.field("sample_weight"), weight)
            entry |= {"fingerprint": dataset.fingerprint(index["clip_id"], index["labels"]), "labels": dict(about)}
        dataset.write_table(dataset.index_file(output, name), index.select(dataset.INDEX.names).cast(dataset.INDEX))
        splits[name] = entry | {"sha256": {"index.parquet": storage.sha256(dataset.index_file(output, name))}}
    dataset.write_info(output, data.info | {"splits": splits, "shards_of": data.shards_uri})
