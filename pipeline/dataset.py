"""A prepared data set on disk: its files, schemas and fingerprint, and how it is opened.

OUT/dataset.json              written last; without it the data set is not finished
OUT/labels.csv                index,mid,display_name
OUT/SPLIT/shards/*.parquet    immutable, one row a clip (`shard_schema`)
OUT/SPLIT/index.parquet       one row a clip, small (`INDEX`)
OUT/SPLIT/failures.parquet    one row a clip that could not be prepared
"""

import functools
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ast_core.errors import ConfigError, DataError
from ast_core.features import FeatureSettings
from ast_core.labels import LabelVocabulary
from pipeline import parquet, storage
from pipeline.parquet import read_table
from pipeline.weights import sample_weights

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 3
UNCHECKED_VERSION = 2
"""The schema version without checksums. Such data are still read; only their shards are checked, by `fbank_hash`."""

ROW_GROUP_CLIPS = 16
"""Clips in a row group of the shards that we write. To get one clip a reader reads this many (3.4 MB at 10 s).

A file's footer has its actual number; dataset.json has the number when the index was written.
"""

PREPARE_AGAIN = "run the same preparation again, if none is running now"
"""The remedy for files that a preparation writes again from the shards. While one runs, they may be inconsistent."""

PAGE_BYTES = 1 << 26
"""So large that the fbanks of a row group are one page. `pipeline.train.data.parquet_pages` reads it as one array."""

FEATURES_KEY = b"features"
"""Key of the feature settings in the metadata of a shard."""

ORIGINS_KEY = b"origins"
"""Key of the origins of a shard's clips in its metadata: see `pipeline.prepare.output.origins`."""


def fbank_type(num_mel_bins: int) -> pa.ListType:
    """Frames × mel bins. No part of it is nullable, so a reader decodes no definition levels."""
    frame = pa.list_(pa.field("bin", pa.float16(), nullable=False), num_mel_bins)
    return pa.list_(pa.field("frame", frame, nullable=False))


LABELS = pa.list_(pa.int16())

SCANNED = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("video_id", pa.string()),
        pa.field("start_s", pa.float64(), nullable=False),
        pa.field("end_s", pa.float64(), nullable=False),
        pa.field("labels", LABELS, nullable=False),
        pa.field("num_frames", pa.int32(), nullable=False),
        pa.field("num_clipped", pa.int32(), nullable=False),  # samples beyond full scale after resampling, set to ±1
        pa.field("num_silent_frames", pa.int32(), nullable=False),  # every bin at the floor, as in digital silence
        pa.field("fbank_sum", pa.float64(), nullable=False),  # sum of the stored values over frames × bins
        pa.field("fbank_sum_sq", pa.float64(), nullable=False),
        pa.field("fbank_hash", pa.int64(), nullable=False),  # hash of the stored bytes: equal audio has equal hashes
    ]
)
"""The small columns of a shard. A preparation and its report read them once and need no others."""


def shard_schema(features: FeatureSettings) -> pa.Schema:
    """The columns of a shard. The file's metadata has the feature settings as JSON."""
    fbank = pa.field("fbank", fbank_type(features.num_mel_bins), nullable=False)
    return pa.schema([*SCANNED, fbank], metadata={FEATURES_KEY: json.dumps(features.to_dict())})


INDEX = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),  # file name below SPLIT/shards
        pa.field("row", pa.int32(), nullable=False),
        pa.field("num_frames", pa.int32(), nullable=False),
        pa.field("labels", LABELS, nullable=False),
        pa.field("sample_weight", pa.float64(), nullable=False),
        pa.field("fbank_hash", pa.int64(), nullable=False),  # as in SCANNED; readers of a shard compare it
    ]
)


def dataset_json(output: str) -> str:
    return storage.join(output, "dataset.json")


def labels_csv(output: str) -> str:
    return storage.join(output, "labels.csv")


