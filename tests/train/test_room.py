"""Long waits of a training for its workers. tests/jobs/test_train.py has the end of one with Ray Train itself."""

import logging

import pytest
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.controller.state import ReschedulingState, RunningState, SchedulingState
from ray.train.v2._internal.execution.scaling_policy import NoopDecision
from ray.train.v2.api.exceptions import ControllerError

from ast_core.errors import UserError
from pipeline.train import room
from pipeline.train.resources import WorkerResources
from pipeline.train.room import EndLongWaits

ASKS, WAITS, RUNS = (
    SchedulingState(NoopDecision()),
    ReschedulingState(ControllerError(WorkerGroupStartupTimeoutError(2))),
    RunningState(),
)


class Clock:
    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(room, "time", clock)
    monkeypatch.setattr(room, "resources_of_nodes", lambda: [{"CPU": 1.0}])
    return clock


def test_a_wait_is_said_once_and_ends(clock: Clock, caplog: pytest.LogCaptureFixture):
    waits = EndLongWaits(WorkerResources((2, 2), use_gpu=False, cpus=1), longest_wait_s=150.0)
    for state in (ASKS, RUNS, ASKS):  # an hour of work, and a node is lost
        clock.now_s += 3600.0
        waits.after_controller_state_update(RUNS, state)
    for state in (WAITS, ASKS, WAITS):
        clock.now_s += 30.0 * (state is WAITS)
        waits.after_controller_state_update(ASKS, state)
    line = "waiting for workers: 2 workers take 1 CPU each, the cluster has room for 1; training goes on when"
    assert [message.startswith(line) for message in caplog.messages] == [True]
    waits.after_controller_state_update(ASKS, RUNS)
    clock.now_s += 3600.0
    waits.after_controller_state_update(RUNS, ASKS)
    clock.now_s += 149.0
    waits.after_controller_state_update(ASKS, WAITS)
    assert len(caplog.messages) == 2
    clock.now_s += 1.0
    with pytest.raises(UserError, match=r"^training waited 150 s for its workers: .* the same command resumes"):
        waits.after_controller_state_update(WAITS, ASKS)


def test_a_wait_of_0_has_no_end(clock: Clock, caplog: pytest.LogCaptureFixture):
    waits = EndLongWaits(WorkerResources((2, 2), use_gpu=False, cpus=1), longest_wait_s=0.0)
    waits.after_controller_state_update(ASKS, WAITS)
    clock.now_s += 1e9
    waits.after_controller_state_update(ASKS, WAITS)
    [line] = caplog.messages
    assert line.endswith("training goes on when the cluster has grown")


def test_other_causes_of_a_wait_are_named(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    waits = EndLongWaits(WorkerResources((2, 2), use_gpu=False, cpus=1), longest_wait_s=60.0)
    waits.after_controller_state_update(ASKS, ASKS)
    clock.now_s += 60.0
    failed = ReschedulingState(ControllerError(WorkerGroupStartupFailedError("No module named 'x'")))
    with pytest.raises(UserError, match=r"for its workers: 2 workers .* They did not start: No module named 'x'; the"):
        waits.after_controller_state_update(ASKS, failed)

    def away() -> None:
        raise ConnectionError("no GCS")

    monkeypatch.setattr(room, "resources_of_nodes", away)
    with pytest.raises(UserError, match=r"2 workers, and Ray does not say"):
        waits.after_controller_state_update(ASKS, WAITS)


def test_the_terminal_does_not_show_each_attempt_of_ray_train():
    """A stack trace a minute would bury the one line."""
    wait = ControllerError(WorkerGroupStartupTimeoutError(2))
    for error, shown in ((wait, False), (UserError("x"), False), (ControllerError(ValueError()), True), (None, True)):
        info = (type(error), error, None) if error else None
        record = logging.LogRecord("ray.train", logging.ERROR, "controller.py", 1, "Error", (), info)
        assert room._is_news(record) is shown
