"""Work in a process of its own, with a deadline: what strangers' media do to FFmpeg or yt-dlp ends there.

A damaged or hostile file may hang a decoder, take all memory or crash it, and a fetch may never end. The child leads a
process group, so that the programs it starts end with it; it ends by itself when its parent is gone. It stays for the
next call, since starting one costs half a second.
"""

import errno
import importlib
import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import IO, Any, NoReturn

from ast_core.errors import UserError
from pipeline.prepare.clip import ClipError, Reason
from pipeline.prepare.memory import keep_freed_memory

PARENT_CHECK_S = 1.0

LOCAL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE}
"""Of errors that are this machine's, whatever the clip."""

SHOWN_OF_STDERR = 2000
"""Bytes from the end of what the child and its programs wrote to standard error."""


class Isolated:
    """Calls `module:function` in a child process, which starts with the first call. Not for several threads at once.

    Args:
        function: importable; what it takes and returns must be picklable. It may raise ClipError or UserError.
        memory_bytes: that the child, and each program it starts, may write to, where the system can limit it (Linux).
        file_bytes: size of a file that the child and its programs may write.
    """

    def __init__(self, function: str, *, memory_bytes: int | None = None, file_bytes: int | None = None) -> None:
        self.function, self.memory_bytes, self.file_bytes = function, memory_bytes, file_bytes
        self._child: subprocess.Popen[bytes] | None = None
        self._open = ExitStack()
        self._connection: Connection
        self._stderr: IO[bytes]

    def __call__(self, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        """Raises ClipError `timeout` past the deadline, `crashed` if the child dies, and what the function raises.

        UserError where the machine has no room for a child, or for what it does.
        """
        try:
            # What it leaves when it is killed lies where this side removes it. A folder for each call: between calls,
            # when Ray ends workers at the end of a job, there is none.
            folder = tempfile.TemporaryDirectory(prefix="ast-isolated-", ignore_cleanup_errors=True)
            if self._child is None or self._child.poll() is not None:
                self._start()
        except OSError as err:  # no room in the temporary folder, no more processes
            raise UserError(f"this machine cannot start a process to work in: {err}") from err
        with folder:
            try:
                self._connection.send_bytes(pickle.dumps((folder.name, args, kwargs), protocol=5))
                if not self._connection.poll(deadline_s):
                    self.stop()
                    raise ClipError(Reason.TIMEOUT, f"not done within {deadline_s:g} s")
                error, result = pickle.loads(self._connection.recv_bytes())
            except (EOFError, ConnectionError) as err:
                raise ClipError(Reason.CRASHED, f"its process ended ({self._ending()})") from err
        if error is not None:
            raise error
        return result

    def stop(self) -> None:
        """End the child and the programs that it started."""
        if self._child is not None:
            _kill_group(self._child.pid)
            self._child.wait()
            self._child = None
            self._open.close()

    def _start(self) -> None:
        self.stop()
        ours, theirs = socket.socketpair()
        self._connection = self._open.enter_context(Connection(ours.detach()))
        self._stderr = self._open.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  stop() closes it
        limits = f"{self.memory_bytes or ''}:{self.file_bytes or ''}"
        argv = [sys.executable, "-m", "pipeline.prepare.isolated", self.function, str(theirs.fileno()), limits]
        # Under pytest or a submitted job the project may be on this process's path alone.
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._child = subprocess.Popen(
            argv, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=self._stderr, stderr=self._stderr,
            start_new_session=True, env=env,
        )  # fmt: skip
        theirs.close()

    def _ending(self) -> str:
        assert self._child is not None
        code = self._child.wait()
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - SHOWN_OF_STDERR))
        last = self._stderr.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
        _kill_group(self._child.pid)  # what it had started may live on
        return ", ".join(filter(None, [signal.Signals(-code).name if code < 0 else f"status {code}", last]))


def _kill_group(leader_pid: int) -> None:
    try:
        os.killpg(leader_pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # all of the group have ended


def _serve(function: str, fd: int, limits: str) -> None:
    """The child: call after call until the parent closes its end."""
    memory_bytes, file_bytes = limits.split(":")
    if memory_bytes and sys.platform == "linux":
        # Not the address space, of which Deno reserves more than any machine has memory.
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory_bytes),) * 2)
    if file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(file_bytes),) * 2)
    folders: list[str] = []
    threading.Thread(target=_end_with_parent, args=(os.getppid(), folders), daemon=True).start()
    keep_freed_memory()
    module, name = function.split(":")
    work: Callable[..., Any] = getattr(importlib.import_module(module), name)
    connection = Connection(fd)
    while True:
        try:
            folder, args, kwargs = pickle.loads(connection.recv_bytes())
        except EOFError:
            _end_without_parent(folders)
        folders[:] = [folder]
        tempfile.tempdir = os.environ["TMPDIR"] = folder
        connection.send_bytes(pickle.dumps(_outcome(work, args, kwargs), protocol=5))


def _outcome(work: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Exception | None, Any]:
    try:
        return None, work(*args, **kwargs)
    except (ClipError, UserError) as err:
        return err, None
    except MemoryError:
        return ClipError(Reason.TOO_LARGE, "takes more memory than a clip may"), None
    except OSError as err:
        if err.errno in LOCAL_ERRNOS:
            return UserError(f"this machine cannot go on: {err}"), None
        return _unforeseen(err), None
    except Exception as err:  # of any library; it need not be picklable
        return _unforeseen(err), None


def _unforeseen(err: Exception) -> ClipError:
    return ClipError(Reason.UNFORESEEN, f"{type(err).__name__}: {err}")


def _end_with_parent(parent_pid: int, folders: list[str]) -> None:
    while os.getppid() == parent_pid:
        time.sleep(PARENT_CHECK_S)
    _end_without_parent(folders)


def _end_without_parent(folders: list[str]) -> NoReturn:
    for folder in folders:  # the parent's to remove, had it lived
        shutil.rmtree(folder, ignore_errors=True)
    os.killpg(os.getpid(), signal.SIGKILL)
    raise AssertionError("alive after SIGKILL")


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), sys.argv[3])
