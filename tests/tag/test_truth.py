"""Truth by construction: sounds at known times, tagged by a stub with known scores."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.tag.events import EventSettings
from pipeline.tag.inputs import find_inputs
from pipeline.tag.work import settings_for, tag_here
from tests import fakes
from tests.tag import stub

COLLAR_S = 0.5


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[stub.Event]]:
    waveform, truth = stub.mixture(300.0, 30)
    return fakes.write_media(tmp_path_factory.mktemp("mix") / "mix.flac", waveform), truth


def found_in(
    path: Path, *, has_frames: bool, hop_s: float, release: float = 0.5
) -> tuple[list[stub.Event], list[stub.Event]]:
    """The events of a recording, and its windows above the threshold as an output without merging would list them."""
    members = [stub.member(100, has_frames=has_frames)]
    settings = settings_for(
        members, np.full(3, 0.5), window_s=1.0, hop_s=hop_s, events=EventSettings(release=release, merge_s=0.5)
    )
    ((_, tagged),) = tag_here(find_inputs([str(path)]), members, settings, "cpu")
    names, events = stub.LABELS.names, tagged.events
    merged = [
        (start_s, end_s, names[label])
        for start_s, end_s, label in zip(events.start_s, events.end_s, events.label, strict=True)
    ]
    by_window = [
        (start_s, end_s, names[c])
        for start_s, end_s, scores in zip(tagged.start_s, tagged.end_s, tagged.scores_WC, strict=True)
        for c in np.flatnonzero(scores >= 0.5)
    ]
    return merged, by_window


def test_merged_windows_find_events_that_single_windows_miss(mixed: tuple[Path, list[stub.Event]]):
    path, truth = mixed
    merged, by_window = found_in(path, has_frames=False, hop_s=0.25, release=1.0)
    assert stub.event_f1(merged, truth, COLLAR_S) >= 0.8
    assert stub.event_f1(by_window, truth, COLLAR_S) < 0.1


def test_frames_find_the_times_of_events_with_windows_that_do_not_overlap(mixed: tuple[Path, list[stub.Event]]):
    path, truth = mixed
    merged, _ = found_in(path, has_frames=True, hop_s=1.0)
    assert stub.event_f1(merged, truth, COLLAR_S) >= 0.95
    errors = [min(abs(start_s - e[0]) for e in merged if e[2] == label) for start_s, _, label in truth]
    assert np.median(errors) < 0.1
