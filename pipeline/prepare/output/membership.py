"""Which clips stand in which split of a data set: those of the last list, each in one split.

Shards are immutable, so a clip that is no longer listed keeps its row there, and comes back for nothing when it is
listed again. What is in an index is decided here, from the rows that the shards have and from the list.

A clip is the same clip if its id and its fbanks are the same: ids such as `001` occur in unrelated data sets.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.prepare.clip import CLIPS, FAILURES, Reason
from pipeline.prepare.sources import ClipList
from pipeline.versions import in_words


@dataclass(frozen=True)
class Listed:
    """What a list says of one split."""

    num_rows: int
    """Rows to be worked on, those that cannot be clips among them."""
    clip_ids: pa.Array
    """Clips, and clips whose file is missing in this folder; the latter may have been prepared from another folder."""
    beyond: pa.Array
    """Clips beyond --limit: they stay if an earlier run has prepared them or seen them fail."""

    @property
    def may_stay(self) -> pa.Array:
        return pa.concat_arrays([self.clip_ids, self.beyond])


@dataclass(frozen=True)
class Membership:
    """Who stands where once a list has been prepared."""

    standing: dict[str, pa.Table]
    """Rows of `prepared` that are in the index, by split: all splits of the list, and others that lost a clip."""
    no_longer_listed: dict[str, int]
    moved: dict[str, int]
    """Clips that left a split for another one."""
    twice: dict[str, pa.Table]
    """FAILURES of clips that a list names in two splits, by the split in which they come second."""
    remarks: list[str] = field(default_factory=list)
    """Lines for the user."""


def listed_in(clips: ClipList, split: str) -> Listed:
    of_split, refused = (_of_split(table, split) for table in (clips.clips, clips.refused))
    missing_here = refused.filter(pc.equal(refused["reason"], str(Reason.MISSING_FILE)))
    return Listed(
        num_rows=len(of_split) + len(refused),
        clip_ids=_joined([of_split["clip_id"], missing_here["clip_id"]]),
        beyond=_joined([_of_split(clips.beyond, split)["clip_id"]]),
    )


def as_stored(prepared: Mapping[str, pa.Table]) -> Membership:
    """Every clip of the shards in its split, where there is no list."""
    return Membership(dict(prepared), dict.fromkeys(prepared, 0), dict.fromkeys(prepared, 0), {})


def settle(
    prepared: Mapping[str, pa.Table], listed: Mapping[str, Listed], others: Mapping[str, pa.Table]
) -> Membership:
    """Decide who stands where.

    Args:
        prepared: what the shards of the list's splits hold, one row a clip, with `clip_id`, `fbank_hash` and `labels`.
        listed: what the list says of each of these splits.
        others: the same columns of the clips in the indexes of all other splits, as far as they share an id with these.
    """
    standing = {
        split: rows.filter(pc.is_in(rows["clip_id"], value_set=listed[split].may_stay))
        for split, rows in prepared.items()
    }
    twice, remarks = _leave_the_second(standing)
    no_longer_listed, moved = {}, {}
    elsewhere = dict(others) | standing
    for split, rows in prepared.items():
        gone = rows.filter(pc.invert(pc.is_in(rows["clip_id"], value_set=listed[split].may_stay)))
        to = {other: len(_same(gone, there)) for other, there in standing.items() if other != split}
        moved[split] = sum(to.values())
        no_longer_listed[split] = len(gone) - moved[split]
        remarks += [_moved_line(n, split, other) for other, n in to.items() if n]
    for split, rows in others.items():
        left = rows
        for other, there in standing.items():
            same = _same(left, there)
            if len(same):
                remarks.append(_moved_line(len(same), split, other))
                left = left.filter(pc.invert(pc.is_in(left["clip_id"], value_set=_ids(same))))
            if namesakes := len(left.filter(pc.is_in(left["clip_id"], value_set=_ids(there)))):
                remarks.append(_namesakes_line(namesakes, split, other))
        if len(left) < len(rows):
            elsewhere[split], moved[split], no_longer_listed[split] = left, len(rows) - len(left), 0
    changed = {split: rows for split, rows in elsewhere.items() if split in prepared or split in moved}
    return Membership(changed, no_longer_listed, moved, twice, remarks)


def once_each(clips: ClipList) -> ClipList:
    """`clips`, where a section that stands in two splits is refused in the second: trained on and scored on, it would
    make the score too high. Within one split a section may stand under several ids."""
    if pc.count_distinct(clips.clips["split"]).as_py() < 2:
        return clips
    where = ["media", "member", "media_start_s", "start_s", "end_s"]
    rows = clips.clips.append_column("row", pa.array(range(len(clips.clips)), pa.int64()))
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
        _refused_twice(row, split_of[second[i]].as_py(), f"as {clip_ids[second[i]].as_py()}")
        for i, row in zip(sorted(second), clips.clips.take(pa.array(sorted(second))).to_pylist(), strict=True)
    ]
    stays = pc.invert(pc.is_in(rows["row"], value_set=pa.array(list(second), pa.int64())))
    return replace(
        clips,
        clips=rows.filter(stays).select(CLIPS.names),
        refused=pa.concat_tables([clips.refused, pa.Table.from_pylist(refused, schema=FAILURES)]),
    )


def _leave_the_second(standing: dict[str, pa.Table]) -> tuple[dict[str, pa.Table], list[str]]:
    """Take a clip that the list names in two splits out of the second, in `standing`."""
    twice: dict[str, pa.Table] = {}
    remarks = []
    for one, two in combinations(standing, 2):
        namesakes = standing[two].filter(pc.is_in(standing[two]["clip_id"], value_set=_ids(standing[one])))
        same = _same(namesakes, standing[one])
        if len(same):
            rows = [_refused_twice(row | {"split": two}, one, "with equal sound") for row in same.to_pylist()]
            refused = pa.Table.from_pylist(rows, schema=FAILURES)
            twice[two] = pa.concat_tables([twice.get(two, FAILURES.empty_table()), refused])
            is_same = pc.is_in(standing[two]["clip_id"], value_set=_ids(same))
            standing[two] = standing[two].filter(pc.invert(is_same))
        if len(same) < len(namesakes):
            remarks.append(_namesakes_line(len(namesakes) - len(same), one, two))
    return twice, remarks


def _same(rows: pa.Table, there: pa.Table) -> pa.Table:
    """The clips among `rows` that are in `there`, by id and by fbanks."""
    position = pc.index_in(rows["clip_id"], value_set=_ids(there))
    found = rows.filter(pc.is_valid(position))
    of_there = there["fbank_hash"].take(position.drop_null())
    return found.filter(pc.equal(found["fbank_hash"], of_there)) if len(found) else found


def _refused_twice(row: Mapping[str, object], first: str, how: str) -> dict[str, object]:
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
    return f"{num_clips:,} clips moved from {old} to {new}: a clip stands in one split, that of the last list"


def _namesakes_line(num_clips: int, one: str, two: str) -> str:
    return f"{num_clips:,} clip ids occur in {one} and in {two} with different sound; both clips stay"


def _of_split(table: pa.Table, split: str) -> pa.Table:
    return table.filter(pc.equal(table["split"], split))


def _ids(table: pa.Table) -> pa.Array:
    return _joined([table["clip_id"]])


def _joined(columns: Iterable[pa.ChunkedArray]) -> pa.Array:
    return pa.concat_arrays([pa.array([], pa.string()), *(chunk for column in columns for chunk in column.chunks)])
