"""Sample weights: clips with rarer labels are drawn more often. Plain NumPy."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa


def sample_weights(labels: Sequence[Sequence[int]] | pa.ListArray, num_classes: int) -> np.ndarray:
    """`[clips]` float64: the sum over a clip's labels of `1000 / (clips with that label + 0.01)`.

    The formula of the reference implementation's `gen_weight_file.py`. Weights are valid for one set of clips: compute
    them again over the union when splits are joined or clips are dropped.
    """
    flat, clip_of_label = flatten_labels(labels)
    if len(flat) and not 0 <= flat.min() <= flat.max() < num_classes:
        raise ValueError(f"a label is {flat.min()} or {flat.max()}; there are {num_classes} classes")
    class_weight = 1000.0 / (np.bincount(flat, minlength=num_classes) + 0.01)
    # Without any labels bincount returns integers.
    return np.bincount(clip_of_label, weights=class_weight[flat], minlength=len(labels)).astype(np.float64)


def flatten_labels(labels: Sequence[Sequence[int]] | pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """All labels in one array, and an array of the same length with the clip of each label."""
    array = (
        labels if isinstance(labels, pa.ListArray) else pa.array([list(clip) for clip in labels], pa.list_(pa.int64()))
    )
    counts = array.value_lengths().to_numpy(zero_copy_only=False)
    return array.flatten().to_numpy().astype(np.int64), np.repeat(np.arange(len(array)), counts)
