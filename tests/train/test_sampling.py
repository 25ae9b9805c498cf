"""The order of an epoch: the right distribution, whatever the number of workers."""

import numpy as np
import pytest
from scipy import stats

from pipeline.train.sampling import NO_PARTNER, EpochOrder, epoch_order, num_steps, rank_rows, rank_share

NUM_CLIPS = 500
GROUPS = np.arange(NUM_CLIPS) // 16  # 32 row groups


def order(epoch: int = 1, **changes: object) -> EpochOrder:
    usual = {"seed": 7, "num_clips": NUM_CLIPS, "weight": None, "mixup": 0.0, "mixup_beta": 10.0, "row_group": GROUPS}
    return epoch_order(**{**usual, "epoch": epoch, "groups_per_window": 8, **changes})


def test_an_epoch_is_a_function_of_seed_and_epoch_alone():
    first, again = order(weight=np.arange(1.0, 501), mixup=0.5), order(weight=np.arange(1.0, 501), mixup=0.5)
    for name in ("clip", "partner", "lam"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert (first.clip != order(epoch=2, weight=np.arange(1.0, 501)).clip).any()
    assert (first.clip != order(seed=8, weight=np.arange(1.0, 501)).clip).any()


def test_uniform_sampling_takes_each_clip_once_in_another_order_each_epoch():
    epochs = [order(epoch).clip for epoch in range(1, 4)]
    for clip in epochs:
        np.testing.assert_array_equal(np.sort(clip), np.arange(NUM_CLIPS))
    assert (epochs[0] != epochs[1]).mean() > 0.9


def test_weighted_sampling_draws_in_proportion_to_the_weights():
    """Chi-square over 40 epochs of skewed weights; wrongly refused once in a thousand seeds."""
    weight = np.random.default_rng(0).pareto(1.5, NUM_CLIPS) + 0.1
    drawn = np.bincount(np.concatenate([order(e, weight=weight).clip for e in range(40)]), minlength=NUM_CLIPS)
    assert stats.chisquare(drawn, weight / weight.sum() * drawn.sum()).pvalue > 1e-3


def test_partners_are_uniform_over_the_data_set_though_clips_are_drawn_by_weight():
    """Chi-square over 60 epochs, under weights that differ by row group; wrongly refused once in a thousand seeds."""
    orders = [order(e, weight=np.linspace(0.1, 10, NUM_CLIPS), mixup=1.0) for e in range(60)]
    partners = np.bincount(np.concatenate([o.partner for o in orders]), minlength=NUM_CLIPS)
    assert stats.chisquare(partners).pvalue > 1e-3


def test_the_share_that_is_mixed_and_its_lambda_are_the_recipes():
    orders = [order(e, mixup=0.3) for e in range(20)]
    mixed = np.concatenate([o.partner != NO_PARTNER for o in orders])
    lam = np.concatenate([o.lam for o in orders])
    assert stats.binomtest(int(mixed.sum()), len(mixed), 0.3).pvalue > 1e-3
    assert (lam[~mixed] == 1).all()
    assert stats.kstest(lam[mixed], stats.beta(10, 10).cdf).pvalue > 1e-3


def test_clips_and_partners_each_stay_within_a_window_of_row_groups():
    sampled = order(mixup=1.0)
    for sequence in (GROUPS[sampled.clip], GROUPS[sampled.partner]):
        assert (np.diff(sequence) != 0).mean() > 0.8  # shuffled, not read group by group
        # Four windows of eight groups; runs of a group's samples do not reach beyond its window.
        lifetimes = [np.ptp(np.flatnonzero(sequence == group)) for group in range(32)]
        assert max(lifetimes) < 0.3 * NUM_CLIPS


def test_one_window_is_a_perfect_shuffle():
    """The rank correlation of a clip's place in the data set and in the order vanishes."""
    places = np.concatenate([order(e, groups_per_window=32).clip for e in range(20)])
    assert abs(stats.spearmanr(places, np.tile(np.arange(NUM_CLIPS), 20)).statistic) < 0.04


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("batch_clips", [1, 12, 13])
def test_ranks_share_a_batch_evenly_and_no_clip_counts_twice(batch_clips: int, world_size: int):
    shares = [rank_share(batch_clips, rank, world_size) for rank in range(world_size)]
    assert len({len(share.position) for share in shares}) == 1
    counted = np.concatenate([share.position[share.weight == 1] for share in shares])
    np.testing.assert_array_equal(np.sort(counted), np.arange(batch_clips))
    assert all((share.position < batch_clips).all() for share in shares)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("num_rows", [1, 5, 64, 101])
def test_every_evaluation_row_lies_on_exactly_one_rank_in_order(num_rows: int, world_size: int):
    rows = np.concatenate([rank_rows(num_rows, rank, world_size) for rank in range(world_size)])
    np.testing.assert_array_equal(rows, np.arange(num_rows))


def test_the_last_batch_of_an_epoch_is_a_step_though_it_is_smaller():
    assert [num_steps(n, 48) for n in (1, 48, 49, 1600)] == [1, 1, 2, 34]
