"""The order of an epoch: which clips, with which mixup partners, in which batches. Pure functions of (seed, epoch).

The order does not depend on the number of ranks. Sample i of an epoch belongs to virtual rank i modulo `VIRTUAL_RANKS`,
and a rank takes every virtual rank whose number equals its own modulo the world size. Each virtual rank reads row
groups of its own. So if the world size divides `VIRTUAL_RANKS`, each row group is read by one rank only; with any other
world size the ranks get the same samples and read more.
"""

from dataclasses import dataclass

import numpy as np

from ast_core.seeds import rng_for

NO_PARTNER = -1

VIRTUAL_RANKS = 24
"""Parts into which the samples of an epoch are divided, whatever the world size. Divisible by 1, 2, 3, 4, 6, 8, 12."""

GROUPS_PER_SHUFFLE_WINDOW = 72
"""Row groups of a shuffle window, over all virtual ranks. Clips are mixed only within a window.

With 16 clips a row group that is 1,152 clips.
"""


@dataclass(frozen=True)
class EpochOrder:
    """The samples of an epoch; every array is `[samples]`, one sample a clip of the data set."""

    clip: np.ndarray
    """Row in the data set."""
    partner: np.ndarray
    """The clip mixed in, or NO_PARTNER."""
    lam: np.ndarray
    """Share of `clip` in the mixture, 1 without a partner."""

    def __len__(self) -> int:
        return len(self.clip)


def epoch_order(
    *,
    seed: int,
    epoch: int,
    num_clips: int,
    weight: np.ndarray | None,
    mixup: float,
    mixup_beta: float,
    row_group: np.ndarray,
) -> EpochOrder:
    """Draw an epoch of `num_clips` samples.

    With `weight`, each sample is drawn with replacement with probability proportional to it, as by the reference
    implementation's `WeightedRandomSampler`. Without, each clip comes once. A share `mixup` of the samples is mixed
    with a partner drawn uniformly (not by weight) over the data set, with λ ~ Beta(mixup_beta, mixup_beta).

    `_partition` then orders the clips, and separately the partners, so that whole row groups can be read.
    """
    clip_rng, partner_rng, lam_rng = (rng_for(purpose, (seed, epoch)) for purpose in ("clips", "partners", "lambda"))
    if weight is None:
        drawn = np.arange(num_clips)
    else:
        drawn = clip_rng.choice(num_clips, size=num_clips, replace=True, p=weight / weight.sum())
    virtual_rank = np.arange(num_clips) % VIRTUAL_RANKS
    clip = _partition(clip_rng, drawn, virtual_rank, row_group)
    mixed = partner_rng.random(num_clips) < mixup
    partner = np.full(num_clips, NO_PARTNER)
    partners = partner_rng.integers(num_clips, size=int(mixed.sum()))
    partner[mixed] = _partition(partner_rng, partners, virtual_rank[mixed], row_group)
    partner[partner == clip] = NO_PARTNER  # a clip mixed with itself is that clip, and adding powers would change it
    lam = np.where(partner != NO_PARTNER, lam_rng.beta(mixup_beta, mixup_beta, num_clips), 1.0)
    return EpochOrder(clip, partner, lam.astype(np.float32))


def _partition(
    rng: np.random.Generator, clips: np.ndarray, virtual_rank: np.ndarray, row_group: np.ndarray
) -> np.ndarray:
    """`clips` `[samples]` in a random order in which virtual rank `virtual_rank[i]` reads position i.

    The clips are sorted by row group, with the row groups in a random order, and cut into one contiguous part for each
    virtual rank. If a cut goes through a row group, two virtual ranks read it. A virtual rank goes through its part in
    shuffle windows: some row groups whose clips are shuffled together. A data set of one window is shuffled perfectly
    and needs no virtual ranks.
    """
    num_groups = int(row_group.max()) + 1
    if num_groups <= GROUPS_PER_SHUFFLE_WINDOW:
        return rng.permutation(clips)
    place = rng.permutation(num_groups)[row_group[clips]]
    by_group = np.lexsort((rng.random(len(clips)), place))
    part_of = np.sort(virtual_rank)  # virtual rank of each clip in this order
    is_new = np.diff(place[by_group], prepend=-1) != 0
    group_of = np.cumsum(is_new)  # number of the row group in this order, counting those that occur
    first_of_part = group_of[np.searchsorted(part_of, part_of)]
    window = (group_of - first_of_part) // (GROUPS_PER_SHUFFLE_WINDOW // VIRTUAL_RANKS)
    ordered = np.empty_like(clips)
    ordered[np.argsort(virtual_rank, kind="stable")] = clips[by_group][
        np.lexsort((rng.random(len(clips)), window, part_of))
    ]
    return ordered


def num_steps(num_samples: int, batch_size: int) -> int:
    """Steps of an epoch. The last batch may be smaller, as in the reference implementation."""
    return -(-num_samples // batch_size)


@dataclass(frozen=True)
class RankShare:
    """One rank's part of a global batch."""

    position: np.ndarray
    """Positions in the global batch, the same number on every rank."""
    weight: np.ndarray
    """1, or 0 for padding: a position that is repeated so that all ranks get the same number."""
    num_clips_global: int


def rank_share(begin: int, end: int, rank: int, world_size: int, fill_to: int = 0) -> RankShare:
    """This rank's share of the global batch of samples `begin` to `end` of an epoch, by virtual ranks.

    A rank that gets fewer samples than others, or than its part of a batch of `fill_to`, repeats clips at weight 0.
    """
    position = np.arange((rank - begin) % world_size, end - begin, world_size)
    per_rank = -(-max(end - begin, fill_to) // world_size)
    weight = np.zeros(per_rank, np.float32)
    weight[: len(position)] = 1
    # Padding repeats the clips that the rank reads anyway, in turns, so that the statistics of batch normalisation are
    # those of all of them. A rank that has none takes the batch's first.
    padding = np.resize(position if len(position) else np.zeros(1, np.int64), per_rank - len(position))
    return RankShare(np.append(position, padding).astype(np.int64), weight, end - begin)


def rank_rows(num_rows: int, rank: int, world_size: int) -> np.ndarray:
    """The rows that a rank evaluates: a contiguous span, so that row groups are read once. No two ranks share a row."""
    bounds = np.linspace(0, num_rows, world_size + 1).round().astype(np.int64)
    return np.arange(bounds[rank], bounds[rank + 1])
