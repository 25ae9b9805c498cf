"""Decides which clips are in the index of which split: those of the last list, each in one split.

Shards are immutable, so a clip that is no longer listed keeps its row there, and is used again without preparation when
it is listed again. The index is computed here from the rows of the shards and from the list.

Two clips are the same if their ids and their fbanks are equal, because ids such as `001` occur in unrelated data sets.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import combinations

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.prepare.clip import CLIPS, FAILURES, Reason
from pipeline.prepare.sources import ClipList
from pipeline.prepare.sources.checks import WEB
from pipeline.prepare.sources.locate import youtube_id
from pipeline.prepare.sources.rows import without_file
from pipeline.redaction import WebAddress, without_secrets
from pipeline.versions import in_words


@dataclass(frozen=True)
class Listed:
    """The clips that a list names for one split."""

    num_rows: int
    """Number of rows to prepare, including refused rows."""
    clip_ids: pa.Array
    """Valid clips, and clips whose file is missing in this folder, which an earlier run may have prepared."""
    beyond: pa.Array
    """Clips beyond --limit, with or without a file in this folder. They stay if an earlier run has prepared them or
    recorded their failure."""

    @property
    def may_stay(self) -> pa.Array:
        return pa.concat_arrays([self.clip_ids, self.beyond])


@dataclass(frozen=True)
class Membership:
    """The clips of each split's index after a list has been prepared."""

    indexed: dict[str, pa.Table]
    """Rows of `prepared` that are in the index, by split: all splits of the list, and others that lost a clip."""
    no_longer_listed: dict[str, int]
    moved: dict[str, int]
    """Number of clips that moved to another split, by their old split."""
    twice: dict[str, pa.Table]
    """FAILURES of clips that a list names in two splits, by the second of the splits."""
    lines: list[str] = field(default_factory=list)
    """Lines for the user."""


def listed_in(clips: ClipList, split: str) -> Listed:
    tables = (clips.clips, clips.refused, clips.beyond, clips.missing_beyond)
    of_split, refused, beyond, missing_beyond = (_of_split(table, split) for table in tables)
    clip_ids = _joined([of_split["clip_id"], without_file(refused)["clip_id"]])
    others = pc.unique(_joined([beyond["clip_id"], missing_beyond["clip_id"]]))
    return Listed(
        num_rows=len(of_split) + len(refused),
        clip_ids=clip_ids,
        beyond=others.filter(pc.invert(pc.is_in(others, value_set=clip_ids))),
    )


def as_stored(prepared: Mapping[str, pa.Table]) -> Membership:
    """All clips of the shards stay in their splits, because there is no list."""
    return Membership(dict(prepared), dict.fromkeys(prepared, 0), dict.fromkeys(prepared, 0), {})


def resolve(
    prepared: Mapping[str, pa.Table], listed: Mapping[str, Listed], others: Mapping[str, pa.Table]
) -> Membership:
    """Compute the clips of each split's index.

    Args:
        prepared: rows of the shards of the list's splits, one row per clip, with `clip_id`, `fbank_hash` and `labels`.
        listed: the clips that the list names for each of these splits.
        others: the same columns of clips in the indexes of other splits that share an id with these.
    """
    indexed = {
        split: rows.filter(pc.is_in(rows["clip_id"], value_set=listed[split].may_stay))
        for split, rows in prepared.items()
    }
    twice, lines = _remove_from_second(indexed)
    no_longer_listed, moved = {}, {}
    elsewhere = dict(others) | indexed
    for split, rows in prepared.items():
        gone = rows.filter(pc.invert(pc.is_in(rows["clip_id"], value_set=listed[split].may_stay)))
        to = {other: len(_same(gone, there)) for other, there in indexed.items() if other != split}
        moved[split] = sum(to.values())
        no_longer_listed[split] = len(gone) - moved[split]
        lines += [_moved_line(n, split, other) for other, n in to.items() if n]
    for split, rows in others.items():
        left = rows
        for other, there in indexed.items():
            same = _same(left, there)
            if len(same):
                lines.append(_moved_line(len(same), split, other))
                left = left.filter(pc.invert(pc.is_in(left["clip_id"], value_set=_ids(same))))
            if same_ids := len(left.filter(pc.is_in(left["clip_id"], value_set=_ids(there)))):
                lines.append(_same_ids_line(same_ids, split, other))
        if len(left) < len(rows):
            elsewhere[split], moved[split], no_longer_listed[split] = left, len(rows) - len(left), 0
    changed = {split: rows for split, rows in elsewhere.items() if split in prepared or split in moved}
    return Membership(changed, no_longer_listed, moved, twice, lines)


