"""The order of an epoch has the right distribution, whatever the number of ranks."""

import numpy as np
import pytest
from scipy import stats

from pipeline.train.data.sampling import (
    GROUPS_PER_SHUFFLE_WINDOW,
    NO_PARTNER,
    VIRTUAL_RANKS,
    EpochOrder,
    epoch_order,
    num_steps,
    rank_rows,
    rank_share,
)

NUM_CLIPS = 5000
GROUPS = np.arange(NUM_CLIPS) // 16  # 313 row groups, about four shuffle windows
SKEWED = np.random.default_rng(0).pareto(1.5, NUM_CLIPS) + 0.1


def order(epoch: int = 1, **changes: object) -> EpochOrder:
    usual = {"seed": 7, "num_clips": NUM_CLIPS, "weight": None, "mixup": 0.0, "mixup_beta": 10.0, "row_group": GROUPS}
    return epoch_order(**{**usual, "epoch": epoch, **changes})


def test_an_epoch_depends_only_on_seed_and_epoch():
    first, again = order(weight=SKEWED, mixup=0.5), order(weight=SKEWED, mixup=0.5)
    for name in ("clip", "partner", "lam"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert (first.clip != order(epoch=2, weight=SKEWED).clip).any()
    assert (first.clip != order(seed=8, weight=SKEWED).clip).any()


def test_uniform_sampling_takes_each_clip_once_in_a_new_order_each_epoch():
    epochs = [order(epoch).clip for epoch in range(1, 4)]
    for clip in epochs:
        np.testing.assert_array_equal(np.sort(clip), np.arange(NUM_CLIPS))
    assert (epochs[0] != epochs[1]).mean() > 0.9


def test_weighted_sampling_draws_in_proportion_to_the_weights():
    """Chi-square test over 50 epochs of skewed weights; a wrong failure for one seed in a thousand."""
    drawn = np.bincount(np.concatenate([order(e, weight=SKEWED).clip for e in range(50)]), minlength=NUM_CLIPS)
    assert stats.chisquare(drawn, SKEWED / SKEWED.sum() * drawn.sum()).pvalue > 1e-3


def test_partners_are_drawn_uniformly_when_clips_are_drawn_by_weight():
    """Chi-square test over 60 epochs, with weights that differ by row group; a wrong failure for one seed in 1,000."""
    orders = [order(e, weight=np.linspace(0.1, 10, NUM_CLIPS), mixup=1.0) for e in range(60)]
    drawn = np.concatenate([o.partner for o in orders])
    partners = np.bincount(drawn[drawn != NO_PARTNER], minlength=NUM_CLIPS)  # a clip is no partner of itself
    assert stats.chisquare(partners).pvalue > 1e-3


def test_mixed_share_and_lambda_follow_the_recipe():
    orders = [order(e, mixup=0.3) for e in range(20)]
    mixed = np.concatenate([o.partner != NO_PARTNER for o in orders])
    lam = np.concatenate([o.lam for o in orders])
    assert stats.binomtest(int(mixed.sum()), len(mixed), 0.3).pvalue > 1e-3
    assert (lam[~mixed] == 1).all()
    assert stats.kstest(lam[mixed], stats.beta(10, 10).cdf).pvalue > 1e-3


@pytest.mark.parametrize("weight", [None, SKEWED])
def test_each_virtual_rank_reads_its_own_row_groups_a_few_at_a_time(weight: np.ndarray | None):
    sampled = order(mixup=0.5, weight=weight)
    mixed = sampled.partner != NO_PARTNER
    virtual_rank = np.arange(NUM_CLIPS) % VIRTUAL_RANKS
    for clip, reader in ((sampled.clip, virtual_rank), (sampled.partner[mixed], virtual_rank[mixed])):
        by_virtual_rank = [GROUPS[clip[reader == i]] for i in range(VIRTUAL_RANKS)]
        # The clips are cut into one part for each virtual rank, and each cut divides at most one row group.
        assert sum(len(set(groups)) for groups in by_virtual_rank) <= len(set(GROUPS[clip])) + VIRTUAL_RANKS - 1
        for groups in by_virtual_rank:
            first, last = {}, {}
            for i, group in enumerate(groups):
                first.setdefault(group, i)
                last[group] = i
            at_once = max(sum(first[g] <= i <= last[g] for g in first) for i in range(len(groups)))
            assert at_once <= GROUPS_PER_SHUFFLE_WINDOW // VIRTUAL_RANKS


def test_neighbours_have_as_uncorrelated_labels_as_in_an_ideal_shuffle():
    """Correlation of labels at distances 1 to 200, over 20 epochs, for clips stored in random order or by class.

    By class, distances that are multiples of `VIRTUAL_RANKS` are left out: such neighbours share a virtual rank.
    """
    by_class = np.repeat(np.arange(10), NUM_CLIPS // 10)
    mixed_up = np.random.default_rng(1).permutation(by_class)
    orders = [order(e).clip for e in range(20)]
    num_pairs, largest = 20 * NUM_CLIPS, stats.norm.isf(1e-3 / 2 / 200)
    for label, distances in ((mixed_up, range(1, 201)), (by_class, [d for d in range(1, 201) if d % VIRTUAL_RANKS])):
        for distance in distances:
            rho = np.mean([np.corrcoef(label[o][distance:], label[o][:-distance])[0, 1] for o in orders])
            assert abs(rho) * num_pairs**0.5 < largest + (2 if label is by_class else 0), distance


def test_a_data_set_of_one_window_is_shuffled_perfectly():
    """The rank correlation between a clip's place in the data set and in the order is 0, also for neighbours."""
    small = {"num_clips": 500, "row_group": GROUPS[:500]}
    orders = [order(e, **small).clip for e in range(40)]
    for clip in (np.concatenate(orders), np.concatenate([np.abs(np.diff(o)) for o in orders])):
        places = np.tile(np.arange(len(clip) // 40), 40)
        assert abs(stats.spearmanr(places, clip).statistic) < 0.03


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("begin", "end"), [(0, 1), (0, 12), (13, 26), (24, 29)])
def test_ranks_share_a_batch_by_virtual_ranks_and_no_clip_counts_twice(begin: int, end: int, world_size: int):
    shares = [rank_share(begin, end, rank, world_size) for rank in range(world_size)]
    assert {len(share.position) for share in shares} == {-(-(end - begin) // world_size)}
    for rank, share in enumerate(shares):
        mine = begin + share.position[share.weight == 1]
        assert (mine % world_size == rank).all()
        assert (share.position < end - begin).all()
    counted = np.concatenate([share.position[share.weight == 1] for share in shares])
    np.testing.assert_array_equal(np.sort(counted), np.arange(end - begin))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_smaller_batch_can_be_padded_with_clips_of_weight_0(world_size: int):
    for rank in range(world_size):
        bare, filled = (rank_share(24, 29, rank, world_size, fill_to) for fill_to in (0, 12))
        num = len(bare.position)
        assert len(filled.position) == 12 // world_size
        assert filled.num_clips_global == 5
        np.testing.assert_array_equal(filled.position[:num], bare.position)
        np.testing.assert_array_equal(filled.weight[:num], bare.weight)
        assert not filled.weight[num:].any()
        times = np.unique(filled.position, return_counts=True)[1]
        assert times.max() - times.min() <= 1  # batch normalisation sees all of them equally


def test_no_clip_is_mixed_with_itself():
    """Adding the powers of a clip to itself would make it quieter."""
    orders = [order(e, num_clips=3, row_group=GROUPS[:3], mixup=1.0) for e in range(30)]
    assert not any((o.partner == o.clip).any() for o in orders)
    assert all((o.lam[o.partner == NO_PARTNER] == 1).all() for o in orders)
    assert any((o.partner == NO_PARTNER).any() for o in orders)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("num_rows", [1, 5, 64, 101])
def test_every_evaluation_row_is_on_exactly_one_rank_in_order(num_rows: int, world_size: int):
    rows = np.concatenate([rank_rows(num_rows, rank, world_size) for rank in range(world_size)])
    np.testing.assert_array_equal(rows, np.arange(num_rows))


def test_a_smaller_last_batch_is_a_step():
    assert [num_steps(n, 48) for n in (1, 48, 49, 1600)] == [1, 1, 2, 34]
