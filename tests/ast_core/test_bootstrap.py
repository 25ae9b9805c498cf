"""The bootstrap of differences between models."""

import math

import numpy as np
import pytest

from ast_core.bootstrap import basic_interval, holm, p_value, resampled_mean, times_drawn
from ast_core.metrics import resampled_map


def scored(skill: float, *, seed: int, num_clips: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Scores and targets `[clips, 3]`. The targets do not depend on the seed."""
    target = (np.random.default_rng(7).random((num_clips, 3)) < 0.3).astype(np.float32)
    return skill * target + np.random.default_rng(seed).random(target.shape), target


def difference(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return resampled_map(*first, num_resamples=400) - resampled_map(*second, num_resamples=400)


def test_resampled_mean_is_the_mean_of_the_drawn_rows():
    values, rng = np.random.default_rng(1).random(50), np.random.default_rng(3)
    rows = [rng.integers(50, size=50) for _ in range(70)]
    expected = [values[each].mean() for each in rows]
    np.testing.assert_allclose(resampled_mean(values, num_resamples=70, seed=3), expected, rtol=0, atol=1e-12)


def test_every_resample_has_as_many_clips_as_there_are():
    drawn = np.concatenate(list(times_drawn(30, 130, seed=2)), axis=1)
    assert drawn.shape == (30, 130)
    assert (drawn.sum(axis=0) == 30).all()


def test_a_paired_difference_is_known_better_than_either_figure():
    one, other = scored(0.5, seed=1), scored(0.5, seed=1)
    other = (other[0] + 0.02 * np.random.default_rng(2).random(other[0].shape), other[1])  # nearly the same model
    spread = resampled_map(*one, num_resamples=400).std()
    assert difference(one, other).std() < 0.2 * spread


def test_p_is_small_for_a_better_model_and_not_for_an_equal_one():
    better, equal, other = scored(1.0, seed=1), scored(0.3, seed=2), scored(0.3, seed=3)
    gap = tuple(float(np.mean(difference(one, other))) for one in (better, equal))
    assert p_value(gap[0], difference(better, other)) == pytest.approx(1 / 401)
    assert p_value(gap[1], difference(equal, other)) > 0.05


def test_p_of_equal_models_is_uniform():
    """Two models of equal skill, many times over: p below 0.2 is about as rare as it says."""
    found = []
    for seed in range(60):
        one, other = (np.random.default_rng(2 * seed + i).random(80) < 0.7 for i in (0, 1))
        resampled = resampled_mean(one, num_resamples=200, seed=seed) - resampled_mean(
            other, num_resamples=200, seed=seed
        )
        found.append(p_value(float(one.mean()) - float(other.mean()), resampled))
    assert 0.05 < np.mean(np.array(found) < 0.2) < 0.4


def test_no_difference_at_all_has_p_1():
    assert p_value(0.0, np.zeros(10)) == 1


def test_undefined_resamples_do_not_count():
    resampled = np.array([0.1, np.nan, 0.3])
    assert basic_interval(0.2, resampled, 1 - 1e-9) == pytest.approx((0.1, 0.3))
    assert p_value(0.2, resampled) == pytest.approx(1 / 3)
    assert math.isnan(p_value(0.2, np.full(3, np.nan)))
    assert math.isnan(p_value(math.nan, resampled))


def test_holm_adjusts_the_smallest_p_most_and_keeps_the_order():
    """The example of the procedure's definition, by hand: 3 · 0.01, 2 · 0.02, max with 1 · 0.03; NaN is no test."""
    np.testing.assert_allclose(holm(np.array([0.03, np.nan, 0.01, 0.02])), [0.04, np.nan, 0.03, 0.04])
    assert holm(np.array([0.6, 0.7])).tolist() == [1, 1]
    assert holm(np.array([])).tolist() == []
