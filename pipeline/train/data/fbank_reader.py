"""Random access to the fbanks of a data set: each value is the one that was prepared, or an error is raised.

The checks form a chain. dataset.json has a checksum of itself and the SHA-256 of each index. The index has each clip's
name, frames and fbank hash, which the shard's row must have too. The fbank is verified by the checksums of its pages,
or by that hash where another program wrote pages without checksums or in other places.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ast_core.errors import DataError
from pipeline import dataset, parquet, storage
from pipeline.dataset import Clips
from pipeline.parquet import ColumnChunk, column_chunks
from pipeline.train.data.parquet_pages import UnknownLayoutError, read_values
from pipeline.train.data.sampling import GROUPS_PER_SHUFFLE_WINDOW
from pipeline.train.data.shard_cache import ShardCache

logger = logging.getLogger(__name__)

GROUPS_IN_MEMORY = 4 * GROUPS_PER_SHUFFLE_WINDOW
"""The current shuffle window and the next one, which is read ahead, of clips and of mixup partners.

All virtual ranks reach the ends of their windows together.
"""

READ_THREADS = 8
"""They mostly wait for storage."""

FACTS = ["clip_id", "num_frames", "fbank_hash"]


@dataclass(frozen=True)
class _Rows:
    """Consecutive rows of a shard."""

    begin: int
    clip_ids: list[str]
    hashes: np.ndarray
    fbanks: list[np.ndarray]
    """float16 `[frames, mel bins]` each."""


class FbankReader:
    """Random access to fbanks, by runs of `Clips.row_group_clips` rows, the most recently used ones kept.

    Such a run is a row group of a shard as we write it. Where another program has written other row groups, the footer
    says which of them hold the run. `prefetch` starts reads; reading what was prefetched waits for them to end.
    """

    def __init__(self, clips: Clips, groups_in_memory: int = GROUPS_IN_MEMORY, cache: ShardCache | None = None) -> None:
        self.clips, self.groups_in_memory, self.cache = clips, groups_in_memory, cache
        self._files: OrderedDict[int, _SharedFile] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], Future[_Rows]] = OrderedDict()
        self._pool = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="feed-read")

    def __enter__(self) -> "FbankReader":
        return self

    def __exit__(self, *ending: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __getitem__(self, clip: int) -> np.ndarray:
        """float16 `[frames, mel bins]` of one clip, a view that is not to be written to.

        Raises:
            DataError: its shard is missing or damaged, or holds another clip in that row.
            OSError: its shard cannot be read.
        """
        rows = self._group(clip).result()
        row = int(self.clips.row[clip]) - rows.begin
        if row >= len(rows.fbanks) or not self._is_clip(clip, rows, row):
            held = f"clip {rows.clip_ids[row]}" if row < len(rows.clip_ids) else "nothing"
            raise DataError(
                f"the shard {self.clips.shards[self.clips.shard_of[clip]]} is damaged or was changed: its row "
                f"{rows.begin + row} holds {held}, or other values, where the index has {self.clips.clip_id[clip]}; "
                "restore it, or run the same preparation again, which makes the index again"
            )
        return rows.fbanks[row]

    def prefetch(self, clips: np.ndarray) -> None:
        for clip in clips:
            self._group(int(clip))

    def padded(self, clips: np.ndarray, num_frames: int) -> tuple[Tensor, Tensor]:
        """float16 `[B, num_frames, mel bins]`, cut or padded with 0, and the frames that each clip has of them."""
        fbanks = [self[int(clip)][:num_frames] for clip in clips]
        batch = torch.empty(len(fbanks), num_frames, fbanks[0].shape[1], dtype=torch.float16)
        for padded, clip in zip(batch.numpy(), fbanks, strict=True):
            padded[: len(clip)] = clip
            padded[len(clip) :] = 0
        return batch, torch.tensor([len(clip) for clip in fbanks])

    def _is_clip(self, clip: int, rows: _Rows, row: int) -> bool:
        clips = self.clips
        return (
            rows.clip_ids[row] == clips.clip_id[clip].as_py()
            and len(rows.fbanks[row]) == clips.num_frames[clip]
            and (clips.fbank_hash is None or rows.hashes[row] == clips.fbank_hash[clip])
        )

    def _group(self, clip: int) -> Future[_Rows]:
        shard, size = int(self.clips.shard_of[clip]), self.clips.row_group_clips
        key = (shard, int(self.clips.row[clip]) // size)
        if key not in self._groups:
            self._groups[key] = self._pool.submit(self._file(shard).read_rows, key[1] * size, (key[1] + 1) * size)
            if len(self._groups) > self.groups_in_memory:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def _file(self, shard: int) -> "_SharedFile":
        if shard not in self._files:
            self._files[shard] = _SharedFile(self.clips.shards[shard], self.clips.num_mel_bins, self.cache)
            if len(self._files) > self.groups_in_memory:
                self._files.popitem(last=False)  # closed with the last read of it
        self._files.move_to_end(shard)
        return self._files[shard]


class _SharedFile:
    """A shard that several threads read. The first one opens it, and a lock admits one reader at a time."""

    def __init__(self, uri: str, num_mel_bins: int, cache: ShardCache | None) -> None:
        self._uri, self._num_mel_bins, self._cache = uri, num_mel_bins, cache
        self._lock = threading.Lock()
        self._shard: _Shard | None = None

    def read_rows(self, begin: int, end: int) -> _Rows:
        """The rows from `begin` on, up to `end` or to the end of the file.

        Raises:
            DataError: the shard is missing or damaged.
            OSError: it cannot be read.
        """
        try:
            with self._lock:
                if self._shard is None:
                    self._shard = _Shard(self._open(), self._num_mel_bins)
                return self._shard.read_rows(begin, end)
        except FileNotFoundError as err:
            raise DataError(f"the shard {self._uri} is missing; restore it, or prepare the data again") from err
        except parquet.DAMAGE:
            return self._read_again(begin, end)

    def _read_again(self, begin: int, end: int) -> _Rows:
        """From where the shard lies, as a whole: storage may have failed for a moment, a kept copy may be damaged."""
        damaged = f"the shard {self._uri} is damaged ({{}}); restore it, or prepare the data again"
        try:
            rows = parquet.parse_from_memory(
                self._uri, lambda source: _Shard(source, self._num_mel_bins).read_rows(begin, end), damaged=damaged
            )
        except OSError as err:
            said = f"reading the shard {self._uri}: {err.strerror or err}"
            raise (OSError(err.errno, said) if err.errno else OSError(said)) from err
        if self._cache is not None and self._cache.forget(self._uri):
            logger.warning(f"the copy of {self._uri} on this node's disk was damaged, and is fetched again")
        with self._lock:
            self._shard = None
        return rows

    def _open(self) -> pa.NativeFile:
        if self._cache is not None:
            return self._cache.open(self._uri)
        fs, path = storage.resolve(self._uri)
        return fs.open_input_file(path)


class _Shard:
    """An open shard, whoever wrote it."""

    def __init__(self, source: pa.NativeFile, num_mel_bins: int) -> None:
        self._source, self._file, self._num_mel_bins = source, parquet.open_checked(source), num_mel_bins
        about = self._file.metadata
        sizes = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
        self._bounds = np.cumsum([0, *sizes])
        """First row of each row group, then the end."""

    @cached_property
    def _columns(self) -> list[list[ColumnChunk]]:
        return column_chunks(self._source)

    def read_rows(self, begin: int, end: int) -> _Rows:
        overlaps = np.minimum(self._bounds[1:], end) > np.maximum(self._bounds[:-1], begin)
        parts = [self._read_group(int(group), begin, end) for group in np.flatnonzero(overlaps)]
        return _Rows(
            begin,
            [clip_id for part in parts for clip_id in part.clip_ids],
            np.concatenate([np.empty(0, np.int64), *(part.hashes for part in parts)]),
            [fbank for part in parts for fbank in part.fbanks],
        )

    def _read_group(self, group: int, begin: int, end: int) -> _Rows:
        """The rows of a row group that are in the range; ValueError if a value is not what it was."""
        facts = self._file.read_row_group(group, columns=FACTS, use_threads=False)
        if any(column.null_count for column in facts.columns):
            raise ValueError("a row without name, frames or hash")
        hashes, num_frames = facts["fbank_hash"].to_numpy(), facts["num_frames"].to_numpy().astype(np.int64)
        values, is_checked = self._values(group)
        if num_frames.min() < 0 or len(values) != self._num_mel_bins * num_frames.sum():
            raise ValueError(f"{len(values)} values of {num_frames.sum()} frames")
        frames, ends = values.reshape(-1, self._num_mel_bins), np.cumsum(num_frames).tolist()
        fbanks = [frames[first:end] for first, end in pairwise([0, *ends])]
        kept = slice(max(begin - int(self._bounds[group]), 0), end - int(self._bounds[group]))
        if not is_checked and [dataset.hash_fbank(fbank) for fbank in fbanks[kept]] != hashes[kept].tolist():
            raise ValueError("the values of a clip are not those of its hash")
        if len(fbanks[kept]) < len(fbanks):  # a view would keep the whole row group in memory
            fbanks = [fbank.copy() for fbank in fbanks[kept]]
        return _Rows(max(begin, int(self._bounds[group])), facts["clip_id"].to_pylist()[kept], hashes[kept], fbanks)

    def _values(self, group: int) -> tuple[np.ndarray, bool]:
        """float16 `[values]` of a row group, and whether checksums show that they are those of its rows."""
        try:
            columns = self._columns[group]
            (fbank,) = [column for column in columns if column.name.startswith("fbank.")]
            return read_values(self._source, fbank), _follow_each_other(columns)
        except UnknownLayoutError:  # some other program wrote it
            column = self._file.read_row_group(group, columns=["fbank"], use_threads=False)["fbank"].combine_chunks()
            return _flat(column), False


def _follow_each_other(columns: Sequence[ColumnChunk]) -> bool:
    """Whether each column of a row group begins where the one before it ends.

    The footer has no checksum. By a wrong place in it, whole pages of other rows could be read, whose checksums hold.
    """
    return [column.begin for column in columns[1:]] == [column.end for column in columns[:-1]]


def _flat(column: pa.Array) -> np.ndarray:
    """float16 `[values]` of lists of lists, of whatever kind of list and width of float."""
    for _ in ("frames", "bins"):
        if not hasattr(column, "flatten") or pa.types.is_struct(column.type):
            raise ValueError(f"an fbank of {column.type}")
        column = column.flatten()
    if not pa.types.is_floating(column.type):
        raise ValueError(f"an fbank of {column.type}")
    with np.errstate(over="ignore"):
        values: np.ndarray = column.to_numpy(zero_copy_only=False).astype(np.float16, copy=False)
    return values
