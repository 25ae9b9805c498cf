"""Tables of the results of recordings, as they are stored."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.embeddings.stored import EMBEDDING, EMBEDDING_VALUE, EmbeddingsOf
from pipeline.prepare.clip import Reason
from pipeline.tag.collect import Tagged
from pipeline.versions import in_words

Results = Sequence[tuple[str, Tagged]]
"""Recordings by name."""

FAILURES = pa.schema(
    [
        pa.field("recording", pa.string(), nullable=False),
        pa.field("start_s", pa.float64()),  # null: the whole recording
        pa.field("end_s", pa.float64()),  # null: up to the end
        pa.field("stage", pa.string(), nullable=False),  # source, decode, tag (the task of a chunk)
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("retry", pa.bool_(), nullable=False),
        pa.field("tool_versions", pa.string(), nullable=False),
        pa.field("read_at", pa.timestamp("us", "UTC")),  # when the reading of its part began; null for rows of lists
    ]
)

EVENTS = pa.schema(
    [
        pa.field("recording", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("mid", pa.string(), nullable=False),
        pa.field("start_s", pa.float64(), nullable=False),
        pa.field("end_s", pa.float64(), nullable=False),
        pa.field("peak_score", pa.float32(), nullable=False),
        pa.field("mean_score", pa.float32(), nullable=False),
    ]
)

_WINDOW = [
    pa.field("recording", pa.string(), nullable=False),
    pa.field("start_s", pa.float64(), nullable=False),
    pa.field("end_s", pa.float64(), nullable=False),
]


def _window_columns(results: Results) -> list[pa.Array]:
    names = np.repeat(np.array([name for name, _ in results], object), [len(tagged.start_s) for _, tagged in results])
    times = [
        np.concatenate([np.empty(0), *(getattr(tagged, column) for _, tagged in results)])
        for column in ("start_s", "end_s")
    ]
    return [pa.array(names, pa.string()), *map(pa.array, times)]


def all_scores(results: Results, num_classes: int) -> pa.Table:
    kind = pa.list_(pa.field("score", pa.float16(), nullable=False), num_classes)
    return _with_lists(results, [tagged.scores_WC for _, tagged in results], "scores", kind)


def embeddings_table(results: Results, of: EmbeddingsOf) -> pa.Table:
    """The embeddings of windows, or the mean of each recording's."""
    arrays = [tagged.embeddings_WD for _, tagged in results if tagged.embeddings_WD is not None]
    kind = pa.list_(pa.field(*EMBEDDING_VALUE, nullable=False), arrays[0].shape[1])
    if of == "clip":
        results = [(name, _as_one_window(tagged)) for name, tagged in results]
        arrays = [array.mean(axis=0, keepdims=True, dtype=np.float32) for array in arrays]
    return _with_lists(results, arrays, EMBEDDING, kind)


def _as_one_window(tagged: Tagged) -> Tagged:
    return replace(tagged, start_s=tagged.start_s.min(keepdims=True), end_s=tagged.end_s.max(keepdims=True))


def _with_lists(results: Results, arrays: Sequence[np.ndarray], name: str, kind: pa.FixedSizeListType) -> pa.Table:
    flat = np.concatenate([np.empty(0, np.float16), *(array.astype(np.float16).ravel() for array in arrays)])
    values = pa.FixedSizeListArray.from_arrays(pa.array(flat), type=kind)
    schema = pa.schema([*_WINDOW, pa.field(name, kind, nullable=False)])
    return pa.table([*_window_columns(results), values], schema=schema)


def top_scores(results: Results, num_classes: int, *, names: Sequence[str], top: int) -> pa.Table:
    """The `top` classes of each window, highest score first."""
    scores = np.concatenate([np.empty((0, num_classes), np.float32), *(tagged.scores_WC for _, tagged in results)])
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    highest = np.take_along_axis(scores, order, axis=1).astype(np.float16)
    width = order.shape[1]
    labels = pa.FixedSizeListArray.from_arrays(
        pa.array(np.array(names, object)[order].ravel(), pa.string()), type=pa.list_(pa.string(), width)
    )
    values = pa.FixedSizeListArray.from_arrays(pa.array(highest.ravel()), type=pa.list_(pa.float16(), width))
    columns = [*_window_columns(results), labels, values]
    return pa.table(columns, names=[*(field.name for field in _WINDOW), "labels", "scores"])


def events_table(results: Results, names: Sequence[str], mids: Sequence[str]) -> pa.Table:
    rows = [
        {
            "recording": name,
            "label": names[label],
            "mid": mids[label],
            "start_s": start_s,
            "end_s": end_s,
            "peak_score": peak,
            "mean_score": mean,
        }
        for name, tagged in results
        for label, start_s, end_s, peak, mean in zip(
            tagged.events.label.tolist(),
            tagged.events.start_s.tolist(),
            tagged.events.end_s.tolist(),
            tagged.events.peak.tolist(),
            tagged.events.mean.tolist(),
            strict=True,
        )
    ]
    return pa.Table.from_pylist(rows, schema=EVENTS)


def failure_rows(results: Results, read_us: int | None = None) -> pa.Table:
    """FAILURES of these recordings. One without windows failed as a whole, for the first of its reasons."""
    rows: list[dict[str, Any]] = []
    for name, tagged in results:
        is_whole = not len(tagged.scores_WC)
        for part in tagged.lost[:1] if is_whole else tagged.lost:
            rows.append(
                {
                    "recording": name,
                    "start_s": None if is_whole else part.begin_s,
                    "end_s": None if is_whole else part.end_s,
                    "stage": "decode",
                    "reason": str(part.reason),
                    "message": part.message,
                    "retry": part.reason.retry and is_whole,
                    "tool_versions": in_words(),
                    "read_at": read_us,
                }
            )
        if is_whole and not tagged.lost:
            why = {"stage": "decode", "reason": str(Reason.TOO_SHORT), "message": "less than one frame", "retry": False}
            rows.append({"recording": name, "tool_versions": in_words(), "read_at": read_us} | why)
    return pa.Table.from_pylist(rows, schema=FAILURES)


def refused_rows(refused: pa.Table) -> pa.Table:
    """FAILURES of rows of lists that name no recording."""
    rows = [
        row | {"stage": "source", "retry": Reason(row["reason"]).retry, "tool_versions": in_words()}
        for row in refused.to_pylist()
    ]
    return pa.Table.from_pylist(rows, schema=FAILURES)
