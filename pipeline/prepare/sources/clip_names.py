"""Names of clips whose list gives them none: the stem of the file, and as many folders as tell equal stems apart.

    audio/rex.wav                                      rex
    sc/bed/0a7c_nohash_0.wav, sc/bird/0a7c_nohash_0.…  bed/0a7c_nohash_0, bird/0a7c_nohash_0
    0000.wav in shard-000000.tar and shard-000001.tar  shard-000000/0000, shard-000001/0000
    x.wav and x.flac in one folder                     x.wav, x.flac

Clips of one split with the same stem are a group. A group takes the fewest folders that make its names differ, and
where whole paths are equal, the suffix of the file too. An archive counts as a folder. A name depends on the paths of
its own group alone, neither on their order nor on any other clip, so that a list that grows renames a clip only when
another file of the same stem joins it.
"""

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


def rows_of_one_name(clips: pa.Table) -> list[list[int]]:
    """Groups of rows with the same split and clip_id, each of two rows or more, in the order of their first rows."""
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
    """A name for each row of a group that shares `clip_id`; None for one whose path stands in the group before.

    A path is that of the file, or of the archive and the member in it; None where the list itself gave the name, which
    then stays.
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
    """For each row of a group, the first row with the same path: itself, unless it repeats another."""
    first_of: dict[_Path, int] = {}
    return [row if path is None else first_of.setdefault(_Path.of(path), row) for row, path in enumerate(paths)]


class _Path(NamedTuple):
    folders: tuple[str, ...]
    """Outermost first; of a URL, the host is one."""
    suffix: str
    """Of the file, with the query of a URL."""
    name: str

    @classmethod
    def of(cls, path: str) -> "_Path":
        query = ""
        if WEB.match(path):
            end = re.search(r"[?#]|$", path).start()  # type: ignore[union-attr]  # the end is always found
            path, query = unquote(path[:end]), path[end:]
        path = unicodedata.normalize("NFC", re.sub(r"^[A-Za-z][A-Za-z0-9+.-]*://", "", path))
        *folders, name = posixpath.normpath(path).split("/")
        stem, suffix = posixpath.splitext(name)
        return cls(tuple(filter(None, folders)), suffix + query, stem)


def _names(clip_id: str, paths: Sequence[_Path], taken: set[str]) -> list[str]:
    for with_suffix in (False, True):
        for depth in range(max((len(path.folders) for path in paths), default=0) + 1):
            names = [
                "/".join([*path.folders[len(path.folders) - depth :][:depth], clip_id + path.suffix * with_suffix])
                for path in paths
            ]
            if len({*names, *taken}) == len(names) + len(taken):
                return names
    return [clip_id] * len(paths)  # differ in nothing that a name can hold; all but one are refused for it
