"""Shards → batches on the device. Runs without Ray: on a bare GPU machine, in a notebook.

Working set: `GROUPS_IN_MEMORY` row groups of 16 clips (1.2 GB of 10 s clips) on one rank, and as much over all ranks
whose number divides `LANES`, whatever the size of the data set.
"""

import hashlib
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ast_core import augment
from ast_core.augment import Augmentation, Patchout
from ast_core.errors import DataError
from ast_core.frames import NUM_MEL_BINS
from ast_core.model import patch_grid
from ast_core.recipe import Recipe
from ast_core.step import Batch, Partners
from pipeline import storage
from pipeline.dataset import ROW_GROUP_CLIPS, Clips
from pipeline.train.pages import UnknownLayoutError, read_values
from pipeline.train.sampling import (
    GROUPS_PER_WINDOW,
    LANES,
    NO_PARTNER,
    EpochOrder,
    RankShare,
    epoch_order,
    num_steps,
    rank_rows,
    rank_share,
)
from pipeline.train.shard_cache import ShardCache
from pipeline.weights import flatten_labels

GROUPS_IN_MEMORY = 4 * GROUPS_PER_WINDOW
"""The window under way and the next one, read ahead, of clips and of mixup partners: lanes cross windows together."""

PREFETCH_BATCHES = 4
READ_AHEAD_CLIPS = 512
"""So far ahead of their use row groups are asked for: at 450 clips/s a second before, many times what S3 takes."""

READ_THREADS = 8
"""They mostly wait for storage."""

T = TypeVar("T")


