"""What tagging leaves behind: parts of scores, events and embeddings, and `tags.json`, which is written last.

    TAGS/tags.json            settings, counts, versions
    TAGS/scores/*.parquet     one row a window
    TAGS/events/*.parquet     one row an event
    TAGS/embeddings/*.parquet one row a window, or one row a recording
    TAGS/labels/*             one file a recording, for people
    TAGS/failures.parquet     what could not be read: whole recordings (start_s and end_s are null) and parts of them
    TAGS/_work/               what a run needs until it has finished

A *part* has the results of some recordings, in files of one name. That of the scores is written last: a recording is
done if it is in a file of scores, or in a part of failures that such a file belongs to.

The module is long because it has all that reads or writes these files, and a run that goes on must agree with the last.
"""

import hashlib
import json
import logging
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ast_core.checkpoints.huggingface import distinct_names
from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary
from pipeline import parquet, storage
from pipeline.embeddings.stored import EMBEDDINGS, EmbeddingsOf, failures_file, tags_json
from pipeline.lease import Held
from pipeline.prepare.clip import Reason
from pipeline.tag.collect import Tagged
from pipeline.tag.label_files import FORMATS
from pipeline.tag.tables import (
    FAILURES,
    Results,
    all_scores,
    embeddings_table,
    events_table,
    failure_rows,
    refused_rows,
    top_scores,
)
from pipeline.versions import in_words, tool_versions

SCHEMA_VERSION = 1

READ_KEY, WITH_KEY = b"read_us", b"with"
"""Keys in the metadata of a file of scores: when the reading of its recordings began, and the other folders in which
its part has a file."""

logger = logging.getLogger(__name__)

ANOTHER = "give another --output, or the settings with which this one was begun"


def folder_of(output: str, kind: str) -> str:
    return storage.join(output, kind)


def work_dir(output: str) -> str:
    return storage.join(output, "_work")


def _settings_json(output: str) -> str:
    return storage.join(work_dir(output), "settings.json")


def start_output(output: str, settings: Mapping[str, Any]) -> None:
    """Reserve a folder for the results of these settings, and remove what an interrupted run left.

    Raises:
        DataError: it has results of other settings, or something else.
    """
    settings = json.loads(json.dumps(settings))  # as they are read back: JSON has no tuples
    found = [uri for uri in (tags_json(output), _settings_json(output)) if storage.exists(uri)]
    if not found and not storage.is_empty(output):
        raise DataError(f"{output} is not empty and contains no tags; give a new folder as --output")
    for uri in found:
        there = storage.read_checked_json(uri, remedy="delete the folder, or give another --output")
        there = there.get("settings", {})
        if differing := [key for key in settings if there.get(key) != settings[key]]:
            raise DataError(f"{output} was tagged with another setting of {', '.join(differing)}; {ANOTHER}")
    storage.write_checked_json(_settings_json(output), {"settings": dict(settings)})
    _clean_up(output)


def _clean_up(output: str) -> None:
    """Delete files of parts that were not finished."""
    finished = _part_names(folder_of(output, "scores"))
    for folder in ("events", EMBEDDINGS, "_work/failures"):
        for uri in storage.list_files(folder_of(output, folder), suffix=".parquet"):
            if posixpath.basename(uri) not in finished:
                storage.delete(uri)
    for folder in ("scores", "events", EMBEDDINGS, "labels"):
        storage.delete_unfinished(folder_of(output, folder))


def _part_names(folder: str) -> set[str]:
    return {posixpath.basename(uri) for uri in storage.list_files(folder, suffix=".parquet")}


@dataclass(frozen=True)
class Done:
    """What earlier runs have done."""

    tagged: Mapping[str, str]
    """Recordings with results, and the file of scores that each is in."""
    failed: pa.Table
    """FAILURES."""
    read_us: Mapping[str, int]
    """When these recordings, and those that failed as a whole, were read, in microseconds since 1970."""

    def names_of_failed(self) -> frozenset[str]:
        return frozenset(self.failed.filter(pc.is_null(self.failed["start_s"]))["recording"].to_pylist())

    def final(self, *, retry: Iterable[str] = ()) -> frozenset[str]:
        """Recordings that are not tried again: those with results, and those not in `retry` that failed for good."""
        whole = self.failed.filter(pc.is_null(self.failed["start_s"]))
        for_good = whole.filter(pc.invert(whole["retry"]))["recording"].to_pylist()
        return frozenset(self.tagged) | frozenset(for_good) - frozenset(retry)


