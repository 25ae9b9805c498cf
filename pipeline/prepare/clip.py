"""The record of a clip during preparation, and its failures.

Sources produce rows of `CLIPS`. Every stage adds its column (`waveform`, `fbank`, …), or marks the clip as failed by
setting `stage`, `reason` and `message`. A failed row stays in the table until the end, so that each listed clip is
counted once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from ast_core.errors import UserError
from pipeline.redaction import without_secrets, without_secrets_of

T = TypeVar("T")

MAX_CLIP_S = 300.0
"""Longest clip. Its frames must be countable in an int16."""

URL_SCHEMES = ("http://", "https://")
"""Beginnings of the `media` that is fetched."""

CLIPS = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("video_id", pa.string()),
        pa.field("media", pa.string(), nullable=False),  # path, s3:// or gs:// URI of a file, or http(s) URL for yt-dlp
        pa.field("member", pa.string()),  # position in `media` if that is an archive: see sources/archives.py
        # position of the clip in the media; 0 if the file was cut before; null if its length decides: see
        # sources/locate.py
        pa.field("media_start_s", pa.float64()),
        pa.field("start_s", pa.float64(), nullable=False),  # start of the clip in the original recording
        pa.field("end_s", pa.float64()),  # null: up to the end of the media
        pa.field("labels", pa.list_(pa.int16()), nullable=False),
    ]
)
"""Output of a source: one row per clip, with a `clip_id` that is unique in its split."""


class Reason(StrEnum):
    """Why a clip could not be prepared. The list is closed, because reports and retries rely on it."""

    # rows that a source refuses
    BAD_ID = "bad_id"
    BAD_TIME = "bad_time"
    NO_LABEL = "no_label"
    UNKNOWN_LABEL = "unknown_label"
    DUPLICATE = "duplicate"
    # getting the audio
    MISSING_FILE = "missing_file"
    UNAVAILABLE = "unavailable"
    PRIVATE_HOST = "private_host"
    RESTRICTED = "restricted"
    THROTTLED = "throttled"
    SETUP = "setup"
    NETWORK = "network"
    TIMEOUT = "timeout"
    TOO_LARGE = "too_large"
    # reading it
    NOT_AUDIO = "not_audio"
    TRUNCATED = "truncated"
    SILENT = "silent"
    OUT_OF_PHASE = "out_of_phase"
    OUT_OF_RANGE = "out_of_range"
    TOO_SHORT = "too_short"
    TOO_LONG = "too_long"
    CRASHED = "crashed"
    # any other error; the message names it
    UNFORESEEN = "unforeseen"

    @property
    def retry(self) -> bool:
        """Whether a later run tries the clip again without being asked."""
        return self in {
            Reason.MISSING_FILE,
            Reason.THROTTLED,
            Reason.SETUP,
            Reason.NETWORK,
            Reason.TIMEOUT,
            Reason.TRUNCATED,
            Reason.UNFORESEEN,
        }


@dataclass(eq=False)
class ClipError(Exception):
    """An expected failure of one clip. Stages turn it into columns, so it never leaves a stage."""

    reason: Reason
    message: str
    attempts: int = 1

    def __post_init__(self) -> None:
        self.message = without_secrets(self.message)  # it is written to failures.parquet and report.html

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


MEDIA_STATE = pa.schema(
    [
        pa.field("media_bytes", pa.int64()),  # size of the file or archive from which the clip was read
        pa.field("media_modified", pa.timestamp("us", "UTC")),  # time of the last change
    ]
)
"""State of the file of a failed clip: if it has changed, the clip is tried again. Null for fetched media."""

FAILURES = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),  # source, download, decode, prepare (the task of a chunk)
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("attempts", pa.int32(), nullable=False),
        pa.field("retry", pa.bool_(), nullable=False),
        pa.field("tool_versions", pa.string(), nullable=False),
        pa.field("labels", pa.list_(pa.int16())),  # null: the list has no label of the vocabulary
        *MEDIA_STATE,
        pa.field("section_hash", pa.int64()),  # of the recording's name and the section: see output/origins.py
        pa.field("start_s", pa.float64()),  # as in CLIPS; null: not known
        pa.field("end_s", pa.float64()),
    ]
)
"""One row per clip that could not be prepared, `OUT/SPLIT/failures.parquet`."""

FAILED_AT = pa.schema(map(FAILURES.field, ("stage", "reason", "message", "attempts")))
"""Columns of a row in progress: null until the clip fails."""

WAVEFORM = pa.list_(pa.field("sample", pa.float32(), nullable=False))


def in_progress(clips: pa.Table) -> pa.Table:
    """Add the columns for a failure to rows of `CLIPS`."""
    for field in FAILED_AT:
        clips = clips.append_column(pa.field(field.name, field.type), pa.nulls(len(clips), field.type))
    return clips


def each_clip(
    rows: pa.Table, stage: str, work: Callable[[dict[str, Any]], T | None]
) -> tuple[pa.Table, list[T | None]]:
    """Apply `work` to every row that has not failed.

    Returns the rows with the failures of `work` written in, and the results, None for failed rows. Not only a ClipError
    becomes a failed row, but every error except UserError: unknown media can make a library raise anything, and that
    must not end a job of two million clips. A UserError ends the job, because a full disk or a missing program would
    make every clip fail.
    """
    results: list[T | None] = []
    failures = {name: rows[name].to_pylist() for name in FAILED_AT.names}
    for i, row in enumerate(rows.to_pylist()):
        result = None
        if row["reason"] is None:
            try:
                result = work(row)
            except UserError:
                raise
            except Exception as err:
                unforeseen = ClipError(Reason.UNFORESEEN, f"{type(err).__name__}: {err}")
                known = err if isinstance(err, ClipError) else unforeseen
                message = without_secrets_of(row.get("media") or "", known.message)
                failure = (stage, str(known.reason), printable(message), known.attempts)
                for values, value in zip(failures.values(), failure, strict=True):
                    values[i] = value
        results.append(result)
    for name, values in failures.items():
        field = FAILED_AT.field(name).with_nullable(True)
        rows = rows.set_column(rows.column_names.index(name), field, pa.array(values, field.type))
    return rows, results


def printable(text: str, max_chars: int = 300) -> str:
    """Make a text from a remote host or a list fit for a table or terminal: one line, printable."""
    return "".join(c if c.isprintable() else " " for c in text)[:max_chars]


def ragged(arrays: Sequence[np.ndarray | None], list_type: pa.ListType) -> pa.ListArray:
    """A list column of 1-D arrays; None becomes an empty list."""
    filled = [np.empty(0, np.float32) if array is None else array for array in arrays]
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in filled])]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(filled)), type=list_type)
