"""Calibrated scores and thresholds of a tagger's classes, from scores of held-out clips. NumPy; fitting uses SciPy and
scikit-learn.

A score is calibrated if, of all decisions with a score of 0.7, 70 % are true. Each class gets the map from raw to
calibrated score that has the lowest log loss in cross-validation (Guo et al., 2017, https://arxiv.org/abs/1706.04599;
Platt, 1999; Zadrozny and Elkan, 2002):

| method        | calibrated score of s                                      | parameters |
|---------------|------------------------------------------------------------|------------|
| `none`        | s                                                          | -          |
| `temperature` | sigmoid(logit(s) / T)                                      | T          |
| `platt`       | sigmoid(a · logit(s) + b)                                  | a, b       |
| `isotonic`    | a non-decreasing function, linear between its points       | x, then y  |

A class with fewer than `MIN_POSITIVES` clips takes the map and the threshold of all classes together.

N clips, C classes. A decision is one of the N × C cells.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary

MIN_POSITIVES = 10
"""Clips that a class needs, with the class and without, for a map and a threshold of its own."""

MIN_ISOTONIC = 50
"""Clips with the class from which a free function is tried: with fewer it learns single clips."""

NUM_FOLDS = 5
CLIP = 1e-4
"""Scores are kept this far from 0 and 1. Runs of earlier versions have float16 scores, in which larger ones are 1."""

CLIPS_AT_ONCE = 4096
"""Clips in memory at once. AudioSet's evaluation set has 11 million decisions."""

Goal = Literal["f1", "precision", "recall"]


@dataclass(frozen=True)
class CalibrationMap:
    """A function from raw to calibrated scores."""

    method: str
    parameters: tuple[float, ...] = ()

    @property
    def falls(self) -> bool:
        """Whether a higher raw score does not give a higher calibrated one. The raw scores then tell nothing apart."""
        return self.method == "platt" and self.parameters[0] <= 0

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Calibrated scores, float32, of the same shape."""
        values = scores.astype(np.float64)
        match self.method, self.parameters:
            case "none", ():
                return scores.astype(np.float32)
            case "temperature", (temperature,):
                values = _sigmoid(_logit(values) / temperature)
            case "platt", (slope, intercept):
                values = _sigmoid(slope * _logit(values) + intercept)
            case "isotonic", points if points and len(points) % 2 == 0:
                x, y = np.split(np.array(points), 2)
                values = np.interp(values, x, y)
            case _:
                raise DataError(f"no calibration {self.method!r} with {len(self.parameters)} parameters")
        return values.astype(np.float32)


NONE = CalibrationMap("none")


@dataclass(frozen=True)
class Threshold:
    """The decision that a class is there if its calibrated score is at least `value`."""

    value: float
    precision: float
    recall: float
    is_reached: bool = True
    """Whether the goal is reached on the held-out clips."""

    @property
    def f1(self) -> float:
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


@dataclass(frozen=True)
class ClassCalibration:
    map: CalibrationMap
    threshold: Threshold
    num_positives: int
    is_own: bool
    """False: too few clips, or scores that do not tell them apart. Then map and threshold are those of all classes."""


@dataclass(frozen=True)
class EventTuning:
    """Settings with which events are found best, from recordings whose events are known (`pipeline.tag.events`)."""

    release: float
    median_s: float
    merge_s: float
    min_s: float
    thresholds: tuple[float, ...]
    """One a class, of calibrated scores."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What it was made from, and how well it finds the events there."""


