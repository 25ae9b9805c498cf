"""Ray for the duration of a job: start it, join a cluster, or say in one line why this is not possible.

Most of the module is about the last: `ray.init` waits without a limit, or fails with a traceback, if there is no such
cluster.
"""

import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._private import services
from ray.exceptions import RayError

from ast_core.errors import ConfigError, UserError, one_line
from jobs import entry
from jobs.common import MAX_CPUS
from pipeline.cluster import usable_cpus
from pipeline.redaction import keys_of_uri

CONNECT_S, ANSWER_S = 4.0, 25.0
"""Time limits for a cluster to accept a connection and to answer. `ray.init` itself has no time limit."""

JOIN_S = 90.0
"""Time limit for joining a cluster that has answered."""

EXIT_CANNOT_JOIN = 2

OF_OWN_RAY = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
}
"""Settings of Ray Train for a Ray of this machine alone. Only clusters get notice that a node will be preempted; a
process would wait for it. By default the controller looks every 2 s whether the workers have ended, which suits
hundreds of workers, and keeps a small training waiting."""

_ASK = """
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    GcsClient(address=sys.argv[1])
except AuthenticationError:
    pass  # it is a cluster, and ray.init can authenticate
"""

_HOST_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):(?P<port>[0-9]{1,5})")


@contextmanager
def ray_session(address: str, num_cpus: int | None = None) -> Iterator[None]:
    """Ray for the duration of a job. If Ray already runs in this process, it is used and left running.

    Args:
        address: HOST:PORT of a head node, `auto` for the cluster on this machine, or `local` to start Ray.

    Raises:
        UserError: no such cluster, or Ray does not start. The message names the setting and the remedy.
    """
    if num_cpus is not None and not 1 <= num_cpus <= MAX_CPUS:
        raise ConfigError(f"--num-cpus is {num_cpus}; use 1 to {MAX_CPUS}")
    if ray.is_initialized():
        yield
        return
    _hide_noise()
    if address == "local":
        _start(num_cpus)
    else:
        _join(address)
    before, os.environ["RAY_ADDRESS"] = os.environ.get("RAY_ADDRESS"), ray.get_runtime_context().gcs_address
    try:
        if entry.has_begun():
            entry.take_signals()  # Ray has replaced the handler of SIGTERM
        yield
    finally:
        if before is None:
            del os.environ["RAY_ADDRESS"]
        else:
            os.environ["RAY_ADDRESS"] = before
        ray.shutdown()


def _start(num_cpus: int | None) -> None:
    for name, value in OF_OWN_RAY.items():
        os.environ.setdefault(name, value)
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus or usable_cpus(),
            logging_level=logging.WARNING,
            include_dashboard=False,  # its processes take seconds of CPU time, and nobody is told its address
        )
    except (OSError, RuntimeError, ValueError, RayError) as err:
        ray.shutdown()
        raise UserError(f"Ray does not start on this machine: {one_line(err).rstrip('.')}; {_remedy(err)}") from err


def _remedy(err: Exception) -> str:
    text, folder = str(err), os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    if "AF_UNIX" in text or "socket path" in text.lower():
        return f"its sockets are below {folder}: set RAY_TMPDIR or TMPDIR to a shorter folder, such as /tmp"
    if isinstance(err, OSError) and err.errno is not None:
        return f"its files are below {folder}: free disk space and allow writing there, or set RAY_TMPDIR"
    return f"its log files are below {folder}/ray/session_latest/logs; another Ray on this machine may use its ports"


def _join(address: str) -> None:
    setting = "RAY_ADDRESS" if address == os.environ.get("RAY_ADDRESS") else "--address"
    remedy = f"{'unset' if setting == 'RAY_ADDRESS' else 'leave out'} {setting} to start Ray on this machine"
    found = _on_this_machine(setting, remedy) if address == "auto" else address
    match = _HOST_PORT.fullmatch(found)
    if match is None or not 0 < int(match["port"]) < 65536:
        dashboard = " (http://… is the dashboard, for `ray job submit`)" if "://" in found else ""
        raise ConfigError(
            f"{setting} is {found}, which is no cluster's address: use HOST:PORT, usually with port 6379{dashboard}, "
            f"or {remedy}"
        )
    _check_answers(found, match["host"].strip("[]"), int(match["port"]), setting, remedy)
    cannot = f"the Ray cluster at {found} ({setting}) cannot be joined"
    late = f"error: {cannot} within {JOIN_S:.0f} s; check that it works and accepts this machine's token, or {remedy}"
    try:
        with entry.deadline(JOIN_S, late, EXIT_CANNOT_JOIN):
            keys = keys_of_uri(os.environ)
            runtime_env = {"env_vars": keys} if keys else None  # workers of a cluster do not have this environment
            ray.init(address=found, logging_level=logging.WARNING, runtime_env=runtime_env)
    except (OSError, RuntimeError, ValueError, RayError) as err:
        ray.shutdown()
        why = one_line(err).rstrip(".")
        raise UserError(
            f"{cannot}: {why}; start a node of it here with `ray start --address={found}`, or {remedy}"
        ) from err


def _on_this_machine(setting: str, remedy: str) -> str:
    """The address that `auto` means: that of the last `ray start`, or else of the only cluster on this machine.

    If there are several, Ray itself would take any of them.
    """
    if started := services.find_bootstrap_address(None):
        return str(started)
    found = sorted(services.find_gcs_addresses())
    if not found:
        raise UserError(f"{setting} is auto, and no Ray cluster runs on this machine; start one, or {remedy}")
    if len(found) > 1:
        raise UserError(f"{setting} is auto, and several Ray clusters run here; name one: {', '.join(found)}")
    return found[0]


def _check_answers(address: str, host: str, port: int, setting: str, remedy: str) -> None:
    why = "is no Ray cluster, or does not answer"
    try:
        socket.create_connection((host, port), timeout=CONNECT_S).close()
        ask = [sys.executable, "-c", _ASK, address]
        if not subprocess.run(ask, capture_output=True, timeout=ANSWER_S, check=False).returncode:
            return
    except subprocess.TimeoutExpired:
        pass  # the listener is not Ray, or it hangs
    except OSError as err:
        why = f"does not answer ({err.strerror or err})"
    raise UserError(f"{address} ({setting}) {why}; start the cluster, or {remedy}")


def _hide_noise() -> None:
    """Hide lines of Ray's logger that the user can do nothing about. Ray's log files keep them."""
    logging.getLogger("ray._private.authentication.authentication_token_setup").addFilter(_is_worth_showing)


def _is_worth_showing(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Token authentication is enabled for this Ray cluster")
