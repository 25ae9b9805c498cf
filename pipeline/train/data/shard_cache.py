"""A cache of object storage's shards on a node's disk, up to a size. Epochs after the first read from it."""

import errno
import logging
import os
import re
import shutil
import time
import uuid
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline import storage

logger = logging.getLogger(__name__)
COPY_BYTES = 1 << 24
NO_ROOM = {errno.ENOSPC, errno.EDQUOT}

CUT_OFF_S = 3600.0
"""A partial copy that did not grow for this long was left by a crash."""

_OURS = re.compile(rf"[0-9a-f]{{32}}\.(parquet|[0-9a-f]{{32}}{re.escape(storage.UNFINISHED)})")
"""Names of the cache's own files. Other files in the folder are left alone."""


@dataclass(frozen=True)
class ShardCache:
    """A cache folder that all workers of a node share.

    A cached file is named after the shard's URI, size and, if known, modification time. The URI is not enough: a shard
    that is prepared again keeps its name, which depends on its clips and not on their features.

    Args:
        folder: A local folder. It is created if it does not exist.
        max_bytes: Above it the least recently opened files are removed. A reader can finish a file that is removed
            meanwhile. While several workers fetch, each may exceed the limit by one shard. A shard larger than
            `max_bytes` is not cached.
    """

    folder: str
    max_bytes: int

    def open(self, uri: str) -> pa.NativeFile:
        """Open `uri` from the cache, or directly if it is a local file or the disk is full."""
        fs, path = storage.resolve(uri)
        if isinstance(fs, pafs.LocalFileSystem):
            return fs.open_input_file(path)
        info = fs.get_file_info(path)
        if not info.is_file or info.size is None or info.size > self.max_bytes:
            return fs.open_input_file(path)
        try:
            return self._open_kept(fs, info, self._kept(uri, info))
        except OSError as err:
            if err.errno not in NO_ROOM:
                raise
            _announce_full(self.folder)
            return fs.open_input_file(path)

    def forget(self, uri: str) -> bool:
        """Remove the cached copy of a file, because it is damaged. Returns whether there was one."""
        fs, path = storage.resolve(uri)
        kept = self._kept(uri, fs.get_file_info(path))
        was_kept = kept.exists()
        kept.unlink(missing_ok=True)
        return was_kept

    def _kept(self, uri: str, info: pafs.FileInfo) -> Path:
        name = sha256(f"{uri} {info.size} {info.mtime_ns}".encode()).hexdigest()[:32]
        return Path(self.folder, f"{name}.parquet")

    def _open_kept(self, fs: pafs.FileSystem, info: pafs.FileInfo, kept: Path) -> pa.NativeFile:
        while True:
            try:
                os.utime(kept)
                return pafs.LocalFileSystem().open_input_file(str(kept))
            except FileNotFoundError:  # not cached yet, or removed by another worker that needed room
                self._fetch(fs, info, kept)

    def _fetch(self, fs: pafs.FileSystem, info: pafs.FileInfo, kept: Path) -> None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(f".{uuid.uuid4().hex}{storage.UNFINISHED}")
        try:
            self._make_room(info.size)
            if shutil.disk_usage(self.folder).free < info.size:  # check before the shard is fetched for nothing
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.folder)
            with fs.open_input_file(info.path) as source, open(unfinished, "wb") as file:
                shutil.copyfileobj(source, file, COPY_BYTES)
            os.replace(unfinished, kept)
        finally:
            unfinished.unlink(missing_ok=True)

    def _make_room(self, num_bytes: int) -> None:
        files = []
        for file in filter(lambda file: _OURS.fullmatch(file.name), Path(self.folder).iterdir()):
            try:
                status = file.stat()
            except FileNotFoundError:
                continue  # another worker has just removed it
            if file.suffix != storage.UNFINISHED:
                files.append((status.st_mtime, status.st_size, file))
            elif time.time() - status.st_mtime > CUT_OFF_S:
                file.unlink(missing_ok=True)
        total = num_bytes + sum(size for _, size, _ in files)
        for _, size, file in sorted(files):
            if total <= self.max_bytes:
                return
            file.unlink(missing_ok=True)
            total -= size


@cache
def _announce_full(folder: str) -> None:
    """Warn once in a process, however many shards it reads."""
    logger.warning(f"the disk of the shard cache {folder} is full: shards are read directly from storage")