def shards_dir(output: str, split: str) -> str:
    return storage.join(output, split, "shards")


def work_dir(output: str) -> str:
    """The folder for files that a preparation needs while it runs."""
    return storage.join(output, "_work")


def index_file(output: str, split: str) -> str:
    return storage.join(output, split, "index.parquet")


def failures_file(output: str, split: str) -> str:
    return storage.join(output, split, "failures.parquet")


def unpublished_file(output: str, split: str) -> str:
    """A marker file. It exists while the files of a split are, or may be, newer than dataset.json."""
    return storage.join(work_dir(output), split, "unpublished")


def write_table(uri: str, table: pa.Table, **options: Any) -> None:
    """Write a Parquet file atomically. There are no statistics of the fbank values, since nobody would use them."""
    small = [name for name in table.column_names if name != "fbank"]
    options = parquet.CHECKSUMS | options
    storage.write_file(
        uri,
        lambda file: pq.write_table(
            table,
            file,
            compression="zstd",
            use_dictionary=small,
            write_statistics=small,
            data_page_size=PAGE_BYTES,
            **options,
        ),
    )


def hash_fbank(fbank: np.ndarray) -> int:
    """`fbank_hash` of one clip's stored values, float16 and contiguous: the first 8 bytes of their BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(fbank.data).digest()[:8], "little", signed=True)


def name_of(clip_ids: pa.ChunkedArray) -> str:
    """A file name that depends only on the clips in the file, so that a task that runs twice writes the same file."""
    return hashlib.sha256("\n".join(clip_ids.to_pylist()).encode()).hexdigest()[:20]


def fingerprint(clip_ids: pa.ChunkedArray, labels: pa.ChunkedArray) -> str:
    """A hash of the clips and their labels, independent of their order."""
    text = pc.binary_join_element_wise(clip_ids, pc.binary_join(labels.cast(pa.list_(pa.string())), ","), " ")
    digest = hashlib.sha256()
    for line in text.take(pc.sort_indices(text)).to_pylist():
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


FAILURES_REMEDY = "restore it, or delete it and run the same preparation again: its clips are tried again"


def read_info(output: str) -> dict[str, Any] | None:
    """The content of dataset.json; None if it does not exist.

    Raises:
        DataError: it is damaged, was edited, or has a schema version that this program does not read.
    """
    uri = dataset_json(output)
    if not storage.exists(uri):
        return None
    remedy = "restore it, or delete it and run the preparation of each split again, which reads the shards back"
    info = storage.read_checked_json(uri, remedy=remedy, is_required=lambda value: _version(value) == SCHEMA_VERSION)
    if _version(info) is None:
        raise DataError(f"{uri} is damaged, it lacks schema_version; {remedy}")
    if _version(info) not in (UNCHECKED_VERSION, SCHEMA_VERSION):
        raise DataError(
            f"{output} has schema version {_version(info)}, this program reads {SCHEMA_VERSION}; "
            "prepare the data again into another folder"
        )
    if missing := {"features", "labels", "splits"} - set(info):
        raise DataError(f"{uri} is damaged, it lacks {min(missing)}; {remedy}")
    return info


def _version(info: dict[str, Any]) -> Any:
    return info.get("schema_version")


def write_info(output: str, info: dict[str, Any]) -> None:
    storage.write_checked_json(dataset_json(output), info)


def read_labels(output: str, info: dict[str, Any] | None) -> LabelVocabulary:
    """The vocabulary in labels.csv, compared with dataset.json (`info`) if there is one.

    Raises:
        DataError: it is missing, damaged, or not the vocabulary of dataset.json.
    """
    uri = labels_csv(output)
    remedy = "put the one back that the data were prepared with"
    try:
        labels = LabelVocabulary.from_csv(storage.read_text(uri), origin=uri)
    except DataError as err:
        raise DataError(f"{uri} is missing or damaged ({err}); {remedy}") from err
    if info is not None and labels.sha256 != info["labels"]["sha256"]:
        raise DataError(f"{uri} is damaged, or not the one that the data were prepared with; {remedy}")
    return labels


def published_sha256(output: str, split: str, name: str) -> str | None:
    """The SHA-256 that dataset.json records for the file `name` of a split.

    None if it records none, or if a run that has not published yet is changing the split.
    """
    info = read_info(output)
    if info is None or split not in info["splits"] or storage.exists(unpublished_file(output, split)):
        return None
    sha256: str | None = info["splits"][split].get("sha256", {}).get(name)
    return sha256


def features_of(output: str, info: dict[str, Any]) -> FeatureSettings:
    """The feature settings in dataset.json (`info`). Raises DataError if this program cannot read such features."""
    return parse_features(info["features"], origin=f"the features in {dataset_json(output)}")


def parse_features(value: Any, *, origin: str) -> FeatureSettings:
    """Feature settings in a file of a data set. Raises DataError if this program cannot read such features."""
    try:
        return FeatureSettings.from_mapping(value, origin=origin)
    except ConfigError as err:
        raise DataError(str(err)) from err


@functools.cache
def _warn_of_version(uri: str) -> None:
    """Warn once in a process."""
    logger.warning(
        f"{uri} is of schema version {UNCHECKED_VERSION}, without checksums of its index and labels: "
        "run the same preparation again, which adds them and prepares no clip again"
    )


@dataclass(frozen=True)
class Clips:
    """The clips of one or several splits, in a fixed order, with the columns that training needs."""

    shards: list[str]
    """URIs; `shard_of` points into it."""
    shard_of: np.ndarray
    row: np.ndarray
    num_frames: np.ndarray
    labels: pa.ListArray
    clip_id: pa.Array
    num_mel_bins: int
    weight: np.ndarray
    """The sample weight of each clip, computed over this union of splits."""
    fbank_hash: np.ndarray | None = None
    """int64, `hash_fbank` of each clip's fbank; None for data of schema version 2."""
    row_group_clips: int = ROW_GROUP_CLIPS
    """Rows in a row group when the index was written. It decides which clips are read together, not where a clip is."""

    def __len__(self) -> int:
        return len(self.row)

    def part(self, begin: int, end: int) -> "Clips":
        """The clips from `begin` to `end`, with only the shards that they are in."""
        used, shard_of = np.unique(self.shard_of[begin:end], return_inverse=True)
        return replace(
            self,
            shards=[self.shards[i] for i in used],
            shard_of=shard_of,
            row=self.row[begin:end],
            num_frames=self.num_frames[begin:end],
            labels=self.labels.slice(begin, end - begin),
            clip_id=self.clip_id.slice(begin, end - begin),
            weight=self.weight[begin:end],
            fbank_hash=None if self.fbank_hash is None else self.fbank_hash[begin:end],
        )


