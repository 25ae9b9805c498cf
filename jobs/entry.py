"""The process of a command: it ends on SIGINT and SIGTERM, and continues if its output is closed.

A job calls `begin` before its imports, which take seconds, and ends through `leave`. So this module imports nothing
that is slow to import.

The file is long because signals, output and child processes must be handled together: each can arrive while another is
being handled.
"""

import errno
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, TextIO

from ast_core.errors import ConfigError
from pipeline.redaction import take_keys, without_secrets

STOPPED = "stopped; run the same command to resume"

UNWIND_S = 5.0
"""How long a stopped job may take to shut Ray down and remove its temporary files. If it takes longer, it is ended.
Nothing is lost, because a job can be resumed after a kill."""

NOISE = (
    b"has constructor arguments in the object store and max_restarts > 0",
    b"Lock blocking 0x",
    b"Lock returning 0x",
    b"RAW: Unlock 0x",
    b"RAW: ReaderUnlock 0x",
)
"""Parts of lines that the user can do nothing about. Ray prints the first as an error about actors that Ray Data and
Ray Train create. The others are rare; Abseil's locks in the libraries print them."""

_FILTER = f"""
import os, sys
for line in sys.stdin.buffer:
    if not any(part in line for part in {NOISE!r}):
        os.write(2, line)
"""

READER_IS_GONE = {errno.EPIPE, errno.EIO}
"""A closed pipe, and a terminal that is gone."""

_stopped_by: int | None = None
_print_once, _raise_once = threading.Lock(), threading.Lock()
"""Acquired by the first signal and never released, so that each thing happens once."""
_has_begun = False
_process_id = 0
"""Of the process that takes the signals; a forked child has another."""
_is_output_lost = False
_stopped_line = STOPPED
_stderr = 2
_children: list[Any] = []
"""Child processes at the time of the signal."""


def begin(stopped: str = STOPPED) -> None:
    """Take over the signals and the output of this process, the driver of a job.

    Ctrl-C (SIGINT) and SIGTERM, which `ray job stop` and Kubernetes send, print `stopped`, silence all later output
    and raise KeyboardInterrupt in the main thread. If the process has not ended after `UNWIND_S`, a thread ends it:
    the main thread may be in a library that blocks or catches the exception. Ray's processes end with this one.
    """
    global _has_begun, _stopped_line
    _has_begun, _stopped_line = True, stopped
    _restart_without_keys()
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # no thread of Ray Data may start another Ray
    sys.excepthook = _excepthook
    sys.stdout, sys.stderr = (
        _Outlet.in_place_of(sys.stdout, 1),
        _Outlet.in_place_of(sys.stderr, _filter_library_output()),
    )
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read,), name="stop", daemon=True).start()
    take_signals()


def _restart_without_keys() -> None:
    """Move keys into the environment and restart the process, because `ps` and Ray show the command line."""
    try:
        words = take_keys(sys.argv[1:], os.environ)
    except ConfigError as err:
        print(f"error: {err}", file=sys.stderr)
        sys.exit(2)
    if words != sys.argv[1:]:
        os.execv(sys.executable, [*sys.orig_argv[: len(sys.orig_argv) - len(words)], *words])


def _filter_library_output() -> int:
    """A descriptor for Python's standard error. Descriptor 2, where C++ writes, now leads to a filter of `NOISE`.

    The filter is a separate process, so it also passes on the last lines of a library that crashes this process.
    """
    global _stderr
    _stderr = os.dup(2)
    with suppress(OSError):  # the process cannot be started: all lines are shown
        command = [sys.executable, "-ISc", _FILTER]
        pass_on = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
        assert pass_on.stdin is not None
        os.dup2(pass_on.stdin.fileno(), 2)
        pass_on.stdin.close()
    return _stderr


def take_signals() -> None:
    """Install the handlers, again after Ray has replaced them. A SIGINT that the caller ignores stays ignored."""
    global _process_id
    _process_id = os.getpid()
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)


def leave(status: int) -> NoReturn:
    """End the process with the status of its job, or with 130 or 143 if it was told to stop."""
    if _stopped_by is None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # the job is done; only the interpreter's shutdown is left
        sys.exit(status)
    _exit_stopped()


