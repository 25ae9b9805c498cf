"""Label enhancement: which classes the ontology relates, the thresholds, and what is added."""

import json

import numpy as np
import pytest

from ast_core.errors import DataError
from ast_core.label_enhancement import class_thresholds, enhanced, related_classes
from ast_core.labels import LabelVocabulary, audioset_labels
from tests.reference import AUDIOSET, needs_shared

LABELS = LabelVocabulary.from_names(["animal", "dog", "bark", "tool", "unknown"])


def entry(mid: str, *child_ids: str, restrictions: tuple[str, ...] = ()) -> dict:
    return {"id": mid, "child_ids": list(child_ids), "restrictions": list(restrictions)}


ONTOLOGY = [
    entry("everything", "animal", "tool", restrictions=("abstract",)),
    entry("animal", "dog"),
    entry("dog", "woof"),
    entry("woof", "bark", "growl"),  # not a class of LABELS
    entry("bark"),
    entry("tool"),
]


def test_children_and_all_ancestors_are_related():
    related = related_classes(ONTOLOGY, LABELS)
    pairs = {(LABELS.names[i], LABELS.names[j]) for i, j in zip(*np.nonzero(related), strict=True)}
    # bark is no direct child of dog, so a clip of dog does not get it; a clip of bark gets dog and animal.
    assert pairs == {("animal", "dog"), ("dog", "animal"), ("bark", "dog"), ("bark", "animal")}


def test_a_related_class_is_added_above_its_threshold_only():
    target = np.array([[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 1, 1, 0]], bool)
    scores = np.array([0.2, 0.6, 0.41, 0.39, 0.9], np.float32)[:, None].repeat(5, axis=1)
    thresholds = class_thresholds(target, scores, None)
    np.testing.assert_allclose(thresholds, [0.4, 0.4, 0.9, 0.9, np.nan], atol=1e-6)
    new = enhanced(target, scores, related_classes(ONTOLOGY, LABELS), thresholds)
    added = [(int(clip), LABELS.names[c]) for clip, c in zip(*np.nonzero(new & ~target), strict=True)]
    assert added == [(2, "dog"), (4, "animal"), (4, "dog")]
    assert (new | target == new).all()


def test_a_threshold_may_be_a_percentile():
    target, scores = np.ones((101, 1), bool), np.linspace(0, 1, 101)[:, None]
    assert class_thresholds(target, scores, 25) == pytest.approx(0.25)


@pytest.mark.parametrize("ontology", [{"id": 1}, [{"id": "dog"}], [entry("cat")]])
def test_another_file_than_the_ontology_is_refused(ontology: object):
    with pytest.raises(DataError, match="ontology"):
        related_classes(ontology, LABELS)


@needs_shared
def test_the_relations_of_audiosets_classes():
    labels = audioset_labels()
    related = related_classes(json.loads((AUDIOSET / "ontology.json").read_text()), labels)
    by_name = {name: {labels.names[j] for j in np.flatnonzero(related[i])} for i, name in enumerate(labels.names)}
    assert by_name["Bark"] == {"Dog", "Domestic animals, pets", "Animal"}
    assert {"Male speech, man speaking", "Child speech, kid speaking"} < by_name["Speech"]
