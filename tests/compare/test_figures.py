"""Figures of a comparison over seeds and folds equal those of loops over resamples with scikit-learn's AP."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import average_precision_score

from ast_core.metrics import tagging_metrics
from ast_core.recipe import Recipe
from pipeline.compare import figures
from pipeline.compare.plan import PlannedRun
from pipeline.compare.results import RunResult
from pipeline.train.evaluation.scores import Scores
from pipeline.train.settings import TrainSettings

NUM_RESAMPLES, NUM_CLASSES = 30, 3
FOLDS = {"a": 25, "b": 18}
"""Clips by fold."""
SETTINGS = TrainSettings(recipe=Recipe(), data="data", train_splits=[], eval_splits=[], output="out")


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "NUM_RESAMPLES", NUM_RESAMPLES)


def result(model: str, skill: float, seed: int, fold: str) -> RunResult:
    """A run whose scores are right by `skill`. A clip has one label, which depends on the fold alone."""
    num_clips = FOLDS[fold]
    labels = np.random.default_rng(num_clips).integers(NUM_CLASSES, size=num_clips)
    noise = np.random.default_rng([seed, num_clips, *model.encode()]).random((num_clips, NUM_CLASSES))
    score = (skill * np.eye(NUM_CLASSES)[labels] + noise).astype(np.float16)
    scores = Scores(pa.array([f"{fold}{i}" for i in range(num_clips)]), pa.array([[int(c)] for c in labels]), score)
    exact = tagging_metrics(score.astype(np.float32), scores.targets())
    planned = PlannedRun(model, seed, fold, replace(SETTINGS, output=f"out/{model}"))
    return RunResult(planned, {}, exact.scalars(), [], None, scores, weights_sha256=None)


@pytest.fixture
def results() -> dict[str, list[RunResult]]:
    skills = {"good": 0.5, "fair": 0.48, "poor": 0.0}
    return {
        model: [result(model, skill, seed, fold) for seed in (0, 1) for fold in FOLDS]
        for model, skill in skills.items()
    }


def mean_ap(score: np.ndarray, target: np.ndarray) -> float:
    return float(np.mean([average_precision_score(t, s) for t, s in zip(target.T, score.T, strict=True) if t.any()]))


def accuracy(score: np.ndarray, target: np.ndarray) -> float:
    return float((score.argmax(axis=1) == target.argmax(axis=1)).mean())


def resamples(num_clips: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    return (rng.integers(num_clips, size=num_clips) for _ in range(NUM_RESAMPLES))


def independent(results: list[RunResult], metric: Any) -> tuple[float, np.ndarray]:
    """The figure of a model and its value in each resample. Folds have resamples of their own, and seeds share them."""
    of_runs, in_resamples = [], []
    for one in results:
        score, target = one.scores.scores.astype(np.float64), one.scores.targets()
        of_runs.append(metric(score, target))
        rows = resamples(len(score), seed=list(FOLDS).index(str(one.planned.fold)))
        in_resamples.append([metric(score[of], target[of]) for of in rows])
    return float(np.mean(of_runs)), np.mean(in_resamples, axis=0)


@pytest.mark.parametrize(("name", "metric"), [("map", mean_ap), ("accuracy", accuracy)])
def test_paired_differences_intervals_and_p_equal_those_of_loops(
    name: str, metric: Any, results: dict[str, list[RunResult]]
):
    scored = {model: figures.scored(runs) for model, runs in results.items()}
    by_hand = {model: independent(runs, metric) for model, runs in results.items()}
    for model, (figure, in_resamples) in by_hand.items():
        found = figures.interval(scored[model].mean(name), scored[model].resampled[name])
        bounds = 2 * figure - np.quantile(in_resamples, [0.975, 0.025])
        assert found == pytest.approx(bounds.tolist(), abs=1e-6)
    p_values = []
    pairs = figures.pair_figures(scored, results, ["x", "y", "z"])
    for pair in pairs:
        (one, of_one), (other, of_other) = (by_hand[model] for model in pair["models"])
        difference, in_resamples = one - other, of_one - of_other
        far = sum(abs(value - difference) >= abs(difference) - 1e-9 for value in in_resamples)
        p_values.append((1 + far) / (1 + NUM_RESAMPLES))
        assert pair[name]["difference"] == pytest.approx(difference, abs=1e-6)
        assert pair[name]["p"] == pytest.approx(p_values[-1])
        bounds = 2 * difference - np.quantile(in_resamples, [0.975, 0.025])
        assert pair[name]["interval"] == pytest.approx(bounds.tolist(), abs=1e-6)
    assert 1 / (1 + NUM_RESAMPLES) == min(p_values) < max(p_values)
    # Holm: the k-th smallest of m is multiplied by m - k, counted from 0, and none is below a smaller one.
    corrected, highest = {}, 0.0
    for k, i in enumerate(np.argsort(p_values)):
        highest = corrected[i] = max(highest, min(1.0, (len(pairs) - k) * p_values[i]))
    assert [pair[name]["p_holm"] for pair in pairs] == pytest.approx([corrected[i] for i in range(len(pairs))])


def test_an_ensemble_of_two_has_the_metrics_of_the_mean_scores(results: dict[str, list[RunResult]]):
    found = figures.ensemble_figures(results["good"], results["fair"])
    expected = [
        mean_ap((one.scores.scores.astype(np.float64) + other.scores.scores) / 2, one.scores.targets())
        for one, other in zip(results["good"], results["fair"], strict=True)
    ]
    assert found["map"] == pytest.approx(np.mean(expected), abs=1e-6)


def test_the_spread_over_seeds_is_that_of_the_means_over_folds(results: dict[str, list[RunResult]]):
    scored = figures.scored(results["fair"])
    values = scored.values["map"].reshape(2, len(FOLDS)).mean(axis=1)
    summary = {"averaged": None, "clips_per_s": 1.0, "train_s": 1.0, "world_size": 1, "epochs": 1, "best_epoch": 1}
    complete = [
        replace(one, summary={**one.summary, **summary}, config={"computed": {"device": "cpu"}})
        for one in results["fair"]
    ]
    found = figures.model_figures(complete, scored)
    assert found["map_std_over_seeds"] == pytest.approx(abs(values[0] - values[1]) / np.sqrt(2))
    assert found["map"] == pytest.approx(values.mean())


def test_runs_on_other_clips_are_not_compared(results: dict[str, list[RunResult]]):
    good, poor = results["good"], results["poor"]
    figures.check_same_clips([*good, *poor])
    other = poor[0].scores
    swapped = replace(poor[0], scores=replace(other, clip_id=other.clip_id[::-1]))
    with pytest.raises(figures.DataError, match=r"^poor, seed 0, a and good, seed 0, a were evaluated on other clips"):
        figures.check_same_clips([*good, swapped])
