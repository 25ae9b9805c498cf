"""RUN/best/scores.parquet: the best model's scores of all evaluation clips, for later analysis.

One row a clip: clip_id, labels, scores (float32, one a class). AudioSet's evaluation set takes at most 43 MB.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ast_core.errors import DataError
from pipeline import dataset, parquet, storage
from pipeline.dataset import Clips
from pipeline.weights import flatten_labels


@dataclass(frozen=True)
class Scores:
    clip_id: pa.Array
    labels: pa.ListArray
    scores: np.ndarray
    """float32 `[clips, C]`; float16 in a run of an earlier version, where all above 0.9998 are 1."""

    def targets(self) -> np.ndarray:
        """Multi-hot labels, float32 `[clips, C]`."""
        targets = np.zeros(self.scores.shape, np.float32)
        label, clip = flatten_labels(self.labels)
        targets[clip, label] = 1
        return targets


def scores_file(run: str) -> str:
    return storage.join(run, "best", "scores.parquet")


def write_scores(run: str, scores: np.ndarray, clips: Clips) -> None:
    """Write the scores `[clips, C]` of the best epoch, in the order of `clips`."""
    num_clips, num_classes = scores.shape
    if num_clips != len(clips):
        raise ValueError(f"{num_clips} rows of scores for {len(clips)} clips")
    flat = pa.array(np.ascontiguousarray(scores, dtype=np.float32).reshape(-1))
    kind = pa.list_(pa.field("score", pa.float32(), nullable=False), num_classes)
    table = pa.table(
        {
            "clip_id": clips.clip_id,
            "labels": clips.labels.cast(dataset.LABELS),
            "scores": pa.FixedSizeListArray.from_arrays(flat, type=kind),
        }
    )
    storage.write_file(
        scores_file(run),
        lambda file: pq.write_table(
            table, file, compression="zstd", use_dictionary=False, write_statistics=False, **parquet.CHECKSUMS
        ),
    )


def read_scores(run: str) -> Scores | None:
    """The run's scores; None if it has none.

    Raises:
        DataError: the file is damaged, or has a label outside its classes.
    """
    uri = scores_file(run)
    if not storage.exists(uri):
        return None
    try:
        table = dataset.read_table(uri, ["clip_id", "labels", "scores"]).combine_chunks()
        clip_id, labels, scores = (table[name].combine_chunks() for name in table.column_names)
        scores = scores.flatten().to_numpy().reshape(len(table), scores.type.list_size)
    except (ValueError, KeyError, AttributeError) as err:
        raise DataError(f"{uri} cannot be read: {err}") from err
    flat, _ = flatten_labels(labels)
    if len(flat) and not 0 <= flat.min() <= flat.max() < scores.shape[1]:
        raise DataError(f"{uri}: a label is {flat.min()} or {flat.max()}; there are {scores.shape[1]} classes")
    return Scores(clip_id, labels, scores)