def read_done(output: str) -> Done:
    """Read the names of the recordings in all parts, and all failures. A recording that is tagged has not failed."""
    tagged, read_us = _tagged(output)
    uris = storage.list_files(folder_of(work_dir(output), "failures"), suffix=".parquet")
    if storage.exists(failures_file(output)):
        uris = [failures_file(output), *uris]
    tables = [_failures(uri) for uri in uris]
    failed = pa.concat_tables([FAILURES.empty_table(), *tables])
    failed_at = failed["read_at"].cast(pa.int64()).fill_null(0).to_numpy()  # null in tables of an earlier version
    failed = failed.take(np.argsort(failed_at, kind="stable"))
    last = {}  # of a recording that failed in several runs, the last failure
    columns = (failed["recording"], failed["start_s"], failed["read_at"].cast(pa.int64()))
    for row, (name, start_s, failed_us) in enumerate(zip(*(column.to_pylist() for column in columns), strict=True)):
        if start_s is None and name not in tagged:
            last[name, None] = row
            if failed_us is not None:
                read_us[name] = failed_us
        # A part of a recording failed with those results that are there, unless an earlier version wrote the row.
        if start_s is not None and name in tagged and failed_us in (None, read_us.get(name)):
            last[name, start_s] = row
    return Done(tagged, failed.take(pa.array(sorted(last.values()), pa.int64())), read_us)


def _failures(uri: str) -> pa.Table:
    table = parquet.read_table(uri)
    if "read_at" not in table.column_names:  # of an earlier version
        table = table.append_column(FAILURES.field("read_at"), pa.nulls(len(table), FAILURES.field("read_at").type))
    try:
        return table.select(FAILURES.names).cast(FAILURES)
    except (KeyError, pa.ArrowException) as err:
        raise DataError(f"{uri} is damaged or no file of ours ({err}); delete it, and tag again") from err


def _tagged(output: str) -> tuple[dict[str, str], dict[str, int]]:
    """The recordings in all files of scores: the file, and when they were read.

    A part whose events or embeddings are missing is deleted, so that its recordings are tagged again.
    """
    there = {kind: _part_names(folder_of(output, kind)) for kind in ("events", EMBEDDINGS)}

    def read(uri: str) -> tuple[list[str], int | None]:
        table = _read_columns(uri, ["recording"])
        metadata = table.schema.metadata or {}
        kinds = metadata.get(WITH_KEY, b"").decode().split()
        if missing := [kind for kind in kinds if posixpath.basename(uri) not in there[kind]]:
            logger.warning(f"{uri} has no {missing[0]} any more; its recordings are tagged again")
            for other in ("events", EMBEDDINGS, "_work/failures"):  # the scores last, so that no other run takes them
                storage.discard(storage.join(output, other, posixpath.basename(uri)))
            storage.delete(uri)
            return [], None
        read_us = int(metadata[READ_KEY]) if READ_KEY in metadata else None
        return pc.unique(table["recording"]).to_pylist(), read_us

    uris = storage.list_files(folder_of(output, "scores"), suffix=".parquet")
    tagged, times = dict[str, str](), dict[str, int]()
    with ThreadPoolExecutor(16) as pool:
        for uri, (names, read_us) in zip(uris, pool.map(read, uris), strict=True):
            tagged |= dict.fromkeys(names, uri)
            if read_us is not None:
                times |= dict.fromkeys(names, read_us)
    return tagged, times


def _columns_of(folder: str, columns: list[str], reduced: Callable[[pa.Table], pa.Table]) -> pa.Table:
    """Small columns of all files of a folder, each `reduced` by itself: a year of audio has millions of windows."""
    kinds = {"recording": pa.string(), "label": pa.string()}
    schema = pa.schema([(name, kinds.get(name, pa.float64())) for name in columns])

    def read(uri: str) -> pa.Table:
        return reduced(_read_columns(uri, columns).cast(schema))

    with ThreadPoolExecutor(16) as pool:
        tables = list(pool.map(read, storage.list_files(folder, suffix=".parquet")))
    return pa.concat_tables([reduced(schema.empty_table()), *tables])


def _read_columns(uri: str, columns: list[str]) -> pa.Table:
    damaged = f"{uri} is damaged ({{}}); delete it, and its recordings are tagged again"
    return parquet.parse_file(uri, lambda file: parquet.open_checked(file).read(columns), damaged=damaged)


