"""The order of an epoch: the right distribution, whatever the number of workers."""

import numpy as np
import pytest
from scipy import stats

from pipeline.train.data.sampling import (
    GROUPS_PER_WINDOW,
    LANES,
    NO_PARTNER,
    EpochOrder,
    epoch_order,
    num_steps,
    rank_rows,
    rank_share,
)

NUM_CLIPS = 5000
GROUPS = np.arange(NUM_CLIPS) // 16  # 313 row groups, some four windows
SKEWED = np.random.default_rng(0).pareto(1.5, NUM_CLIPS) + 0.1


def order(epoch: int = 1, **changes: object) -> EpochOrder:
    usual = {"seed": 7, "num_clips": NUM_CLIPS, "weight": None, "mixup": 0.0, "mixup_beta": 10.0, "row_group": GROUPS}
    return epoch_order(**{**usual, "epoch": epoch, **changes})


def test_an_epoch_is_a_function_of_seed_and_epoch_alone():
    first, again = order(weight=SKEWED, mixup=0.5), order(weight=SKEWED, mixup=0.5)
    for name in ("clip", "partner", "lam"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert (first.clip != order(epoch=2, weight=SKEWED).clip).any()
    assert (first.clip != order(seed=8, weight=SKEWED).clip).any()


def test_uniform_sampling_takes_each_clip_once_in_another_order_each_epoch():
    epochs = [order(epoch).clip for epoch in range(1, 4)]
    for clip in epochs:
        np.testing.assert_array_equal(np.sort(clip), np.arange(NUM_CLIPS))
    assert (epochs[0] != epochs[1]).mean() > 0.9


def test_weighted_sampling_draws_in_proportion_to_the_weights():
    """Chi-square over 50 epochs of skewed weights; wrongly refused once in a thousand seeds."""
    drawn = np.bincount(np.concatenate([order(e, weight=SKEWED).clip for e in range(50)]), minlength=NUM_CLIPS)
    assert stats.chisquare(drawn, SKEWED / SKEWED.sum() * drawn.sum()).pvalue > 1e-3


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


@pytest.mark.parametrize("weight", [None, SKEWED])
def test_each_lane_reads_row_groups_of_its_own_a_few_at_a_time(weight: np.ndarray | None):
    sampled = order(mixup=0.5, weight=weight)
    mixed = sampled.partner != NO_PARTNER
    lane = np.arange(NUM_CLIPS) % LANES
    for clip, of in ((sampled.clip, lane), (sampled.partner[mixed], lane[mixed])):
        by_lane = [GROUPS[clip[of == i]] for i in range(LANES)]
        # Cut into as many runs as there are lanes, at most one row group lies on each cut.
        assert sum(len(set(groups)) for groups in by_lane) <= len(set(GROUPS[clip])) + LANES - 1
        for groups in by_lane:
            begun, ended = {}, {}
            for i, group in enumerate(groups):
                begun.setdefault(group, i)
                ended[group] = i
            at_once = max(sum(begun[g] <= i <= ended[g] for g in begun) for i in range(len(groups)))
            assert at_once <= GROUPS_PER_WINDOW // LANES


def test_labels_along_the_order_are_as_unrelated_as_in_an_ideal_shuffle():
    """The correlation of neighbours' labels at distances 1 to 200, over 20 epochs, of clips in no order and of clips
    that lie by class. There it is nearly the same, but for distances at which a lane comes round again.
    """
    by_class = np.repeat(np.arange(10), NUM_CLIPS // 10)
    mixed_up = np.random.default_rng(1).permutation(by_class)
    orders = [order(e).clip for e in range(20)]
    num_pairs, largest = 20 * NUM_CLIPS, stats.norm.isf(1e-3 / 2 / 200)
    for label, distances in ((mixed_up, range(1, 201)), (by_class, [d for d in range(1, 201) if d % LANES])):
        for distance in distances:
            rho = np.mean([np.corrcoef(label[o][distance:], label[o][:-distance])[0, 1] for o in orders])
            assert abs(rho) * num_pairs**0.5 < largest + (2 if label is by_class else 0), distance


def test_a_data_set_of_one_window_is_shuffled_perfectly():
    """The rank correlation of a clip's place in the data set and in the order vanishes, also among neighbours."""
    small = {"num_clips": 500, "row_group": GROUPS[:500]}
    orders = [order(e, **small).clip for e in range(40)]
    for clip in (np.concatenate(orders), np.concatenate([np.abs(np.diff(o)) for o in orders])):
        places = np.tile(np.arange(len(clip) // 40), 40)
        assert abs(stats.spearmanr(places, clip).statistic) < 0.03


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("begin", "end"), [(0, 1), (0, 12), (13, 26), (24, 29)])
def test_ranks_share_a_batch_by_lanes_and_no_clip_counts_twice(begin: int, end: int, world_size: int):
    shares = [rank_share(begin, end, rank, world_size) for rank in range(world_size)]
    assert {len(share.position) for share in shares} == {-(-(end - begin) // world_size)}
    for rank, share in enumerate(shares):
        mine = begin + share.position[share.weight == 1]
        assert (mine % world_size == rank).all()
        assert (share.position < end - begin).all()
    counted = np.concatenate([share.position[share.weight == 1] for share in shares])
    np.testing.assert_array_equal(np.sort(counted), np.arange(end - begin))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_smaller_batch_can_be_filled_up_with_clips_that_do_not_count(world_size: int):
    for rank in range(world_size):
        bare, filled = (rank_share(24, 29, rank, world_size, fill_to) for fill_to in (0, 12))
        num = len(bare.position)
        assert len(filled.position) == 12 // world_size
        assert filled.num_clips_global == 5
        np.testing.assert_array_equal(filled.position[:num], bare.position)
        np.testing.assert_array_equal(filled.weight[:num], bare.weight)
        assert not filled.weight[num:].any()


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("num_rows", [1, 5, 64, 101])
def test_every_evaluation_row_lies_on_exactly_one_rank_in_order(num_rows: int, world_size: int):
    rows = np.concatenate([rank_rows(num_rows, rank, world_size) for rank in range(world_size)])
    np.testing.assert_array_equal(rows, np.arange(num_rows))


def test_the_last_batch_of_an_epoch_is_a_step_though_it_is_smaller():
    assert [num_steps(n, 48) for n in (1, 48, 49, 1600)] == [1, 1, 2, 34]
