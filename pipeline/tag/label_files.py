"""Events of a recording as a text file for people: a table, or a label track for Audacity."""

import csv
import io
from collections.abc import Callable, Sequence

from pipeline.tag.events import Runs


def to_csv(events: Runs, names: Sequence[str]) -> str:
    """`start_s,end_s,label,score`, one line an event; the score is the highest."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["start_s", "end_s", "label", "score"])
    for start_s, end_s, label, peak in _rows(events, names):
        writer.writerow([f"{start_s:.3f}", f"{end_s:.3f}", label, f"{peak:.4f}"])
    return file.getvalue()


def to_audacity(events: Runs, names: Sequence[str]) -> str:
    """A label track: start, end and text, separated by tabs (File > Import > Labels)."""
    return "".join(
        f"{start_s:.6f}\t{end_s:.6f}\t{label} {peak:.2f}\n" for start_s, end_s, label, peak in _rows(events, names)
    )


def _rows(events: Runs, names: Sequence[str]) -> list[tuple[float, float, str, float]]:
    labels = [" ".join(names[label].split()) for label in events.label.tolist()]
    return list(zip(events.start_s.tolist(), events.end_s.tolist(), labels, events.peak.tolist(), strict=True))


FORMATS: dict[str, tuple[Callable[[Runs, Sequence[str]], str], str]] = {
    "csv": (to_csv, ".csv"),
    "audacity": (to_audacity, ".txt"),
}
"""Writers and suffixes by name."""
