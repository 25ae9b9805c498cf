"""The embeddings that tagging has stored, read part by part: those of years of audio do not fit into memory.

W windows, N recordings, D dimensions.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ast_core.errors import DataError
from pipeline import parquet, storage
from pipeline.prepare.sources.archives import ahead

EMBEDDINGS = "embeddings"
"""Folder of the embeddings in a folder of tags."""

EMBEDDING = "embedding"
"""Column of a vector: a fixed-size list of float16."""

EMBEDDING_VALUE = ("value", pa.float16())
"""Name and type of an element of it."""

ROWS = ["recording", "start_s", "end_s"]
"""Columns that say what a vector is the embedding of."""

EmbeddingsOf = Literal["window", "clip"]
"""Whether a vector is the embedding of a window, or the mean over a recording or prepared clip."""

TAG_AGAIN = "run jobs/tag.py with --output and --embeddings to the end"


def tags_json(output: str) -> str:
    """The file that describes a folder of tags. It is written last."""
    return storage.join(output, "tags.json")


def failures_file(output: str) -> str:
    """The table of what could not be read, in a folder of tags."""
    return storage.join(output, "failures.parquet")


@dataclass(frozen=True)
class Part:
    """The rows of one file."""

    rows: pa.Table
    """ROWS."""
    vectors_WD: np.ndarray
    """float32."""

    def only(self, is_wanted: np.ndarray) -> "Part":
        return Part(self.rows.filter(pa.array(is_wanted)), self.vectors_WD[is_wanted])


@dataclass(frozen=True)
class StoredEmbeddings:
    uri: str
    """The folder of tags."""
    info: Mapping[str, Any]
    """tags.json"""
    files: tuple[str, ...]

    @classmethod
    def open(cls, uri: str) -> "StoredEmbeddings":
        """Raises DataError if there are no tags, or they have no embeddings."""
        uri = storage.absolute(uri)
        if not storage.exists(tags_json(uri)):
            raise DataError(f"{uri} has no finished tags (no tags.json); {TAG_AGAIN}")
        info = storage.read_checked_json(tags_json(uri), remedy=TAG_AGAIN)
        if info["settings"].get("embeddings") not in get_args(EmbeddingsOf):
            raise DataError(f"{uri} has tags without embeddings; {TAG_AGAIN} into another folder")
        files = storage.list_files(storage.join(uri, EMBEDDINGS), suffix=".parquet")
        if not files:
            raise DataError(f"{uri} has no embedding: no recording could be read, see failures.parquet there")
        return cls(uri, info, tuple(files))

    @property
    def model_sha256(self) -> str:
        """Hash of the model. Embeddings of different models cannot be compared."""
        (sha256,) = self.info["settings"]["models"]
        return str(sha256)

    @property
    def checkpoint(self) -> str:
        """Where the model was when the recordings were tagged."""
        return str(self.info["checkpoints"][0])

    def parts(self) -> Iterator[Part]:
        """The files that have rows, which threads read a few ahead.

        Raises:
            DataError: a file is damaged, or has a value that is not finite.
        """
        return (part for part in ahead(_part, self.files) if len(part.rows))

    def rows(self) -> pa.Table:
        """ROWS of all vectors, in the order of `parts`."""
        return pa.concat_tables([_read(file, ROWS) for file in self.files])

    def unreadable(self) -> pa.ChunkedArray:
        """The recordings that tagging could not read, and which therefore have no embedding."""
        uri = failures_file(self.uri)
        if not storage.exists(uri):
            return pa.chunked_array([], pa.string())
        failures = parquet.read_table(uri, ["recording", "start_s"], remedy=TAG_AGAIN)
        return failures["recording"].filter(pc.is_null(failures["start_s"]))

    def means(self, recordings: pa.Array) -> np.ndarray:
        """The mean embedding of each of these recordings, float32 `[N, D]`.

        Raises:
            DataError: one of them has no embedding.
        """
        sums_ND, windows_N = None, np.zeros(len(recordings), np.int64)
        for part in self.parts():
            at = pc.index_in(part.rows["recording"], value_set=recordings).fill_null(-1).to_numpy()
            known = at >= 0
            at = at[known]
            if sums_ND is None:
                sums_ND = np.zeros((len(recordings), part.vectors_WD.shape[1]), np.float32)
            np.add.at(sums_ND, at, part.vectors_WD[known])
            windows_N += np.bincount(at, minlength=len(recordings))
        missing = np.flatnonzero(windows_N == 0)
        if sums_ND is None or len(missing):
            raise DataError(
                f"{self.uri} has no embedding of {len(missing):,} of {len(recordings):,} recordings, first of "
                f"{recordings[int(missing[0])]}; tag them into it with --embeddings"
            )
        return sums_ND / windows_N[:, None].astype(np.float32)


def _part(file: str) -> Part:
    table = _read(file, [*ROWS, EMBEDDING]).combine_chunks()
    column = table[EMBEDDING].combine_chunks()
    vectors = column.flatten().to_numpy().reshape(len(table), column.type.list_size).astype(np.float32)
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise DataError(
            f"{file}: the embedding of {table['recording'][row]} is not finite; the model is damaged, or its "
            "embeddings are beyond float16"
        )
    return Part(table.select(ROWS), vectors)


def _read(file: str, columns: list[str]) -> pa.Table:
    damaged = f"{file} is damaged ({{}}); delete the files of its name below scores and {EMBEDDINGS}, and tag again"
    return parquet.parse_file(file, lambda source: parquet.open_checked(source).read(columns), damaged=damaged)
