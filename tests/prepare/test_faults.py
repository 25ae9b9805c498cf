"""The preparation job, killed at a few moments: a small part of `benchmarks.faults`, with real processes and Ray."""

from collections.abc import Iterator

import pytest

pytest.importorskip("inotify_simple", reason="counts the openings of files by Linux's inotify")

from benchmarks.faults import Campaign, Kind, Moment, Outcome, Phase, Setting, campaign


@pytest.fixture(scope="module")
def faults() -> Iterator[Campaign]:
    with campaign(num_clips=120, seed=0) as made:
        yield made


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(Moment(Kind.WORKER, Phase.WORK, 0.5), marks=pytest.mark.slow),
        pytest.param(Moment(Kind.FETCHER, Phase.WORK, 0.5), marks=pytest.mark.slow),
        pytest.param(Moment(Kind.DRIVER, Phase.WORK, 0.7), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_killed_job_ends_with_the_same_data_set_as_an_undisturbed_one(faults: Campaign, moment: Moment):
    outcome: Outcome = faults.trial(moment)
    assert outcome.harm == "", outcome.orphans
    assert outcome.hit


@pytest.mark.slow
def test_the_campaigns_input_has_clips_and_failures_of_every_kind(faults: Campaign):
    content = faults.undisturbed(Setting.FOLDER).content
    reasons = {reason for _, reason in content.failures}
    assert reasons == {"not_audio", "silent", "truncated", "missing_file", "bad_time", "duplicate"}
    assert len(content.clips) > 100
    in_two_splits = [clip for clip, reason in content.failures if clip.startswith("eval/") and reason == "duplicate"]
    assert len(in_two_splits) == 3  # in the lists; the data set has none in two splits