@dataclass(frozen=True)
class PreparedDataset:
    """An opened data set. `info` is its dataset.json."""

    uri: str
    info: dict[str, Any]
    labels: LabelVocabulary
    features: FeatureSettings

    @classmethod
    def open(cls, uri: str) -> "PreparedDataset":
        """Open a data set.

        Raises:
            DataError: it does not exist, or is unfinished, damaged, or of another schema version.
        """
        uri = storage.absolute(uri)
        info = read_info(uri)
        if info is None:
            raise DataError(
                f"{uri} holds no finished data set (no dataset.json); run jobs/prepare_audioset.py to the end"
            )
        if info["schema_version"] == UNCHECKED_VERSION:
            _warn_of_version(uri)
        return cls(uri, info, read_labels(uri, info), features_of(uri, info))

    @property
    def splits(self) -> list[str]:
        return list(self.info["splits"])

    @property
    def shards_uri(self) -> str:
        """The data set whose shards have the clips: another one if this is a view (`pipeline.relabel`)."""
        uri: str = self.info.get("shards_of", self.uri)
        return uri

    def index(self, split: str) -> pa.Table:
        """The index of a split: rows of INDEX, without `fbank_hash` for data of schema version 2."""
        entry = self._entry(split)
        sha256 = entry.get("sha256", {}).get("index.parquet")
        index = read_table(index_file(self.uri, split), sha256=sha256, remedy=PREPARE_AGAIN)
        columns = [name for name in INDEX.names if name != "fbank_hash" or sha256 is not None]
        if missing := sorted(set(columns) - set(index.column_names)):
            raise DataError(f"{index_file(self.uri, split)} lacks the column {missing[0]}; {PREPARE_AGAIN}")
        if len(index) != entry["clips"]:
            raise DataError(f"split {split!r} of {self.uri} is being prepared; run jobs/prepare_audioset.py to the end")
        return index.select(columns)

    def failures(self, split: str) -> pa.Table | None:
        """The failures table of a split; None if it was not written. During a preparation it may be a newer one."""
        self._entry(split)  # refuses a split that does not exist
        uri, sha256 = failures_file(self.uri, split), published_sha256(self.uri, split, "failures.parquet")
        if sha256 is None and not storage.exists(uri):
            return None
        return read_table(uri, sha256=sha256, remedy=FAILURES_REMEDY)

    def _entry(self, split: str) -> dict[str, Any]:
        if split not in self.info["splits"]:
            raise DataError(f"{self.uri} has no split {split!r}; it has {', '.join(self.splits)}")
        entry: dict[str, Any] = self.info["splits"][split]
        return entry

    def clips(self, splits: Sequence[str]) -> Clips:
        """The clips of the union of splits. Sample weights are computed again over the union."""
        if not splits:
            raise DataError(f"no split given; {self.uri} has {', '.join(self.splits)}")
        if repeated := {split for split in splits if splits.count(split) > 1}:
            raise DataError(f"split {repeated.pop()!r} is given twice")
        tables = [self.index(split) for split in splits]
        if not any(map(len, tables)):
            raise DataError(f"{', '.join(splits)} of {self.uri}: no clip was prepared; see failures.parquet there")
        names = [
            pc.binary_join_element_wise(shards_dir(self.shards_uri, s), t["shard"], "/")
            for s, t in zip(splits, tables, strict=True)
        ]
        shard = (
            pa.chunked_array([chunk for name in names for chunk in name.chunks]).combine_chunks().dictionary_encode()
        )
        union = pa.concat_tables(tables).combine_chunks()
        labels = union["labels"].combine_chunks()
        return Clips(
            shards=shard.dictionary.to_pylist(),
            shard_of=shard.indices.to_numpy(),
            row=union["row"].to_numpy(),
            num_frames=union["num_frames"].to_numpy(),
            labels=labels,
            clip_id=union["clip_id"].combine_chunks(),
            num_mel_bins=self.features.num_mel_bins,
            weight=sample_weights(labels, len(self.labels)),
            fbank_hash=union["fbank_hash"].to_numpy() if "fbank_hash" in union.column_names else None,
            row_group_clips=self.info.get("row_group_clips", 16),  # the value of schema version 2
        )

    def norm(self, splits: Sequence[str]) -> tuple[float, float]:
        """The norm: mean and standard deviation of raw log-mel over all frames of the splits."""
        parts = [self.info["splits"][split] for split in splits]
        frames = np.array([part["frames"] for part in parts], dtype=np.float64)
        means = np.array([part["norm"]["mean"] for part in parts])
        squares = np.array([part["norm"]["std"] for part in parts]) ** 2 + means**2
        mean = float((frames * means).sum() / frames.sum())
        return mean, float(((frames * squares).sum() / frames.sum() - mean**2) ** 0.5)

    def fingerprint(self, splits: Sequence[str]) -> dict[str, str]:
        return {split: self.info["splits"][split]["fingerprint"] for split in splits}
