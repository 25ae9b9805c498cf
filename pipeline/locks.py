"""The lock that lets only one job at a time write to an output or a run."""

import errno
import fcntl
import os
import posixpath
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import pyarrow.fs as pafs
import ray

from ast_core.errors import DataError
from pipeline import storage
from pipeline.cluster import end, on_this_node, ray_is_ours

Purpose = Literal["prepare", "train", "tag"]
DOING: dict[Purpose, str] = {"prepare": "preparing", "train": "training", "tag": "tagging"}
NO_SUCH_LOCKS = (errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""Errors of `flock` on file systems without locks, such as NFS and some Lustre."""


@contextmanager
def exclusive(purpose: Purpose, uri: str) -> Iterator[None]:
    """Lock `uri` against other jobs, until the block or this process ends.

    A folder on a local disk is locked on this machine, and created if it does not exist. In a cluster, `uri` is also
    locked against the other jobs of the cluster, whether it is local or remote. A Ray that this process has started
    needs no second lock on a folder, because all its jobs are on this machine. Two clusters that write to one bucket do
    not see each other's locks.

    Raises:
        DataError: another job has the lock, or `uri` is a file.
    """
    with ExitStack() as held:
        is_ours = held.enter_context(_locked_folder(uri))
        is_folder = isinstance(storage.resolve(uri)[0], pafs.LocalFileSystem)
        if is_ours and ray.is_initialized() and not (is_folder and ray_is_ours()):
            is_ours = held.enter_context(_named_in_cluster(purpose, uri))
        if not is_ours:
            raise DataError(f"another job is {DOING[purpose]} {uri}; wait for its end, or stop it")
        yield


@contextmanager
def _locked_folder(folder: str) -> Iterator[bool]:
    """Lock a local folder; False if another process has the lock. On object storage this does nothing."""
    fs, path = storage.resolve(folder)
    if not isinstance(fs, pafs.LocalFileSystem):
        yield True
        return
    try:
        os.makedirs(path, exist_ok=True)  # Arrow's error on a read-only disk does not name the folder
    except (FileExistsError, NotADirectoryError) as err:
        raise DataError(f"{folder} is a file or below one; give a folder") from err
    handle = os.open(path, os.O_RDONLY)
    try:
        yield _flock(handle)
    finally:
        os.close(handle)


def _flock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as err:
        if err.errno not in NO_SUCH_LOCKS:
            raise
    return True


@contextmanager
def _named_in_cluster(purpose: str, uri: str) -> Iterator[bool]:
    """Reserve the name of `uri` in the cluster; False if another job has it."""
    fs, path = storage.resolve(uri)
    name = f"{purpose} {fs.type_name}:{posixpath.normpath(path)}"  # the same for all spellings and options of a URI
    try:
        holder: Any = ray.remote(_Holder).options(name=name, **on_this_node()).remote()
    except ValueError:  # an actor with this name exists
        yield False
        return
    try:
        yield True
    finally:
        end(holder, name)


class _Holder:
    """An actor without methods. Its name is the lock, and Ray frees the name when the job ends, however it ends."""
