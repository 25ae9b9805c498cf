"""Metrics equal scikit-learn's and the reference's, also with ties. Undefined values are NaN and left out."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from ast_core.bootstrap import RESAMPLES_AT_ONCE
from ast_core.metrics import bootstrap_map, d_prime, tagging_metrics
from tests.reference import figures


def scored(distinct_scores: int, *, seed: int, dtype: type = np.float64) -> tuple[np.ndarray, np.ndarray]:
    """Scores and targets of 200 clips and 6 classes with 5 to 70 % positives; `distinct_scores` sets the ties."""
    rng = np.random.default_rng(seed)
    target = (rng.random((200, 6)) < np.linspace(0.05, 0.7, 6)).astype(np.float32)
    target[0], target[1] = 1, 0  # each class has positives and negatives
    score = np.floor((0.3 * target + 0.7 * rng.random((200, 6))) * distinct_scores) / distinct_scores
    return score.astype(dtype), target


@pytest.mark.parametrize("distinct_scores", [1, 2, 3, 20, 10_000])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_ap_and_auc_equal_scikit_learns_with_any_number_of_ties(distinct_scores: int, dtype: type):
    score, target = scored(distinct_scores, seed=distinct_scores, dtype=dtype)
    ours = tagging_metrics(score, target)
    ap = [average_precision_score(target[:, c], score[:, c]) for c in range(6)]
    auc = [roc_auc_score(target[:, c], score[:, c]) for c in range(6)]
    np.testing.assert_allclose(ours.ap, ap, rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours.auc, auc, rtol=0, atol=1e-12)
    assert ours.map == pytest.approx(np.mean(ap), abs=1e-12)
    assert ours.mauc == pytest.approx(np.mean(auc), abs=1e-12)


def test_the_order_of_the_clips_does_not_matter():
    score, target = scored(5, seed=1)
    order = np.random.default_rng(2).permutation(len(score))
    ours, shuffled = tagging_metrics(score, target), tagging_metrics(score[order], target[order])
    np.testing.assert_allclose(shuffled.ap, ours.ap, rtol=0, atol=1e-12)
    np.testing.assert_allclose(shuffled.auc, ours.auc, rtol=0, atol=1e-12)


def test_metrics_equal_the_references():
    expected = figures("metrics_reference")
    ours = tagging_metrics(expected["score"], expected["target"])
    np.testing.assert_allclose(ours.ap, expected["ap"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(ours.auc, expected["auc"], rtol=0, atol=1e-9)
    assert ours.accuracy == pytest.approx(float(expected["acc"]), abs=1e-12)
    assert ours.d_prime == pytest.approx(float(expected["d_prime"]), abs=1e-9)


def test_undefined_classes_are_nan_and_left_out_of_the_means():
    score, target = scored(20, seed=3)
    target[:, 0], target[:, 1] = 0, 1
    ours = tagging_metrics(score, target)
    rest = tagging_metrics(score[:, 2:], target[:, 2:])
    assert np.isnan(ours.ap).tolist() == [True, False, False, False, False, False]
    assert np.isnan(ours.auc).tolist() == [True, True, False, False, False, False]
    assert ours.ap[1] == 1
    assert ours.mauc == rest.mauc
    assert ours.map == pytest.approx((1 + 4 * rest.map) / 5)
    assert ours.d_prime == rest.d_prime


def test_without_a_defined_class_only_the_accuracy_is_defined():
    ours = tagging_metrics(np.array([[0.2, 0.1]]), np.zeros((1, 2)))
    assert [math.isnan(value) for value in (ours.map, ours.mauc, ours.d_prime)] == [True, True, True]
    assert ours.accuracy == 1


def test_accuracy_compares_the_highest_score_with_the_first_label():
    score = np.array([[0.9, 0.1, 0.2], [0.1, 0.9, 0.2], [0.1, 0.2, 0.9], [0.5, 0.5, 0.1]])
    target = np.array([[1, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0]])
    assert tagging_metrics(score, target).accuracy == 3 / 4


def test_scalars_are_those_of_the_summary():
    score, target = scored(20, seed=4)
    ours = tagging_metrics(score, target)
    assert ours.scalars() == {
        "map": ours.map,
        "mauc": ours.mauc,
        "d_prime": ours.d_prime,
        "accuracy": ours.accuracy,
    }


@pytest.mark.parametrize(
    ("auc", "expected"),
    [(0.5, 0), (1, math.inf), (0, -math.inf), (0.975, 2.771808), (0.025, -2.771808)],  # √2 · 1.959964
)
def test_d_prime(auc: float, expected: float):
    assert d_prime(auc) == pytest.approx(expected, abs=1e-5)
    assert math.isnan(d_prime(math.nan))


@pytest.mark.parametrize(
    ("score_shape", "target_shape"), [((3, 2), (3, 3)), ((3, 2), (2, 2)), ((0, 2), (0, 2)), ((3,), (3,))]
)
@pytest.mark.parametrize("function", [tagging_metrics, bootstrap_map])
def test_mismatched_shapes_are_refused_with_both_shapes(function: Callable, score_shape: tuple, target_shape: tuple):
    with pytest.raises(ValueError, match=r"give the same \[clips, classes\]") as refused:
        function(np.zeros(score_shape), np.zeros(target_shape))
    assert str(score_shape) in str(refused.value)


@pytest.mark.parametrize("function", [tagging_metrics, bootstrap_map])
def test_a_nan_score_is_refused(function: Callable):
    with pytest.raises(ValueError, match="NaN: the model diverged"):
        function(np.array([[0.1, np.nan]]), np.array([[1, 0]]))


def test_one_class_and_one_clip_have_metrics():
    one_class = tagging_metrics(np.array([[0.9], [0.5], [0.1]]), np.array([[1], [0], [1]]))
    assert (one_class.ap.tolist(), one_class.auc.tolist()) == ([pytest.approx((1 + 2 / 3) / 2)], [0.5])
    assert (one_class.map, one_class.mauc, one_class.accuracy) == (one_class.ap[0], 0.5, 1)
    one_clip = tagging_metrics(np.array([[0.9, 0.1]]), np.array([[0, 1]]))
    assert (one_clip.map, math.isnan(one_clip.mauc), one_clip.accuracy) == (1, True, 0)


# --- bootstrap intervals


def mirrored_maps(score: np.ndarray, target: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """`2 map - m` for the `map` m of each resample, computed from its rows."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(len(score), size=len(score)) for _ in range(num_resamples)]
    maps = np.array([tagging_metrics(score[each], target[each]).map for each in rows])
    return 2 * tagging_metrics(score, target).map - maps


