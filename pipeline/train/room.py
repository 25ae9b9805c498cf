"""What a training does while the cluster has no room for its workers: one line, and an end after the longest wait.

Ray Train itself asks again and again, without end and with a traceback each minute. So a cluster that lost a machine
for good would be paid for until somebody looks.
"""

import logging
import time

from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    ReschedulingState,
    RestartingState,
    SchedulingState,
    TrainControllerState,
)
from ray.train.v2.api.exceptions import ControllerError

from ast_core.errors import UserError
from pipeline.cluster import resources_of_nodes
from pipeline.train.resources import WorkerResources

SAY_AFTER_S = 45.0
"""Shorter waits, for example for processes to start, are not mentioned. Ray Train looks again after 60 s."""

logger = logging.getLogger(__name__)


class EndLongWaits(ControllerCallback):
    """Ends a training that has waited for its workers for `longest_wait_s`; 0 waits without end."""

    def __init__(self, wanted: WorkerResources, longest_wait_s: float) -> None:
        self._wanted, self._longest_wait_s = wanted, longest_wait_s
        self._since_s: float | None = None
        self._has_said = False

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        self._since_s = time.monotonic()
        for handler in logging.getLogger("ray.train").handlers:
            if isinstance(handler, logging.StreamHandler):  # the terminal; log files keep all
                handler.addFilter(_is_news)

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        if not isinstance(current_state, (InitializingState, SchedulingState, ReschedulingState, RestartingState)):
            self._since_s, self._has_said = None, False
            return
        if self._since_s is None:
            self._since_s = time.monotonic()
        waited_s = time.monotonic() - self._since_s
        if self._longest_wait_s and waited_s >= self._longest_wait_s:
            raise UserError(
                f"training waited {waited_s:,.0f} s for its workers: {self._line()}. {_remedy(current_state)}; the "
                "same command resumes, and --longest-wait-s 0 waits without end"
            )
        if waited_s >= SAY_AFTER_S and not self._has_said:
            self._has_said = True
            end = f", and ends after {self._longest_wait_s:,.0f} s" if self._longest_wait_s else ""
            logger.warning(f"waiting for workers: {self._line()}; training goes on when the cluster has grown{end}")

    def _line(self) -> str:
        try:
            return self._wanted.room_line(resources_of_nodes())
        except Exception:  # Ray's head is away, and an error here would end the training
            return f"{self._wanted}, and Ray does not say for how many the cluster has room"


def _remedy(state: TrainControllerState) -> str:
    error = state.training_failed_error if isinstance(state, ReschedulingState) else None
    cause = error.controller_failure if isinstance(error, ControllerError) else None
    if cause is not None and not isinstance(cause, WorkerGroupStartupTimeoutError):
        return f"They did not start: {next(iter(str(cause).strip().splitlines()), type(cause).__name__)}"
    return "Start Ray on more machines, or lower --num-workers (MIN:MAX trains with what there is)"


def _is_news(record: logging.LogRecord) -> bool:
    """Whether the terminal shows a line of Ray Train's controller: not if it says what this module says."""
    error = record.exc_info[1] if record.exc_info else None
    cause = error.controller_failure if isinstance(error, ControllerError) else error
    return not isinstance(cause, (UserError, WorkerGroupStartupTimeoutError))
