"""Ray for the length of a job: joined or started, or the one line that says why not."""

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

from ast_core.errors import ConfigError, UserError
from jobs import entry
from jobs.common import MAX_CPUS
from pipeline.redaction import keys_of_uri

CONNECT_S, ANSWER_S = 4.0, 25.0
"""How long a cluster may take to accept a connection and to say what it is. `ray.init` itself waits without a limit."""

JOIN_S = 90.0
"""How long it may take to join a cluster that has answered."""

EXIT_CANNOT_JOIN = 2

_ASK = """
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    GcsClient(address=sys.argv[1])
except AuthenticationError:
    pass  # a cluster, which ray.init knows how to sign in to
"""

_HOST_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):(?P<port>[0-9]{1,5})")


@contextmanager
def ray_session(address: str, num_cpus: int | None = None) -> Iterator[None]:
    """Ray for the length of a job. One that is up in this process already is used and left alone.

    Args:
        address: HOST:PORT of a cluster's head, `auto` for the one that runs on this machine, or `local` to start one.

    Raises:
        UserError: there is no such cluster, or Ray does not start; the message names the setting and the remedy.
    """
    if num_cpus is not None and not 1 <= num_cpus <= MAX_CPUS:
        raise ConfigError(f"--num-cpus is {num_cpus}; use 1 to {MAX_CPUS}")
    if ray.is_initialized():
        yield
        return
    _leave_out_what_nobody_can_act_on()
    if address == "local":
        _start(num_cpus)
    else:
        _join(address)
    there, os.environ["RAY_ADDRESS"] = os.environ.get("RAY_ADDRESS"), ray.get_runtime_context().gcs_address
    try:
        if entry.has_begun():
            entry.take_signals()  # Ray has put a handler of its own for SIGTERM
        yield
    finally:
        if there is None:
            del os.environ["RAY_ADDRESS"]
        else:
            os.environ["RAY_ADDRESS"] = there
        ray.shutdown()


def _start(num_cpus: int | None) -> None:
    try:
        ray.init(address="local", num_cpus=num_cpus, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError, RayError) as err:
        ray.shutdown()
        raise UserError(f"Ray does not start on this machine: {_one_line(err)}; {_remedy(err)}") from err


def _remedy(err: Exception) -> str:
    said, folder = str(err), os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    if "AF_UNIX" in said or "socket path" in said.lower():
        return f"its sockets lie below {folder}: set RAY_TMPDIR or TMPDIR to a shorter folder, such as /tmp"
    if isinstance(err, OSError) and err.errno is not None:
        return f"its files lie below {folder}: make room and give rights there, or set RAY_TMPDIR to another folder"
    return f"its log files are below {folder}/ray/session_latest/logs; another Ray here may hold its ports"


def _join(address: str) -> None:
    setting = "RAY_ADDRESS" if address == os.environ.get("RAY_ADDRESS") else "--address"
    remedy = f"{'unset' if setting == 'RAY_ADDRESS' else 'leave out'} {setting} to start Ray on this machine"
    found = _on_this_machine(setting, remedy) if address == "auto" else address
    match = _HOST_PORT.fullmatch(found)
    if match is None or not 0 < int(match["port"]) < 65536:
        dashboard = ", and http:// the dashboard's, for `ray job submit`" if "://" in found else ""
        raise ConfigError(
            f"{setting} is {found}, which is no cluster's address: that is HOST:PORT, usually of port 6379{dashboard}; "
            f"give it, or {remedy}"
        )
    _check_answers(found, match["host"].strip("[]"), int(match["port"]), setting, remedy)
    cannot = f"the Ray cluster at {found} ({setting}) cannot be joined"
    late = f"error: {cannot} within {JOIN_S:.0f} s; see whether it is well and takes this machine's token, or {remedy}"
    try:
        with entry.deadline(JOIN_S, late, EXIT_CANNOT_JOIN):
            keys = keys_of_uri(os.environ)
            runtime_env = {"env_vars": keys} if keys else None  # the workers of a cluster have not this environment
            ray.init(address=found, logging_level=logging.WARNING, runtime_env=runtime_env)
    except (OSError, RuntimeError, ValueError, RayError) as err:
        ray.shutdown()
        raise UserError(
            f"{cannot}: {_one_line(err)}; start a node of it here by `ray start --address={found}`, or {remedy}"
        ) from err


def _on_this_machine(setting: str, remedy: str) -> str:
    """The address of the cluster that `auto` means: that of `ray start`, or else the only one that runs here.

    Ray itself would take any of several.
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
        pass  # what listens there is not Ray, or hangs
    except OSError as err:
        why = f"does not answer ({err.strerror or err})"
    raise UserError(f"{address} ({setting}) {why}; start the cluster, or {remedy}")


def _one_line(err: BaseException) -> str:
    return " ".join(str(err).split())[:500].rstrip(".") or type(err).__name__


def _leave_out_what_nobody_can_act_on() -> None:
    """Lines of Ray's own that are no news. All others come through, and its log files keep everything."""
    logging.getLogger("ray._private.authentication.authentication_token_setup").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Token authentication is enabled for this Ray cluster")
