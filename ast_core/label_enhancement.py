"""Label enhancement with AudioSet's ontology, as in PSLA (https://github.com/YuanGongND/psla).

AudioSet's labels lack classes that can be heard: a clip of `Speech` may lack `Male speech` below it, or one of `Bark`
lack `Dog` above it. A class is added if it is related to a label of the clip and a teacher scores it higher than a
threshold of that class.

N clips, C classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary


def related_classes(ontology: Sequence[Mapping[str, Any]], labels: LabelVocabulary) -> np.ndarray:
    """bool `[C, C]`: whether class j may be added to a clip of class i, as its child or as one of its ancestors.

    `ontology` is the content of AudioSet's `ontology.json`. Abstract classes relate nothing. A class that is not in the
    ontology, as five of FSD50K's are not, is related to none.

    Raises:
        DataError: it is not such a content, or has none of the classes.
    """
    try:
        children = {entry["id"]: entry["child_ids"] for entry in ontology if entry["restrictions"] != ["abstract"]}
    except (TypeError, KeyError) as err:
        raise DataError(
            f"this is not AudioSet's ontology.json, whose entries have id, child_ids, restrictions: {err}"
        ) from err
    index_of = {mid: i for i, mid in enumerate(labels.mids)}
    if index_of.keys().isdisjoint(children):
        raise DataError("the ontology has none of these classes; their MIDs must be those of AudioSet")
    related = np.zeros((len(labels), len(labels)), bool)
    for mid in index_of.keys() & children.keys():
        for child in children[mid]:
            if child in index_of:
                related[index_of[mid], index_of[child]] = True
        for descendant in _descendants(mid, children) & index_of.keys():
            related[index_of[descendant], index_of[mid]] = True
    np.fill_diagonal(related, False)
    return related


def _descendants(mid: str, children: Mapping[str, Sequence[str]]) -> set[str]:
    found: set[str] = set()
    ahead = [mid]
    while ahead:
        new = set(children.get(ahead.pop(), ())) - found
        found |= new
        ahead += new
    return found


def class_thresholds(target_NC: np.ndarray, scores_NC: np.ndarray, percentile: float | None) -> np.ndarray:
    """`[C]`: the mean, or a percentile, of a class's scores over the clips that have it. NaN if no clip has it."""
    thresholds = np.full(target_NC.shape[1], np.nan)
    for c in np.flatnonzero(target_NC.any(axis=0)):
        own = scores_NC[target_NC[:, c], c].astype(np.float64)
        thresholds[c] = own.mean() if percentile is None else np.percentile(own, percentile)
    return thresholds


def enhanced(
    target_NC: np.ndarray, scores_NC: np.ndarray, related_CC: np.ndarray, thresholds_C: np.ndarray
) -> np.ndarray:
    """bool `[N, C]`: the labels, with each related class whose score exceeds its threshold."""
    added_NC = np.zeros_like(target_NC)
    for c in range(target_NC.shape[1]):
        has_related_N = target_NC[:, related_CC[:, c]].any(axis=1)
        added_NC[:, c] = has_related_N & (scores_NC[:, c] > thresholds_C[c])
    return target_NC | added_NC