def sorted_values(score: np.ndarray, target: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """The sorted values of `mirrored_maps` from `bootstrap_map`: the quantile k / (n - 1) of n values is a value."""
    bounds = [
        bootstrap_map(score, target, num_resamples=num_resamples, seed=seed, confidence=1 - 2 * k / (num_resamples - 1))
        for k in range(1, num_resamples // 2)
    ]
    return np.array([low for low, _ in bounds] + [high for _, high in reversed(bounds)])


@pytest.mark.parametrize("distinct_scores", [1, 2, 3, 20, 10_000])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_the_map_of_each_resample_is_that_of_its_rows(distinct_scores: int, dtype: type):
    score, target = scored(distinct_scores, seed=distinct_scores, dtype=dtype)
    score, target = score[:60], target[:60]
    target[:, 1] = 0  # never defined
    target[:, 2] = np.arange(60) == 7  # undefined in about a third of the resamples
    target[:, 3] = 1
    num_resamples = 20
    maps = mirrored_maps(score, target, num_resamples, seed=5)
    ours = sorted_values(score, target, num_resamples, seed=5)
    np.testing.assert_allclose(ours, np.sort(maps)[1:-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_clips", [1, 2, 3, 7])
@pytest.mark.parametrize("num_classes", [1, 4])
def test_with_one_resample_both_bounds_are_equal(num_clips: int, num_classes: int):
    score, target = (values[:num_clips, 2 : 2 + num_classes] for values in scored(4, seed=1))
    for seed in range(20):
        expected = mirrored_maps(score, target, 1, seed)[0]
        bounds = bootstrap_map(score, target, num_resamples=1, seed=seed)
        np.testing.assert_allclose(bounds, [expected, expected], rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_resamples", [RESAMPLES_AT_ONCE - 1, RESAMPLES_AT_ONCE, 2 * RESAMPLES_AT_ONCE + 3])
@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_the_bounds_are_quantiles_over_all_resamples(num_resamples: int, confidence: float):
    score, target = scored(20, seed=6)
    maps = mirrored_maps(score, target, num_resamples, seed=7)
    bounds = bootstrap_map(score, target, num_resamples=num_resamples, seed=7, confidence=confidence)
    expected = np.quantile(maps, [(1 - confidence) / 2, 1 - (1 - confidence) / 2])
    np.testing.assert_allclose(bounds, expected, rtol=0, atol=1e-12)


def test_undefined_resamples_do_not_count_and_no_labels_give_no_interval():
    score, target = np.array([[0.2], [0.9], [0.3], [0.5]]), np.array([[1], [0], [0], [0]])
    maps = mirrored_maps(score, target, 100, seed=0)
    assert 0 < np.isnan(maps).sum() < 60
    expected = np.nanquantile(maps, [0.025, 0.975])
    np.testing.assert_allclose(bootstrap_map(score, target, num_resamples=100), expected, rtol=0, atol=1e-12)
    assert np.isnan(bootstrap_map(score, np.zeros_like(target), num_resamples=100)).all()


def population_map(shifts: np.ndarray, prevalences: np.ndarray) -> float:
    """Mean AP of a population with normal scores, shifted for positives: ∫ precision d(recall)."""
    threshold = np.linspace(12, -8, 200_001).reshape(-1, 1)
    recall, false_share = stats.norm.sf(threshold - shifts), stats.norm.sf(threshold)
    precision = prevalences * recall / (prevalences * recall + (1 - prevalences) * false_share)
    return float(np.trapezoid(precision, recall, axis=0).mean())


def test_the_interval_covers_the_population_map_at_its_confidence():
    shifts, prevalences = np.array([1.0, 2.0]), np.array([0.5, 0.4])
    expected, repetitions, num_clips = population_map(shifts, prevalences), 400, 1000
    rng, covered = np.random.default_rng(12), 0
    for seed in range(repetitions):
        target = rng.random((num_clips, 2)) < prevalences
        score = rng.standard_normal(target.shape) + shifts * target
        low, high = bootstrap_map(score, target, num_resamples=200, seed=seed)
        covered += low <= expected <= high
    # 0.928 in 1,000 other repetitions. With a true share of 0.91 to 0.97, at most one seed in a thousand fails.
    assert stats.binom.ppf(1e-3, repetitions, 0.91) <= covered <= stats.binom.isf(1e-3, repetitions, 0.97)


def test_the_interval_holds_for_few_positives():
    """The quantiles of the resamples cover less: 0.74 against 0.92 in 300 other repetitions."""
    rng, repetitions, num_clips = np.random.default_rng(4), 100, 2000
    shifts, prevalences = rng.uniform(1, 3.5, 30), np.exp(rng.uniform(np.log(0.005), np.log(0.05), 30))
    expected, covered, covered_by_quantiles = population_map(shifts, prevalences), 0, 0
    for seed in range(repetitions):
        target = rng.random((num_clips, 30)) < prevalences
        score = rng.standard_normal(target.shape) + shifts * target
        low, high = bootstrap_map(score, target, num_resamples=200, seed=seed)
        covered += low <= expected <= high
        twice = 2 * tagging_metrics(score, target).map
        covered_by_quantiles += twice - high <= expected <= twice - low
    assert covered >= stats.binom.ppf(1e-3, repetitions, 0.88)  # at most one seed in a thousand fails
    assert covered_by_quantiles < covered


def test_four_times_the_clips_halve_the_interval():
    score, target = scored(10_000, seed=8)
    widths = [np.diff(bootstrap_map(np.tile(score, (n, 1)), np.tile(target, (n, 1))))[0] for n in (1, 4)]
    assert widths[1] == pytest.approx(widths[0] / 2, rel=0.15)


def test_an_interval_is_a_function_of_its_seed():
    score, target = scored(20, seed=9)
    first, again, other = (bootstrap_map(score, target, num_resamples=50, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert all(type(bound) is float for bound in first)


def test_the_bootstrap_uses_only_the_order_of_scores_and_keeps_its_inputs():
    score, target = scored(20, seed=10)
    before = score.copy(), target.copy()
    logits = np.log((score + 1e-3) / (1 + 1e-3 - score))
    assert bootstrap_map(score, target, num_resamples=50) == bootstrap_map(logits, target > 0.5, num_resamples=50)
    assert np.array_equal(score, before[0])
    assert np.array_equal(target, before[1])


@pytest.mark.parametrize(
    "settings", [{"num_resamples": 0}, {"confidence": 0.0}, {"confidence": 1.0}, {"confidence": 95}], ids=str
)
def test_an_impossible_bootstrap_setting_is_refused_with_its_value(settings: dict):
    (name, value), *_ = settings.items()
    with pytest.raises(ValueError, match=rf"{name}.* {value}"):
        bootstrap_map(np.zeros((2, 1)), np.ones((2, 1)), **settings)
