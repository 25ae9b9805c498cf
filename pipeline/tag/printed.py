"""Results in a terminal."""

from collections.abc import Sequence

import numpy as np

from ast_core.errors import ConfigError, DataError
from pipeline.tag.collect import Tagged
from pipeline.tag.inputs import Inputs
from pipeline.tag.output import Summary
from pipeline.tag.predictor import Member, labels_of
from pipeline.tag.tables import failure_rows
from pipeline.tag.windows import BATCH_WINDOWS
from pipeline.tag.work import TagSettings, tag_here
from pipeline.text_table import text_table

MAX_PRINTED = 16
"""Recordings whose results are printed. More need an --output."""

SHOWN = 5
"""Classes with the highest scores that are shown of a recording."""

MAX_EVENTS = 40
"""Events that are shown of a recording."""

MAX_LABELS = 20
"""Classes in the table at the end."""


def are_few(inputs: Inputs) -> bool:
    """Whether there are so few recordings that their results can be printed, and Ray's start would take longer."""
    return not inputs.datasets and len(inputs.recordings) <= MAX_PRINTED


def check_few(inputs: Inputs) -> None:
    """Raises ConfigError if the results are too many to print."""
    if not are_few(inputs):
        number = "a data set" if inputs.datasets else f"{len(inputs.recordings):,} recordings"
        raise ConfigError(f"--input has {number}, and up to {MAX_PRINTED} recordings are printed; give --output URI")


def print_tags(
    inputs: Inputs, members: Sequence[Member], settings: TagSettings, device: str, batch_windows: int = BATCH_WINDOWS
) -> None:
    """Print the classes of each recording, and the events of one that is longer than a window.

    Raises:
        DataError: none could be read. The reasons are printed before.
    """
    for row in inputs.refused.to_pylist():
        print(f"{row['recording']}  {row['reason']}: {row['message']}\n")
    names, has_tagged = labels_of(members).names, False
    for name, tagged in tag_here(inputs, members, settings, device, batch_windows=batch_windows):
        print(described(name, tagged, names) + "\n", flush=True)
        has_tagged |= len(tagged.start_s) > 0
    if not has_tagged:
        raise DataError("no recording could be tagged; the reasons are above")


def described(name: str, tagged: Tagged, names: Sequence[str]) -> str:
    """The results of a recording as text."""
    if not len(tagged.start_s):
        (failure,) = failure_rows([(name, tagged)]).to_pylist()
        return f"{name}  {failure['reason']}: {failure['message']}"
    lines = [f"{name}  {_clock(tagged.start_s[0])} to {_clock(tagged.end_s.max())}"]
    highest = tagged.scores_WC.max(axis=0)
    best = np.argsort(-highest, kind="stable")[:SHOWN]
    lines += [f"  {highest[c]:.3f}  {names[c]}" for c in best]
    if len(tagged.start_s) > 1:
        lines += _event_lines(tagged, names)
    lines += [
        f"  not read: {_clock(part.begin_s)} to {'the end' if part.end_s is None else _clock(part.end_s)} "
        f"({part.reason}: {part.message})"
        for part in tagged.lost
    ]
    return "\n".join(lines)


def _event_lines(tagged: Tagged, names: Sequence[str]) -> list[str]:
    events = tagged.events
    if not len(events):
        return ["  no class reaches its threshold"]
    rows = [
        (f"  {_clock(start_s)}", _clock(end_s), f"{peak:.3f}", names[label])
        for start_s, end_s, peak, label in zip(
            events.start_s[:MAX_EVENTS], events.end_s, events.peak, events.label.tolist(), strict=False
        )
    ]
    left = len(events) - len(rows)
    more = [f"  and {left:,} more events: --output URI writes all"] if left else []
    return [text_table(["  from", "to", "score", "class"], rows, "lrrl"), *more]


def summary_table(summary: Summary) -> str:
    """Counts, the classes that were heard longest, and failures by reason."""
    counts = summary.counts()
    lines = [
        f"{counts['recordings']:,} recordings, {counts['hours']:.2f} h, {counts['windows']:,} windows, "
        f"{counts['events']:,} events; failed: {summary.num_failed:,}"
    ]
    if counts["failed"]:
        lines.append("failed: " + ", ".join(f"{number:,} {reason}" for reason, number in counts["failed"].items()))
    if counts["damaged_parts"]:
        lines.append(f"parts that could not be read: {counts['damaged_parts']:,}, see failures.parquet")
    heard = summary.by_label.slice(0, MAX_LABELS).to_pylist()
    if heard:
        rows = [(row["label"], _clock(row["seconds"]), f"{row['events']:,}") for row in heard]
        lines.append(text_table(["class", "heard", "events"], rows, "lrr"))
    return "\n".join(lines)


def _clock(seconds: float) -> str:
    """h:mm:ss.s"""
    tenths = round(seconds * 10)
    return f"{tenths // 36000}:{tenths // 600 % 60:02d}:{tenths % 600 / 10:04.1f}"
