"""The order of an epoch: which clips, with which mixup partners, in which batches. Pure functions of (seed, epoch).

Nothing here depends on the number of workers: the samples of an epoch are dealt to `LANES` lanes in turns, and a rank
takes every lane whose number is its own modulo the world size. Each lane goes through row groups of its own, so that
ranks whose number divides `LANES` read each row group once among them; any other number of ranks gets the same samples
and reads more.
"""

from dataclasses import dataclass

import numpy as np

from ast_core.seeds import rng_for

NO_PARTNER = -1

LANES = 24
"""Divides by 1, 2, 3, 4, 6, 8, 12 and 24 ranks."""

GROUPS_PER_WINDOW = 72
"""Row groups that the samples at any place of the order are drawn from, over all lanes: 1,152 clips of 16 a group."""


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

    With `weight`, each sample is drawn with replacement with probability proportional to it, as the original's
    `WeightedRandomSampler`; without, each clip comes once. A share `mixup` of the samples is mixed with a partner drawn
    uniformly (not by weight) over the data set, with λ ~ Beta(mixup_beta, mixup_beta).

    To read row groups and not single clips, each of the two sequences is `_dealt` to the lanes by row group.
    """
    clip_rng, partner_rng, lam_rng = (rng_for(purpose, (seed, epoch)) for purpose in ("clips", "partners", "lambda"))
    if weight is None:
        drawn = np.arange(num_clips)
    else:
        drawn = clip_rng.choice(num_clips, size=num_clips, replace=True, p=weight / weight.sum())
    lane = np.arange(num_clips) % LANES
    clip = _dealt(clip_rng, drawn, lane, row_group)
    mixed = partner_rng.random(num_clips) < mixup
    partner = np.full(num_clips, NO_PARTNER)
    partners = partner_rng.integers(num_clips, size=int(mixed.sum()))
    partner[mixed] = _dealt(partner_rng, partners, lane[mixed], row_group)
    lam = np.where(mixed, lam_rng.beta(mixup_beta, mixup_beta, num_clips), 1.0)
    return EpochOrder(clip, partner, lam.astype(np.float32))


def _dealt(rng: np.random.Generator, clips: np.ndarray, lane: np.ndarray, row_group: np.ndarray) -> np.ndarray:
    """`clips` `[samples]` in a random order whose position i is read by lane `lane[i]`.

    The clips, lined up by row groups in a random order, are cut into one run a lane; where a cut goes through a row
    group, two lanes read it. A lane goes through its run in windows of row groups, shuffled within the window. A data
    set of one window needs no lanes and is shuffled perfectly.
    """
    num_groups = int(row_group.max()) + 1
    if num_groups <= GROUPS_PER_WINDOW:
        return rng.permutation(clips)
    place = rng.permutation(num_groups)[row_group[clips]]
    in_line = np.lexsort((rng.random(len(clips)), place))
    lane_of = np.sort(lane)  # of each clip in line
    is_new = np.diff(place[in_line], prepend=-1) != 0
    group_of = np.cumsum(is_new)  # row groups counted along the line, of those that occur
    first_of_lane = group_of[np.searchsorted(lane_of, lane_of)]
    window = (group_of - first_of_lane) // (GROUPS_PER_WINDOW // LANES)
    dealt = np.empty_like(clips)
    dealt[np.argsort(lane, kind="stable")] = clips[in_line][np.lexsort((rng.random(len(clips)), window, lane_of))]
    return dealt


def num_steps(num_samples: int, batch_size: int) -> int:
    """The last batch may be smaller, as the original's."""
    return -(-num_samples // batch_size)


@dataclass(frozen=True)
class RankShare:
    """One rank's part of a global batch."""

    position: np.ndarray
    """Positions in the global batch, the same number on every rank."""
    weight: np.ndarray
    """1, or 0 where a position is only repeated to fill up."""
    num_clips_global: int


def rank_share(begin: int, end: int, rank: int, world_size: int, fill_to: int = 0) -> RankShare:
    """Deal out samples `begin` to `end` of an epoch by lanes. Where ranks get fewer than others, or than their part of
    a batch of `fill_to`, they repeat a clip at weight 0.
    """
    position = np.arange((rank - begin) % world_size, end - begin, world_size)
    per_rank = -(-max(end - begin, fill_to) // world_size)
    weight = np.zeros(per_rank, np.float32)
    weight[: len(position)] = 1
    # A filler is a clip that the rank reads anyway; a rank that has none takes the batch's first.
    filler = position[-1] if len(position) else 0
    return RankShare(np.append(position, [filler] * (per_rank - len(position))).astype(np.int64), weight, end - begin)


def rank_rows(num_rows: int, rank: int, world_size: int) -> np.ndarray:
    """Evaluation: every row on exactly one rank, in contiguous runs so that row groups are read once."""
    bounds = np.linspace(0, num_rows, world_size + 1).round().astype(np.int64)
    return np.arange(bounds[rank], bounds[rank + 1])
