"""The process of a command: it ends when it is told to stop, and goes on when nobody reads its output.

A job calls `begin` before its imports, which take seconds, and ends through `leave`. This module imports nothing that
takes time.
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

STOPPED = "stopped; run the same command to go on"

UNWIND_S = 5.0
"""How long a stopped job may take to shut Ray down and remove its temporary files. Whatever a job has written can be
gone on with after a kill, so nothing is lost when the process ends without that."""

NO_NEWS = (
    b"has constructor arguments in the object store and max_restarts > 0",
    b"Lock blocking 0x",
    b"Lock returning 0x",
    b"RAW: Unlock 0x",
    b"RAW: ReaderUnlock 0x",
)
"""Parts of lines that nobody can act on. Ray says the first, as an error, of actors that Ray Data and Ray Train make by
themselves. The others, which are rare, are of Abseil's locks in the libraries."""

_PASS_ON = f"""
import os, sys
for line in sys.stdin.buffer:
    if not any(part in line for part in {NO_NEWS!r}):
        os.write(2, line)
"""

NOBODY_READS = {errno.EPIPE, errno.EIO}
"""A closed pipe; a terminal that is gone."""

_stopped_by: int | None = None
_may_say, _may_raise = threading.Lock(), threading.Lock()
"""Taken by the first to do so, and never released."""
_has_begun = False
_stderr = 2
_children: list[Any] = []
"""When the job was stopped."""


def begin() -> None:
    """Take over the signals and the output of this process, the driver of a job.

    Ctrl-C (SIGINT) and SIGTERM, which `ray job stop` and Kubernetes send, print one line, silence everything after it
    and raise KeyboardInterrupt in the main thread. A thread ends the process after `UNWIND_S` where that does not:
    the main thread may be in a library that waits or that catches it. Ray's own processes end with this one.
    """
    global _has_begun
    _has_begun = True
    _take_keys_out_of_the_command_line()
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # no thread of Ray Data's may start a Ray of its own
    sys.excepthook = _excepthook
    sys.stdout, sys.stderr = (
        _Outlet.in_place_of(sys.stdout, 1),
        _Outlet.in_place_of(sys.stderr, _apart_from_libraries()),
    )
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read,), name="stop", daemon=True).start()
    take_signals()


def _take_keys_out_of_the_command_line() -> None:
    """Begin again without them, as `ps` and Ray show the command line. The environment has them from then on."""
    try:
        words = take_keys(sys.argv[1:], os.environ)
    except ConfigError as err:
        print(f"error: {err}", file=sys.stderr)
        sys.exit(2)
    if words != sys.argv[1:]:
        os.execv(sys.executable, [*sys.orig_argv[: len(sys.orig_argv) - len(words)], *words])


def _apart_from_libraries() -> int:
    """A descriptor for what Python writes to standard error; what C++ writes there goes past `NO_NEWS`.

    That is done by a process of its own: so the last words of a library that crashes this one are passed on too.
    """
    global _stderr
    _stderr = os.dup(2)
    with suppress(OSError):  # no room for a process: all lines are shown
        command = [sys.executable, "-ISc", _PASS_ON]
        pass_on = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
        assert pass_on.stdin is not None
        os.dup2(pass_on.stdin.fileno(), 2)
        pass_on.stdin.close()
    return _stderr


def take_signals() -> None:
    """Also called after Ray has set handlers of its own. A signal that the caller ignores (nohup) stays ignored."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)


def leave(status: int) -> NoReturn:
    """End the process with the status of its job, or with 130 or 143 if it was told to stop."""
    if _stopped_by is None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # the job is done: what is left is the end of the interpreter
        sys.exit(status)
    _exit_stopped()


@contextmanager
def deadline(seconds: float, line: str, status: int) -> Iterator[None]:
    """End a job's process with a line and a status where the block, a library's call without a limit, takes longer.

    Nothing happens in a process that is not a job's own.
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


def is_stopped() -> bool:
    return _stopped_by is not None


def _interrupt(number: int, frame: FrameType | None) -> None:
    _stop(number)
    if _may_raise.acquire(blocking=False):  # a second signal must not end the unwinding after the first
        raise KeyboardInterrupt


def _stop(number: int) -> None:
    """Say that the job is stopped, once; nothing that libraries say of it is printed after that."""
    global _stopped_by
    if not _may_say.acquire(blocking=False):
        return
    _stopped_by = number
    with suppress(OSError):  # nobody reads it
        os.write(_stderr, f"{STOPPED}\n".encode())  # not print: this may run within one
    silence = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2, _stderr):
        os.dup2(silence, descriptor)


def _watch(wakeup: int) -> None:
    """Hear of signals that the main thread cannot handle, being in a call that waits."""
    while True:
        for number in os.read(wakeup, 64):
            if number in (signal.SIGINT, signal.SIGTERM):
                _stop(number)
                _children.extend(_descendants())
                time.sleep(UNWIND_S)
                _exit_stopped()


def _exit_stopped() -> NoReturn:
    """End without the interpreter's own end, in which threads may wait for each other. Ray's processes end first."""
    assert _stopped_by is not None
    _kill_children()
    os._exit(128 + _stopped_by)


def _kill_children() -> None:
    for process in {*_children, *_descendants()}:
        with suppress(Exception):  # it has ended
            process.kill()  # nothing, where its number is another process's by now


def _descendants() -> list[Any]:
    """Ray's processes: some outlive their parent for seconds. Our own notice its end and remove their folders."""
    try:
        import psutil  # Ray brings it
    except ImportError:
        return []  # it ended before Ray was imported
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


def _is_no_news(shown: bytes) -> bool:
    return any(part in shown for part in NO_NEWS)


class _Outlet(io.FileIO):
    """Standard output or standard error. When it cannot be written any more, the job goes on without it."""

    @classmethod
    def in_place_of(cls, stream: TextIO, descriptor: int) -> TextIO:
        """A text stream that appears line by line, whoever reads it; a closed one (None) stays closed."""
        if stream is None:
            return stream
        raw = cls(descriptor, "wb", closefd=False)
        return io.TextIOWrapper(
            io.BufferedWriter(raw), encoding=stream.encoding, errors="backslashreplace", line_buffering=True
        )

    def write(self, data: Any) -> int | None:  # type: ignore[override]  # FileIO's own may be None too
        shown = bytes(data)
        if _is_no_news(shown):  # from a worker
            shown = b"".join(line for line in shown.splitlines(keepends=True) if not _is_no_news(line))
        if b"://" in shown:
            shown = without_secrets(shown.decode(errors="surrogateescape")).encode(errors="surrogateescape")
        try:
            written = super().write(shown)
            return len(data) if written == len(shown) or shown != data else written
        except OSError as err:
            with open(os.devnull, "wb") as silence:
                os.dup2(silence.fileno(), self.fileno())
            if err.errno not in NOBODY_READS:
                print(f"warning: output cannot be written any more ({err.strerror}); the job goes on", file=sys.stderr)
            return len(data)
