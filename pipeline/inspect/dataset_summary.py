"""The doctor's input: a prepared data set's small columns, and the official lists of its splits.

No fbank is read: shards have columns with its sums and hash (`pipeline.prepare.output.shards.clip_facts`).
"""

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ast_core.errors import DataError
from ast_core.features import FeatureSettings
from ast_core.labels import LabelVocabulary, audioset_labels
from pipeline.dataset import PreparedDataset
from pipeline.embeddings.stored import StoredEmbeddings
from pipeline.prepare.clip import FAILURES
from pipeline.prepare.output.shards import scan_shards
from pipeline.prepare.sources import OFFICIAL_LISTS, read_segments
from pipeline.prepare.sources.locate import Place
from pipeline.prepare.sources.web_lists import cached
from pipeline.weights import flatten_labels

_OTHER_NAME = re.compile(r"Y?(?P<video>[A-Za-z0-9_-]{11})(_(?P<start>\d+(\.\d+)?))?(_\d+(\.\d+)?)?")
"""Names of clips in copies of AudioSet: `YID`, `ID`, `ID_30`, `YID_30.000_40.000`."""


@dataclass(frozen=True)
class OfficialList:
    origin: str
    clips: pa.Table
    """`CLIPS`, one row a clip, without the places of the media."""
    num_refused: int
    """Rows that could not be read."""


@dataclass(frozen=True)
class SplitSummary:
    name: str
    features: FeatureSettings
    num_classes: int
    info: dict[str, Any]
    """The split's entry of dataset.json."""
    stored: pa.Table
    """The small columns (`SCANNED`), shard and row of all shards. After a crash a clip may be in two shards."""
    index: pa.Table
    """INDEX, as it is on disk."""
    failures: pa.Table
    official: OfficialList | None
    no_list: str
    """Why there is no official list; empty if there is one, or if the split cannot have one."""

    @cached_property
    def clips(self) -> pa.Table:
        """One row of `stored` for each clip of the index. Clips that are no longer listed stay in the shards."""
        first = np.unique(self.stored["clip_id"].to_numpy(zero_copy_only=False), return_index=True)[1]
        distinct = self.stored.take(np.sort(first))
        return distinct.filter(pc.is_in(distinct["clip_id"], value_set=self.index["clip_id"].combine_chunks()))

    @property
    def num_lost(self) -> int:
        """The number of clips in the shards that should be in the index and are not."""
        not_indexed = pc.count_distinct(self.stored["clip_id"]).as_py() - len(self.clips)
        return max(0, int(not_indexed - self.info.get("left_out", 0)))

    @cached_property
    def position(self) -> np.ndarray:
        """`[clips]`: each clip's row in the official list; -1 if it is not in the list or there is none."""
        return _positions(self.clips, self.official.clips) if self.official else np.full(len(self.clips), -1)

    def column(self, name: str) -> np.ndarray:
        return self.clips[name].to_numpy()

    def class_counts(self, clips: pa.Table) -> np.ndarray:
        """`[C]`: the number of clips that have each class."""
        return np.bincount(flatten_labels(clips["labels"].combine_chunks())[0], minlength=self.num_classes)


@dataclass(frozen=True)
class DatasetSummary:
    uri: str
    info: dict[str, Any]
    """dataset.json"""
    labels: LabelVocabulary
    features: FeatureSettings
    splits: list[SplitSummary]
    embeddings: StoredEmbeddings | None = None
    """Embeddings of the clips of all splits, if they are stored."""


def summarize(
    data: PreparedDataset,
    official: Mapping[str, str] | None = None,
    stored: Mapping[str, pa.Table] | None = None,
    embeddings: StoredEmbeddings | None = None,
) -> DatasetSummary:
    """Read the shards' small columns and the official lists: those in `official`, and those known by the split's name.

    Only a list that `official` gives as a URL or a name is fetched from the web. A list known by the split's name is
    read from the cache; if it is not there, `SplitSummary.no_list` says so.

    Args:
        official: The official list, by split.
        stored: The small columns of splits whose shards were read already, by split.
        embeddings: Of the clips of all splits.

    Raises:
        DataError: the data set is a view (`pipeline.relabel`), `official` names a split that does not exist or a list
            that cannot be read, or a shard is damaged.
    """
    if data.shards_uri != data.uri:
        raise DataError(f"{data.uri} has no clips of its own, it has other labels for {data.shards_uri}; examine that")
    official, stored = official or {}, stored or {}
    if unknown := sorted(official.keys() - set(data.splits)):
        raise DataError(f"{data.uri} has no split {unknown[0]!r}; it has {', '.join(data.splits)}")
    with ThreadPoolExecutor(max(1, len(data.splits))) as pool:
        splits = list(
            pool.map(lambda split: _summarize_split(data, split, official.get(split), stored.get(split)), data.splits)
        )
    return DatasetSummary(data.uri, data.info, data.labels, data.features, splits, embeddings)


def _summarize_split(data: PreparedDataset, split: str, uri: str | None, stored: pa.Table | None) -> SplitSummary:
    failures = data.failures(split)
    listed, no_list = _official_list(data, split, uri)
    return SplitSummary(
        name=split,
        features=data.features,
        num_classes=len(data.labels),
        info=data.info["splits"][split],
        stored=scan_shards(data.uri, split) if stored is None else stored,
        index=data.index(split),
        failures=FAILURES.empty_table() if failures is None else failures,
        official=listed,
        no_list=no_list,
    )


def _official_list(data: PreparedDataset, split: str, uri: str | None) -> tuple[OfficialList | None, str]:
    if uri is None and set(audioset_labels().mids).isdisjoint(data.labels.mids):
        return None, ""
    if uri is None and split not in OFFICIAL_LISTS:
        return None, f"no official list is named {split}; give its list with --official {split}=LIST"
    if (source := uri or cached(split)) is None:
        return None, (
            f"the official list {split} is not in the cache of this machine, and a report fetches nothing by itself; "
            f"give --official {split}={split} to fetch it, or {split}=FILE"
        )
    try:
        listed = read_segments(
            source,
            locate=lambda video_id, start_s, end_s: Place("", None, 0.0),
            vocabulary=data.labels,
            split=split,
        )
        if not len(listed.clips):
            raise DataError(f"no row of {uri or split} could be read: {listed.refused['message'][0]}")
    except DataError as err:
        if uri is not None:
            raise
        return None, str(err)
    return OfficialList(uri or split, listed.clips, len(listed.refused)), ""


def _positions(clips: pa.Table, listed: pa.Table) -> np.ndarray:
    position = _index_in(clips["clip_id"], listed["clip_id"])
    lost = np.flatnonzero(position < 0)
    if len(lost):
        matches = map(_OTHER_NAME.fullmatch, clips["clip_id"].take(lost).to_pylist())
        names = [
            (m["video"], m["start"] and f"{m['video']}_{float(m['start']):.3f}") if m else (None, None) for m in matches
        ]
        videos = pa.array([video if section is None else None for video, section in names], pa.string())
        sections = pa.array([section for _, section in names], pa.string())
        by_video, by_section = _index_in(videos, listed["video_id"]), _index_in(sections, listed["clip_id"])
        position[lost] = np.where(by_section >= 0, by_section, by_video)
    return position


def _index_in(names: pa.Array, listed: pa.ChunkedArray) -> np.ndarray:
    """`[names]`: the first row of each name in `listed`, -1 if there is none. Arrow does it for millions of names."""
    found = pc.index_in(names, value_set=listed.combine_chunks(), skip_nulls=True)
    return found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