@dataclass(frozen=True)
class WriteParts:
    """Writes parts of a chunk. It travels to the workers."""

    output: str
    labels: LabelVocabulary
    top: int | None = None
    label_format: str | None = None
    embeddings: EmbeddingsOf | None = None
    held: Held | None = None
    """The lock of the output. A part is not written after another job has taken over."""

    def written(self, chunk: str) -> tuple[set[str], int]:
        """The recordings in the parts of a chunk, of an attempt that ended early, and the number of the next part."""
        names: set[str] = set()
        number = 0
        while storage.exists(uri := self._file("scores", _part(chunk, number))):
            names.update(_read_columns(uri, ["recording"])["recording"].to_pylist())
            failures = self._file("_work/failures", _part(chunk, number))
            if storage.exists(failures):
                table = parquet.read_table(failures, ["recording", "start_s"])
                names.update(table.filter(pc.is_null(table["start_s"]))["recording"].to_pylist())
            number += 1
        return names, number

    def write(self, chunk: str, number: int, results: Sequence[tuple[str, Tagged]], read_us: int) -> None:
        """Write a part with these recordings and their results. The file of scores is the last one.

        Args:
            read_us: when the reading of the recordings began, in microseconds since 1970. What was written to their
                files later may not be in the results.
        """
        if self.held is not None:
            self.held.check()
        part = _part(chunk, number)
        with_windows = [(name, tagged) for name, tagged in results if len(tagged.scores_WC)]
        names = distinct_names(self.labels)
        if self.label_format is not None:
            write, suffix = FORMATS[self.label_format]
            for name, tagged in results:
                uri = storage.join(self.output, "labels", f"{file_name(name)}{suffix}")
                if len(tagged.scores_WC):
                    storage.write_bytes(uri, write(tagged.events, names).encode())
                else:
                    storage.discard(uri)  # of an earlier run that could read it
        kinds = []
        if self.embeddings is not None and with_windows:
            kinds.append(EMBEDDINGS)
            self._write(EMBEDDINGS, part, embeddings_table(with_windows, self.embeddings))
        events = events_table(with_windows, names, self.labels.mids)
        if len(events):
            kinds.append("events")
            self._write("events", part, events)
        failures = failure_rows(results, read_us)
        if len(failures):
            self._write("_work/failures", part, failures)
        table = self._scores(with_windows)
        self._write("scores", part, table.replace_schema_metadata({READ_KEY: str(read_us), WITH_KEY: " ".join(kinds)}))

    def _scores(self, results: Results) -> pa.Table:
        if self.top is None:
            return all_scores(results, len(self.labels))
        return top_scores(results, len(self.labels), names=distinct_names(self.labels), top=self.top)

    def fail(self, chunk: str, number: int, names: Sequence[str], message: str, read_us: int) -> None:
        """Write a part that says that all these recordings failed."""
        if self.held is not None:
            self.held.check()
        row = {"stage": "tag", "reason": str(Reason.CRASHED), "message": message, "retry": True, "read_at": read_us}
        rows = [row | {"recording": name, "tool_versions": in_words()} for name in names]
        self._write("_work/failures", _part(chunk, number), pa.Table.from_pylist(rows, schema=FAILURES))
        self._write("scores", _part(chunk, number), self._scores([]))

    def begin_attempt(self, run: str, chunk: str) -> int:
        """Record that a worker begins a chunk, and return how many have begun it in this run before."""
        number = 0
        while storage.exists(uri := storage.join(work_dir(self.output), "attempts", run, f"{chunk}-{number}")):
            number += 1
        storage.write_bytes(uri, b"")
        return number

    def _file(self, kind: str, part: str) -> str:
        return storage.join(self.output, kind, f"{part}.parquet")

    def _write(self, kind: str, part: str, table: pa.Table) -> None:
        storage.write_file(
            self._file(kind, part), lambda file: pq.write_table(table, file, compression="zstd", **parquet.CHECKSUMS)
        )


def _part(chunk: str, number: int) -> str:
    return f"{chunk}-{number:05d}"


