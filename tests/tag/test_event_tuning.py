"""Settings and thresholds of events are found again from recordings whose events are known."""

from pathlib import Path

import numpy as np
import pytest

from ast_core.errors import DataError
from pipeline.tag.event_tuning import MIN_EVENTS, Known, num_found, read_truth, tune
from pipeline.tag.events import EventSettings, Timeline, window_events
from tests.tag import stub

FRAME_S = 0.1


def line(length_s: float, *parts: tuple[int, float, float, float]) -> Timeline:
    """Scores of 0.02 of two classes, and of the given class, start, end and score."""
    start_s = np.arange(0, length_s, FRAME_S)
    scores = np.full((len(start_s), 2), 0.02, np.float32)
    for label, begin_s, end_s, score in parts:
        scores[(start_s >= begin_s - 0.01) & (start_s < end_s - 0.01), label] = score
    return Timeline(start_s, start_s + FRAME_S, scores)


def test_an_event_is_found_if_its_onset_and_offset_are_near():
    truth = [(10.0, 14.0)]
    assert num_found(truth, [(10.4, 12.1)]) == 1  # the end may be off by a half of its length
    assert num_found(truth, [(10.6, 14.0)]) == 0
    assert num_found(truth, [(10.0, 11.9)]) == 0
    assert num_found([(10.0, 10.5)], [(10.1, 10.9)]) == 1
    assert num_found(truth, [(10.0, 14.0), (10.1, 14.0)]) == 1


def test_events_with_gaps_glitches_and_a_quiet_class_are_found_after_tuning():
    parts, truth = [], []
    for i in range(8):
        begin_s = 20.0 * i + 2
        parts += [(0, begin_s, begin_s + 2, 0.9), (0, begin_s + 2.8, begin_s + 5, 0.9)]  # a gap of 0.8 s
        parts += [(0, begin_s + 9, begin_s + 9.5, 0.95)]  # a glitch of half a second
        parts += [(0, begin_s + 12, begin_s + 15, 0.4)]  # another sound, for which the other class would be loud
        parts += [(1, begin_s + 5, begin_s + 9, 0.3)]  # a class with low scores
        truth += [(begin_s, begin_s + 5, 0), (begin_s + 5, begin_s + 9, 1)]
    scores = line(162.0, *parts)
    found = tune([Known(scores, truth)], np.full(2, 0.5))
    assert found.facts == {"recordings": 1, "events": 16, "collar_s": 0.5, "f1": 1.0, "classes_with_few": 0}
    settings = EventSettings.of(found)
    events = window_events(scores.start_s, scores.end_s, scores.scores_SC, np.array(found.thresholds), settings)
    assert len(events) == 16
    by_default = window_events(scores.start_s, scores.end_s, scores.scores_SC, np.full(2, 0.5), EventSettings())
    assert len(by_default) == 24
    assert found.thresholds[1] < 0.3 < 0.4 < found.thresholds[0]
    assert EventSettings.of(found, merge_s=0.1) == EventSettings(found.release, found.median_s, 0.1, found.min_s)


def test_a_class_with_few_events_takes_the_threshold_of_all_and_one_without_keeps_its_own():
    few = [(0, 10.0 * i, 10.0 * i + 4, 0.9) for i in range(MIN_EVENTS - 1)]
    known = Known(line(60.0, *few), [(s, e, c) for c, s, e, _ in few])
    found = tune([known], np.array([0.4, 0.7]))
    assert found.facts["classes_with_few"] == 1
    assert found.facts["f1"] == 1.0
    assert found.thresholds[1] == 0.7


def test_a_list_of_events_is_read_and_its_faults_are_named(tmp_path: Path):
    file = tmp_path / "events.csv"
    head = "path,start_s,end_s,label\n"
    file.write_text(f"{head}a.wav,1.5,2,low\nb.wav,,,\na.wav,3,4,high\n")
    assert read_truth(str(file), stub.LABELS) == {
        f"{tmp_path}/a.wav": [(1.5, 2.0, 0), (3.0, 4.0, 2)],
        f"{tmp_path}/b.wav": [],
    }
    for rows, said in (
        ("a.wav,1,2,owl", "line 2: the model has no class 'owl'"),
        ("a.wav,2,1,low", "line 2: an event from 2 s to 1 s"),
        ("a.wav,x,1,low", "line 2: start_s is 'x', not a number of seconds"),
        ("a.wav,,,", "has no event; give columns path, start_s, end_s, label"),
    ):
        file.write_text(f"{head}{rows}\n")
        with pytest.raises(DataError, match=said):
            read_truth(str(file), stub.LABELS)
    file.write_text("path,label\na.wav,low\n")
    with pytest.raises(DataError, match="needs columns path, start_s, end_s, label"):
        read_truth(str(file), stub.LABELS)
