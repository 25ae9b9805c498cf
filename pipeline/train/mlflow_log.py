"""Logging of a run to MLflow, if requested. Values are sent in a thread, so that training never waits for the server.

RUN/mlflow.json contains the id of the MLflow run, so that a resumed run continues it.
"""

import logging
import os
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ast_core.errors import UserError
from pipeline import storage
from pipeline.redaction import without_secrets, without_secrets_of

logger = logging.getLogger(__name__)
EXPERIMENT = "ast-ray"
"""The experiment, unless MLFLOW_EXPERIMENT_NAME names another."""
SEND_EVERY_S = 10.0
BATCH_METRICS = 1000
BATCH_PARAMS = 100
PARAM_CHARACTERS = 6000
"""MLflow's limits: metrics and parameters in one request, characters of a parameter."""

Value = tuple[str, float, int, int]
"""Name, value, step, and when in milliseconds since 1970."""


def check_mlflow(uri: str) -> None:
    """Raise UserError if MLflow is not installed, or cannot log to `uri` from every folder and node."""
    if not (":" in uri or uri.startswith("/") or uri == "databricks"):
        raise UserError(f"MLflow cannot log to {uri} from other folders and nodes: give its full path, or a URI")
    _client(uri)


def _client(uri: str) -> Any:
    try:
        import mlflow
        from mlflow.exceptions import MlflowException
    except ImportError as err:
        raise UserError(
            f"logging to MLflow needs its package, on every node: pip install mlflow-skinny ({err})"
        ) from err
    try:
        return mlflow.MlflowClient(tracking_uri=uri)
    except (MlflowException, ImportError, OSError) as err:  # ImportError: a database needs more packages
        raise UserError(_refusal(uri, err)) from err


def _refusal(uri: str, err: Exception) -> str:
    return without_secrets_of(uri, f"MLflow cannot log to {uri}: {' '.join(str(err).split())}")


class MlflowLog:
    """The MLflow run of a training run.

    A resumed run produces the same values as before it was interrupted; those that MLflow has are not sent again.
    Values that the server refuses are sent again before the next ones, so that MLflow has no gaps.

    Raises:
        UserError: MLflow is not installed, or its server does not answer at the start. Later failures of the server
            only give warnings.
    """

    def __init__(self, run: str, uri: str, params: Mapping[str, Any]) -> None:
        self._client = _client(uri)
        self._pending: list[Value] = []
        self._known_until: dict[str, int] = {}
        """The last step that MLflow has, by name. It is requested once."""
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._sending: Future[list[Value]] | None = None
        """It gives the values that MLflow did not take."""
        self._sent_s = time.monotonic()
        try:
            self._run_id, self._is_new = self._continue_or_begin(run, params)
        except Exception as err:
            raise UserError(_refusal(uri, err)) from err

    def _continue_or_begin(self, run: str, params: Mapping[str, Any]) -> tuple[str, bool]:
        from mlflow.entities import Param

        record = storage.join(run, "mlflow.json")
        if storage.exists(record):
            run_id = storage.read_checked_json(record, remedy="delete it, and a new MLflow run begins")["run_id"]
            if self._is_there(run_id):
                self._client.update_run(run_id, status="RUNNING")
                return run_id, False
            logger.warning(f"the MLflow run {run_id} is gone; a new one begins")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        created = self._client.create_run(experiment_id, run_name=without_secrets(run).rstrip("/").rpartition("/")[2])
        given = [Param(key, str(value)[:PARAM_CHARACTERS]) for key, value in params.items()]
        for first in range(0, len(given), BATCH_PARAMS):
            self._client.log_batch(created.info.run_id, params=given[first : first + BATCH_PARAMS])
        storage.write_checked_json(record, {"run_id": created.info.run_id, "experiment": name})
        return created.info.run_id, True

    def _is_there(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as err:
            if err.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def add(self, values: Mapping[str, float], step: int) -> None:
        now_ms = int(time.time() * 1000)
        self._pending += [(name, value, step, now_ms) for name, value in values.items()]
        if time.monotonic() - self._sent_s > SEND_EVERY_S:
            self.send()

    def send(self) -> None:
        """Begin to send the pending values, unless the previous ones are still being sent."""
        if self._sending is None or self._sending.done():
            self._sent_s = time.monotonic()
            self._sending = self._sender.submit(self._send, self._take_pending())

    def close(self, status: str) -> None:
        """Wait until all values are sent, and set the run's status."""
        self._sender.submit(self._send, self._take_pending())
        self._sender.submit(self._end, status).result()
        self._sender.shutdown()

    def _take_pending(self) -> list[Value]:
        """The values to send next, after those that MLflow did not take. Waits until nothing is being sent."""
        refused = [] if self._sending is None else self._sending.result()
        values, self._pending = refused + self._pending, []
        return values

    def _send(self, values: list[Value]) -> list[Value]:
        """Send values, and return those that MLflow did not take."""
        from mlflow.entities import Metric

        try:
            values = [value for value in values if value[2] > self._last_known_step(value[0])]
            while values:
                metrics = [Metric(name, value, when_ms, step) for name, value, step, when_ms in values[:BATCH_METRICS]]
                self._client.log_batch(self._run_id, metrics=metrics)
                values = values[BATCH_METRICS:]
        except Exception as err:
            logger.warning(f"MLflow did not take {len(values)} values, RUN/metrics.jsonl has them: {err}")
            if _is_refused(err):  # the same values would be refused again and again, and no later ones be sent
                values = values[BATCH_METRICS:]
        return values

    def _last_known_step(self, name: str) -> int:
        if self._is_new:
            return -1
        if name not in self._known_until:
            history = self._client.get_metric_history(self._run_id, name)
            self._known_until[name] = max((metric.step for metric in history), default=-1)
        return self._known_until[name]

    def _end(self, status: str) -> None:
        try:
            self._client.set_terminated(self._run_id, status)
        except Exception as err:
            logger.warning(f"MLflow was not told that the run has ended: {err}")


def _is_refused(err: Exception) -> bool:
    """Whether the server has refused a request itself, and not just had no time for it."""
    status = getattr(err, "get_http_status_code", lambda: 500)()
    return 400 <= status < 500 and status not in (408, 429)
