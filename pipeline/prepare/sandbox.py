"""Work in a process of its own, with a deadline: what strangers' media do to FFmpeg or yt-dlp ends there.

A damaged or hostile file may hang a decoder, take all memory or crash it, and a fetch may never end. The child leads a
process group, so that the programs it starts end with it. It ends as soon as its parent has ended, however that came
about. It stays for the next call, since starting one costs half a second.
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
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import IO, Any, NoReturn

from ast_core.errors import UserError
from pipeline.os_errors import explain
from pipeline.prepare import answers
from pipeline.prepare.clip import ClipError, Reason
from pipeline.prepare.memory import keep_freed_memory

PARENT_CHECK_S = 1.0
"""The child hears at once of its parent's end, by the socket between them. It also looks this often whether it has
another parent, as a process that the parent forked may hold a copy of the socket."""

EXIT_S = 5.0
"""A child that has closed the socket without an answer has ended by then, or is ended."""

MAX_RESULT_BYTES = 256 << 20
"""Arrays and bytes in a result: what a fetch may bring, and more than the longest clip's samples."""

LOCAL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE}
"""Errors of this machine, which every clip would meet."""

SHOWN_OF_STDERR = 2000
"""Bytes from the end of what the child and its programs wrote to standard error."""


class Isolated:
    """Calls `module:function` in a child process, which starts with the first call. Not for several threads at once.

    Args:
        function: importable. Its arguments are pickled; its result may be what `answers.pack_result` takes, and it may
            raise ClipError or UserError.
        memory_bytes: that the child, and each program it starts, may write to, where the system can limit it (Linux).
        file_bytes: size of a file that the child and its programs may write.
        result_bytes: size of the arrays and bytes in a result.
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

    def __call__(self, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        """The function's result, with lists for tuples.

        Raises:
            ClipError: `timeout` when the deadline for sending, working and receiving has passed; `crashed` if the child
                dies or its answer is none; and what the function raises.
            UserError: where the machine has no room for a child, or for what it does.
        """
        ends_s = time.monotonic() + deadline_s
        try:
            if self._child is None or self._child.poll() is not None:
                self._start()
        except OSError as err:  # no room in the temporary folder, no more processes
            raise UserError(f"this machine cannot start a process to work in: {err}") from err
        # The child makes this folder for the length of the call, and removes it when its parent ends before that. If
        # the child ends first, it is removed here. Its name cannot be guessed, and so nobody else has made it.
        folder = os.path.join(tempfile.gettempdir(), f"ast-isolated-{secrets.token_hex(8)}")
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
        finally:
            _remove(folder)

    def stop(self) -> None:
        """End the child and the programs that it started."""
        if self._child is not None:
            _kill_group(self._child.pid)
            self._child.wait()
            self._child = None
            self._open.close()

    def _start(self) -> None:
        self.stop()
        self._socket, theirs = map(self._open.enter_context, socket.socketpair())
        self._stderr = self._open.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  stop() closes it
        limits = f"{self.memory_bytes or ''}:{self.file_bytes or ''}:{self.result_bytes}"
        argv = [sys.executable, "-m", "pipeline.prepare.sandbox", self.function, str(theirs.fileno()), limits]
        # Under pytest or a submitted job the project may be on this process's path alone.
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._child = subprocess.Popen(
            argv, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=self._stderr, stderr=self._stderr,
            start_new_session=True, env=env,
        )  # fmt: skip
        theirs.close()

    def _send(self, data: bytes, ends_s: float) -> None:
        self._socket.settimeout(_left_s(ends_s))
        self._socket.sendall(data)  # the limit is that of all the bytes together

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
        """How the child ended, and the last line that it wrote to standard error."""
        assert self._child is not None
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(EXIT_S)
        _kill_group(self._child.pid)  # what it had started may live on
        code = self._child.wait()
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - SHOWN_OF_STDERR))
        last = self._stderr.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
        return ", ".join(filter(None, [signal.Signals(-code).name if code < 0 else f"status {code}", last]))


def _left_s(ends_s: float) -> float:
    left_s = ends_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s


def _kill_group(leader_pid: int) -> None:
    try:
        os.killpg(leader_pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # all of the group have ended


def _remove(folder: str) -> None:
    """Under another name first, so that a program which is still ending adds nothing to it."""
    with suppress(OSError):
        os.rename(folder, folder := f"{folder}-ended")
        shutil.rmtree(folder, ignore_errors=True)


class _Folder:
    """In the child: the folder of the call in progress."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._path = ""

    def make(self, path: str) -> None:
        with self._lock:
            self._path = path
            os.mkdir(path, 0o700)
        tempfile.tempdir = os.environ["TMPDIR"] = path

    def end(self) -> NoReturn:
        """Remove it, and end this process and its programs."""
        self._lock.acquire()  # for good: no other folder is made
        _remove(self._path)
        os.killpg(os.getpid(), signal.SIGKILL)
        raise AssertionError("alive after SIGKILL")


def _serve(function: str, fd: int, limits: str) -> None:
    """The child: call after call until the parent closes its end."""
    memory_bytes, file_bytes, result_bytes = limits.split(":")
    if memory_bytes and sys.platform == "linux":
        # Not the address space, of which Deno reserves more than any machine has memory.
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory_bytes),) * 2)
    if file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(file_bytes),) * 2)
    folder = _Folder()
    threading.Thread(target=_end_with_parent, args=(os.getppid(), fd, folder), daemon=True).start()
    keep_freed_memory()
    module, name = function.split(":")
    work: Callable[..., Any] = getattr(importlib.import_module(module), name)
    connection = socket.socket(fileno=fd)
    requests = connection.makefile("rb")
    with suppress(EOFError, ConnectionError, pickle.UnpicklingError):  # the parent has ended, maybe while it sent
        while True:
            path, args, kwargs = pickle.load(requests)
            for part in _answer(work, folder, path, args, kwargs, int(result_bytes)):
                connection.sendall(part)
    folder.end()


def _answer(
    work: Callable[..., Any], folder: _Folder, path: str, args: Any, kwargs: Any, result_bytes: int
) -> tuple[bytes, bytearray]:
    try:
        folder.make(path)
        packed = answers.pack_result(work(*args, **kwargs))
        if len(packed[1]) > result_bytes:
            raise ClipError(Reason.TOO_LARGE, f"{len(packed[1]):,} bytes; {result_bytes:,} are allowed")
        return packed
    except (ClipError, UserError) as err:
        return answers.pack_error(err)
    except MemoryError:
        return answers.pack_error(ClipError(Reason.TOO_LARGE, "takes more memory than a clip may"))
    except Exception as err:  # any library's
        if isinstance(err, OSError) and err.errno in LOCAL_ERRNOS:
            return answers.pack_error(UserError(f"this machine cannot go on: {explain(err, os.path.dirname(path))}"))
        return answers.pack_error(ClipError(Reason.UNFORESEEN, f"{type(err).__name__}: {err}"))


def _end_with_parent(parent_pid: int, fd: int, folder: _Folder) -> None:
    """End this process, its programs and its folder when the parent has closed the socket, or is another one."""
    poller = select.poll()
    poller.register(fd, 0)  # of a peer that is gone it tells in any case
    while os.getppid() == parent_pid and not poller.poll(PARENT_CHECK_S * 1000):
        pass
    folder.end()


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), sys.argv[3])
