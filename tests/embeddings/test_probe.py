"""Probes find classes that embeddings separate."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.embeddings import probe
from pipeline.embeddings.labels import Labelled
from pipeline.embeddings.probe import choose_penalty, linear_scores, neighbour_scores
from pipeline.embeddings.stored import StoredEmbeddings
from tests.embeddings.made import write_embeddings

NUM_CLASSES = 3


def blobs(number: int, seed: int, spread: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Vectors that are the sum of their classes' directions and noise. The last class has no clip."""
    rng = np.random.default_rng(seed)
    targets = (rng.random((number, NUM_CLASSES)) < 0.4).astype(np.float32)
    targets[:, -1] = 0
    directions = np.eye(NUM_CLASSES, 8) * 3
    return targets @ directions + rng.normal(0, spread, (number, 8)) + 5, targets


def labelled(vectors: dict[str, np.ndarray], number: int, seed: int) -> Labelled:
    """Recordings in `vectors`, to which they are added, with two windows each."""
    made, targets = blobs(number, seed)
    names = [f"{seed}/{i}" for i in range(number)]
    shift = np.array([[0.2], [-0.2]])
    vectors |= {name: vector + shift for name, vector in zip(names, made, strict=True)}
    return Labelled(pa.array(names), targets)


def test_both_probes_find_classes_that_are_separated(tmp_path: Path):
    vectors: dict[str, np.ndarray] = {}
    train, evaluation = labelled(vectors, 120, 1), labelled(vectors, 60, 2)
    stored = StoredEmbeddings.open(write_embeddings(tmp_path / "tags", vectors))
    said: list[str] = []
    found = probe.probe(stored, train, evaluation, neighbours=5, num_resamples=100, say=said.append)
    assert said == ["120 training and 60 evaluation recordings, 8 dimensions"]
    assert [one.name for one in found] == ["linear probe", "nearest neighbours"]
    for one in found:
        assert one.metrics.map > 0.95
        low, high = one.intervals["map"]
        assert 0.8 < low <= one.metrics.map <= high + 0.01
        assert f"mAP {one.metrics.map:.4f} [" in one.line()
        as_json = one.to_dict()
        assert as_json["per_class"]["ap"][-1] is None
        assert as_json["map"] == one.metrics.map
        assert set(as_json["intervals"]) == {"map", "accuracy"}


def test_neighbours_vote_with_the_weights_of_their_similarity():
    train = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]])
    targets = np.array([[1, 0], [0, 1], [1, 1], [0, 0]], np.float32)
    scores = neighbour_scores(train, targets, np.array([[2.0, 0.0]]), 2)
    first, second = math.exp(0.0), math.exp((math.sqrt(0.5) - 1) / 0.07)
    np.testing.assert_allclose(scores, [[1.0, second / (first + second)]], rtol=1e-6)


def test_a_class_without_training_clips_has_one_score_for_all():
    vectors, targets = blobs(40, 1)
    scores = linear_scores(vectors, targets, vectors[:5], 0.1)
    assert scores[:, -1].tolist() == [0.0] * 5
    assert len(set(scores[:, 0].tolist())) == 5


def test_the_penalty_is_chosen_on_clips_that_the_probe_has_not_seen():
    rng = np.random.default_rng(0)
    signal, targets = blobs(100, 1, spread=1.5)
    noise = rng.normal(0, 1, (100, 300))  # of which a probe with little regularisation learns single clips
    assert choose_penalty(np.hstack([signal - 5, noise]), targets, (0.001, 100.0)) == 0.001
    assert choose_penalty(signal[:4], targets[:4]) == probe.PENALTIES[0]


@pytest.mark.parametrize("num_resamples", [0, 10])
def test_intervals_are_left_out_where_they_are_not_wanted(num_resamples: int, tmp_path: Path):
    vectors: dict[str, np.ndarray] = {}
    train, evaluation = labelled(vectors, 20, 1), labelled(vectors, 10, 2)
    stored = StoredEmbeddings.open(write_embeddings(tmp_path / "tags", vectors))
    found = probe.probe(stored, train, evaluation, neighbours=50, num_resamples=num_resamples, say=lambda _: None)
    assert [bool(one.intervals) for one in found] == [num_resamples > 0] * 2
    assert found[1].setting == "K 20"
