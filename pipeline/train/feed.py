"""Shards → batches on the device. Runs without Ray: on a bare GPU machine, in a notebook.

Working set: `GROUPS_IN_MEMORY` row groups of 16 clips (0.5 GB of 10 s clips), whatever the size of the data set.
"""

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ast_core import augment
from ast_core.augment import Augmentation
from ast_core.recipe import Recipe
from ast_core.step import Batch
from pipeline import storage
from pipeline.dataset import ROW_GROUP_CLIPS, Clips
from pipeline.train.sampling import NO_PARTNER, EpochOrder, epoch_order, num_steps, rank_rows, rank_share
from pipeline.weights import flatten_labels

GROUPS_PER_WINDOW = 64
GROUPS_IN_MEMORY = 2 * GROUPS_PER_WINDOW  # one window of clips, one of mixup partners
PREFETCH_BATCHES = 4
T = TypeVar("T")


class FbankReader:
    """Random access to the fbanks of a data set, by row group, the most recently used ones kept."""

    def __init__(self, clips: Clips, groups_in_memory: int = GROUPS_IN_MEMORY) -> None:
        self.clips = clips
        self.groups_in_memory = groups_in_memory
        self._files: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], list[np.ndarray]] = OrderedDict()

    def __getitem__(self, clip: int) -> np.ndarray:
        """float16 `[frames, mel bins]` of one clip, a view that is not to be written to."""
        shard, row = int(self.clips.shard_of[clip]), int(self.clips.row[clip])
        key = (shard, row // ROW_GROUP_CLIPS)
        if key not in self._groups:
            self._groups[key] = _read_group(self._file(shard), key[1])
            if len(self._groups) > self.groups_in_memory:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key][row % ROW_GROUP_CLIPS]

    def padded(self, clips: np.ndarray, num_frames: int) -> tuple[Tensor, Tensor]:
        """float16 `[B, num_frames, mel bins]`, cut or padded with 0, and the frames that each clip has of them."""
        fbanks = [self[int(clip)][:num_frames] for clip in clips]
        batch = torch.zeros(len(fbanks), num_frames, fbanks[0].shape[1], dtype=torch.float16)
        for padded, clip in zip(batch, fbanks, strict=True):
            padded[: len(clip)] = torch.from_numpy(clip)
        return batch, torch.tensor([len(clip) for clip in fbanks])

    def _file(self, shard: int) -> pq.ParquetFile:
        if shard not in self._files:
            fs, path = storage.resolve(self.clips.shards[shard])
            self._files[shard] = pq.ParquetFile(fs.open_input_file(path), pre_buffer=True)
            if len(self._files) > self.groups_in_memory:
                self._files.popitem(last=False)[1].close(force=True)
        self._files.move_to_end(shard)
        return self._files[shard]


def _read_group(file: pq.ParquetFile, group: int) -> list[np.ndarray]:
    column = file.read_row_group(group, columns=["fbank"], use_threads=False)["fbank"].combine_chunks()
    frames = column.flatten()
    values = frames.flatten().to_numpy().reshape(len(frames), -1).copy()  # its own memory: the file's buffers go
    bounds = np.cumsum(column.value_lengths().to_numpy())[:-1]
    return np.split(values, bounds)


def row_groups(clips: Clips) -> np.ndarray:
    """`[clips]`: a number for the row group that each clip lies in, counted over the data set."""
    group = clips.row // ROW_GROUP_CLIPS
    key = clips.shard_of.astype(np.int64) * (int(group.max()) + 1) + group
    return np.unique(key, return_inverse=True)[1]


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

    batch: Batch
    augmentation: Augmentation
    num_clips_global: int


@dataclass
class Waits:
    """Seconds that the consumer waited for batches."""

    wait_s: float = 0.0


@dataclass(frozen=True)
class TrainFeed:
    """The training batches of one rank."""

    clips: Clips
    recipe: Recipe
    num_classes: int
    rank: int = 0
    world_size: int = 1
    waits: Waits = field(default_factory=Waits)

    @property
    def steps_per_epoch(self) -> int:
        return num_steps(len(self.clips), self.recipe.batch_size)

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
            groups_per_window=GROUPS_PER_WINDOW,
        )

    def epoch(self, epoch: int, device: torch.device) -> Iterator[TrainBatch]:
        """All batches of an epoch, counted from 1; read ahead by a thread."""
        reader, targets = FbankReader(self.clips), Targets(self.clips, self.num_classes)
        for made in _read_ahead(lambda: self._batches(epoch, reader, targets), self.waits):
            yield TrainBatch(made.batch.to(device), made.augmentation, made.num_clips_global)

    def _batches(self, epoch: int, reader: FbankReader, targets: Targets) -> Iterator[TrainBatch]:
        recipe, order = self.recipe, self.order(epoch)
        for step, begin in enumerate(range(0, len(order), recipe.batch_size)):
            samples = np.arange(begin, min(begin + recipe.batch_size, len(order)))
            drawn = augment.draw(
                (recipe.seed, epoch, step),
                len(samples),
                num_frames=recipe.input_tdim,
                num_mel_bins=recipe.input_fdim,
                freqm=recipe.freqm,
                timem=recipe.timem,
                noise=recipe.noise,
            )
            share = rank_share(len(samples), self.rank, self.world_size)
            mine = samples[share.position]
            batch = self._batch(reader, targets, order.clip[mine], order.partner[mine], order.lam[mine], share.weight)
            yield TrainBatch(batch, drawn.take(share.position), share.num_clips_global)

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
        target = targets(clip)
        if not (partner != NO_PARTNER).any():
            return Batch(fbank, frames, torch.from_numpy(target), torch.from_numpy(weight))
        # An unmixed clip of a batch with mixed ones is its own partner at λ = 1, which changes nothing.
        partner = np.where(partner == NO_PARTNER, clip, partner)
        partner_fbank, partner_frames = reader.padded(partner, num_frames)
        target = lam[:, None] * target + (1 - lam[:, None]) * targets(partner)
        return Batch(
            fbank,
            frames,
            torch.from_numpy(target),
            torch.from_numpy(weight),
            partner_fbank,
            partner_frames,
            torch.from_numpy(lam),
        )


def eval_batches(
    clips: Clips, recipe: Recipe, num_classes: int, *, rank: int, world_size: int, batch_size: int, device: torch.device
) -> Iterator[Batch]:
    """This rank's run of rows of an evaluation split (`rank_rows`), in order, each exactly once."""
    rows = rank_rows(len(clips), rank, world_size)
    reader, targets = FbankReader(clips), Targets(clips, num_classes)

    def made() -> Iterator[Batch]:
        for begin in range(0, len(rows), batch_size):
            some = rows[begin : begin + batch_size]
            fbank, frames = reader.padded(some, recipe.input_tdim)
            yield Batch(fbank, frames, torch.from_numpy(targets(some)), torch.ones(len(some)))

    for batch in _read_ahead(made, Waits()):
        yield batch.to(device)


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
