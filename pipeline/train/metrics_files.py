"""RUN/metrics.jsonl: one JSON record a line, readable while training runs, on disk and on object storage.

On a local disk each record is appended at once. Object storage cannot append, and writing the whole file at each flush
would send a number of bytes that is quadratic in the length of the run. There a flush writes the records since the last
flush as a part, `RUN/metrics/LINE.jsonl`, where LINE is the number of records before it. The whole file is written, and
the parts are deleted, when the records have doubled since it was last written, and at the end. So at most four times
the bytes of the records are sent.
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
"""Folder of the parts in RUN. On a local disk there is none."""


def read_records(run: str) -> list[dict[str, Any]]:
    """All records of a run so far, in their order.

    An incomplete last line, as after a power cut, is left out: the run writes it again.

    Raises:
        DataError: any other line is not a record.
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
        if first <= len(lines) < first + len(added):  # otherwise the whole file has them, and a crash left the part
            lines = lines[:first] + added
    return lines


def _lines_of(uri: str, is_good: Callable[[str], bool]) -> list[str]:
    lines = []
    for number, line in enumerate(storage.read_text(uri).splitlines(keepends=True), start=1):
        if is_good(line):
            lines.append(line.rstrip("\n"))
        elif line.endswith("\n"):
            raise DataError(
                f"{uri}: line {number} is damaged; restore the file, or delete it: training continues, and its records "
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
    """The writer of the records, on rank 0. It keeps the existing records up to `last_step`."""

    def __init__(self, run: str, last_step: int) -> None:
        self._run = run
        self._is_local = storage.is_local(run)
        self._appended: IO[bytes] | None = None
        """The open file of a local run."""
        existing = _read_lines(run, _is_record)
        self._lines = [line for line in existing if json.loads(line)["step"] <= last_step]
        self._num_saved, self._whole_bytes = 0, 0
        if existing or storage.exists(_file(run)):
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
        """Write all records to disk or object storage before returning."""
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
