"""Shards of object storage kept on a node's disk, up to a size: epochs after the first read them there."""

import os
import re
import shutil
import time
import uuid
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline import storage

COPY_BYTES = 1 << 24

CUT_OFF_S = 3600.0
"""A copy is cut off, by a kill, if nothing was added to it for so long."""

_OURS = re.compile(rf"[0-9a-f]{{32}}\.(parquet|[0-9a-f]{{32}}{re.escape(storage.UNFINISHED)})")
"""Nothing else in the folder is touched."""


@dataclass(frozen=True)
class ShardCache:
    """Shared by all workers of a node. A shard is named after its URI: shards never change.

    Args:
        folder: local; made if it is not there.
        max_bytes: beyond it the files that were opened longest ago go. A file being read may be removed, and its
            reader keeps it to the end. While several workers fetch at once, one shard each may be over.
    """

    folder: str
    max_bytes: int

    def open(self, uri: str) -> pa.NativeFile:
        """The file `uri` from this node's disk; a local file is its own."""
        fs, path = storage.resolve(uri)
        if isinstance(fs, pafs.LocalFileSystem):
            return fs.open_input_file(path)
        kept = Path(self.folder, f"{sha256(uri.encode()).hexdigest()[:32]}.parquet")
        while True:
            try:
                os.utime(kept)
                return pafs.LocalFileSystem().open_input_file(str(kept))
            except FileNotFoundError:  # never here, or removed for room by another worker
                self._fetch(fs, path, kept)

    def _fetch(self, fs: pafs.FileSystem, path: str, kept: Path) -> None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(f".{uuid.uuid4().hex}{storage.UNFINISHED}")
        try:
            with fs.open_input_file(path) as source, open(unfinished, "wb") as file:
                self._make_room(source.size())
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
