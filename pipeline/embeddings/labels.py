"""The labels of recordings that have embeddings: those of a prepared data set, or of a manifest.

N recordings, C classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary
from pipeline import storage
from pipeline.dataset import PreparedDataset, dataset_json
from pipeline.embeddings.stored import StoredEmbeddings, failures_file
from pipeline.prepare.sources import read_manifest
from pipeline.recording_names import clip_name_prefix, recording_name
from pipeline.weights import flatten_labels


@dataclass(frozen=True)
class Labelled:
    """Recordings of some splits, with their labels."""

    recordings: pa.Array
    """Their names in tags."""
    targets_NC: np.ndarray
    """float32, 0 or 1."""

    def only(self, is_wanted: np.ndarray) -> "Labelled":
        return Labelled(self.recordings.filter(pa.array(is_wanted)), self.targets_NC[is_wanted])


@dataclass(frozen=True)
class Labels:
    """Where labels come from."""

    uri: str
    vocabulary: LabelVocabulary
    _splits: dict[str, tuple[pa.Array, pa.ListArray]]
    """Names and labels by split."""

    @classmethod
    def open(cls, uri: str) -> "Labels":
        """Read the labels of a prepared data set or of a manifest.

        Raises:
            DataError: it is neither, or damaged.
        """
        if storage.exists(dataset_json(uri)):
            return cls._of_data(PreparedDataset.open(uri))
        listed = read_manifest(storage.absolute(uri))
        for line in listed.notes:
            print(line)
        if refused := listed.refused.to_pylist():
            first = f"{refused[0]['clip_id']}: {refused[0]['message']}"
            print(f"{len(refused):,} rows of {uri} are not used ({first})")
        names = pa.array(
            [
                recording_name(media, start_s, end_s)
                for media, start_s, end_s in zip(
                    *(listed.clips[column].to_pylist() for column in ("media", "start_s", "end_s")), strict=True
                )
            ],
            pa.string(),
        )
        split = listed.clips["split"]
        splits = {}
        for name in pc.unique(split).to_pylist():
            is_in = pc.equal(split, name).combine_chunks()
            splits[name] = names.filter(is_in), listed.clips["labels"].combine_chunks().filter(is_in)
        return cls(uri, listed.vocabulary, splits)

    @classmethod
    def _of_data(cls, data: PreparedDataset) -> "Labels":
        splits = {}
        for split in data.splits:
            index = data.index(split)
            names = pc.binary_join_element_wise(clip_name_prefix(data.uri, split), index["clip_id"], "")
            splits[split] = names.combine_chunks(), index["labels"].combine_chunks()
        return cls(data.uri, data.labels, splits)

    @property
    def splits(self) -> list[str]:
        return list(self._splits)

    def of(self, splits: Sequence[str]) -> Labelled:
        """The recordings of the union of splits. Raises DataError for a split that does not exist."""
        if twice := next((split for split in splits if list(splits).count(split) > 1), None):
            raise DataError(f"split {twice!r} is given twice")
        if unknown := [split for split in splits if split not in self._splits]:
            raise DataError(f"{self.uri} has no split {unknown[0]!r}; it has {', '.join(self._splits)}")
        names = pa.chunked_array([self._splits[split][0] for split in splits], pa.string()).combine_chunks()
        labels = pa.chunked_array([self._splits[split][1] for split in splits]).combine_chunks()
        targets = np.zeros((len(names), len(self.vocabulary)), np.float32)
        label, recording = flatten_labels(labels)
        targets[recording, label] = 1
        return Labelled(names, targets)


def readable(labelled: Labelled, embeddings: StoredEmbeddings, say: Callable[[str], Any] = print) -> Labelled:
    """The recordings without those that tagging could not read.

    Raises:
        DataError: none is left.
    """
    is_lost = pc.is_in(labelled.recordings, value_set=embeddings.unreadable()).to_numpy(zero_copy_only=False)
    if not is_lost.any():
        return labelled
    # A run that was killed may have read some of them since.
    is_there = pc.is_in(labelled.recordings, value_set=embeddings.rows()["recording"]).to_numpy(zero_copy_only=False)
    is_lost &= ~is_there
    if not is_lost.any():
        return labelled
    first = labelled.recordings[int(np.argmax(is_lost))]
    say(
        f"{is_lost.sum():,} of {len(is_lost):,} recordings are left out, because tagging could not read them ({first} "
        f"for one): see {failures_file(embeddings.uri)}"
    )
    if is_lost.all():
        raise DataError(f"tagging could read none of these recordings; see {failures_file(embeddings.uri)}")
    return labelled.only(~is_lost)
