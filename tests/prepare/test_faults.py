"""The preparation job, killed at a few moments: `benchmarks.faults` in small. Real processes, a real Ray."""

from collections.abc import Iterator

import pytest

pytest.importorskip("inotify_simple", reason="counts the openings of files as Linux tells them")

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
        Moment(Kind.DRIVER, Phase.WORK, 0.7),
    ],
    ids=str,
)
def test_a_job_that_was_killed_ends_with_the_data_set_of_an_undisturbed_one(faults: Campaign, moment: Moment):
    outcome: Outcome = faults.trial(moment)
    assert outcome.harm == "", outcome.orphans
    assert outcome.hit


def test_the_world_has_clips_and_failures_of_every_kind_worth_a_run(faults: Campaign):
    content = faults.undisturbed(Setting.FOLDER).content
    reasons = {reason for _, reason in content.failures}
    assert reasons == {"not_audio", "silent", "truncated", "missing_file", "bad_time", "duplicate"}
    assert len(content.clips) > 100
    in_two_splits = [clip for clip, reason in content.failures if clip.startswith("eval/") and reason == "duplicate"]
    assert len(in_two_splits) == 3  # as the lists have them, and as none is in the data set
