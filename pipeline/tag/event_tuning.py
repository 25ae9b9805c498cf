"""Event settings and thresholds that find the events of recordings whose events are known.

An event is found if one of its class begins within `COLLAR_S` of its start, and ends within `COLLAR_S` or a half of its
length of its end, as sed_eval defines it. F1 is that of all events. For each combination of release, median, merge and
shortest length, one threshold for all classes is chosen, and for each class with enough events one of its own.

R recordings, C classes, K candidates of a threshold.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ast_core.calibration import EventTuning
from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary
from ast_core.text_files import read_table
from pipeline import storage
from pipeline.prepare.clip import ClipError
from pipeline.prepare.sources.checks import folder_of, media_in, seconds
from pipeline.prepare.sources.web_lists import read_text
from pipeline.recording_names import recording_name
from pipeline.tag.events import EventSettings, Runs, Timeline, events_of, runs_above

COLLAR_S = 0.5
SHARE_OF_LENGTH = 0.5
"""Share of an event's length by which its end may be off."""

MIN_EVENTS = 5
"""Events that a class needs for a threshold of its own."""

RELEASES = (0.3, 0.5, 0.7, 1.0)
MEDIANS_S = (0.0, 0.3, 0.6, 1.0)
MERGES_S = (0.0, 0.3, 1.0, 2.0)
SHORTEST_S = (0.0, 0.3, 0.6, 1.0)
NUM_CANDIDATES = 15

COLUMNS = ("path", "start_s", "end_s", "label")
NEEDS = "columns path, start_s, end_s, label"

KnownEvent = tuple[float, float, int]
"""Start and end in seconds, and class."""


@dataclass(frozen=True)
class Known:
    """A recording whose events are known."""

    line: Timeline
    """Scores over time, not filtered."""
    events: Sequence[KnownEvent]


def read_truth(uri: str, labels: LabelVocabulary) -> dict[str, list[KnownEvent]]:
    """The events of each recording that a list names. A recording without events has a row without a label.

    Raises:
        DataError: a row has an unknown label, no times, or no recording.
    """
    found: dict[str, list[KnownEvent]] = {}
    uri_of: dict[str, str] = {}  # a path may be spelled in several ways
    rows = read_table(read_text(uri, uri), origin=uri, columns=COLUMNS, is_header=set(COLUMNS).issubset, needs=NEEDS)
    for line, row in rows:
        try:
            media = storage.absolute(media_in(folder_of(uri), row["path"], "path"))
            events = found.setdefault(uri_of.setdefault(recording_name(media), media), [])
            if not row["label"]:
                continue
            start_s, end_s = seconds(row["start_s"], "start_s"), seconds(row["end_s"], "end_s")
        except ClipError as err:
            raise DataError(f"{uri}, line {line}: {err.message}") from err
        if not 0 <= start_s < end_s:
            raise DataError(f"{uri}, line {line}: an event from {start_s:g} s to {end_s:g} s")
        if row["label"] not in labels.index_of:
            raise DataError(f"{uri}, line {line}: the model has no class {row['label']!r}")
        events.append((start_s, end_s, labels.index_of[row["label"]]))
    if not any(found.values()):
        raise DataError(f"{uri} has no event; give {NEEDS}")
    return found