class FbankReader:
    """Random access to the fbanks of a data set, by row group, the most recently used ones kept.

    `prefetch` starts reads; reading what was prefetched waits for them to end.
    """

    def __init__(self, clips: Clips, groups_in_memory: int = GROUPS_IN_MEMORY, cache: ShardCache | None = None) -> None:
        self.clips, self.groups_in_memory, self.cache = clips, groups_in_memory, cache
        self._files: OrderedDict[int, _SharedFile] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], Future[list[np.ndarray]]] = OrderedDict()
        self._pool = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="feed-read")

    def __enter__(self) -> "FbankReader":
        return self

    def __exit__(self, *ending: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __getitem__(self, clip: int) -> np.ndarray:
        """float16 `[frames, mel bins]` of one clip, a view that is not to be written to."""
        return self._group(clip).result()[int(self.clips.row[clip]) % ROW_GROUP_CLIPS]

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

    def _group(self, clip: int) -> Future[list[np.ndarray]]:
        shard, row = int(self.clips.shard_of[clip]), int(self.clips.row[clip])
        key = (shard, row // ROW_GROUP_CLIPS)
        if key not in self._groups:
            self._groups[key] = self._pool.submit(self._file(shard).read_group, key[1])
            if len(self._groups) > self.groups_in_memory:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def _file(self, shard: int) -> "_SharedFile":
        if shard not in self._files:
            self._files[shard] = _SharedFile(self.clips.shards[shard], self.cache)
            if len(self._files) > self.groups_in_memory:
                self._files.popitem(last=False)  # closed with the last read of it
        self._files.move_to_end(shard)
        return self._files[shard]


class _SharedFile:
    """A shard that several threads read, opened by the first; a Parquet reader takes one at a time."""

    def __init__(self, uri: str, cache: ShardCache | None) -> None:
        self._uri, self._cache = uri, cache
        self._lock = threading.Lock()
        self._file: pq.ParquetFile | None = None
        self._source: pa.NativeFile

    def read_group(self, group: int) -> list[np.ndarray]:
        """float16 `[frames, mel bins]` of each clip of a row group.

        Raises:
            DataError: the shard is missing or damaged.
            OSError: it cannot be read, now or at all; Arrow also says so of a damaged one.
        """
        try:
            with self._lock:
                if self._file is None:
                    self._source = self._open()
                    self._file = pq.ParquetFile(self._source)
                num_frames = self._file.read_row_group(group, columns=["num_frames"], use_threads=False)["num_frames"]
                values = self._values(self._file, group)
            frames = values.reshape(-1, NUM_MEL_BINS)
            return np.split(frames, np.cumsum(num_frames.to_numpy())[:-1])
        except FileNotFoundError as err:
            raise DataError(f"the shard {self._uri} is missing; restore it, or prepare the data anew") from err
        except (ValueError, LookupError) as err:  # Arrow's errors are among them
            raise DataError(f"the shard {self._uri} is damaged ({err}); restore it, or prepare the data anew") from err
        except OSError as err:
            said = f"reading the shard {self._uri}: {err.strerror or err}"
            raise (OSError(err.errno, said) if err.errno else OSError(said)) from err

    def _values(self, file: pq.ParquetFile, group: int) -> np.ndarray:
        # Not by `file.schema`: it and the file's metadata hold each other until the garbage collector comes by.
        about = file.metadata.row_group(group)
        columns = map(about.column, range(about.num_columns))
        (fbank,) = [column for column in columns if column.path_in_schema.startswith("fbank.")]
        try:
            return read_values(self._source, fbank)
        except UnknownLayoutError:  # some other program wrote it
            column = file.read_row_group(group, columns=["fbank"], use_threads=False)["fbank"]
            return column.combine_chunks().flatten().flatten().to_numpy()

    def _open(self) -> pa.NativeFile:
        if self._cache is not None:
            return self._cache.open(self._uri)
        fs, path = storage.resolve(self._uri)
        return fs.open_input_file(path)


def row_groups(clips: Clips) -> np.ndarray:
    """`[clips]`: a number for the row group that each clip lies in, counted over the data set."""
    group = clips.row // ROW_GROUP_CLIPS
    key = clips.shard_of.astype(np.int64) * (int(group.max()) + 1) + group
    return np.unique(key, return_inverse=True)[1]


def layout(clips: Clips) -> str:
    """A hash of which clips lie together: where it differs, so does the order of an epoch."""
    return hashlib.sha256(row_groups(clips).astype("<i8").tobytes()).hexdigest()


class Targets:
    """Multi-hot labels of the data set's clips."""

    def __init__(self, clips: Clips, num_classes: int) -> None:
        self.num_classes = num_classes
        self._labels, clip_of_label = flatten_labels(clips.labels)
        self._begin = np.searchsorted(clip_of_label, np.arange(len(clips) + 1))

    def __call__(self, clips: np.ndarray) -> np.ndarray:
        """float32 `[B, C]` for rows of the data set."""
        target = np.zeros((len(clips), self.num_classes), np.float32)
        for row, clip in zip(target, clips, strict=True):
            row[self._labels[self._begin[clip] : self._begin[clip + 1]]] = 1
        return target


@dataclass(frozen=True)
class TrainBatch:
    """One rank's share of a global batch, with the augmentation drawn for it."""

    step: int
    """Within the epoch, counted from 0."""
    batch: Batch
    augmentation: Augmentation
    patchout: Patchout | None
    num_clips_global: int


@dataclass
class Waits:
    """Seconds that the consumer waited for batches; of the time that training took, they are the data-wait share.

    A GPU stood idle for them no longer than that: it may have been at work on steps that it was asked for before.
    """

    wait_s: float = 0.0


@dataclass(frozen=True)
class TrainFeed:
    """The training batches of one rank."""

    clips: Clips
    recipe: Recipe
    num_classes: int
    rank: int = 0
    world_size: int = 1
    cache: ShardCache | None = None
    waits: Waits = field(default_factory=Waits)

    @property
    def steps_per_epoch(self) -> int:
        return num_steps(len(self.clips), self.recipe.batch_size)

    @property
    def groups_in_memory(self) -> int:
        """Each rank's part of them where it reads lanes of its own."""
        return GROUPS_IN_MEMORY // (self.world_size if LANES % self.world_size == 0 else 1)

    def order(self, epoch: int) -> EpochOrder:
        """The global order of an epoch, the same on every rank."""
        return epoch_order(
            seed=self.recipe.seed,
            epoch=epoch,
            num_clips=len(self.clips),
            weight=self.clips.weight if self.recipe.sampling == "weighted" else None,
            mixup=self.recipe.mixup,
            mixup_beta=augment.MIXUP_BETA,
            row_group=row_groups(self.clips),
        )

    def epoch(self, epoch: int, device: torch.device, first_step: int = 0) -> Iterator[TrainBatch]:
        """The batches of an epoch, counted from 1, from a step on; read ahead by a thread."""
        # These arrays, which alone are as long as the data set, are made here and not in the thread, a new one each
        # epoch: glibc gives threads memory apart, of which one after the other would keep room for all of them.
        began_s = time.perf_counter()
        order, targets = self.order(epoch), Targets(self.clips, self.num_classes)
        self.waits.wait_s += time.perf_counter() - began_s
        for made in _read_ahead(
            lambda: self._batches(epoch, order, targets, first_step, device.type == "cuda"), self.waits
        ):
            yield replace(made, batch=made.batch.to(device))

    def _batches(
        self, epoch: int, order: EpochOrder, targets: Targets, first_step: int, pinned: bool
    ) -> Iterator[TrainBatch]:
        recipe = self.recipe
        steps = range(first_step, self.steps_per_epoch)
        ahead = -(-READ_AHEAD_CLIPS // recipe.batch_size)
        with FbankReader(self.clips, self.groups_in_memory, self.cache) as reader:
            for step, upcoming in _with_upcoming(steps, ahead):
                for later in upcoming:
                    samples, _ = self._share(later, len(order))
                    partner = order.partner[samples]
                    reader.prefetch(np.concatenate([order.clip[samples], partner[partner != NO_PARTNER]]))
                samples, share = self._share(step, len(order))
                drawn = augment.draw(
                    (recipe.seed, epoch, step),
                    share.num_clips_global,
                    num_frames=recipe.input_tdim,
                    num_mel_bins=recipe.input_fdim,
                    freqm=recipe.freqm,
                    timem=recipe.timem,
                    noise=recipe.noise,
                )
                patchout = augment.draw_patchout(
                    (recipe.seed, epoch, step),
                    patch_grid(recipe.input_fdim, recipe.input_tdim, recipe.fstride, recipe.tstride),
                    num_rows=recipe.patchout_f,
                    num_columns=recipe.patchout_t,
                )
                batch = self._batch(
                    reader, targets, order.clip[samples], order.partner[samples], order.lam[samples], share.weight
                )
                batch = batch.pinned() if pinned else batch
                yield TrainBatch(step, batch, drawn.take(share.position), patchout, share.num_clips_global)

    def _share(self, step: int, num_samples: int) -> tuple[np.ndarray, RankShare]:
        """The samples of the epoch that this rank takes at a step, and their place in the global batch."""
        begin = step * self.recipe.batch_size
        end = min(begin + self.recipe.batch_size, num_samples)
        # A smaller last batch would be compiled for anew.
        fill_to = self.recipe.batch_size if self.recipe.compile else 0
        share = rank_share(begin, end, self.rank, self.world_size, fill_to)
        return begin + share.position, share

    def _batch(
        self,
        reader: FbankReader,
        targets: Targets,
        clip: np.ndarray,
        partner: np.ndarray,
        lam: np.ndarray,
        weight: np.ndarray,
    ) -> Batch:
        num_frames = self.recipe.input_tdim
        fbank, frames = reader.padded(clip, num_frames)
        target, partners = targets(clip), None
        mixed = np.flatnonzero(partner != NO_PARTNER)
        if len(mixed):
            partner, lam = partner[mixed], lam[mixed]
            target[mixed] = lam[:, None] * target[mixed] + (1 - lam[:, None]) * targets(partner)
            partners = Partners(mixed, *reader.padded(partner, num_frames), torch.from_numpy(lam))
        return Batch(fbank, frames, torch.from_numpy(target), torch.from_numpy(weight), partners)


def eval_batches(
    clips: Clips,
    recipe: Recipe,
    num_classes: int,
    *,
    rank: int,
    world_size: int,
    batch_size: int,
    device: torch.device,
    cache: ShardCache | None = None,
) -> Iterator[Batch]:
    """This rank's run of rows of an evaluation split (`rank_rows`), in order, each exactly once."""
    rows, targets = rank_rows(len(clips), rank, world_size), Targets(clips, num_classes)
    pieces = [rows[begin : begin + batch_size] for begin in range(0, len(rows), batch_size)]

    def made() -> Iterator[Batch]:
        with FbankReader(clips, cache=cache) as reader:
            for some, upcoming in _with_upcoming(pieces, -(-READ_AHEAD_CLIPS // batch_size)):
                for later in upcoming:
                    reader.prefetch(later)
                fbank, frames = reader.padded(some, recipe.input_tdim)
                batch = Batch(fbank, frames, torch.from_numpy(targets(some)), torch.ones(len(some)))
                yield batch.pinned() if device.type == "cuda" else batch

    for batch in _read_ahead(made, Waits()):
        yield batch.to(device)


def _with_upcoming(items: Sequence[T], ahead: int) -> Iterator[tuple[T, Sequence[T]]]:
    """Each item with those that have come within `ahead` of it, each once over the whole."""
    seen = 0
    for i, item in enumerate(items):
        yield item, items[seen : i + 1 + ahead]
        seen = i + 1 + ahead


def _read_ahead(make: Callable[[], Iterator[T]], waits: Waits) -> Iterator[T]:
    """Run `make()` in a thread, at most PREFETCH_BATCHES ahead; its exceptions are raised here."""
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(PREFETCH_BATCHES)
    abandoned = threading.Event()

    def put(item: tuple[T | None, BaseException | None]) -> None:
        while not abandoned.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def run() -> None:
        try:
            for item in make():
                put((item, None))
                if abandoned.is_set():
                    return
            put((None, None))
        except BaseException as err:
            put((None, err))

    thread = threading.Thread(target=run, name="feed", daemon=True)
    thread.start()
    try:
        while True:
            began_s = time.perf_counter()
            item, err = ready.get()
            waits.wait_s += time.perf_counter() - began_s
            if err is not None:
                raise err
            if item is None:
                return
            yield item
    finally:
        abandoned.set()
        thread.join()
