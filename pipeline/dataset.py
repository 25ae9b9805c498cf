"""A prepared data set on disk: its schemas, how it is opened, its fingerprint. The one place where a column is spelt.

OUT/dataset.json              written last: no dataset.json, no data set
OUT/labels.csv                index,mid,display_name
OUT/SPLIT/shards/*.parquet    immutable, one row a clip (`SHARD`)
OUT/SPLIT/index.parquet       one row a clip, small (`INDEX`)
OUT/SPLIT/failures.parquet    one row a clip that could not be prepared
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ast_core import frames
from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary
from pipeline import storage
from pipeline.weights import sample_weights

SCHEMA_VERSION = 2
ROW_GROUP_CLIPS = 16
"""Clips a row group: a reader that wants one clip pays for this many (3.4 MB at 10 s)."""

PAGE_BYTES = 1 << 26
"""A row group's fbanks are one page, which a reader takes as one array; `pipeline.train.pages` does."""

FBANK = pa.list_(
    pa.field("frame", pa.list_(pa.field("bin", pa.float16(), nullable=False), frames.NUM_MEL_BINS), nullable=False)
)
"""Frames × mel bins. Nothing in it is nullable, so that a reader decodes no definition levels."""

LABELS = pa.list_(pa.int16())

SHARD = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("video_id", pa.string()),
        pa.field("start_s", pa.float64(), nullable=False),
        pa.field("end_s", pa.float64(), nullable=False),
        pa.field("labels", LABELS, nullable=False),
        pa.field("num_frames", pa.int16(), nullable=False),
        pa.field("num_clipped", pa.int32(), nullable=False),  # samples beyond full scale after resampling, set to ±1
        pa.field("num_silent_frames", pa.int16(), nullable=False),  # every bin at the floor, as digital silence has it
        pa.field("fbank_sum", pa.float64(), nullable=False),  # of all frames × bins of the stored values
        pa.field("fbank_sum_sq", pa.float64(), nullable=False),
        pa.field("fbank_hash", pa.int64(), nullable=False),  # of the stored bytes: equal audio has equal hashes
        pa.field("fbank", FBANK, nullable=False),
    ]
)

INDEX = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),  # file name below SPLIT/shards
        pa.field("row", pa.int32(), nullable=False),
        pa.field("num_frames", pa.int16(), nullable=False),
        pa.field("labels", LABELS, nullable=False),
        pa.field("sample_weight", pa.float64(), nullable=False),
    ]
)

FEATURES: dict[str, Any] = {
    "kind": "kaldi log-mel fbank",
    "sample_rate_hz": frames.SAMPLE_RATE_HZ,
    "num_mel_bins": frames.NUM_MEL_BINS,
    "frame_length_ms": frames.FRAME_LENGTH_MS,
    "frame_shift_ms": frames.FRAME_SHIFT_MS,
    "low_freq_hz": frames.LOW_FREQ_HZ,
    "window": "hanning",
    "waveform_scale": 1.0,
    "stored_as": "float16",
}
"""How the fbanks were computed; two data sets with other settings do not mix."""


def dataset_json(output: str) -> str:
    return storage.join(output, "dataset.json")


def labels_csv(output: str) -> str:
    return storage.join(output, "labels.csv")


def shards_dir(output: str, split: str) -> str:
    return storage.join(output, split, "shards")


def work_dir(output: str) -> str:
    """What a preparation needs while it is under way."""
    return storage.join(output, "_work")


def index_file(output: str, split: str) -> str:
    return storage.join(output, split, "index.parquet")


def failures_file(output: str, split: str) -> str:
    return storage.join(output, split, "failures.parquet")


def write_table(uri: str, table: pa.Table, **options: Any) -> None:
    """One Parquet file, seen whole or not at all. Statistics of the fbank values would serve nobody."""
    small = [name for name in table.column_names if name != "fbank"]
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


def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    return pq.read_table(io.BytesIO(storage.read_bytes(uri)), columns=columns)