def tune(known: Sequence[Known], thresholds_C: np.ndarray, on_step: Callable[[], None] = lambda: None) -> EventTuning:
    """The settings and thresholds with the largest F1 of all events.

    Args:
        known: recordings with at least one event in all.
        thresholds_C: thresholds of classes without any event, which nothing is known of.
        on_step: called after each median filter that is tried.
    """
    classes = sorted({label for recording in known for _, _, label in recording.events})
    truth = [[[e[:2] for e in one.events if e[2] == c] for c in classes] for one in known]
    num_events = np.array([sum(len(of_recording[i]) for of_recording in truth) for i in range(len(classes))])
    candidates_K = np.linspace(0, 1, NUM_CANDIDATES + 2)[1:-1]
    best: tuple[float, EventSettings, np.ndarray] | None = None
    for median_s in MEDIANS_S:
        lines = [_of_classes(one.line.filtered(median_s), classes) for one in known]
        runs = {
            release: [[runs_above(line, np.full(len(classes), release * t)) for line in lines] for t in candidates_K]
            for release in RELEASES
        }
        for release, merge_s, min_s in itertools.product(RELEASES, MERGES_S, SHORTEST_S):
            settings = EventSettings(release, median_s, merge_s, min_s)
            counts = [
                _counts(truth, some, threshold, settings)
                for threshold, some in zip(candidates_K, runs[release], strict=True)
            ]
            hits_KC, found_KC = np.array(counts).transpose(1, 0, 2)
            for_all = int(np.argmax(_f1(hits_KC.sum(axis=1), found_KC.sum(axis=1), num_events.sum())))
            chosen_C = np.where(num_events >= MIN_EVENTS, _best_of(hits_KC, found_KC, num_events, for_all), for_all)
            columns = np.arange(len(classes))
            hits, found = hits_KC[chosen_C, columns].sum(), found_KC[chosen_C, columns].sum()
            reached = float(_f1(hits, found, num_events.sum()))
            if best is None or reached > best[0]:
                best = reached, settings, candidates_K[chosen_C]
        on_step()
    assert best is not None
    f1, settings, of_classes = best
    thresholds = thresholds_C.astype(float).copy()
    thresholds[classes] = of_classes
    facts = {"recordings": len(known), "events": int(num_events.sum()), "collar_s": COLLAR_S, "f1": f1}
    few = int((num_events < MIN_EVENTS).sum())
    return EventTuning(**vars(settings), thresholds=tuple(thresholds.tolist()), facts=facts | {"classes_with_few": few})


def _best_of(hits_KC: np.ndarray, found_KC: np.ndarray, num_events_C: np.ndarray, for_all: int) -> np.ndarray:
    """`[C]`: the candidate with the largest F1 of each class; of equal ones the nearest to that for all classes."""
    f1_KC = _f1(hits_KC, found_KC, num_events_C)
    distance = np.abs(np.arange(len(f1_KC)) - for_all)
    order = np.argsort(distance, kind="stable")
    best: np.ndarray = order[np.argmax(f1_KC[order], axis=0)]
    return best


def _f1(hits: np.ndarray, found: np.ndarray, num_events: np.ndarray) -> np.ndarray:
    return 2 * hits / (found + num_events)


def _of_classes(line: Timeline, classes: Sequence[int]) -> Timeline:
    return Timeline(line.start_s, line.end_s, line.scores_SC[:, classes])


def _counts(
    truth_RC: Sequence[Sequence[Sequence[tuple[float, float]]]],
    runs: Sequence[Runs],
    threshold: float,
    settings: EventSettings,
) -> tuple[np.ndarray, np.ndarray]:
    """`[C]`: the true events that are found, and all events that are found."""
    num_classes = len(truth_RC[0])
    hits, found = np.zeros(num_classes, int), np.zeros(num_classes, int)
    for truth_C, of_recording in zip(truth_RC, runs, strict=True):
        events = events_of(of_recording, np.full(num_classes, threshold), settings)
        found += np.bincount(events.label, minlength=num_classes)
        for c, truth in enumerate(truth_C):
            own = events.label == c
            hits[c] += num_found(truth, list(zip(events.start_s[own], events.end_s[own], strict=True)))
    return hits, found


def num_found(truth: Sequence[tuple[float, float]], events: Sequence[tuple[float, float]]) -> int:
    """How many events of a class are found, each by another one of `events`."""
    left, hits = sorted(events), 0
    for start_s, end_s in sorted(truth):
        off_s = max(COLLAR_S, SHARE_OF_LENGTH * (end_s - start_s))
        for event in left:
            if abs(event[0] - start_s) <= COLLAR_S and abs(event[1] - end_s) <= off_s:
                left.remove(event)
                hits += 1
                break
    return hits