def refuse_repeated_sections(clips: ClipList) -> ClipList:
    """Refuse a section that is in two splits in the second one, because training on evaluation clips inflates scores.

    Within one split a section may have several ids. Several spellings of a path are one file.
    """
    if pc.count_distinct(clips.clips["split"]).as_py() < 2:
        return clips
    where = ["file", "member", "media_start_s", "start_s", "end_s"]
    rows = clips.clips.append_column("file", _one_spelling(clips.clips["media"]))
    rows = rows.append_column("row", pa.array(range(len(rows)), pa.int64()))
    shared = rows.group_by(where).aggregate([("split", "count_distinct"), ("row", "list")])
    shared = shared.filter(pc.greater(shared["split_count_distinct"], 1))
    if not len(shared):
        return clips
    split_of, clip_ids = clips.clips["split"], clips.clips["clip_id"]
    second: dict[int, int] = {}
    for of_section in shared["row_list"].to_pylist():
        first = min(of_section)
        second |= {row: first for row in of_section if split_of[row].as_py() != split_of[first].as_py()}
    refused = [
        _refused_duplicate(row, split_of[second[i]].as_py(), f"as {clip_ids[second[i]].as_py()}")
        for i, row in zip(sorted(second), clips.clips.take(pa.array(sorted(second))).to_pylist(), strict=True)
    ]
    stays = pc.invert(pc.is_in(rows["row"], value_set=pa.array(list(second), pa.int64())))
    return replace(
        clips,
        clips=rows.filter(stays).select(CLIPS.names),
        refused=pa.concat_tables([clips.refused, pa.Table.from_pylist(refused, schema=FAILURES)]),
    )


def _one_spelling(media: pa.ChunkedArray) -> pa.ChunkedArray:
    """Local paths without `file://`, `.`, `..` and links of folders, and one URL for each video of YouTube. A link of a
    single file stays, because to look at each of two million files takes minutes on a shared disk.
    """
    real_folder = cache(os.path.realpath)

    def spelled(uri: str) -> str:
        path = storage.local_path(uri)
        if WEB.match(path):
            if video_id := youtube_id(path):
                return f"https://youtu.be/{video_id}"
            return "\n".join(WebAddress.of(path))
        if "://" in path:
            return without_secrets(path)
        folder, _, name = os.path.normpath(path).rpartition("/")
        return f"{real_folder(folder)}/{name}"

    encoded = media.combine_chunks().dictionary_encode()
    files = pa.array([spelled(uri) for uri in encoded.dictionary.to_pylist()], pa.string())
    return pa.chunked_array([files.take(encoded.indices)])


def _remove_from_second(indexed: dict[str, pa.Table]) -> tuple[dict[str, pa.Table], list[str]]:
    """Remove a clip that the list names in two splits from the second one; changes `indexed`."""
    twice: dict[str, pa.Table] = {}
    lines = []
    for one, two in combinations(indexed, 2):
        same_ids = indexed[two].filter(pc.is_in(indexed[two]["clip_id"], value_set=_ids(indexed[one])))
        same = _same(same_ids, indexed[one])
        if len(same):
            rows = [_refused_duplicate(row | {"split": two}, one, "with equal sound") for row in same.to_pylist()]
            refused = pa.Table.from_pylist(rows, schema=FAILURES)
            twice[two] = pa.concat_tables([twice.get(two, FAILURES.empty_table()), refused])
            is_same = pc.is_in(indexed[two]["clip_id"], value_set=_ids(same))
            indexed[two] = indexed[two].filter(pc.invert(is_same))
        if len(same) < len(same_ids):
            lines.append(_same_ids_line(len(same_ids) - len(same), one, two))
    return twice, lines


def _same(rows: pa.Table, there: pa.Table) -> pa.Table:
    """The clips of `rows` that are in `there`, compared by id and fbank."""
    position = pc.index_in(rows["clip_id"], value_set=_ids(there))
    found = rows.filter(pc.is_valid(position))
    of_there = there["fbank_hash"].take(position.drop_null())
    return found.filter(pc.equal(found["fbank_hash"], of_there)) if len(found) else found


def _refused_duplicate(row: Mapping[str, object], first: str, how: str) -> dict[str, object]:
    message = f"its sound is in the split {first} too, {how}; it stays there and leaves {row['split']}"
    return {
        "clip_id": row["clip_id"],
        "split": row["split"],
        "stage": "source",
        "reason": str(Reason.DUPLICATE),
        "message": message,
        "attempts": 1,
        "retry": Reason.DUPLICATE.retry,
        "tool_versions": in_words(),
        "labels": row["labels"],
    }


def _moved_line(num_clips: int, old: str, new: str) -> str:
    return f"{num_clips:,} clips moved from {old} to {new}: a clip is in one split, that of the last list"


def _same_ids_line(num_clips: int, one: str, two: str) -> str:
    return f"{num_clips:,} clip ids occur in {one} and in {two} with different sound; both clips stay"


def _of_split(table: pa.Table, split: str) -> pa.Table:
    return table.filter(pc.equal(table["split"], split))


def _ids(table: pa.Table) -> pa.Array:
    return _joined([table["clip_id"]])


def _joined(columns: Iterable[pa.ChunkedArray]) -> pa.Array:
    return pa.concat_arrays([pa.array([], pa.string()), *(chunk for column in columns for chunk in column.chunks)])