@dataclass(frozen=True)
class ModelCalibration:
    """The calibration of each class of a model."""

    classes: tuple[ClassCalibration, ...]
    error_before: float = float("nan")
    """Expected calibration error of the raw scores."""
    error_after: float = float("nan")
    """The same after calibration, each clip calibrated without its own fold."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What it was made from."""
    events: EventTuning | None = None

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Calibrated scores of raw ones, float32 `[…, C]`."""
        calibrated = np.empty(scores.shape, np.float32)
        for c, of_class in enumerate(self.classes):
            calibrated[..., c] = of_class.map(scores[..., c])
        return calibrated

    def thresholds(self) -> np.ndarray:
        """`[C]`, of calibrated scores."""
        return np.array([of_class.threshold.value for of_class in self.classes])

    def to_dict(self, labels: LabelVocabulary) -> dict[str, Any]:
        """The content of calibration.json."""
        events = {} if self.events is None else {"events": asdict(self.events)}
        return events | {
            "schema_version": 1,
            "made_from": dict(self.facts),
            "expected_calibration_error": {"before": self.error_before, "after": self.error_after},
            "classes": [
                {
                    "mid": mid,
                    "display_name": name,
                    "positives": c.num_positives,
                    "is_own": c.is_own,
                    "method": c.map.method,
                    "parameters": list(c.map.parameters),
                    "threshold": c.threshold.value,
                    "precision": c.threshold.precision,
                    "recall": c.threshold.recall,
                    "is_goal_reached": c.threshold.is_reached,
                }
                for c, mid, name in zip(self.classes, labels.mids, labels.names, strict=True)
            ],
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], labels: LabelVocabulary, *, origin: object) -> "ModelCalibration":
        """Raises DataError if it is no such content, or of other classes."""
        try:
            classes, errors = value["classes"], value["expected_calibration_error"]
            mids = tuple(item["mid"] for item in classes)
            found = tuple(
                ClassCalibration(
                    CalibrationMap(item["method"], tuple(map(float, item["parameters"]))),
                    Threshold(item["threshold"], item["precision"], item["recall"], item["is_goal_reached"]),
                    item["positives"],
                    item["is_own"],
                )
                for item in classes
            )
            for one in found:
                one.map(np.array([0.5]))  # raises for parameters that do not fit
            events = _tuning(value["events"], len(found)) if "events" in value else None
            made = cls(found, errors["before"], errors["after"], value["made_from"], events)
        except (KeyError, TypeError, ValueError, DataError) as err:
            raise DataError(f"{origin} is damaged or of another version ({type(err).__name__}: {err})") from err
        if mids != labels.mids:
            raise DataError(f"{origin} is of other classes than the model; run jobs/calibrate.py again")
        return made


def _tuning(value: Mapping[str, Any], num_classes: int) -> EventTuning:
    """Read an `EventTuning` of `num_classes` classes. Raises KeyError, TypeError or ValueError if it is none."""
    made = EventTuning(**{**value, "thresholds": tuple(map(float, value["thresholds"]))})
    if len(made.thresholds) != num_classes:
        raise ValueError(f"{len(made.thresholds)} thresholds of events for {num_classes} classes")
    return made


def calibrate(
    scores: np.ndarray,
    targets: np.ndarray,
    *,
    goal: Goal = "f1",
    value: float = 0.0,
    facts: Mapping[str, Any] | None = None,
    on_class: Callable[[], None] = lambda: None,
) -> ModelCalibration:
    """Calibrate all classes.

    Args:
        scores: raw scores (sigmoids) `[N, C]` of clips that the model was not trained on.
        targets: 0 or 1, `[N, C]`.
        goal: what the thresholds are for: the largest F1, or the wanted precision or recall `value`.
        on_class: called after each class.

    Raises:
        DataError: no class has enough clips.
    """
    num_positives = targets.sum(axis=0).astype(int)
    enough = np.minimum(num_positives, len(targets) - num_positives) >= MIN_POSITIVES
    num_negatives = targets.size - num_positives.sum()
    if num_negatives < MIN_POSITIVES:
        raise DataError(f"{num_negatives} negative decisions are too few to calibrate; {MIN_POSITIVES} are needed")
    if num_positives.sum() < MIN_POSITIVES:
        raise DataError(
            f"{num_positives.sum()} positive decisions are too few to calibrate; {MIN_POSITIVES} are needed"
        )
    pooled = _fit_pooled(scores, targets)
    out_of_fold = np.empty(scores.shape, np.float32)
    maps = []
    for c in range(scores.shape[1]):
        score, target = scores[:, c], targets[:, c]
        if enough[c]:
            chosen, out_of_fold[:, c] = choose_map(score, target)
            enough[c] = not chosen.falls
        if not enough[c]:
            chosen, out_of_fold[:, c] = pooled, pooled(score)
        maps.append(chosen)
        on_class()
    calibrated = np.stack([m(scores[:, c]) for c, m in enumerate(maps)], axis=1)
    of_all = choose_threshold(calibrated.ravel(), targets.ravel(), goal, value)
    classes = [
        ClassCalibration(
            maps[c],
            choose_threshold(calibrated[:, c], targets[:, c], goal, value) if enough[c] else of_all,
            int(num_positives[c]),
            bool(enough[c]),
        )
        for c in range(scores.shape[1])
    ]
    before, after = (reliability(some, targets).expected_error for some in (scores, out_of_fold))
    return ModelCalibration(tuple(classes), before, after, facts or {})


def choose_map(score: np.ndarray, target: np.ndarray) -> tuple[CalibrationMap, np.ndarray]:
    """The map of a class with the lowest cross-validated log loss, and `[N]` the calibrated scores of each fold by the
    map that the other folds gave."""
    methods = [_fit_none, _fit_temperature, _fit_platt]
    if target.sum() >= MIN_ISOTONIC:
        methods.append(_fit_isotonic)
    folds = _folds(target)
    best, best_loss, best_scores = _fit_none, np.inf, score
    for fit in methods:
        held_out = np.empty(len(score), np.float32)
        for fold in range(NUM_FOLDS):
            inside = folds != fold
            held_out[~inside] = fit(score[inside], target[inside])(score[~inside])
        loss = log_loss(held_out, target)
        if loss < best_loss:
            best, best_loss, best_scores = fit, loss, held_out
    return best(score, target), best_scores


def choose_threshold(score: np.ndarray, target: np.ndarray, goal: Goal, value: float) -> Threshold:
    """The threshold of a class, half-way between two of its scores.

    `f1`: the largest F1. `precision`: the highest recall with at least this precision; if there is none, the highest
    precision. `recall`: the highest precision with at least this recall.
    """
    order = np.argsort(-score, kind="stable")
    ordered = score[order].astype(np.float64)
    is_last = np.append(ordered[1:] < ordered[:-1], True)  # a decision at this score takes all equal ones
    hits = np.cumsum(target[order])[is_last]
    taken = np.flatnonzero(is_last) + 1
    cuts = ordered[is_last]
    precision, recall = hits / taken, hits / max(target.sum(), 1)
    lower = np.append(cuts[1:], 0.0)
    with np.errstate(invalid="ignore"):
        f1 = np.nan_to_num(2 * precision * recall / (precision + recall))
    reached = np.ones(len(cuts), bool)
    match goal:
        case "f1":
            best = int(np.argmax(f1))
        case "precision":
            reached = precision >= value
            best = int(np.flatnonzero(reached)[-1]) if reached.any() else int(np.lexsort((-recall, -precision))[0])
        case "recall":
            reached = recall >= value
            best = int(np.lexsort((-cuts, -np.where(reached, precision, -1)))[0])
    threshold = float((cuts[best] + lower[best]) / 2)
    return Threshold(threshold, float(precision[best]), float(recall[best]), bool(reached[best]))


def log_loss(score: np.ndarray, target: np.ndarray) -> float:
    """Mean negative log-likelihood of the decisions, with scores clipped by `CLIP`."""
    clipped = np.clip(score.astype(np.float64), CLIP, 1 - CLIP)
    return float(-np.mean(np.where(target > 0.5, np.log(clipped), np.log1p(-clipped))))


@dataclass(frozen=True)
class Reliability:
    """Decisions by bin of score. All bins have the same width; a bin without decisions has NaN."""

    edges: np.ndarray
    decisions: np.ndarray
    mean_score: np.ndarray
    share_true: np.ndarray
    """The share of decisions whose clip has the class. For calibrated scores it equals `mean_score`."""

    @property
    def expected_error(self) -> float:
        """Expected calibration error: the mean over decisions of |mean score − share of true ones| of their bin."""
        return float(np.nansum(np.abs(self.mean_score - self.share_true) * self.decisions) / self.decisions.sum())


def reliability(scores: np.ndarray, targets: np.ndarray, num_bins: int = 10) -> Reliability:
    """Decisions `[N, C]` by bin of score. A score on an edge belongs to the bin above; 1 belongs to the last bin."""
    sums = np.zeros((3, num_bins))
    for first in range(0, len(scores), CLIPS_AT_ONCE):
        score = scores[first : first + CLIPS_AT_ONCE].astype(np.float32).ravel()
        target = targets[first : first + CLIPS_AT_ONCE].ravel()
        in_bin = np.minimum((score * num_bins).astype(np.int64), num_bins - 1)
        for total, weights in zip(sums, (None, score, target), strict=True):
            total += np.bincount(in_bin, weights, minlength=num_bins)
    decisions, score_sum, num_true = sums
    with np.errstate(invalid="ignore"):
        means = score_sum / decisions, num_true / decisions
    return Reliability(np.linspace(0, 1, num_bins + 1), decisions.astype(np.int64), *means)


def _folds(target: np.ndarray) -> np.ndarray:
    """`[N]`: the fold of each clip. All folds have the same share of positives."""
    from sklearn.model_selection import StratifiedKFold

    folds = np.empty(len(target), np.int64)
    splits = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=0).split(target[:, None], target > 0.5)
    for fold, (_, held_out) in enumerate(splits):
        folds[held_out] = fold
    return folds


def _fit_none(score: np.ndarray, target: np.ndarray) -> CalibrationMap:
    return NONE


def _fit_temperature(score: np.ndarray, target: np.ndarray) -> CalibrationMap:
    from scipy.optimize import minimize_scalar

    logits = _logit(score.astype(np.float64))
    found = minimize_scalar(lambda x: log_loss(_sigmoid(logits / np.exp(x)), target), bounds=(-3, 3), method="bounded")
    return CalibrationMap("temperature", (float(np.exp(found.x)),))


def _fit_platt(score: np.ndarray, target: np.ndarray, weight: np.ndarray | None = None) -> CalibrationMap:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1e6)  # hardly regularised, yet finite for classes that are separated without error
    model.fit(_logit(score.astype(np.float64))[:, None], target > 0.5, sample_weight=weight)
    return CalibrationMap("platt", (float(model.coef_[0, 0]), float(model.intercept_[0])))


def _fit_isotonic(score: np.ndarray, target: np.ndarray) -> CalibrationMap:
    from sklearn.isotonic import IsotonicRegression

    model = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(score.astype(np.float64), target)
    return CalibrationMap("isotonic", (*map(float, model.X_thresholds_), *map(float, model.y_thresholds_)))


def _fit_pooled(scores: np.ndarray, targets: np.ndarray) -> CalibrationMap:
    """Platt's map of all classes together, or none if that would fall.

    Scores are rounded to float16, which has few different values, and equal ones are counted together.
    """
    values, place = np.unique(scores.astype(np.float16).ravel(), return_inverse=True)
    positives = np.bincount(place, targets.ravel(), minlength=len(values))
    negatives = np.bincount(place, minlength=len(values)) - positives
    both = np.concatenate([values, values]), np.repeat([1.0, 0.0], len(values))
    weight = np.concatenate([positives, negatives])
    fitted = _fit_platt(both[0][weight > 0], both[1][weight > 0], weight[weight > 0])
    return NONE if fitted.falls else fitted


def _logit(scores: np.ndarray) -> np.ndarray:
    clipped = np.clip(scores, CLIP, 1 - CLIP)
    return np.log(clipped) - np.log1p(-clipped)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def names_of_few(made: ModelCalibration, labels: LabelVocabulary) -> Sequence[str]:
    """The names of the classes without a calibration of their own (`ClassCalibration.is_own`)."""
    return [name for name, c in zip(labels.names, made.classes, strict=True) if not c.is_own]
