"""A separate process with a deadline, in which FFmpeg or yt-dlp processes untrusted media.

A damaged or hostile file may block a decoder, use up all memory or crash it, and a fetch may never end. The child leads
a process group, so that the programs that it starts end with it. It ends as soon as its parent has ended for any
reason. It is used for many calls, because starting one takes half a second.
"""

import errno
import importlib
import os
import pickle
import resource
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import IO, Any, NoReturn

from ast_core.errors import UserError
from pipeline.os_errors import explain
from pipeline.prepare import answers
from pipeline.prepare.clip import ClipError, Reason

PARENT_CHECK_S = 1.0
"""The child notices its parent's end at once by the socket between them. At this interval it also checks that its
parent is still the same process, because another process that the parent forked may have a copy of the socket."""

EXIT_S, EXIT_CHECK_S = 5.0, 0.01
"""Time that a child gets to end after it has closed the socket without an answer; then it is killed."""

MAX_RESULT_BYTES = 256 << 20
"""Limit of arrays and bytes in a result: enough for a fetch, and for the samples of the longest clip."""

LOCAL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE}
"""Errors of this machine, which would make every clip fail."""

SHOWN_OF_STDERR = 2000
"""Number of bytes that are shown from the end of the child's standard error."""

KEEP_FREED_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(128 << 20), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
"""Have glibc keep what a clip frees for the next one. Otherwise it returns the same megabytes to the system and asks
for them again, and the system clears each page: a tenth of the CPU time of decoding."""


class Sandbox:
    """Calls `module:function` in a child process, which starts with the first call. Not safe for several threads.

    Args:
        function: an importable function. Its arguments are pickled, its result must be one that `answers.pack_result`
            accepts, and it may raise ClipError or UserError.
        memory_bytes: memory limit of the child, and of each program that it starts (only on Linux).
        file_bytes: limit of the size of a file that the child and its programs write.
        result_bytes: limit of the arrays and bytes in a result.
    """

    def __init__(
        self,
        function: str,
        *,
        memory_bytes: int | None = None,
        file_bytes: int | None = None,
        result_bytes: int = MAX_RESULT_BYTES,
    ) -> None:
        self.function, self.memory_bytes, self.file_bytes = function, memory_bytes, file_bytes
        self.result_bytes = result_bytes
        self._child: subprocess.Popen[bytes] | None = None
        self._open = ExitStack()
        self._socket: socket.socket
        self._stderr: IO[bytes]

    def __call__(self, *args: Any, deadline_s: float, folder: str = "", **kwargs: Any) -> Any:
        """Return the function's result, with lists in place of tuples.

        Args:
            folder: a `temporary_folder` for this call and for all that the child writes; otherwise it is the machine's.

        Raises:
            ClipError: `timeout` if sending, working and receiving take longer than `deadline_s`; `crashed` if the child
                dies or its answer is invalid; and any that the function raises.
            UserError: the machine has no room for a child process, or for its work.
        """
        ends_s = time.monotonic() + deadline_s
        try:
            if self._child is None or _has_ended(self._child):
                self._start()
        except OSError as err:  # no space in the temporary folder, or too many processes
            raise UserError(f"this machine cannot start a process to work in: {err}") from err
        try:
            self._send(pickle.dumps((folder, args, kwargs), protocol=5), ends_s)
            json_bytes, raw_bytes = answers.sizes_of(self._receive(answers.HEAD.size, ends_s), self.result_bytes)
            return answers.unpack(self._receive(json_bytes, ends_s), self._receive(raw_bytes, ends_s))
        except TimeoutError as err:
            self.stop()
            raise ClipError(Reason.TIMEOUT, f"not done within {deadline_s:g} s") from err
        except (EOFError, ConnectionError) as err:
            raise ClipError(Reason.CRASHED, f"its process ended ({self._ending()})") from err
        except answers.BadAnswerError as err:
            self.stop()
            raise ClipError(Reason.CRASHED, f"its process gave {err}") from err

    def stop(self) -> None:
        """End the child and the programs that it started."""
        if self._child is not None:
            # Before `wait`: only until then is its number, and so that of its group, not given to another process.
            with suppress(ProcessLookupError, PermissionError):  # the whole group has ended (the latter on macOS)
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
            self._child = None
            self._open.close()

    def _start(self) -> None:
        self.stop()
        self._socket, theirs = map(self._open.enter_context, socket.socketpair())
        self._stderr = self._open.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  stop() closes it
        limits = f"{self.memory_bytes or ''}:{self.file_bytes or ''}:{self.result_bytes}"
        argv = [sys.executable, "-m", "pipeline.prepare.sandbox", self.function, str(theirs.fileno()), limits]
        # Under pytest or a submitted job the project may be importable only by this process's path.
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | KEEP_FREED_MEMORY
        self._child = subprocess.Popen(
            argv, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=self._stderr, stderr=self._stderr,
            start_new_session=True, env=env,
        )  # fmt: skip
        theirs.close()

    def _send(self, data: bytes, ends_s: float) -> None:
        self._socket.settimeout(_left_s(ends_s))
        self._socket.sendall(data)  # the timeout applies to all bytes together

    def _receive(self, num_bytes: int, ends_s: float) -> bytearray:
        data = bytearray(num_bytes)
        view = memoryview(data)
        while view:
            self._socket.settimeout(_left_s(ends_s))
            num_received = self._socket.recv_into(view)
            if not num_received:
                raise EOFError
            view = view[num_received:]
        return data

    def _ending(self) -> str:
        """How the child ended, with the last line of its standard error. Programs that it started are ended too."""
        assert self._child is not None
        child, ends_s = self._child, time.monotonic() + EXIT_S
        while not _has_ended(child) and time.monotonic() < ends_s:
            time.sleep(EXIT_CHECK_S)
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - SHOWN_OF_STDERR))
        last = self._stderr.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
        self.stop()
        code = child.returncode
        return ", ".join(filter(None, [signal.Signals(-code).name if code < 0 else f"status {code}", last]))


