"""The lock that lets one job at a time write to an output or a run: on a machine, in a cluster, or, on S3, anywhere."""

import errno
import fcntl
import os
import posixpath
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, Literal

import pyarrow.fs as pafs
import ray

from ast_core.errors import DataError
from pipeline import lease, storage
from pipeline.cluster import end, on_this_node, ray_is_ours
from pipeline.lease import Held
from pipeline.s3 import UnconditionalError

Purpose = Literal["prepare", "train", "tag"]
DOING: dict[Purpose, str] = {"prepare": "preparing", "train": "training", "tag": "tagging"}
NO_SUCH_LOCKS = (errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""Errors of `flock` on file systems without locks, such as some mounts of NFS and Lustre."""
LOCAL_LOCK = "lock"
"""The locked file of a local folder, below `storage.LOCKS`."""


@contextmanager
def exclusive(purpose: Purpose, uri: str) -> Iterator[Held]:
    """Lock `uri` against other jobs, until the block or this process ends.

    A folder is locked on this machine, and on others that share it by a network file system with locks. It is created
    if it does not exist. In a cluster, `uri` is also locked against the other jobs of the cluster, whether it is local
    or remote. A Ray that this process has started needs no second lock on a folder, because all its jobs are on this
    machine. On S3, `uri` is locked against all jobs everywhere (`pipeline.lease`). Other buckets, and stores that
    cannot write on condition, have no such lock: a line says so.

    Raises:
        DataError: another job has the lock, or `uri` is a file.
        LeaseLostError: the job could not keep the lock; raised within the block.
    """
    with ExitStack() as held:
        is_ours = held.enter_context(_locked_folder(_doing(purpose, uri), uri))
        is_folder = storage.is_local(uri)
        if is_ours and ray.is_initialized() and not (is_folder and ray_is_ours()):
            is_ours = held.enter_context(_named_in_cluster(purpose, uri))
        if not is_ours:
            owner = lease.owner_of(_lease_file(purpose, uri)) if lease.is_possible(uri) else None
            raise _refused(purpose, uri, owner)
        yield Held(uri, _doing(purpose, uri), None) if is_folder else held.enter_context(_leased(purpose, uri))


@contextmanager
def _leased(purpose: Purpose, uri: str) -> Iterator[Held]:
    """Hold a lease on a remote output, if its store has leases."""
    doing, lacks = _doing(purpose, uri), "jobs of other clusters are not kept from it"
    with ExitStack() as stack:
        held = Held(uri, doing, None)
        if not lease.is_possible(uri):
            print(f"{doing}: only S3 has locks that hold between clusters, so {lacks}", flush=True)
        else:
            say = partial(print, flush=True)
            try:
                held = stack.enter_context(lease.leased(_lease_file(purpose, uri), doing, say))
            except lease.HeldError as err:
                raise _refused(purpose, uri, err.owner) from err
            except UnconditionalError as err:
                print(f"{doing}: this store does not write on condition ({err}), so {lacks}", flush=True)
        yield held


def _refused(purpose: Purpose, uri: str, owner: lease.Owner | None) -> DataError:
    who = "" if owner is None else f" ({owner.text})"
    return DataError(f"another job is {_doing(purpose, uri)}{who}; wait for its end, or stop it")


def _doing(purpose: Purpose, uri: str) -> str:
    return f"{DOING[purpose]} {uri}"


def _lease_file(purpose: Purpose, uri: str) -> str:
    return storage.join(uri, storage.LOCKS, f"{purpose}.json")


@contextmanager
def _locked_folder(doing: str, folder: str) -> Iterator[bool]:
    """Lock a local folder; False if another process has the lock. On object storage this does nothing.

    The lock is on a file, because the client of a network file system keeps locks of folders to its own machine. The
    file goes when the job ends; one that a killed job leaves is not locked.
    """
    fs, path = storage.resolve(folder)
    if not isinstance(fs, pafs.LocalFileSystem):
        yield True
        return
    file = os.path.join(path, storage.LOCKS, LOCAL_LOCK)
    try:
        os.makedirs(path, exist_ok=True)  # Arrow's error on a read-only disk does not name the folder
        handle = _opened_and_locked(file, doing)
    except (FileExistsError, NotADirectoryError) as err:
        raise DataError(f"{folder} is a file or below one; give a folder") from err
    if handle is None:
        yield False
        return
    try:
        yield True
    finally:
        with suppress(OSError):
            os.unlink(file)
        os.close(handle)
        with suppress(OSError):  # a client of NFS keeps an unlinked file in its folder until it is closed
            os.rmdir(os.path.dirname(file))


def _opened_and_locked(file: str, doing: str) -> int | None:
    """The handle of a new or existing file with a lock; None if another process has the lock."""
    folder = os.path.dirname(file)
    while True:
        try:
            os.makedirs(folder, exist_ok=True)
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # a job that ends has removed the folder
            continue
        except FileExistsError:  # the same, while `makedirs` looked at it
            if os.path.lexists(folder) and not os.path.isdir(folder):
                raise
            continue
        try:
            is_locked = _flock(handle, doing)
            if is_locked and _is_still(file, handle):
                return handle
        except OSError as err:
            os.close(handle)
            if err.errno != errno.ESTALE:  # on NFS: the file was removed
                raise
            continue
        os.close(handle)
        if not is_locked:
            return None


def _is_still(file: str, handle: int) -> bool:
    """Whether the open file is still the one of this name. The job that had its lock may have removed it.

    The name is opened, because a client of NFS then asks the server, and need not for `stat`.
    """
    try:
        with open(file, "rb") as again:
            return os.path.samestat(os.fstat(handle), os.fstat(again.fileno()))
    except FileNotFoundError:
        return False


def _flock(handle: int, doing: str) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as err:
        if err.errno not in NO_SUCH_LOCKS:
            raise
        print(f"{doing}: this file system has no locks, so other jobs are not kept from it", flush=True)
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
