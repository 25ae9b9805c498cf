"""Events from scores, against cases that were computed by hand."""

import numpy as np
import pytest

from ast_core.errors import ConfigError
from pipeline.tag.events import (
    EventSettings,
    Runs,
    Timeline,
    events_of,
    joined,
    median_filter,
    owned_frames,
    runs_above,
    timeline,
    window_events,
)

HALF = np.array([0.5])


def events(
    scores: list[float], *, window_s: float = 1.0, hop_s: float = 1.0, threshold: float = 0.5, **settings: float
) -> list[tuple[float, float, float, float]]:
    """Start, end, peak and mean of the events of one class."""
    start_s = np.arange(len(scores)) * hop_s
    found = window_events(
        start_s,
        start_s + window_s,
        np.array(scores, np.float32)[:, None],
        np.array([threshold]),
        EventSettings(**{"release": 1.0} | settings),
    )
    return [
        tuple(round(float(value), 3) for value in row)
        for row in zip(found.start_s, found.end_s, found.peak, found.mean, strict=True)
    ]


def test_neighbouring_windows_above_the_threshold_are_one_event():
    assert events([0.1, 0.6, 0.8, 0.1, 0.7]) == [(1, 3, 0.8, 0.7), (4, 5, 0.7, 0.7)]
    assert events([0.5]) == [(0, 1, 0.5, 0.5)]
    assert events([0.4, 0.3]) == []
    assert events([]) == []


def test_overlapping_windows_report_an_event_once_where_they_agree():
    """Windows of 2 s each second; only the second holds 1 to 3 s. Segments have the means 0, .5, .5, 0."""
    assert events([0.0, 1.0, 0.0], window_s=2.0) == [(1, 3, 0.5, 0.5)]
    assert events([0.0, 1.0, 1.0, 0.0], window_s=2.0, threshold=0.9) == [(2, 3, 1.0, 1.0)]


def test_an_event_goes_on_down_to_its_release():
    scores = [0.3, 0.45, 0.8, 0.45, 0.3, 0.45]
    assert events(scores, release=0.8) == [(1, 4, 0.8, 0.567)]
    assert events(scores, release=1.0) == [(2, 3, 0.8, 0.8)]


def test_gaps_up_to_a_length_are_closed_and_short_events_dropped():
    scores = [0.9, 0.1, 0.9, 0.1, 0.1, 0.9]
    assert events(scores) == [(0, 1, 0.9, 0.9), (2, 3, 0.9, 0.9), (5, 6, 0.9, 0.9)]
    assert events(scores, merge_s=1.0) == [(0, 3, 0.9, 0.9), (5, 6, 0.9, 0.9)]
    assert events(scores, merge_s=1.0, min_s=2.0) == [(0, 3, 0.9, 0.9)]


def test_a_median_filter_removes_a_single_window_and_fills_one():
    assert events([0.1, 0.9, 0.1, 0.1, 0.9, 0.9, 0.1, 0.9, 0.9], median_s=3.0) == [(4, 9, 0.9, 0.9)]
    np.testing.assert_array_equal(median_filter(np.array([[1], [0], [2]]), 3)[:, 0], [1, 1, 2])


def test_each_class_has_its_own_threshold_and_events_come_in_order_of_time():
    scores = np.array([[0.6, 0.1], [0.1, 0.3], [0.6, 0.1]], np.float32)
    found = window_events(np.arange(3.0), np.arange(3.0) + 1, scores, np.array([0.5, 0.2]), EventSettings(release=1))
    assert list(zip(found.label, found.start_s, strict=True)) == [(0, 0), (1, 1), (0, 2)]


def test_a_gap_in_the_recording_ends_an_event():
    line = Timeline(np.array([0.0, 1.0, 60.0]), np.array([1.0, 2.0, 61.0]), np.array([[0.9], [0.9], [0.9]]))
    found = events_of(runs_above(line, HALF), HALF, EventSettings())
    assert list(zip(found.start_s, found.end_s, strict=True)) == [(0, 2), (60, 61)]


def test_a_last_window_that_overlaps_more_gives_no_second_event():
    """The last window ends with the recording at 2.5 s."""
    start_s, end_s = np.array([0.0, 1.0, 1.5]), np.array([1.0, 2.0, 2.5])
    line = timeline(start_s, end_s, np.array([[0.2], [0.6], [0.8]]))
    np.testing.assert_allclose(line.start_s, [0, 1, 1.5, 2])
    np.testing.assert_allclose(line.scores_SC[:, 0], [0.2, 0.6, 0.7, 0.8], rtol=1e-6)
    assert len(window_events(start_s, end_s, np.array([[0.2], [0.6], [0.8]]), HALF, EventSettings())) == 1


def test_frames_count_only_in_the_time_that_their_window_owns():
    frames = np.array([[0.9], [0.9], [0.1], [0.9]])
    first = owned_frames(0.0, 0.0, 3.0, 1.0, frames, 0.0)
    np.testing.assert_allclose(first.start_s, [0, 1, 2])
    second = owned_frames(2.0, 3.0, 6.0, 1.0, frames, 0.0)
    np.testing.assert_allclose([second.start_s[0], second.end_s[-1]], [3, 6])
    runs = Runs.together([runs_above(first, HALF), runs_above(second, HALF)])
    found = events_of(runs, HALF, EventSettings(release=1))
    assert list(zip(found.start_s, found.end_s, strict=True)) == [(0, 2), (3, 4), (5, 6)]


def test_runs_of_neighbouring_windows_are_joined_at_their_border():
    runs = Runs(
        *map(np.array, ([0, 0, 1], [0.0, 1.0, 1.0], [1.0, 2.0, 2.0], [0.6, 0.9, 0.7], [0.6, 0.9, 0.7], [1.0] * 3))
    )
    found = joined(runs, 0.0)
    assert found.label.tolist() == [0, 1]
    assert (found.start_s[0], found.end_s[0], found.peak[0], found.mean[0]) == (0.0, 2.0, 0.9, 0.75)


@pytest.mark.parametrize(
    ("name", "value", "allowed"), [("release", 0.0, "more than 0"), ("merge_s", -1.0, "0 to 3600 s")]
)
def test_settings_that_are_not_allowed_name_their_option(name: str, value: float, allowed: str):
    with pytest.raises(ConfigError, match=f"^--{name.replace('_', '-')} is {value:g}; use {allowed}"):
        EventSettings(**{name: value})
