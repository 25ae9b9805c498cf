"""The tags of a recording as JSON.

W windows, C classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ast_core.labels import LabelVocabulary
from pipeline.serve.refusals import OWN_WORDS
from pipeline.tag.collect import Tagged

MAX_EVENTS = 1000
"""Events of an answer."""


def tags_of(tagged: Tagged, labels: LabelVocabulary, *, top: int, window_scores: bool) -> dict[str, Any]:
    """The answer for a recording with at least one window.

    Args:
        top: classes that are listed.
        window_scores: whether each window has its own top classes.
    """
    highest_C = tagged.scores_WC.max(axis=0)
    events = tagged.events
    answer: dict[str, Any] = {
        "end_s": _rounded(tagged.end_s.max()),
        "classes": _classes(highest_C, labels, top),
        "events": [
            {
                "label": labels.names[label],
                "mid": labels.mids[label],
                "start_s": _rounded(start_s),
                "end_s": _rounded(end_s),
                "peak": _rounded(peak, 4),
                "mean": _rounded(mean, 4),
            }
            for label, start_s, end_s, peak, mean in zip(
                events.label[:MAX_EVENTS].tolist(), events.start_s, events.end_s, events.peak, events.mean, strict=False
            )
        ],
        "num_events": len(events),
        "lost": [
            {
                "start_s": _rounded(part.begin_s),
                "end_s": None if part.end_s is None else _rounded(part.end_s),
                "reason": str(part.reason),
                "message": OWN_WORDS.get(part.reason, part.message),
            }
            for part in tagged.lost
        ],
    }
    if window_scores:
        answer["windows"] = [
            {"start_s": _rounded(start_s), "end_s": _rounded(end_s), "classes": _classes(scores_C, labels, top)}
            for start_s, end_s, scores_C in zip(tagged.start_s, tagged.end_s, tagged.scores_WC, strict=True)
        ]
    return answer


def _classes(scores_C: np.ndarray, labels: LabelVocabulary, top: int) -> Sequence[dict[str, Any]]:
    """The classes with the highest scores."""
    best = np.argsort(-scores_C, kind="stable")[:top].tolist()
    return [{"label": labels.names[c], "mid": labels.mids[c], "score": _rounded(scores_C[c], 4)} for c in best]


def _rounded(value: float, digits: int = 3) -> float:
    return round(float(value), digits)