def file_name(recording: str) -> str:
    """A file name for a recording: its own without suffix, and a hash of all of its name, which makes it unique."""
    stem = posixpath.splitext(posixpath.basename(recording.partition("#")[0]))[0]
    digest = hashlib.sha256(recording.encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', stem)[:100]}-{digest}"


@dataclass(frozen=True)
class Summary:
    """What all parts have together."""

    recordings: pa.Table
    """One row a recording: recording, seconds, windows."""
    by_label: pa.Table
    """One row a class that was heard: label, seconds, events."""
    failures: pa.Table

    @property
    def num_failed(self) -> int:
        return len(self.failures.filter(pc.is_null(self.failures["start_s"])))

    @property
    def hours(self) -> float:
        return (pc.sum(self.recordings["seconds"]).as_py() or 0.0) / 3600

    def counts(self) -> dict[str, Any]:
        whole = self.failures.filter(pc.is_null(self.failures["start_s"]))
        return {
            "recordings": len(self.recordings),
            "hours": self.hours,
            "windows": pc.sum(self.recordings["windows"]).as_py() or 0,
            "events": pc.sum(self.by_label["events"]).as_py() or 0,
            "failed": dict(Counter(whole["reason"].to_pylist()).most_common()),
            "damaged_parts": len(self.failures) - len(whole),
        }


def finish(output: str, refused: pa.Table, lists: Sequence[str]) -> Summary:
    """Write the table of failures, and return what the parts have. `write_tags` then ends the run.

    Args:
        refused: rows of lists that name no recording.
        lists: the names of all lists that the run has read, whose earlier rows no longer count.
    """
    done = read_done(output)
    list_of_row = pc.replace_substring_regex(done.failed["recording"], ": [^:]*$", "")
    is_of_list = pc.and_(pc.equal(done.failed["stage"], "source"), pc.is_in(list_of_row, pa.array(lists, pa.string())))
    known = done.failed.filter(pc.invert(is_of_list))
    failures = pa.concat_tables([known, refused_rows(refused)]).sort_by("recording")
    storage.write_file(
        failures_file(output),
        lambda file: pq.write_table(failures, file, compression="zstd", **parquet.CHECKSUMS),
    )
    return Summary(_recordings(output), _by_label(output), failures)


def _recordings(output: str) -> pa.Table:
    table = _spans(_columns_of(folder_of(output, "scores"), ["recording", "start_s", "end_s"], _spans_of_windows))
    seconds = pc.subtract(table["end_s"], table["start_s"])
    return pa.table({"recording": table["recording"], "seconds": seconds, "windows": table["windows"]})


def _spans_of_windows(windows: pa.Table) -> pa.Table:
    return _spans(windows.append_column("windows", pa.array(np.ones(len(windows), np.int64))))


def _spans(rows: pa.Table) -> pa.Table:
    """One row a recording, with its first and last second and its number of windows."""
    grouped = rows.group_by("recording").aggregate([("start_s", "min"), ("end_s", "max"), ("windows", "sum")])
    found = grouped.select(["recording", "start_s_min", "end_s_max", "windows_sum"])
    return found.rename_columns(["recording", "start_s", "end_s", "windows"]).sort_by("recording")


def _by_label(output: str) -> pa.Table:
    table = _totals(_columns_of(folder_of(output, "events"), ["label", "start_s", "end_s"], _totals_of_events))
    return table.sort_by([("seconds", "descending"), ("label", "ascending")])


def _totals_of_events(events: pa.Table) -> pa.Table:
    seconds = pc.subtract(events["end_s"], events["start_s"])
    ones = pa.array(np.ones(len(events), np.int64))
    return _totals(pa.table({"label": events["label"], "seconds": seconds, "events": ones}))


def _totals(rows: pa.Table) -> pa.Table:
    """One row a class, with its seconds and its number of events."""
    grouped = rows.group_by("label").aggregate([("seconds", "sum"), ("events", "sum")])
    return grouped.select(["label", "seconds_sum", "events_sum"]).rename_columns(["label", "seconds", "events"])


def write_tags(output: str, settings: Mapping[str, Any], facts: Mapping[str, Any], summary: Summary) -> None:
    """Write tags.json and remove what only an unfinished run needs."""
    value = {"schema_version": SCHEMA_VERSION, "settings": dict(settings), **facts, "counts": summary.counts()}
    storage.write_checked_json(tags_json(output), value | {"tool_versions": tool_versions()})
    for uri in storage.list_files(work_dir(output), recursive=True):
        storage.discard(uri)
    storage.delete_if_empty(work_dir(output))
