"""Probes: how well simple classifiers separate classes by a model's embeddings, which the probes do not change.

The linear probe is a logistic regression per class. Nearest neighbours are the weighted vote of Wu et al., 2018
(https://arxiv.org/abs/1805.01978): each of the K nearest training clips votes for its labels with exp(cosine / 0.07).
Both see embeddings whose dimensions have the mean 0 and the standard deviation 1 over the training clips.

N training clips, M clips to score, D dimensions, C classes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ast_core.bootstrap import basic_interval, resampled_mean
from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary
from ast_core.metrics import METRICS, TaggingMetrics, bootstrap_map, per_class_columns, tagging_metrics
from pipeline.embeddings.labels import Labelled
from pipeline.embeddings.nearest import unit_vectors
from pipeline.embeddings.stored import StoredEmbeddings
from pipeline.text_table import text_table

TEMPERATURE = 0.07

PENALTIES = (0.001, 0.01, 0.1, 1.0)
"""Values of scikit-learn's C that the linear probe chooses from: the one with the highest mAP on held-out clips."""

HELD_OUT = 0.2
"""Share of the training clips that are held out for this choice."""

MAX_CHOICE_CLIPS = 10_000
"""Training clips with which the choice is made."""

MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class Probed:
    """The results of a probe on the clips to score."""

    name: str
    setting: str
    scores_MC: np.ndarray
    metrics: TaggingMetrics
    intervals: Mapping[str, tuple[float, float]]
    """Intervals of 95 % of the metrics that have one, by name."""

    def line(self) -> str:
        """The figures as one line."""
        parts = []
        for metric in METRICS.values():
            words = f"{metric.title} {self.metrics.values[metric.name]:.4f}"
            if bounds := self.intervals.get(metric.name):
                words += f" [{bounds[0]:.4f}, {bounds[1]:.4f}]"
            parts.append(words)
        return f"{self.name} ({self.setting}): " + "  ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """The figures for a JSON file, with null where one is undefined."""
        of_class = {
            column: [value if math.isfinite(value) else None for value in values.tolist()]
            for column, values in self.metrics.per_class.items()
        }
        scalars = {name: value if math.isfinite(value) else None for name, value in self.metrics.scalars().items()}
        intervals = {name: list(bounds) for name, bounds in self.intervals.items() if np.isfinite(bounds).all()}
        return {"name": self.name, "setting": self.setting, **scalars, "intervals": intervals, "per_class": of_class}


def probe(
    embeddings: StoredEmbeddings,
    train: Labelled,
    evaluation: Labelled,
    *,
    neighbours: int,
    num_resamples: int,
    say: Callable[[str], Any] = print,
) -> list[Probed]:
    """Both probes, trained on the recordings `train` and scored on `evaluation`.

    Args:
        num_resamples: of the bootstrap for the intervals; 0 is none.

    Raises:
        DataError: a recording has no embedding, or is in both.
    """
    from sklearn.preprocessing import StandardScaler

    if both := sorted({*train.recordings.to_pylist()} & {*evaluation.recordings.to_pylist()}):
        raise DataError(
            f"{len(both):,} recordings are in a split to train on and in one to score, {both[0]} for one; a probe is "
            "scored on recordings that it has not seen"
        )
    trained_on = {_file(name) for name in train.recordings.to_pylist()}
    if shared := [name for name in evaluation.recordings.to_pylist() if _file(name) in trained_on]:
        say(
            f"warning: {len(shared):,} of the sections to score are of recordings that have sections to train on "
            f"({shared[0]} for one); overlapping ones make the figures too high"
        )
    scaler = StandardScaler()
    train_ND = scaler.fit_transform(embeddings.means(train.recordings))
    eval_MD = scaler.transform(embeddings.means(evaluation.recordings))
    say(f"{len(train_ND):,} training and {len(eval_MD):,} evaluation recordings, {train_ND.shape[1]:,} dimensions")
    penalty = choose_penalty(train_ND, train.targets_NC)
    number = min(neighbours, len(train_ND))
    scored = (
        ("linear probe", f"C {penalty:g}", linear_scores(train_ND, train.targets_NC, eval_MD, penalty)),
        ("nearest neighbours", f"K {number}", neighbour_scores(train_ND, train.targets_NC, eval_MD, number)),
    )
    return [_probed(*one, evaluation.targets_NC, num_resamples) for one in scored]


def _file(name: str) -> str:
    """The recording that a section is of."""
    return name.partition("#t=")[0]


def choose_penalty(vectors_ND: np.ndarray, targets_NC: np.ndarray, penalties: Sequence[float] = PENALTIES) -> float:
    """The value of C whose linear probe has the highest mAP on training clips that it has not seen.

    With fewer than ten training clips, or no class among those held out, it is the first.
    """
    order = np.random.default_rng(0).permutation(len(vectors_ND))[:MAX_CHOICE_CLIPS]
    num_held_out = round(HELD_OUT * len(order))
    held_out, seen = order[:num_held_out], order[num_held_out:]
    if num_held_out < 2 or not targets_NC[held_out].any():
        return penalties[0]
    maps = [
        tagging_metrics(
            linear_scores(vectors_ND[seen], targets_NC[seen], vectors_ND[held_out], penalty), targets_NC[held_out]
        ).map
        for penalty in penalties
    ]
    return penalties[int(np.argmax(maps))]


def linear_scores(train_ND: np.ndarray, targets_NC: np.ndarray, eval_MD: np.ndarray, penalty: float) -> np.ndarray:
    """Scores `[M, C]` of logistic regressions with scikit-learn's `C=penalty`.

    A class that all training clips have, or none, gets that share as its score of all clips.
    """
    from sklearn.linear_model import LogisticRegression

    scores = np.tile(targets_NC.mean(axis=0, dtype=np.float64), (len(eval_MD), 1))
    for c in np.flatnonzero((scores[0] > 0) & (scores[0] < 1)):
        model = LogisticRegression(C=penalty, max_iter=MAX_ITERATIONS).fit(train_ND, targets_NC[:, c] > 0.5)
        scores[:, c] = model.predict_proba(eval_MD)[:, 1]
    return scores


def neighbour_scores(train_ND: np.ndarray, targets_NC: np.ndarray, eval_MD: np.ndarray, number: int) -> np.ndarray:
    """Scores `[M, C]`: the share of the votes of the `number` nearest training clips."""
    from sklearn.neighbors import NearestNeighbors

    model = NearestNeighbors(n_neighbors=number, metric="cosine", algorithm="brute").fit(unit_vectors(train_ND))
    distance_MK, at_MK = model.kneighbors(unit_vectors(eval_MD))
    votes_MK = np.exp(-distance_MK / TEMPERATURE)
    votes_MK /= votes_MK.sum(axis=1, keepdims=True)
    scores = np.zeros((len(eval_MD), targets_NC.shape[1]))
    for k in range(number):
        scores += votes_MK[:, k, None] * targets_NC[at_MK[:, k]]
    return scores


def _probed(name: str, setting: str, scores: np.ndarray, targets: np.ndarray, num_resamples: int) -> Probed:
    metrics = tagging_metrics(scores, targets)
    if not num_resamples:
        return Probed(name, setting, scores, metrics, {})
    hits = scores.argmax(axis=1) == targets.argmax(axis=1)
    intervals = {
        "map": bootstrap_map(scores, targets, num_resamples=num_resamples),
        "accuracy": basic_interval(metrics.accuracy, resampled_mean(hits, num_resamples=num_resamples)),
    }
    return Probed(name, setting, scores, metrics, intervals)


def per_class_table(probed: Probed, labels: LabelVocabulary, evaluation: Labelled) -> str:
    """The classes that have recordings to score, highest AP first, for a terminal."""
    counts = evaluation.targets_NC.sum(axis=0).astype(int)
    columns = per_class_columns()
    order = np.argsort(-probed.metrics.per_class[columns[0].column], kind="stable")  # NaN is last
    rows = [
        (labels.names[c], *(_shown(probed.metrics.per_class[each.column][c]) for each in columns), f"{counts[c]:,}")
        for c in order
        if counts[c]
    ]
    return text_table(["class", *(each.title for each in columns), "clips"], rows, "l" + "r" * (len(columns) + 1))


def _shown(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "–"
