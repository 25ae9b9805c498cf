"""The one lock: a single job at a time writes to an output or a run."""

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
from pipeline.cluster import end, on_this_node

Purpose = Literal["prepare", "train"]
DOING: dict[Purpose, str] = {"prepare": "preparing", "train": "training"}
NO_SUCH_LOCKS = (errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What `flock` says on file systems without locks: NFS, some Lustre."""


@contextmanager
def exclusive(purpose: Purpose, uri: str) -> Iterator[None]:
    """Hold `uri` against all other jobs that can be seen, until the block or this process ends.

    A folder on a local disk, which is created if it does not exist, is locked on this machine. If this process has
    joined Ray, `uri` is also held against the other jobs of the cluster, wherever it is. Two clusters that write to one
    bucket do not see each other.

    Raises:
        DataError: another job holds it, or it is a file.
    """
    with ExitStack() as held:
        is_ours = held.enter_context(_locked_folder(uri))
        if is_ours and ray.is_initialized():
            is_ours = held.enter_context(_named_in_cluster(purpose, uri))
        if not is_ours:
            raise DataError(f"another job is {DOING[purpose]} {uri}; wait for its end, or stop it")
        yield


@contextmanager
def _locked_folder(folder: str) -> Iterator[bool]:
    """Lock a local folder; False if another process has locked it. Elsewhere there is nothing to lock."""
    fs, path = storage.resolve(folder)
    if not isinstance(fs, pafs.LocalFileSystem):
        yield True
        return
    try:
        fs.create_dir(path)
    except FileExistsError as err:
        raise DataError(f"{folder} is a file; give a folder") from err
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
    """Hold the name of `uri` in the cluster; False if another job does."""
    fs, path = storage.resolve(uri)
    name = f"{purpose} {fs.type_name}:{posixpath.normpath(path)}"  # the same for all spellings and options of a URI
    try:
        holder: Any = ray.remote(_Holder).options(name=name, **on_this_node()).remote()
    except ValueError:  # Ray gives a name once
        yield False
        return
    try:
        yield True
    finally:
        end(holder, name)


class _Holder:
    """An actor without methods. Its name is the lock, and Ray frees the name when the job ends, however it ends."""
