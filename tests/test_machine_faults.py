"""How the campaign of faults between machines counts what is lost, doubled or wrong."""

from dataclasses import asdict

from benchmarks.machine_faults import Job, Kind, Run, Trial, compare, table


def trial_of(job: Job) -> Trial:
    return Trial(Kind.CUT, job, 0, "node1", [Run("FAILED", 31.2, "error: a"), Run("SUCCEEDED", 12.0, "data set: b")])


def counts(trial: Trial) -> tuple[int, int, int]:
    return trial.lost, trial.doubled, trial.wrong


def test_steps_that_are_missing_repeated_or_have_another_loss_are_counted():
    wanted = [(1, 0.5), (2, 0.4), (3, 0.3)]
    well, ill = trial_of(Job.TRAIN), trial_of(Job.TRAIN)
    compare(well, wanted, [(1, 0.5), (2, 0.4 * (1 + 1e-7)), (3, 0.3)])
    compare(ill, wanted, [(1, 0.5), (1, 0.5), (2, 0.4001)])
    assert (well.is_well, counts(well)) == (True, (0, 0, 0))
    assert (ill.is_well, counts(ill)) == (False, (1, 1, 1))


def test_clips_that_are_missing_repeated_or_different_are_counted():
    rows = [("a", (0,), 50, 1), ("b", (1,), 50, 2), ("c", (2,), 50, 3)]
    well, ill = trial_of(Job.PREPARE), trial_of(Job.PREPARE)
    compare(well, (rows, ["a", "b", "c"]), (rows[::-1], ["c", "b", "a"]))
    compare(ill, (rows, ["a", "b", "c"]), ([rows[0], rows[0], ("b", (1,), 50, 9)], ["a", "b"]))
    assert (well.is_well, counts(well)) == (True, (0, 0, 0))
    assert (ill.is_well, counts(ill)) == (False, (1, 1, 1))


def test_a_trial_whose_job_does_not_succeed_in_the_end_is_not_well():
    trial = trial_of(Job.TAG)
    trial.runs.pop()
    assert not trial.is_well


def test_the_table_has_a_row_for_each_kind_over_its_jobs_and_seeds():
    trials = [asdict(trial_of(job)) for job in (Job.PREPARE, Job.TRAIN, Job.TRAIN)]
    trials[2]["runs"][0]["seconds"], trials[2]["lost"], trials[2]["largest_difference"] = 99.0, 2, 3e-8
    *_, row = table(trials).splitlines()
    assert row == "| cut | prepare × 1, train × 2 | prepare 31, train 99 | error: a | 2 | 2 | 0 | 0 | 3e-08 |"
