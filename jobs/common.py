"""Code that the jobs share: options, and one line for each error that the user can fix."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ast_core.errors import ConfigError, UserError
from jobs import entry
from pipeline import storage
from pipeline.os_errors import explain
from pipeline.redaction import take_keys, without_secrets

MAX_CPUS = 100_000
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT


def status_of_printed() -> int:
    """The exit status of a command whose result is what it has printed: an error if that could not be written."""
    return EXIT_USER_ERROR if entry.is_output_lost() else 0


class JobParser(argparse.ArgumentParser):
    """Refuses an empty path or name, as of a variable of the shell that is not set. It would mean the default.

    Raises:
        ConfigError: a text option is empty, unless that is its default, as for `--yt-dlp`.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        parsed, rest = super().parse_known_args(args, namespace)
        for name, value in vars(parsed).items():
            texts = value if isinstance(value, list) else [value]
            if any(isinstance(text, str) and not text.strip() for text in texts) and value != self.get_default(name):
                raise ConfigError(f"--{name.replace('_', '-')} is empty; give a value, or leave the option out")
        return parsed, rest


def add_ray_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Ray")
    group.add_argument(
        "--address",
        default=os.environ.get("RAY_ADDRESS") or "local",
        help="cluster to join (default: $RAY_ADDRESS, which `ray job submit` sets; else Ray starts on this machine)",
    )
    group.add_argument("--num-cpus", type=int, default=None, help="CPUs to use when Ray is started on this machine")


def check_numbers(args: argparse.Namespace, **limits: float) -> None:
    """Raises ConfigError if a given option is not above 0 and at most its limit. `nan` is refused too.

    Args:
        limits: the largest value of each option, by its attribute: `timeout_s` for `--timeout-s`.
    """
    for name, most in limits.items():
        value = getattr(args, name)
        if value is not None and not 0 < value <= most:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; use more than 0 and at most {most:g}")


def output_uri(given: str, option: str = "--output") -> str:
    """The absolute path or URI of an output. Under `ray job submit`, Ray deletes the current folder at the end."""
    if not given.strip():  # as of a variable of the shell that is not set
        raise ConfigError(f"{option} is empty; give a path or a URI")
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and "://" not in given and not os.path.isabs(given):
        raise ConfigError(f"{option} {given} would be lost with the submitted job; give an absolute path or a URI")
    return storage.absolute(given)


def output_file(given: str, option: str) -> str:
    """`output_uri` of a file. Refuses a folder before the work is done."""
    if os.path.isdir(given):
        raise ConfigError(f"{option} {given} is a folder; give a file")
    return output_uri(given, option)


def run(job: Callable[[], int]) -> NoReturn:
    """Run a job as this process and end the process with the job's exit status. `entry.begin` must come first."""
    try:
        status = run_job(lambda _: job())
    finally:
        if entry.is_stopped():
            entry.leave(EXIT_INTERRUPTED)  # even if the job caught the interrupt
    entry.leave(status)


def run_job(job: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """The exit status of `job(argv)`: 2 and one line for a UserError. An unforeseen error keeps its traceback.

    Errors of the system (a full disk, a missing permission, storage that does not answer) also become one line
    (`pipeline.os_errors`).
    """
    try:
        return job(None if argv is None else take_keys(argv, os.environ))  # `entry.begin` did this with sys.argv
    except UserError as err:
        print(f"error: {without_secrets(str(err))}", file=sys.stderr)
    except OSError as err:
        line = explain(err)
        if line is None:
            raise
        print(f"error: {without_secrets(line)}", file=sys.stderr)
    except KeyboardInterrupt:
        if not entry.is_stopped():  # no signal reached this process
            print(entry.STOPPED, file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_USER_ERROR