@contextmanager
def temporary_folder() -> Iterator[str]:
    """The path of a folder for calls of a `Sandbox`, which is removed with its content at the end of the context.

    The child makes it with the first of these calls, and removes it if its parent ends before. Making one takes a
    hundredth of the time of decoding a clip, so calls that write no file have none.
    """
    # The name is random, so no other process can have created it.
    folder = os.path.join(tempfile.gettempdir(), f"ast-isolated-{secrets.token_hex(8)}")
    try:
        yield folder
    finally:
        _remove(folder)


def _left_s(ends_s: float) -> float:
    left_s = ends_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s


def _has_ended(child: subprocess.Popen[bytes]) -> bool:
    """Whether the child has ended. Unlike `poll`, this leaves it as a zombie, so that its number stays its own."""
    if not hasattr(os, "waitid"):  # on macOS before Python 3.13
        return child.poll() is not None
    try:
        return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
    except ChildProcessError:
        return True  # something else in this process has waited for it


def _remove(folder: str) -> None:
    """Rename the folder before deleting it, so that a program that is still ending cannot add files to it."""
    with suppress(OSError):
        os.rename(folder, folder := f"{folder}-ended")
        shutil.rmtree(folder, ignore_errors=True)


class _Folder:
    """The temporary folder of the call in progress, in the child."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._path, self._usual = "", os.environ.get("TMPDIR", "")

    def use(self, path: str) -> None:
        """Make `path` the temporary folder, or the usual one if it is empty. Several calls may use one folder."""
        if path == self._path:
            return
        with self._lock:
            if path:
                os.makedirs(path, 0o700, exist_ok=True)  # a child that died may have made it
            self._path = path
        tempfile.tempdir, os.environ["TMPDIR"] = path or None, path or self._usual

    def end(self) -> NoReturn:
        """Remove the folder, and end this process and its programs."""
        self._lock.acquire()  # never released, so no other folder is made
        _remove(self._path)
        os.killpg(os.getpid(), signal.SIGKILL)
        raise AssertionError("alive after SIGKILL")


def _serve(function: str, fd: int, limits: str) -> None:
    """Main loop of the child: answer calls until the parent closes the socket."""
    memory_bytes, file_bytes, result_bytes = limits.split(":")
    if memory_bytes and sys.platform == "linux":
        # RLIMIT_DATA, not RLIMIT_AS: Deno reserves more address space than any machine has memory.
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory_bytes),) * 2)
    if file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(file_bytes),) * 2)
    folder = _Folder()
    threading.Thread(target=_end_with_parent, args=(os.getppid(), fd, folder), daemon=True).start()
    module, name = function.split(":")
    work: Callable[..., Any] = getattr(importlib.import_module(module), name)
    connection = socket.socket(fileno=fd)
    requests = connection.makefile("rb")
    with suppress(EOFError, ConnectionError, pickle.UnpicklingError):  # the parent has ended, perhaps while sending
        while True:
            path, args, kwargs = pickle.load(requests)
            for part in _answer(work, folder, path, args, kwargs, int(result_bytes)):
                connection.sendall(part)
    folder.end()


def _answer(
    work: Callable[..., Any], folder: _Folder, path: str, args: Any, kwargs: Any, result_bytes: int
) -> tuple[bytes, bytearray]:
    try:
        folder.use(path)
        packed = answers.pack_result(work(*args, **kwargs))
        if len(packed[1]) > result_bytes:
            raise ClipError(Reason.TOO_LARGE, f"{len(packed[1]):,} bytes; {result_bytes:,} are allowed")
        return packed
    except (ClipError, UserError) as err:
        return answers.pack_error(err)
    except MemoryError:
        return answers.pack_error(ClipError(Reason.TOO_LARGE, "takes more memory than a clip may"))
    except Exception as err:  # a library may raise anything
        if isinstance(err, OSError) and err.errno in LOCAL_ERRNOS:
            where = os.path.dirname(path) or tempfile.gettempdir()
            return answers.pack_error(UserError(f"this machine cannot go on: {explain(err, where)}"))
        return answers.pack_error(ClipError(Reason.UNFORESEEN, f"{type(err).__name__}: {err}"))


def _end_with_parent(parent_pid: int, fd: int, folder: _Folder) -> None:
    """End this process, its programs and its folder when the parent has closed the socket or has been replaced."""
    poller = select.poll()
    poller.register(fd, 0)  # the end of the peer is reported for any event mask
    while os.getppid() == parent_pid and not poller.poll(PARENT_CHECK_S * 1000):
        pass
    folder.end()


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), sys.argv[3])
