"""TAGS/report.html: what was heard, for how long, what failed, and recordings to listen to with their events."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ast_core.errors import UserError
from ast_core.features import FeatureSettings
from pipeline import parquet, storage
from pipeline.html import charts, page
from pipeline.html.page import Cell, Column, Table
from pipeline.prepare.audio.features import clip_fbank
from pipeline.prepare.clip import ClipError
from pipeline.prepare.output.audio_store import flac_bytes
from pipeline.prepare.sources.checks import WEB
from pipeline.prepare.stream import RecordingReader, Source
from pipeline.redaction import without_secrets
from pipeline.tag.output import Summary, folder_of
from pipeline.text_table import duration
from pipeline.versions import VERSION

MAX_SAMPLES = 6
"""Classes of which one event can be heard: those that were heard longest."""

MAX_TRIES = 4 * MAX_SAMPLES
"""Recordings that are opened for them. If all have been moved since, each class would cost a try otherwise."""

SAMPLE_S, BEFORE_S = 20.0, 5.0
"""Length of a sample, and how much of it is before the event."""

MAX_ROWS = 500
"""Recordings and failures in a table. The Parquet files have all of them."""

MAX_EVENT_FILES = 50
"""Files of events in which samples are looked for."""

BRIGHTEST = 6.0
"""Natural logarithm of the power of the brightest colour."""


def write_report(output: str, summary: Summary, recordings: pa.Table, features: FeatureSettings) -> str:
    """Write the page and return its URI.

    Args:
        recordings: RECORDINGS of this run, from which samples are read.
    """
    counts = summary.counts()
    events = _some_events(output)
    now = datetime.now(UTC)
    html = page.render(
        "tags_report.html",
        uri=without_secrets(output),
        made=f"Made {now:%Y-%m-%d %H:%M} UTC by ast-ray {VERSION}.",
        key_figures=[
            ("recordings", page.count(counts["recordings"])),
            ("of audio", f"{counts['hours']:,.1f} h"),
            ("events", page.count(counts["events"])),
            ("classes heard", page.count(len(summary.by_label))),
            ("failed", page.count(summary.num_failed)),
        ],
        by_label=_by_label(summary),
        by_recording=_by_recording(summary),
        failures=_failures(summary),
        max_rows=MAX_ROWS,
        samples=list(_samples(events, summary, recordings, features)),
    )
    uri = storage.join(output, "report.html")
    storage.write_bytes(uri, html.encode())
    return uri


def _by_label(summary: Summary) -> Table:
    rows = summary.by_label.to_pylist()
    longest = max((row["seconds"] for row in rows), default=1.0)
    return Table(
        "Classes by the time that they were heard",
        [Column("class", is_number=False), Column("time heard", is_sorted=True), Column("events")],
        [
            [
                Cell(row["label"], row["label"]),
                Cell(duration(row["seconds"]), row["seconds"], row["seconds"] / longest),
                Cell(page.count(row["events"]), row["events"]),
            ]
            for row in rows
        ],
        id="classes",
    )


def _by_recording(summary: Summary) -> Table:
    rows = summary.recordings.sort_by([("seconds", "descending")]).slice(0, MAX_ROWS).to_pylist()
    return Table(
        "Recordings, longest first",
        [Column("recording", is_number=False), Column("length", is_sorted=True), Column("windows")],
        [
            [
                Cell(row["recording"], row["recording"]),
                Cell(duration(row["seconds"]), row["seconds"]),
                Cell(page.count(row["windows"]), row["windows"]),
            ]
            for row in rows
        ],
        id="recordings",
    )


def _failures(summary: Summary) -> Table:
    def part(row: dict[str, Any]) -> str:
        if row["start_s"] is None:
            return "all of it"
        end = "the end" if row["end_s"] is None else f"{row['end_s']:.1f} s"
        return f"{row['start_s']:.1f} s to {end}"

    rows = summary.failures.slice(0, MAX_ROWS).to_pylist()
    names = ("recording", "part", "reason", "message")
    return Table(
        "What could not be read",
        [Column(name, is_number=False) for name in names],
        [[Cell(row["recording"]), Cell(part(row)), Cell(row["reason"]), Cell(row["message"])] for row in rows],
    )


def _some_events(output: str) -> pa.Table:
    columns = ["recording", "label", "start_s", "end_s", "peak_score"]
    uris = storage.list_files(folder_of(output, "events"), suffix=".parquet")[:MAX_EVENT_FILES]
    tables = [parquet.read_table(uri, columns) for uri in uris]
    return pa.concat_tables(tables) if tables else pa.table({name: [] for name in columns})


def _samples(
    events: pa.Table, summary: Summary, recordings: pa.Table, features: FeatureSettings
) -> Iterator[dict[str, Any]]:
    """For each of the classes that were heard longest, the event with the highest score, if it can be read."""
    if not len(events):
        return
    # Not those at URLs: reading them again would be fetches that the rate limiter does not count.
    recordings = recordings.filter(pc.invert(pc.match_substring_regex(recordings["media"], f"(?i)^{WEB.pattern}")))
    known = events.filter(pc.is_in(events["recording"], value_set=recordings["recording"]))
    reader, shown, tried = RecordingReader(), 0, 0
    try:
        for label in summary.by_label["label"].to_pylist():
            of_label = known.filter(pc.equal(known["label"], label)).sort_by([("peak_score", "descending")])
            if shown == MAX_SAMPLES or tried == MAX_TRIES or not len(known):
                return
            if not len(of_label):
                continue
            event = of_label.slice(0, 1).to_pylist()[0]
            row = pc.index(recordings["recording"], event["recording"]).as_py()
            tried += 1
            sample = _sample(event, known, recordings.slice(row, 1).to_pylist()[0], features, reader)
            if sample is not None:
                shown += 1
                yield sample
    finally:
        reader.stop()


def _sample(
    event: dict[str, Any],
    events: pa.Table,
    recording: dict[str, Any],
    features: FeatureSettings,
    reader: RecordingReader,
) -> dict[str, Any] | None:
    """What the page shows of an event; None if its media cannot be read now."""
    begin_s = max(recording["start_s"], event["start_s"] - BEFORE_S)
    end_s = begin_s + SAMPLE_S if recording["end_s"] is None else min(begin_s + SAMPLE_S, recording["end_s"])
    source = Source(recording["media"], recording["member"], begin_s, end_s)
    try:
        blocks = list(reader.blocks(source, features.sample_rate_hz))
    except (ClipError, UserError):
        return None
    waveform = np.clip(np.concatenate([np.empty(0, np.float32), *(block.samples for block in blocks)]), -1, 1)
    fbank = clip_fbank(waveform, features)
    if not len(fbank):
        return None
    length_s = len(waveform) / features.sample_rate_hz
    ticks_hz = [hz for hz in (250, 1000, 2000, 4000, 8000, 16_000) if hz <= features.upper_freq_hz]
    return {
        "picture": charts.picture(
            fbank.T,
            low=features.floor,
            high=BRIGHTEST / features.log_scale.nats_per_unit,
            title=event["label"],
            x_max=length_s,
            x_label="seconds",
            y_ticks=[(_share_of_mel(hz, features), f"{hz / 1000:g}") for hz in ticks_hz],
            y_label="kHz, mel scale",
        ),
        "lanes": charts.lanes(
            _spans(events, event["recording"], begin_s, begin_s + length_s),
            title="Events",
            x_max=length_s,
            x_label="seconds",
        ),
        "audio": page.data_uri(flac_bytes(waveform, features.sample_rate_hz), "audio/flac"),
        "name": event["recording"],
        "about": f"{event['recording']}, from {duration(begin_s)} on; score {event['peak_score']:.2f}",
    }


def _spans(
    events: pa.Table, recording: str, begin_s: float, end_s: float
) -> list[tuple[str, list[tuple[float, float]]]]:
    """The events of a recording between two times, by class, relative to the first time."""
    spans: dict[str, list[tuple[float, float]]] = {}
    for row in events.filter(pc.equal(events["recording"], recording)).to_pylist():
        first, last = max(row["start_s"], begin_s), min(row["end_s"], end_s)
        if last > first:
            spans.setdefault(row["label"], []).append((first - begin_s, last - begin_s))
    longest = sorted(spans.items(), key=lambda item: -sum(end - begin for begin, end in item[1]))
    return longest[: len(charts.LINE_COLOURS)]


def _share_of_mel(freq_hz: float, features: FeatureSettings) -> float:
    low, high, at = map(features.mel, (features.low_freq_hz, features.upper_freq_hz, freq_hz))
    return (at - low) / (high - low)
