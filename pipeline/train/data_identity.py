"""What identifies the data of a run: the clips in their order, their labels, and their stored features."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ast_core.errors import DataError
from pipeline.dataset import Clips, PreparedDataset
from pipeline.train.data.feed import layout


def data_identity(
    dataset: PreparedDataset, splits: Mapping[str, Sequence[str]], clips: Mapping[str, Clips]
) -> dict[str, Any]:
    """Hashes that are equal just if a run on these clips can go on. `splits` and `clips` have the keys `train`, `eval`.

    `content` has no hash of the features of clips in data sets of schema version 2, which record none.
    """
    content = {what: hashes for what in clips if (hashes := _hash_of_features(clips[what])) is not None}
    return {
        "train_splits": dataset.fingerprint(splits["train"]),
        "eval_splits": dataset.fingerprint(splits["eval"]),
        "train_layout": layout(clips["train"]),
        "clip_order": {what: _clip_order(clips[what]) for what in clips},
        "content": content | {"labels": dataset.labels.sha256},
    }


def check_unchanged(
    expected: Mapping[str, Any],
    dataset: PreparedDataset,
    splits: Mapping[str, Sequence[str]],
    clips: Mapping[str, Clips],
) -> None:
    """Raise DataError if the data set has been prepared again since the driver computed `expected`.

    A preparation may run beside a training. Ranks that start again after it would mix the scores, and the order, of two
    sets of clips.
    """
    if data_identity(dataset, splits, clips) != expected:
        raise DataError(
            f"{dataset.uri} was prepared again while this run trains on it, and its clips are others now; train with "
            "another --output, or put the former data set back"
        )


def _clip_order(clips: Clips) -> str:
    """A hash of the clips in their order. It avoids a Python loop: there may be two million clips."""
    joined = pc.binary_join(pa.ListArray.from_arrays([0, len(clips)], clips.clip_id), "\n")
    return hashlib.sha256(joined[0].as_buffer()).hexdigest()


def _hash_of_features(clips: Clips) -> str | None:
    if clips.fbank_hash is None:
        return None
    return hashlib.sha256(clips.fbank_hash.tobytes()).hexdigest()
