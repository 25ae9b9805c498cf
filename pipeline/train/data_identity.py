"""What identifies the data of a run: the clips in their order, their labels, and their stored features."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ast_core.errors import DataError
from pipeline.dataset import Clips, PreparedDataset
from pipeline.train.data.feed import layout

SAME_NORM = 1e-3
"""Largest difference of two norms of the same sound. Another kind of CPU or decoder changes them by far less."""


def data_identity(
    dataset: PreparedDataset, splits: Mapping[str, Sequence[str]], clips: Mapping[str, Clips]
) -> dict[str, Any]:
    """What a run records of its data. `splits` and `clips` have the keys `train` and `eval`.

    `content` has hashes of the stored features and of the labels. For data sets of schema version 2, which record no
    hashes of features, it has only that of the labels.
    """
    content = {what: hashes for what in clips if (hashes := _hash_of_features(clips[what])) is not None}
    return {
        "train_splits": dataset.fingerprint(splits["train"]),
        "eval_splits": dataset.fingerprint(splits["eval"]),
        "train_layout": layout(clips["train"]),
        "clip_order": {what: _clip_order(clips[what]) for what in clips},
        "content": content | {"labels": dataset.labels.sha256},
        "norm_of_splits": {what: list(dataset.norm(of)) for what, of in splits.items()},
    }


def check_unchanged(
    expected: Mapping[str, Any],
    dataset: PreparedDataset,
    splits: Mapping[str, Sequence[str]],
    clips: Mapping[str, Clips],
) -> None:
    """Raise DataError if the data set has been prepared again since the driver computed `expected`, with other clips.

    A preparation may run beside a training. Ranks that start again after it would mix the scores, and the order, of two
    sets of clips.
    """
    now = data_identity(dataset, splits, clips)
    compared = ("train_splits", "eval_splits", "train_layout", "clip_order")
    if any(now[key] != expected[key] for key in compared) or changed_content(expected, now):
        raise DataError(
            f"{dataset.uri} was prepared again while this run trains on it, and its clips are others now; train with "
            "another --output, or put the former data set back"
        )


def changed_content(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Which of `train`, `eval` and `labels` changed in content, as far as both identities know it."""
    before: Mapping[str, str] = then.get("content", {})  # earlier versions recorded none
    return [key for key, sha256 in now["content"].items() if before.get(key, sha256) != sha256]


def has_other_sound(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether features that changed are of other sound, rather than rounded in another way, by their norm."""
    norms = ((then["norm_of_splits"][what], now["norm_of_splits"][what]) for what in ("train", "eval"))
    return any(abs(one - other) > SAME_NORM for pair in norms for one, other in zip(*pair, strict=True))


def _clip_order(clips: Clips) -> str:
    """A hash of the clips in their order. It avoids a Python loop: there may be two million clips."""
    joined = pc.binary_join(pa.ListArray.from_arrays([0, len(clips)], clips.clip_id), "\n")
    return hashlib.sha256(joined[0].as_buffer()).hexdigest()


def _hash_of_features(clips: Clips) -> str | None:
    if clips.fbank_hash is None:
        return None
    return hashlib.sha256(clips.fbank_hash.tobytes()).hexdigest()
