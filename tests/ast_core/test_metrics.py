"""Metrics equal scikit-learn's and the original's, ties included; what is undefined is NaN and left out."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from ast_core.metrics import RESAMPLES_AT_ONCE, bootstrap_map, d_prime, tagging_metrics
from tests.reference import figures, needs_shared


def scored(distinct_scores: int, *, seed: int, dtype: type = np.float64) -> tuple[np.ndarray, np.ndarray]:
    """200 clips, 6 classes of 5 to 70 % positives, with as few distinct scores as asked."""
    rng = np.random.default_rng(seed)
    target = (rng.random((200, 6)) < np.linspace(0.05, 0.7, 6)).astype(np.float32)
    target[0], target[1] = 1, 0  # no class is one-sided
    score = np.floor((0.3 * target + 0.7 * rng.random((200, 6))) * distinct_scores) / distinct_scores
    return score.astype(dtype), target


@pytest.mark.parametrize("distinct_scores", [1, 2, 3, 20, 10_000])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_ap_and_auc_equal_scikit_learns_however_many_scores_tie(distinct_scores: int, dtype: type):
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


@needs_shared
def test_metrics_equal_the_originals():
    expected = figures("metrics_reference")
    ours = tagging_metrics(expected["score"], expected["target"])
    np.testing.assert_allclose(ours.ap, expected["ap"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(ours.auc, expected["auc"], rtol=0, atol=1e-9)
    assert ours.accuracy == pytest.approx(float(expected["acc"]), abs=1e-12)
    assert ours.d_prime == pytest.approx(float(expected["d_prime"]), abs=1e-9)


def test_a_class_without_positives_or_negatives_is_nan_and_left_out_of_the_means():
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


def test_with_no_class_defined_the_means_are_nan_and_the_accuracy_is_not():
    ours = tagging_metrics(np.array([[0.2, 0.1]]), np.zeros((1, 2)))
    assert [math.isnan(value) for value in (ours.map, ours.mauc, ours.d_prime)] == [True, True, True]
    assert ours.accuracy == 1


def test_accuracy_takes_the_highest_score_and_the_first_label():
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
def test_shapes_that_do_not_go_together_are_named(function: Callable, score_shape: tuple, target_shape: tuple):
    with pytest.raises(ValueError, match=r"must be one \[clips, classes\]") as refused:
        function(np.zeros(score_shape), np.zeros(target_shape))
    assert str(score_shape) in str(refused.value)


@pytest.mark.parametrize("function", [tagging_metrics, bootstrap_map])
def test_a_score_that_is_not_a_number_is_refused(function: Callable):
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
    """The `map` of each resample, of rows that are actually taken, mirrored at the `map` of all: `2 map - …`."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(len(score), size=len(score)) for _ in range(num_resamples)]
    maps = np.array([tagging_metrics(score[each], target[each]).map for each in rows])
    return 2 * tagging_metrics(score, target).map - maps


def one_by_one(score: np.ndarray, target: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """The same out of `bootstrap_map`, sorted: the quantiles k / (n - 1) of n values are the values."""
    bounds = [
        bootstrap_map(score, target, num_resamples=num_resamples, seed=seed, confidence=1 - 2 * k / (num_resamples - 1))
        for k in range(1, num_resamples // 2)
    ]
    return np.array([low for low, _ in bounds] + [high for _, high in reversed(bounds)])


@pytest.mark.parametrize("distinct_scores", [1, 2, 3, 20, 10_000])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_every_resamples_map_is_that_of_the_rows_drawn(distinct_scores: int, dtype: type):
    score, target = scored(distinct_scores, seed=distinct_scores, dtype=dtype)
    score, target = score[:60], target[:60]
    target[:, 1] = 0  # never defined
    target[:, 2] = np.arange(60) == 7  # in about a third of the resamples not defined
    target[:, 3] = 1
    num_resamples = 20
    maps = mirrored_maps(score, target, num_resamples, seed=5)
    ours = one_by_one(score, target, num_resamples, seed=5)
    np.testing.assert_allclose(ours, np.sort(maps)[1:-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_clips", [1, 2, 3, 7])
@pytest.mark.parametrize("num_classes", [1, 4])
def test_one_resample_of_few_clips_is_both_bounds(num_clips: int, num_classes: int):
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


def test_a_resample_without_any_positive_does_not_count_and_without_a_label_there_is_no_interval():
    score, target = np.array([[0.2], [0.9], [0.3], [0.5]]), np.array([[1], [0], [0], [0]])
    maps = mirrored_maps(score, target, 100, seed=0)
    assert 0 < np.isnan(maps).sum() < 60
    expected = np.nanquantile(maps, [0.025, 0.975])
    np.testing.assert_allclose(bootstrap_map(score, target, num_resamples=100), expected, rtol=0, atol=1e-12)
    assert np.isnan(bootstrap_map(score, np.zeros_like(target), num_resamples=100)).all()


def population_map(shifts: np.ndarray, prevalences: np.ndarray) -> float:
    """Mean AP of endlessly many clips whose scores are normal, those of positives shifted: ∫ precision d(recall)."""
    threshold = np.linspace(12, -8, 200_001).reshape(-1, 1)
    recall, false_share = stats.norm.sf(threshold - shifts), stats.norm.sf(threshold)
    precision = prevalences * recall / (prevalences * recall + (1 - prevalences) * false_share)
    return float(np.trapezoid(precision, recall, axis=0).mean())


def test_the_interval_covers_the_populations_map_about_as_often_as_it_says():
    shifts, prevalences = np.array([1.0, 2.0]), np.array([0.5, 0.4])
    expected, repetitions, num_clips = population_map(shifts, prevalences), 400, 1000
    rng, covered = np.random.default_rng(12), 0
    for seed in range(repetitions):
        target = rng.random((num_clips, 2)) < prevalences
        score = rng.standard_normal(target.shape) + shifts * target
        low, high = bootstrap_map(score, target, num_resamples=200, seed=seed)
        covered += low <= expected <= high
    # 0.928 over 1,000 other repetitions. At any share from 0.91 to 0.97 a seed is refused once in a thousand, or less.
    assert stats.binom.ppf(1e-3, repetitions, 0.91) <= covered <= stats.binom.isf(1e-3, repetitions, 0.97)


def test_the_interval_is_about_right_where_positives_are_few():
    """Where the resamples' own quantiles cover less: 0.74 against 0.92 over 300 other repetitions."""
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
    assert covered >= stats.binom.ppf(1e-3, repetitions, 0.88)  # wrongly refused once in a thousand, or less
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


def test_the_scores_order_alone_matters_and_nothing_that_was_given_is_changed():
    score, target = scored(20, seed=10)
    before = score.copy(), target.copy()
    logits = np.log((score + 1e-3) / (1 + 1e-3 - score))
    assert bootstrap_map(score, target, num_resamples=50) == bootstrap_map(logits, target > 0.5, num_resamples=50)
    assert np.array_equal(score, before[0])
    assert np.array_equal(target, before[1])


@pytest.mark.parametrize(
    "settings", [{"num_resamples": 0}, {"confidence": 0.0}, {"confidence": 1.0}, {"confidence": 95}], ids=str
)
def test_a_bootstrap_that_cannot_be_is_named_with_what_was_asked(settings: dict):
    (name, value), *_ = settings.items()
    with pytest.raises(ValueError, match=rf"{name}.* {value}"):
        bootstrap_map(np.zeros((2, 1)), np.ones((2, 1)), **settings)
