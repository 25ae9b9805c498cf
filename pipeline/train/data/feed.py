"""From shards to batches on the device. It works without Ray, for example in a notebook.

Memory, whatever the size of the data set: training keeps `GROUPS_IN_MEMORY` row groups of 16 clips (1.2 GB of 10 s
clips), all ranks together if the world size divides `VIRTUAL_RANKS`, otherwise each rank. Evaluation reads forward, and
each rank keeps what that needs: 67 row groups (0.3 GB).
"""

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch

from ast_core.augment.augmentation import Drawn, draw_augmentations, partner_share, take
from ast_core.augment.mixup import MIXUP_BETA
from ast_core.batch import Batch, Partners
from ast_core.features import KALDI128, FeatureSettings
from ast_core.models.patchout import Patchout, draw_patchout
from ast_core.models.shapes import patch_grid
from ast_core.recipe import Recipe
from pipeline.dataset import Clips
from pipeline.train.data.fbank_reader import GROUPS_IN_MEMORY, FbankReader
from pipeline.train.data.sampling import (
    NO_PARTNER,
    VIRTUAL_RANKS,
    EpochOrder,
    RankShare,
    epoch_order,
    num_steps,
    rank_rows,
    rank_share,
)
from pipeline.train.data.shard_cache import ShardCache
from pipeline.weights import flatten_labels

PREFETCH_BATCHES = 4
READ_AHEAD_CLIPS = 512
"""Row groups are requested this many clips ahead: a second at 450 clips/s, many times the latency of S3."""

T = TypeVar("T")


def row_groups(clips: Clips) -> np.ndarray:
    """`[clips]`: the number, in the data set, of the row group that contained each clip when the index was written."""
    group = clips.row // clips.row_group_clips
    key = clips.shard_of.astype(np.int64) * (int(group.max()) + 1) + group
    return np.unique(key, return_inverse=True)[1]


def layout(clips: Clips) -> str:
    """A hash of which clips share a row group. The order of an epoch depends on it."""
    return hashlib.sha256(row_groups(clips).astype("<i8").tobytes()).hexdigest()


class Targets:
    """The multi-hot labels of a data set's clips."""

    def __init__(self, clips: Clips, num_classes: int) -> None:
        self.num_classes = num_classes
        self._labels, clip_of_label = flatten_labels(clips.labels)
        self._begin = np.searchsorted(clip_of_label, np.arange(len(clips) + 1))

    def __call__(self, clips: np.ndarray) -> np.ndarray:
        """The targets, float32 `[B, C]`, of clips given by their rows in the data set."""
        target = np.zeros((len(clips), self.num_classes), np.float32)
        for row, clip in zip(target, clips, strict=True):
            row[self._labels[self._begin[clip] : self._begin[clip + 1]]] = 1
        return target


@dataclass(frozen=True)
class TrainBatch:
    """One rank's share of a global batch, with the augmentations drawn for it."""

    step: int
    """Step within the epoch, counted from 0."""
    batch: Batch
    augmentations: Sequence[Drawn]
    patchout: Patchout | None
    num_clips_global: int


