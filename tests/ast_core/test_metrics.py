"""Metrics equal scikit-learn's and the original's, ties included; what is undefined is NaN and left out."""

import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from ast_core.metrics import d_prime, tagging_metrics
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
def test_shapes_that_do_not_go_together_are_named(score_shape: tuple, target_shape: tuple):
    with pytest.raises(ValueError, match=r"must be one \[clips, classes\]") as refused:
        tagging_metrics(np.zeros(score_shape), np.zeros(target_shape))
    assert str(score_shape) in str(refused.value)


def test_a_score_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="NaN: the model diverged"):
        tagging_metrics(np.array([[0.1, np.nan]]), np.array([[1, 0]]))
