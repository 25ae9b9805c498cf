"""Calibration: reliability by its definition, maps and thresholds from constructed scores."""

import numpy as np
import pytest

from ast_core import calibration
from ast_core.calibration import CalibrationMap, ModelCalibration, calibrate, choose_threshold, reliability
from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary


def made(num_clips: int = 60, num_classes: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores = rng.random((num_clips, num_classes)).astype(np.float16)
    scores[0, :3] = 0, 0.5, 1  # edges
    return scores, (rng.random((num_clips, num_classes)) < 0.3).astype(np.float32)


def test_reliability_matches_its_definition(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calibration, "CLIPS_AT_ONCE", 7)
    scores, targets = made()
    scores = np.where(scores > 0.9, np.float16(0.85), scores)  # a bin that is empty apart from the 1
    scores[0, 2] = 0.85
    found = reliability(scores, targets)
    error = 0.0
    for b in range(10):
        cells = [
            (float(s), t)
            for s, t in zip(scores.ravel(), targets.ravel(), strict=True)
            if b / 10 <= s and (s < (b + 1) / 10 or b == 9)
        ]
        assert found.decisions[b] == len(cells)
        if not cells:
            assert np.isnan(found.mean_score[b])
            assert np.isnan(found.share_true[b])
            continue
        mean, share = np.mean([s for s, _ in cells]), np.mean([t for _, t in cells])
        assert found.mean_score[b] == pytest.approx(mean)
        assert found.share_true[b] == pytest.approx(share)
        error += abs(mean - share) * len(cells) / scores.size
    assert 0 in found.decisions
    assert found.decisions.sum() == scores.size
    assert found.expected_error == pytest.approx(error)


def test_expected_error_is_0_for_probabilities_and_1_for_certain_mistakes():
    scores = np.full((10, 4), 0.25, np.float16)
    targets = np.tile(np.array([1, 0, 0, 0], np.float32), (10, 1))
    assert reliability(scores, targets).expected_error == 0
    assert reliability(1 - targets, targets).expected_error == 1


def distorted(num_clips: int, shares: list[float], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores of classes with these shares of positives. The true probability is that of the logit divided by 3."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(0, 1.5, (num_clips, len(shares))) + np.log(shares) - np.log1p(-np.array(shares))
    target = (rng.random(logit.shape) < 1 / (1 + np.exp(-logit))).astype(np.float32)
    return (1 / (1 + np.exp(-3 * logit))).astype(np.float16), target


def test_a_known_distortion_is_undone():
    scores, targets = distorted(3000, [0.3, 0.1])
    found = calibrate(scores, targets)
    assert found.error_before > 0.05
    assert found.error_after < 0.015
    unseen, of_unseen = distorted(3000, [0.3, 0.1], seed=1)
    assert reliability(found(unseen), of_unseen).expected_error < 0.015
    assert all(of_class.is_own for of_class in found.classes)


def test_scores_that_are_calibrated_are_hardly_changed():
    rng = np.random.default_rng(0)
    scores = rng.random((4000, 1)).astype(np.float16)
    targets = (rng.random((4000, 1)) < scores).astype(np.float32)
    found = calibrate(scores, targets)
    assert np.abs(found(scores) - scores).max() < 0.06


def test_a_class_with_few_clips_takes_the_map_and_threshold_of_all():
    scores, targets = distorted(2000, [0.3, 0.1, 0.2])
    targets[:, 2] = 0
    targets[:9, 2] = 1
    found = calibrate(scores, targets)
    assert [c.is_own for c in found.classes] == [True, True, False]
    assert found.classes[2].map.method == "platt"
    assert found.classes[2].num_positives == 9
    few = LabelVocabulary.from_names(["a", "b", "c"])
    assert calibration.names_of_few(found, few) == ["c"]
    with pytest.raises(DataError, match=r"^2 positive decisions are too few to calibrate; 10 are needed$"):
        calibrate(scores[:5], np.eye(5, 3) * (np.arange(5) < 2)[:, None])
    with pytest.raises(DataError, match=r"^0 negative decisions are too few to calibrate; 10 are needed$"):
        calibrate(scores[:20], np.ones((20, 3)))


def test_a_class_whose_scores_fall_with_it_takes_the_map_of_all():
    """Platt's method would turn the scores around: the class would be heard where its raw score is lowest."""
    scores, targets = distorted(2000, [0.3, 0.1, 0.02])
    order = np.argsort(scores[:, 2])
    targets[:, 2] = 0
    targets[order[:30], 2] = 1  # the clips with the lowest scores
    found = calibrate(scores, targets)
    assert [c.is_own for c in found.classes] == [True, True, False]
    grid = np.linspace(0.01, 0.99, 50, dtype=np.float32)[:, None].repeat(3, 1)
    assert (np.diff(found(grid), axis=0) >= 0).all()


SCORE = np.array([0.9, 0.8, 0.7, 0.6, 0.6, 0.2])
TARGET = np.array([1, 1, 0, 1, 0, 0])


@pytest.mark.parametrize(
    ("goal", "value", "threshold", "precision", "recall", "reached"),
    [
        ("f1", 0, 0.75, 1, 2 / 3, True),  # F1 0.8; with all up to 0.6 it is 0.75
        ("precision", 0.9, 0.75, 1, 2 / 3, True),
        ("precision", 0.6, 0.4, 3 / 5, 1, True),  # the two of 0.6 are taken together
        ("recall", 0.5, 0.75, 1, 2 / 3, True),
        ("recall", 0.9, 0.4, 3 / 5, 1, True),
        ("precision", 1.1, 0.75, 1, 2 / 3, False),
    ],
)
def test_thresholds_reach_their_goal(
    goal: str, value: float, threshold: float, precision: float, recall: float, reached: bool
):
    found = choose_threshold(SCORE, TARGET, goal, value)
    assert (found.value, found.precision, found.recall) == pytest.approx((threshold, precision, recall))
    assert found.is_reached == reached


def test_a_wanted_precision_holds_on_unseen_clips():
    scores, targets = distorted(4000, [0.3])
    found = calibrate(scores, targets, goal="precision", value=0.8)
    unseen, of_unseen = distorted(4000, [0.3], seed=1)
    taken = found(unseen)[:, 0] >= found.thresholds()[0]
    share = of_unseen[taken, 0].mean()
    assert abs(share - 0.8) < 1.96 * np.sqrt(0.8 * 0.2 / taken.sum()) + 0.02


def test_the_content_of_calibration_json_is_read_back():
    labels = LabelVocabulary.from_names(["a", "b", "c"])
    scores, targets = distorted(600, [0.3, 0.2, 0.1])
    found = calibrate(scores, targets, facts={"clips": 600})
    value = found.to_dict(labels)
    read = ModelCalibration.from_dict(value, labels, origin="f")
    assert read == found
    np.testing.assert_array_equal(read(scores), found(scores))
    with pytest.raises(DataError, match=r"^f is of other classes than the model"):
        ModelCalibration.from_dict(value, LabelVocabulary.from_names(["a", "b", "d"]), origin="f")
    value["classes"][0]["method"] = "magic"
    with pytest.raises(DataError, match=r"^f is damaged or of another version \(DataError: no calibration 'magic'"):
        ModelCalibration.from_dict(value, labels, origin="f")


def test_maps_compute_what_their_table_says():
    scores = np.array([0.2, 0.5, 0.8], np.float16)
    np.testing.assert_allclose(CalibrationMap("temperature", (2.0,))(scores), [1 / 3, 0.5, 2 / 3], atol=2e-4)
    shifted = 1 / (1 + np.exp(-(2 * np.log(0.25) + 1)))
    np.testing.assert_allclose(CalibrationMap("platt", (2.0, 1.0))(scores)[0], shifted, atol=2e-4)
    np.testing.assert_allclose(CalibrationMap("isotonic", (0.2, 0.8, 0.0, 0.6))(scores), [0, 0.3, 0.6], atol=2e-4)
