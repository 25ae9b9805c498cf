"""What jobs share: options, and errors that the user can fix as one line."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from ast_core.errors import ConfigError, UserError
from jobs import entry
from pipeline import storage
from pipeline.os_errors import explain
from pipeline.redaction import take_keys, without_secrets

MAX_CPUS = 100_000
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT


def add_ray_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Ray")
    group.add_argument(
        "--address",
        default=os.environ.get("RAY_ADDRESS") or "local",
        help="cluster to join (default: $RAY_ADDRESS, which `ray job submit` sets; else Ray starts on this machine)",
    )
    group.add_argument("--num-cpus", type=int, default=None, help="CPUs to use when Ray is started on this machine")


def check_numbers(args: argparse.Namespace, **limits: float) -> None:
    """Raises ConfigError where an option that is given is not a number above 0 and up to its limit; `nan` is neither.

    Args:
        limits: the largest value by the name of each option, `timeout_s` for `--timeout-s`.
    """
    for name, most in limits.items():
        value = getattr(args, name)
        if value is not None and not 0 < value <= most:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; use more than 0 and at most {most:g}")


def output_uri(given: str, option: str = "--output") -> str:
    """An absolute place to write to. Under `ray job submit` the current folder is a copy that Ray deletes."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and "://" not in given and not os.path.isabs(given):
        raise ConfigError(f"{option} {given} would be lost with the submitted job; give an absolute path or a URI")
    return storage.absolute(given)


def run(job: Callable[[], int]) -> NoReturn:
    """Run a job as this process, from the command line to the exit status; `entry.begin` came before."""
    try:
        status = run_job(lambda _: job())
    finally:
        if entry.is_stopped():
            entry.leave(EXIT_INTERRUPTED)  # whatever the job made of the interrupt
    entry.leave(status)


def run_job(job: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """The exit status of `job(argv)`: 2 and one line for a UserError; anything unforeseen keeps its traceback.

    A full disk, a missing permission, storage that does not answer end in one line too: `pipeline.os_errors`.
    """
    try:
        return job(None if argv is None else take_keys(argv, os.environ))  # `entry.begin` did so with the process's own
    except UserError as err:
        print(f"error: {without_secrets(str(err))}", file=sys.stderr)
    except OSError as err:
        line = explain(err)
        if line is None:
            raise
        print(f"error: {without_secrets(line)}", file=sys.stderr)
    except KeyboardInterrupt:
        if not entry.is_stopped():  # by no signal to this process
            print(entry.STOPPED, file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_USER_ERROR
