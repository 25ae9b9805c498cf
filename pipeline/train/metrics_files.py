"""RUN/metrics.jsonl: one JSON record a line, there while training runs, wherever RUN lies.

On a local disk a record is appended as it comes. Object storage cannot append, and writing the whole file at each flush
would send a quadratic number of bytes over a run. There a flush writes the records since the last one as a part of
their own, `RUN/metrics/LINE.jsonl`, LINE being how many records come before it. The whole file is written when the
records have doubled since it was written last, and at the end; then the parts go. So at most four times the bytes of
the records are sent.
"""

import json
import os
import posixpath
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from ast_core.errors import DataError
from pipeline import storage

PARTS = "metrics"
"""Folder in RUN; never there on a local disk."""


def read_records(run: str) -> list[dict[str, Any]]:
    """All records of a run so far, in their order; none where there are none yet.

    A last line that is cut off, as by a power cut, is left out: the run writes it again.

    Raises:
        DataError: any other line is no record.
    """
    return [json.loads(line) for line in _read_lines(run, _is_object)]


def has_records(run: str) -> bool:
    return bool(_read_lines(run, _is_object))


def _file(run: str) -> str:
    return storage.join(run, "metrics.jsonl")


def _parts(run: str) -> list[str]:
    return storage.list_files(storage.join(run, PARTS), suffix=".jsonl")


def _read_lines(run: str, is_good: Callable[[str], bool]) -> list[str]:
    lines = _lines_of(_file(run), is_good) if storage.exists(_file(run)) else []
    for part in _parts(run):
        first = int(posixpath.basename(part).removesuffix(".jsonl"))
        added = _lines_of(part, is_good)
        if first <= len(lines) < first + len(added):  # else the whole file has them, and a kill left the part
            lines = lines[:first] + added
    return lines


def _lines_of(uri: str, is_good: Callable[[str], bool]) -> list[str]:
    lines = []
    for number, line in enumerate(storage.read_text(uri).splitlines(keepends=True), start=1):
        if is_good(line):
            lines.append(line.rstrip("\n"))
        elif line.endswith("\n"):
            raise DataError(
                f"{uri}: line {number} is damaged; restore the file, or delete it: training goes on, and its records "
                "begin there"
            )
    return lines


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _is_record(line: str) -> bool:
    try:
        record = json.loads(line)
        return (
            record["kind"] in ("step", "epoch") and isinstance(record["epoch"], int) and isinstance(record["step"], int)
        )
    except (ValueError, KeyError, TypeError):
        return False


class MetricsFile:
    """The writer, on rank 0. It begins with the records up to `last_step` that are there."""

    def __init__(self, run: str, last_step: int) -> None:
        self._run = run
        self._is_local = storage.is_local(run)
        self._appended: IO[bytes] | None = None
        """Of a local run."""
        there = _read_lines(run, _is_record)
        self._lines = [line for line in there if json.loads(line)["step"] <= last_step]
        self._num_saved, self._whole_bytes = 0, 0
        if there or storage.exists(_file(run)):
            self._write_whole()

    @property
    def lines(self) -> Sequence[str]:
        return self._lines

    def add(self, record: dict[str, Any]) -> None:
        line = json.dumps(record)
        self._lines.append(line)
        if self._is_local:
            if self._appended is None:
                path = Path(storage.resolve(_file(self._run))[1])
                path.parent.mkdir(parents=True, exist_ok=True)
                self._appended = path.open("ab")
            self._appended.write(f"{line}\n".encode())
            self._appended.flush()

    def flush(self) -> None:
        """All records are on disk, or on object storage, when this returns."""
        if self._is_local:
            if self._appended is not None:
                os.fsync(self._appended.fileno())
            return
        if self._num_saved == len(self._lines):
            return
        if self._num_bytes() >= 2 * self._whole_bytes:
            self._write_whole()
        else:
            uri = storage.join(self._run, PARTS, f"{self._num_saved:09d}.jsonl")
            storage.write_bytes(uri, _joined(self._lines[self._num_saved :]))
            self._num_saved = len(self._lines)

    def close(self) -> None:
        self.flush()
        if self._appended is not None:
            self._appended.close()
            self._appended = None
        if not self._is_local and (self._num_saved < len(self._lines) or _parts(self._run)):
            self._write_whole()

    def _num_bytes(self) -> int:
        return sum(len(line) + 1 for line in self._lines)

    def _write_whole(self) -> None:
        whole = _joined(self._lines)
        storage.write_bytes(_file(self._run), whole)
        self._num_saved, self._whole_bytes = len(self._lines), len(whole)
        for part in [] if self._is_local else _parts(self._run):
            storage.delete(part)


def _joined(lines: Sequence[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()