@dataclass
class Waits:
    """Seconds that training waited for batches. Divided by the training time they are the data-wait share.

    This is an upper bound of the GPU's idle time: during a wait the GPU may still run steps that were queued before.
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
    features: FeatureSettings = KALDI128
    """Those of the data set."""

    @property
    def steps_per_epoch(self) -> int:
        return num_steps(len(self.clips), self.recipe.batch_size)

    @property
    def groups_in_memory(self) -> int:
        """Row groups that this rank keeps in memory: its part of GROUPS_IN_MEMORY if ranks share no row groups."""
        return GROUPS_IN_MEMORY // (self.world_size if VIRTUAL_RANKS % self.world_size == 0 else 1)

    def order(self, epoch: int) -> EpochOrder:
        """The global order of an epoch, the same on every rank."""
        return epoch_order(
            seed=self.recipe.seed,
            epoch=epoch,
            num_clips=len(self.clips),
            weight=self.clips.weight if self.recipe.sampling == "weighted" else None,
            mixup=partner_share(self.recipe),
            mixup_beta=MIXUP_BETA,
            row_group=row_groups(self.clips),
        )

    def epoch(self, epoch: int, device: torch.device, first_step: int = 0) -> Iterator[TrainBatch]:
        """The batches of an epoch (counted from 1) from `first_step` on. A thread reads ahead."""
        # These arrays are as long as the data set. They are created here and not in the thread, which is a new one in
        # each epoch: glibc gives each thread its own heap, and each of these heaps would keep room for the arrays.
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
                drawn = draw_augmentations(recipe, (recipe.seed, epoch, step), share.num_clips_global)
                patchout = None
                if recipe.patchout_f or recipe.patchout_t:
                    patchout = draw_patchout(
                        (recipe.seed, epoch, step),
                        patch_grid(recipe.input_fdim, recipe.input_tdim, recipe.fstride, recipe.tstride),
                        num_rows=recipe.patchout_f,
                        num_columns=recipe.patchout_t,
                    )
                batch = self._batch(
                    reader, targets, order.clip[samples], order.partner[samples], order.lam[samples], share.weight
                )
                batch = batch.pinned() if pinned else batch
                yield TrainBatch(step, batch, take(drawn, share.position), patchout, share.num_clips_global)

    def _share(self, step: int, num_samples: int) -> tuple[np.ndarray, RankShare]:
        """This rank's part of a step: indices of its samples in the epoch, and their positions in the global batch."""
        begin = step * self.recipe.batch_size
        end = min(begin + self.recipe.batch_size, num_samples)
        # A smaller last batch would be compiled again.
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
        return Batch(fbank, frames, torch.from_numpy(target), torch.from_numpy(weight), partners, self.features)


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
    """This rank's rows of an evaluation split (`rank_rows`), in order, each exactly once."""
    rows, targets = rank_rows(len(clips), rank, world_size), Targets(clips, num_classes)
    pieces = [rows[begin : begin + batch_size] for begin in range(0, len(rows), batch_size)]
    ahead = -(-READ_AHEAD_CLIPS // batch_size)
    # From its prefetching to its reading a row group must outlast those of `ahead` batches before it and after it.
    num_groups = min(_most_groups(clips, rows, (2 * ahead + 1) * batch_size), GROUPS_IN_MEMORY)

    def made() -> Iterator[Batch]:
        with FbankReader(clips, num_groups, cache) as reader:
            for some, upcoming in _with_upcoming(pieces, ahead):
                for later in upcoming:
                    reader.prefetch(later)
                fbank, frames = reader.padded(some, recipe.input_tdim)
                batch = Batch(fbank, frames, torch.from_numpy(targets(some)), torch.ones(len(some)))
                yield batch.pinned() if device.type == "cuda" else batch

    for batch in _read_ahead(made, Waits()):
        yield batch.to(device)


def _most_groups(clips: Clips, rows: np.ndarray, num_rows: int) -> int:
    """The largest number of row groups that `num_rows` consecutive ones of `rows` have clips in.

    An index is in the order of the shards, so that a row group ends where the next one begins.
    """
    group = row_groups(clips)[rows]
    number = np.cumsum(np.diff(group, prepend=-1) != 0)  # counts the row groups in the order of reading
    last = np.minimum(np.arange(len(rows)) + num_rows, len(rows)) - 1
    return int((number[last] - number).max(initial=0)) + 1


def _with_upcoming(items: Sequence[T], ahead: int) -> Iterator[tuple[T, Sequence[T]]]:
    """Each item, with the items that are now at most `ahead` after it and were not returned with an earlier item."""
    seen = 0
    for i, item in enumerate(items):
        yield item, items[seen : i + 1 + ahead]
        seen = i + 1 + ahead


def _read_ahead(make: Callable[[], Iterator[T]], waits: Waits) -> Iterator[T]:
    """The items of `make()`, which runs in a thread at most PREFETCH_BATCHES ahead. Its exceptions are raised here."""
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