@contextmanager
def deadline(seconds: float, line: str, status: int) -> Iterator[None]:
    """End the process with a line and a status if the block takes longer. For library calls without a time limit.

    It does nothing in a process that did not call `begin`.
    """

    def end() -> None:
        with suppress(OSError):
            os.write(_stderr, f"{line}\n".encode())
        _kill_children()
        os._exit(status)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    if _has_begun:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def has_begun() -> bool:
    return _has_begun


def is_output_lost() -> bool:
    """Whether something printed is lost, as on a full disk. A reader that went away has lost nothing that it wants."""
    return _is_output_lost


def is_stopped() -> bool:
    return _stopped_by is not None


def _interrupt(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _process_id:  # a child between fork and exec, as Ray's processes are for a moment
        os._exit(128 + number)
    _stop(number)
    if _raise_once.acquire(blocking=False):  # a second signal must not interrupt the clean-up
        raise KeyboardInterrupt


def _stop(number: int) -> None:
    """Print once that the job is stopped, and silence what libraries print afterwards."""
    global _stopped_by
    if not _print_once.acquire(blocking=False):
        return
    _stopped_by = number
    with suppress(OSError):  # the output is closed
        os.write(_stderr, f"{_stopped_line}\n".encode())  # not `print`, since this may interrupt one
    silence = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2, _stderr):
        os.dup2(silence, descriptor)


def _watch(wakeup: int) -> None:
    """Act on signals that the main thread cannot handle because a library call blocks it."""
    while True:
        for number in os.read(wakeup, 64):
            if number in (signal.SIGINT, signal.SIGTERM):
                _stop(number)
                _children.extend(_descendants())
                time.sleep(UNWIND_S)
                _exit_stopped()


def _exit_stopped() -> NoReturn:
    """End Ray's processes, then this one without the interpreter's shutdown, in which threads may deadlock."""
    assert _stopped_by is not None
    _kill_children()
    os._exit(128 + _stopped_by)


def _kill_children() -> None:
    for process in {*_children, *_descendants()}:
        with suppress(Exception):  # it has ended
            process.kill()  # psutil does nothing if the number belongs to another process by now


def _descendants() -> list[Any]:
    """Ray's processes, some of which outlive their parent for seconds. Our sandboxes end and clean up by themselves."""
    try:
        import psutil  # part of Ray, found after Ray is imported
    except ImportError:
        return []  # Ray was not imported yet, so it has no processes
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if not any(word.startswith("pipeline.") for word in process.cmdline()):
                found.append(process)
    return found


def _excepthook(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    if is_stopped():
        _exit_stopped()
    sys.__excepthook__(kind, error, traceback)


def _is_noise(shown: bytes) -> bool:
    return any(part in shown for part in NOISE)


class _Outlet(io.FileIO):
    """Standard output or standard error. If it can no longer be written, the job continues without it."""

    @classmethod
    def in_place_of(cls, stream: TextIO, descriptor: int) -> TextIO:
        """A line-buffered text stream, also if it is not a terminal. A closed stream (None) stays closed."""
        if stream is None:
            return stream
        raw = cls(descriptor, "wb", closefd=False)
        return io.TextIOWrapper(
            io.BufferedWriter(raw), encoding=stream.encoding, errors="backslashreplace", line_buffering=True
        )

    def write(self, data: Any) -> int | None:  # type: ignore[override]  # FileIO's may return None too
        shown = bytes(data)
        if _is_noise(shown):  # from a worker
            shown = b"".join(line for line in shown.splitlines(keepends=True) if not _is_noise(line))
        if b"://" in shown:
            shown = without_secrets(shown.decode(errors="surrogateescape")).encode(errors="surrogateescape")
        try:
            written = super().write(shown)
            return len(data) if written == len(shown) or shown != data else written
        except OSError as err:
            with open(os.devnull, "wb") as silence:
                os.dup2(silence.fileno(), self.fileno())
            if err.errno not in READER_IS_GONE:
                global _is_output_lost
                _is_output_lost = True
                print(f"warning: output can no longer be written ({err.strerror}); the job continues", file=sys.stderr)
            return len(data)
