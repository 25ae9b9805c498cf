"""The order of an epoch: which clips, with which mixup partners, in which batches. Pure functions of (seed, epoch).

Nothing here depends on the number of workers: a global batch is drawn once and each rank takes its share of it.
"""

from dataclasses import dataclass

import numpy as np

from ast_core.seeds import rng_for

NO_PARTNER = -1


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
    groups_per_window: int,
) -> EpochOrder:
    """Draw an epoch of `num_clips` samples.

    With `weight`, each sample is drawn with replacement with probability proportional to it, as the original's
    `WeightedRandomSampler`; without, each clip comes once. A share `mixup` of the samples is mixed with a partner drawn
    uniformly (not by weight) over the data set, with λ ~ Beta(mixup_beta, mixup_beta).

    To read row groups and not single clips, each of the two sequences goes through the row groups in a random order
    of its own, in windows of `groups_per_window`, shuffled within the window: a reader holds two windows. A data set
    of one window is shuffled perfectly.
    """
    clip_rng, partner_rng, lam_rng = (rng_for(purpose, (seed, epoch)) for purpose in ("clips", "partners", "lambda"))
    if weight is None:
        drawn = np.arange(num_clips)
    else:
        drawn = clip_rng.choice(num_clips, size=num_clips, replace=True, p=weight / weight.sum())
    clip = _shuffled_in_windows(clip_rng, drawn, row_group, groups_per_window)
    mixed = partner_rng.random(num_clips) < mixup
    partner = np.full(num_clips, NO_PARTNER)
    partners = partner_rng.integers(num_clips, size=int(mixed.sum()))
    partner[mixed] = _shuffled_in_windows(partner_rng, partners, row_group, groups_per_window)
    lam = np.where(mixed, lam_rng.beta(mixup_beta, mixup_beta, num_clips), 1.0)
    return EpochOrder(clip, partner, lam.astype(np.float32))


def _shuffled_in_windows(
    rng: np.random.Generator, clips: np.ndarray, row_group: np.ndarray, groups_per_window: int
) -> np.ndarray:
    window_of_group = rng.permutation(int(row_group.max()) + 1) // groups_per_window
    return clips[np.lexsort((rng.random(len(clips)), window_of_group[row_group[clips]]))]


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


def rank_share(batch_clips: int, rank: int, world_size: int) -> RankShare:
    """Deal a global batch out evenly: where it does not divide, ranks repeat a clip at weight 0."""
    per_rank = -(-batch_clips // world_size)
    position = rank + world_size * np.arange(per_rank)
    real = position < batch_clips
    return RankShare(np.where(real, position, 0), real.astype(np.float32), batch_clips)


def rank_rows(num_rows: int, rank: int, world_size: int) -> np.ndarray:
    """Evaluation: every row on exactly one rank, in contiguous runs so that row groups are read once."""
    bounds = np.linspace(0, num_rows, world_size + 1).round().astype(np.int64)
    return np.arange(bounds[rank], bounds[rank + 1])
