"""Names for clips without an id in their list: the file's stem, with as many folders as tell equal stems apart.

    audio/rex.wav                                      rex
    sc/bed/0a7c_nohash_0.wav, sc/bird/0a7c_nohash_0.…  bed/0a7c_nohash_0, bird/0a7c_nohash_0
    0000.wav in shard-000000.tar and shard-000001.tar  shard-000000/0000, shard-000001/0000
    x.wav and x.flac in one folder                     x.wav, x.flac

Clips of one split with the same stem form a group. A group gets the smallest number of folders that makes its names
differ, and also the file's suffix if whole paths are equal, and last a hash of what may be a key in its address. An
archive counts as a folder. A name depends only on the paths of its group, not on their order or on other clips. So a
growing list renames a clip only if another file of the same stem joins its group.
"""

import hashlib
import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.prepare.sources.checks import WEB
from pipeline.redaction import WebAddress


def rows_of_one_name(clips: pa.Table) -> list[list[int]]:
    """Groups of two or more rows with the same split and clip_id, in the order of their first rows."""
    counts = clips.group_by(["split", "clip_id"]).aggregate([([], "count_all")])
    if len(counts) == len(clips):
        return []
    repeated = counts.filter(pc.greater(counts["count_all"], 1))["clip_id"].combine_chunks()
    rows = pc.indices_nonzero(pc.is_in(clips["clip_id"], value_set=repeated))
    names = clips.select(["split", "clip_id"]).take(rows)
    groups: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for row, *name in zip(rows.to_pylist(), names["split"].to_pylist(), names["clip_id"].to_pylist(), strict=True):
        groups[name[0], name[1]].append(row)
    return [group for group in groups.values() if len(group) > 1]


def tell_apart(clip_id: str, paths: Sequence[str | None]) -> list[str | None]:
    """A name for each row of a group that shares `clip_id`; None if an earlier row has the same path.

    A path is that of the file, or of the archive and the member in it. It is None if the list itself gave the name,
    which is then kept.
    """
    is_given = None in paths
    of_their_own = {
        row: _Path.of(path)
        for row, (path, first) in enumerate(zip(paths, first_rows(paths), strict=True))
        if path is not None and row == first
    }
    names: list[str | None] = [clip_id if path is None else None for path in paths]
    taken = {clip_id} if is_given else set()
    for row, name in zip(of_their_own, _names(clip_id, list(of_their_own.values()), taken), strict=True):
        names[row] = name
    return names


def first_rows(paths: Sequence[str | None]) -> list[int]:
    """For each row of a group, the first row with the same path. That is the row itself unless it is a repetition."""
    first_of: dict[_Path, int] = {}
    return [row if path is None else first_of.setdefault(_Path.of(path), row) for row, path in enumerate(paths)]


class _Path(NamedTuple):
    folders: tuple[str, ...]
    """Outermost first; includes the host of a URL."""
    suffix: str
    """Suffix of the file, with the query of a URL."""
    name: str
    hashed: str = ""
    """A hash of the options of a URL that must not be shown; empty if there are none."""

    @classmethod
    def of(cls, path: str) -> "_Path":
        query = hashed = ""
        if WEB.match(path):
            path, others = WebAddress.of(path)
            hashed = f"#{hashlib.blake2b(others.encode()).hexdigest()[:8]}" if others else ""
            end = re.search(r"[?#]|$", path).start()  # type: ignore[union-attr]  # the end is always found
            path, query = unquote(path[:end]), path[end:]
        path = unicodedata.normalize("NFC", re.sub(r"^[A-Za-z][A-Za-z0-9+.-]*://", "", path))
        *folders, name = posixpath.normpath(path).split("/")
        stem, suffix = posixpath.splitext(name)
        return cls(tuple(filter(None, folders)), suffix + query, stem, hashed)


def _names(clip_id: str, paths: Sequence[_Path], taken: set[str]) -> list[str]:
    for with_suffix, with_hash in ((False, False), (True, False), (True, True)):
        endings = [path.suffix * with_suffix + path.hashed * with_hash for path in paths]
        for depth in range(max((len(path.folders) for path in paths), default=0) + 1):
            names = [
                "/".join([*path.folders[len(path.folders) - depth :][:depth], f"{clip_id}{ending}"])
                for path, ending in zip(paths, endings, strict=True)
            ]
            if len({*names, *taken}) == len(names) + len(taken):
                return names
    return [clip_id] * len(paths)  # no name can tell them apart; all but one are refused
