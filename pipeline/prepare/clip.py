"""A clip on its way through preparation: the record, and its failure.

A *clip* is a section of a recording with labels. Sources make rows of `CLIPS`; every stage adds its column
(`audio`, then `waveform`, then `fbank`) or turns the clip into a failure by filling `stage`, `reason` and `message`.
A failed row travels on to the end, so that each clip asked for is accounted for once.
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
"""Longest clip: its frames are counted in an int16."""

CLIPS = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("video_id", pa.string()),
        pa.field("media", pa.string(), nullable=False),  # path, s3:// or gs:// URI of a file, or http(s) URL for yt-dlp
        pa.field("member", pa.string()),  # where in `media`, if that is an archive: see sources/archives.py
        # where in the media the clip begins; 0 in a file cut before; null where its length must tell: see
        # sources/locate.py
        pa.field("media_start_s", pa.float64()),
        pa.field("start_s", pa.float64(), nullable=False),  # where in the original recording the clip begins
        pa.field("end_s", pa.float64()),  # null: to the end of the media
        pa.field("labels", pa.list_(pa.int16()), nullable=False),
    ]
)
"""What a source hands over: one row a clip, `clip_id` unique within its split."""


class Reason(StrEnum):
    """Why a clip could not be prepared. The list is closed: reports and retries rely on it."""

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
    # whatever nobody thought of; the message names the error
    UNFORESEEN = "unforeseen"

    @property
    def retry(self) -> bool:
        """Whether a later run should try again by itself."""
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
    """An expected failure of one clip. Stages turn it into columns; it never leaves a stage."""

    reason: Reason
    message: str
    attempts: int = 1

    def __post_init__(self) -> None:
        self.message = without_secrets(self.message)  # it goes to failures.parquet and report.html

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


MEDIA_STATE = pa.schema(
    [
        pa.field("media_bytes", pa.int64()),  # size of the file, or of the archive, that the clip was read from
        pa.field("media_modified", pa.timestamp("us", "UTC")),  # when it was written last
    ]
)
"""What a file that failed was like: one that has changed since is tried again. Null for fetched media."""

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
        pa.field("labels", pa.list_(pa.int16())),  # null: the list named none that the vocabulary has
        *MEDIA_STATE,
    ]
)
"""One row a clip that could not be prepared, `OUT/SPLIT/failures.parquet`."""

FAILED_AT = pa.schema(map(FAILURES.field, ("stage", "reason", "message", "attempts")))
"""Columns of a row under way: null while the clip is well."""

WAVEFORM = pa.list_(pa.field("sample", pa.float32(), nullable=False))


def under_way(clips: pa.Table) -> pa.Table:
    """Rows of `CLIPS` with room for a failure."""
    for field in FAILED_AT:
        clips = clips.append_column(pa.field(field.name, field.type), pa.nulls(len(clips), field.type))
    return clips


def each_clip(
    rows: pa.Table, stage: str, work: Callable[[dict[str, Any]], T | None]
) -> tuple[pa.Table, list[T | None]]:
    """`work` on every row that is still well.

    Returns the rows, with the failures that `work` raised written in, and the results, None where failed. Not only a
    ClipError ends as a row: what strangers' media make a library raise must not end a job of two million clips. A
    UserError does: a full disk or a missing program would be every clip's fate.
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
                said = (stage, str(known.reason), printable(message), known.attempts)
                for values, value in zip(failures.values(), said, strict=True):
                    values[i] = value
        results.append(result)
    for name, values in failures.items():
        field = FAILED_AT.field(name).with_nullable(True)
        rows = rows.set_column(rows.column_names.index(name), field, pa.array(values, field.type))
    return rows, results


def printable(text: str, max_chars: int = 300) -> str:
    """One line that a table or a terminal can show, whatever a remote host or a list put into it."""
    return "".join(c if c.isprintable() else " " for c in text)[:max_chars]


def ragged(arrays: Sequence[np.ndarray | None], list_type: pa.ListType) -> pa.ListArray:
    """A list column from 1-D arrays; None becomes an empty list."""
    filled = [np.empty(0, np.float32) if array is None else array for array in arrays]
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in filled])]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(filled)), type=list_type)
