"""Collects the rows of a list: those that become clips, and those that are refused."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary
from pipeline.prepare.clip import CLIPS, FAILURES, ClipError, Reason
from pipeline.prepare.sources.checks import CONTROL, LONGEST_ID, check_clip_id, show
from pipeline.prepare.sources.clip_names import first_rows, rows_of_one_name, tell_apart
from pipeline.prepare.sources.label_text import UnknownLabels
from pipeline.redaction import without_secrets
from pipeline.versions import in_words

LEAST_REFUSED = 5
"""A list is not refused as a whole for fewer refused rows than this."""

USUAL_SPLITS = {"train", "training", "dev", "val", "valid", "validation", "test", "testing", "eval", "evaluation"}

_GIVEN = None
"""In place of a path: the list itself gives the clip_id."""

_NAMED_CLIPS = CLIPS.append(pa.field("named_by", pa.string()))
"""Clips with the path from which their names are made: "" for the media itself, null for a name given in the list."""


@dataclass(frozen=True)
class ClipList:
    clips: pa.Table
    """`CLIPS`; a clip_id is unique within its split."""
    refused: pa.Table
    """`FAILURES` of the stage "source"."""
    vocabulary: LabelVocabulary
    notes: tuple[str, ...] = ()
    """Lines for the user about the list."""
    beyond: pa.Table = field(default_factory=CLIPS.empty_table)
    """`CLIPS` beyond --limit: not prepared now, but still listed, so that clips prepared earlier stay."""
    missing_beyond: pa.Table = field(default_factory=FAILURES.empty_table)
    """Rows of `refused` beyond --limit without a file in this folder, which an earlier run may have prepared."""

    @property
    def splits(self) -> list[str]:
        """Splits of all rows, including refused ones."""
        chunks = [*self.clips["split"].chunks, *self.refused["split"].chunks]
        splits: list[str] = pc.unique(pa.chunked_array(chunks, pa.string())).to_pylist()
        return splits

    def limited(self, num_clips: int | None) -> "ClipList":
        """The first clips of each split, and as many of its refused rows.

        The other clips stay listed, so those prepared earlier stay in the data set.
        """
        if num_clips is None:
            return self
        is_first = _is_first(self.clips["split"], num_clips)
        is_first_refused = _is_first(self.refused["split"], num_clips)
        return replace(
            self,
            clips=self.clips.filter(is_first),
            refused=self.refused.filter(is_first_refused),
            beyond=self.clips.filter(pc.invert(is_first)),
            missing_beyond=without_file(self.refused.filter(pc.invert(is_first_refused))),
        )


def without_file(refused: pa.Table) -> pa.Table:
    """The refused rows whose only fault is that their file is missing. An earlier run may have had it elsewhere."""
    return refused.filter(pc.equal(refused["reason"], str(Reason.MISSING_FILE)))


def _is_first(splits: pa.ChunkedArray, num_rows: int) -> pa.Array:
    """bool `[rows]`: whether a row is among the first `num_rows` of its split."""
    seen: Counter[str] = Counter()
    is_first = []
    for split in splits.to_pylist():
        seen[split] += 1
        is_first.append(seen[split] <= num_rows)
    return pa.array(is_first, pa.bool_())


class Rows:
    """The rows read so far. They are converted to Arrow in pieces, so that two million fit in a gigabyte."""

    def __init__(self, vocabulary: LabelVocabulary, on_numbers: str = "indices are read only in a --manifest") -> None:
        if len(vocabulary) > 2**15:
            raise DataError(f"{len(vocabulary)} labels are too many; up to {2**15} can be stored")
        self.vocabulary, self._index_of = vocabulary, vocabulary.index_of
        self._unknown_labels = UnknownLabels(vocabulary, on_numbers)
        self._clips, self._refused = _Pieces(_NAMED_CLIPS), _Pieces(FAILURES)
        self._reserved: defaultdict[str, set[str]] = defaultdict(set)
        self._num_refused: Counter[Reason] = Counter()
        self._first_refused: dict[Reason, str] = {}
        self._any_known = False
        self._unknown = ""
        self._repeated: list[tuple[str, str, tuple[int, ...], str]] = []
        """Rows that repeat a clip: its split and clip_id, their own labels, and their positions."""

    def indices(self, cells: list[str]) -> tuple[int, ...]:
        """The indices of the classes that `cells` name, without repetitions."""
        if not cells:
            raise ClipError(Reason.NO_LABEL, "the row has no label")
        try:
            # A tuple, because lists of numbers slow down garbage collection.
            return tuple(sorted({self._index_of[cell] for cell in cells}))
        except KeyError as err:
            message = self._unknown_labels.message(err.args[0])
            self._unknown = self._unknown or message
            raise ClipError(Reason.UNKNOWN_LABEL, message) from None

    def reserve(self, clip_id: str, split: str) -> None:
        """Reserve a `clip_id` that the list itself gives for this row."""
        check_clip_id(clip_id)
        claimed = self._reserved[split]
        if clip_id in claimed:
            raise ClipError(Reason.DUPLICATE, f"{clip_id} is in {split} already")
        claimed.add(clip_id)

    def keep(self, *row: Any) -> None:
        """Add a row of `CLIPS`. Its clip_id must have been reserved."""
        self._clips.add((*row, _GIVEN))

    def keep_named(self, *row: Any, path: str = "") -> None:
        """Add a row of `CLIPS` whose clip_id is made from its media or `path`, and may be changed by `clip_names`."""
        check_clip_id(row[0], is_given=False)
        if CONTROL.search(path):
            raise ClipError(Reason.BAD_ID, f"its folder {show(path)} has control characters, or is not UTF-8")
        self._clips.add((*row, path))

    def refuse(
        self,
        name: str,
        split: str,
        err: ClipError,
        cells: Iterable[str],
        place: str = "",
        section: tuple[float | None, float | None] = (None, None),
    ) -> None:
        """Add the row at `place` to the refused rows. `section` is its start and end, as far as they are known."""
        labels = tuple(sorted({self._index_of[cell] for cell in cells if cell in self._index_of})) or None
        self._any_known = self._any_known or labels is not None
        if err.reason is Reason.DUPLICATE:
            self._repeated.append((split, name, labels or (), place or show(name)))
        self._count(err.reason, f"{place or show(name)}: {err.message}")
        self._refuse(name, split, err, labels, section)

    def _count(self, reason: Reason, what: str) -> None:
        self._num_refused[reason] += 1
        self._first_refused.setdefault(reason, what)

    def _refuse(
        self,
        name: str,
        split: str,
        err: ClipError,
        labels: Iterable[int] | None,
        section: tuple[float | None, float | None] = (None, None),
    ) -> None:
        name = without_secrets(name)  # a refused row may be named by its URL
        safe_name = name if name.isprintable() else CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", name)
        safe_name = safe_name.replace("\ufffd", "\\ufffd")
        if len(safe_name) > LONGEST_ID:
            safe_name = safe_name[: LONGEST_ID - 1] + "…"  # otherwise it could be the id of a valid clip
        message = CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", err.message)
        why = (err.reason.value, message, 1, err.reason.retry)
        self._refused.add((safe_name, split, "source", *why, in_words(), labels, None, None, None, *section))

    def done(self, origin: str, notes: Iterable[str] = ()) -> ClipList:
        """Return all rows.

        Raises:
            DataError: there are no rows, none has a known label, or most would be refused for one reason.
        """
        clips = self._with_unique_names(self._clips.table())
        num_refused = self._num_refused.total()
        if not len(clips) + num_refused:
            raise DataError(f"{origin} has no rows; give a list with at least one clip")
        if not len(clips) and not self._any_known:
            reason, number = self._num_refused.most_common(1)[0]
            if reason != Reason.UNKNOWN_LABEL and number > num_refused // 2:
                raise DataError(f"no row of {origin} can be read, the first: {self._first_refused[reason]}")
            if not self._unknown and (why := self._first_refused.get(Reason.UNKNOWN_LABEL)):
                raise DataError(f"no row of {origin} has labels that can be read, the first: {why}")
            first = f", the first: {self._unknown}" if self._unknown else ""
            raise DataError(f"no row of {origin} has a known label{first}; --labels must be the list's own label file")
        for reason, number in self._num_refused.most_common():
            if reason != Reason.MISSING_FILE and number >= LEAST_REFUSED and 2 * number > len(clips) + num_refused:
                raise DataError(
                    f"{number} of {len(clips) + num_refused} rows of {origin} would be refused as {reason}, the first: "
                    f"{self._first_refused[reason]}; {_REMEDY[reason]}"
                )
        lines = (*self._relabelled_lines(origin, clips), *self._split_lines(origin, clips))
        return ClipList(clips, self._refused.table(), self.vocabulary, (*notes, *lines))

    def _split_lines(self, origin: str, clips: pa.Table) -> list[str]:
        """Lines on splits that differ only in case, or that are called as a class."""
        splits: list[str] = pc.unique(clips["split"]).to_pylist()
        seen: dict[str, str] = {}
        lines = []
        for split in splits:
            number = re.fullmatch(r"0*(\d+)(?:\.0*)?", split)  # data frames write a column with a gap as 1.0
            if (other := seen.setdefault(number[1] if number else split.casefold(), split)) != split:
                lines.append(f"the splits {show(other)} and {show(split)} of {origin} differ only in spelling")
            if split in self._index_of and split.casefold() not in USUAL_SPLITS:
                lines.append(f"{origin} has a split {show(split)}, which is a class too; quote labels that have commas")
        return lines

    def _relabelled_lines(self, origin: str, clips: pa.Table) -> list[str]:
        """A line on rows that repeat a clip with other labels, as in lists with one row per label."""
        if not self._repeated:
            return []
        names = pa.array([f"{split}/{clip_id}" for split, clip_id, _, _ in self._repeated], pa.string())
        accepted = pc.binary_join_element_wise(clips["split"], clips["clip_id"], "/")
        first = clips["labels"].take(pc.index_in(names, value_set=accepted.combine_chunks()))
        places = [
            place
            for (_, _, labels, place), of_first in zip(self._repeated, first.to_pylist(), strict=True)
            if of_first is not None and not set(labels) <= set(of_first)
        ]
        if not places:
            return []
        return [
            f"{len(places):,} rows of {origin} repeat a clip with other labels ({places[0]} first), which are not "
            "stored; a clip has one row, with its labels separated by `;`"
        ]

    def _with_unique_names(self, clips: pa.Table) -> pa.Table:
        """Make the clip ids unique within each split, and refuse repeated clips."""
        named_by = clips["named_by"]
        if named_by.null_count < len(clips):
            clips = _with_ends(clips)
            groups = rows_of_one_name(clips)
        else:
            groups = []
        clips = clips.drop_columns("named_by")
        if not groups:
            return clips
        clip_ids, splits = clips["clip_id"].to_pylist(), clips["split"].to_pylist()
        refused: dict[int, ClipError] = {}
        for group in groups:
            media = clips["media"].take(group).to_pylist()
            paths = [media[i] if path == "" else path for i, path in enumerate(named_by.take(group).to_pylist())]
            names = tell_apart(clip_ids[group[0]], paths)
            for row, name, first in zip(group, names, first_rows(paths), strict=True):
                try:
                    if name is None:
                        labels = tuple(clips["labels"][row].as_py())
                        self._repeated.append((splits[row], clip_ids[group[first]], labels, show(clip_ids[row])))
                        raise ClipError(
                            Reason.DUPLICATE, f"{clip_ids[row]} is in {splits[row]} already, from that file"
                        )
                    clip_ids[row] = name
                    check_clip_id(name, is_given=False)
                except ClipError as err:
                    refused[row] = err
        times = Counter((splits[row], name) for row, name in enumerate(clip_ids) if row not in refused)
        for row in sorted({row for group in groups for row in group} - refused.keys(), reverse=True):
            if times[splits[row], clip_ids[row]] > 1:  # the new name belongs to another clip
                times[splits[row], clip_ids[row]] -= 1
                refused[row] = ClipError(Reason.DUPLICATE, f"{clip_ids[row]} is in {splits[row]} already")
        labels = clips["labels"].take(pa.array(sorted(refused), pa.int64())).to_pylist()
        for row, indices in zip(sorted(refused), labels, strict=True):
            self._count(refused[row].reason, f"{show(clip_ids[row])}: {refused[row].message}")
            self._refuse(clip_ids[row], splits[row], refused[row], indices)
        clips = clips.set_column(0, CLIPS.field("clip_id"), pa.array(clip_ids, pa.string()))
        return clips.take(pa.array([row for row in range(len(clips)) if row not in refused], pa.int64()))


def _with_ends(clips: pa.Table) -> pa.Table:
    """Add the end to the ids of sections of one file that have the same start and other ends: `rex_0.100_0.400`."""
    if not (groups := rows_of_one_name(clips)):
        return clips
    clip_ids = clips["clip_id"].to_pylist()
    for group in groups:
        rows = clips.select(["named_by", "media", "end_s"]).take(pa.array(group)).to_pylist()
        ends_of: defaultdict[tuple[str, str], set[float | None]] = defaultdict(set)
        for row in rows:
            if row["named_by"] is not None:
                ends_of[row["named_by"], row["media"]].add(row["end_s"])
        for number, row in zip(group, rows, strict=True):
            if len(ends_of[row["named_by"], row["media"]]) > 1 and row["end_s"] is not None:
                clip_ids[number] = f"{clip_ids[number]}_{row['end_s']:.3f}"
    return clips.set_column(0, _NAMED_CLIPS.field("clip_id"), pa.array(clip_ids, pa.string()))


class _Pieces:
    """A table that grows row by row."""

    def __init__(self, schema: pa.Schema, rows_a_piece: int = 1 << 14) -> None:
        self._schema, self._rows_a_piece = schema, rows_a_piece
        self._pieces: list[pa.RecordBatch] = []
        self._columns: list[list[Any]] = [[] for _ in schema]

    def add(self, row: tuple[Any, ...]) -> None:
        for column, value in zip(self._columns, row, strict=True):
            column.append(value)
        if len(self._columns[0]) == self._rows_a_piece:
            self._close_piece()

    def _close_piece(self) -> None:
        arrays = [pa.array(column, field.type) for column, field in zip(self._columns, self._schema, strict=True)]
        self._pieces.append(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        for column in self._columns:
            column.clear()

    def table(self) -> pa.Table:
        self._close_piece()
        return pa.Table.from_batches(self._pieces, schema=self._schema)


_REMEDY = {
    Reason.BAD_ID: "correct the list, or give the column with the ids",
    Reason.BAD_TIME: "give times in seconds, with a point, and clips of at most 300 s",
    Reason.NO_LABEL: "give the column with the labels, and background sound a class such as `background`",
    Reason.UNKNOWN_LABEL: "--labels must be its own label file, or list only clips whose labels are known",
    Reason.DUPLICATE: "list each clip once, with all its labels, or give a clip_id column whose ids differ",
}