def name_of(clip_ids: pa.ChunkedArray) -> str:
    """A file's name after the clips in it: a task that runs twice writes the same file twice."""
    return hashlib.sha256("\n".join(clip_ids.to_pylist()).encode()).hexdigest()[:20]


def fingerprint(clip_ids: pa.ChunkedArray, labels: pa.ChunkedArray) -> str:
    """A hash of which clips there are and how they are labelled, whatever their order."""
    text = pc.binary_join_element_wise(clip_ids, pc.binary_join(labels.cast(pa.list_(pa.string())), ","), " ")
    digest = hashlib.sha256()
    for line in text.take(pc.sort_indices(text)).to_pylist():
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


@dataclass(frozen=True)
class Clips:
    """The clips of one or several splits, in a fixed order, with what training needs to know of each."""

    shards: list[str]
    """URIs; `shard_of` points into it."""
    shard_of: np.ndarray
    row: np.ndarray
    num_frames: np.ndarray
    labels: pa.ListArray
    clip_id: pa.Array
    weight: np.ndarray
    """Sampling weight over this union of splits."""

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True)
class PreparedDataset:
    """An opened data set. `info` is its dataset.json."""

    uri: str
    info: dict[str, Any]
    labels: LabelVocabulary

    @classmethod
    def open(cls, uri: str) -> "PreparedDataset":
        """Raises DataError where there is none, it is unfinished, or of another schema version."""
        uri = storage.absolute(uri)
        if not storage.exists(dataset_json(uri)):
            raise DataError(
                f"{uri} holds no finished data set (no dataset.json); run jobs/prepare_audioset.py to the end"
            )
        info = storage.read_json(dataset_json(uri))
        if info.get("schema_version") != SCHEMA_VERSION:
            raise DataError(
                f"{uri} has schema version {info.get('schema_version')}, this program reads {SCHEMA_VERSION}; "
                "prepare the data anew into another folder"
            )
        labels = LabelVocabulary.from_csv(storage.read_text(labels_csv(uri)), origin=labels_csv(uri))
        return cls(uri, info, labels)

    @property
    def splits(self) -> list[str]:
        return list(self.info["splits"])

    def index(self, split: str) -> pa.Table:
        if split not in self.info["splits"]:
            raise DataError(f"{self.uri} has no split {split!r}; it has {', '.join(self.splits)}")
        index = read_table(index_file(self.uri, split))
        if len(index) != self.info["splits"][split]["clips"]:
            raise DataError(f"split {split!r} of {self.uri} is being prepared; run jobs/prepare_audioset.py to the end")
        return index

    def clips(self, splits: Sequence[str]) -> Clips:
        """The union of splits. Their weights are computed anew over it."""
        if not splits:
            raise DataError(f"no split given; {self.uri} has {', '.join(self.splits)}")
        if repeated := {split for split in splits if splits.count(split) > 1}:
            raise DataError(f"split {repeated.pop()!r} is given twice")
        tables = [self.index(split) for split in splits]
        if not any(map(len, tables)):
            raise DataError(f"{', '.join(splits)} of {self.uri}: no clip was prepared; see failures.parquet there")
        names = [
            pc.binary_join_element_wise(shards_dir(self.uri, s), t["shard"], "/")
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
            weight=sample_weights(labels, len(self.labels)),
        )

    def norm(self, splits: Sequence[str]) -> tuple[float, float]:
        """Mean and standard deviation of raw log-mel over all frames of the splits."""
        parts = [self.info["splits"][split] for split in splits]
        frames = np.array([part["frames"] for part in parts], dtype=np.float64)
        means = np.array([part["norm"]["mean"] for part in parts])
        squares = np.array([part["norm"]["std"] for part in parts]) ** 2 + means**2
        mean = float((frames * means).sum() / frames.sum())
        return mean, float(((frames * squares).sum() / frames.sum() - mean**2) ** 0.5)

    def fingerprint(self, splits: Sequence[str]) -> dict[str, str]:
        return {split: self.info["splits"][split]["fingerprint"] for split in splits}
