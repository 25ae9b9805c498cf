"""What the report opens again to have samples to listen to."""

from collections.abc import Iterator

import pyarrow as pa
import pytest

from ast_core.features import KALDI128
from pipeline.prepare.clip import ClipError, Reason
from pipeline.prepare.stream import Source
from pipeline.tag import report
from pipeline.tag.inputs import RECORDINGS
from pipeline.tag.output import Summary


class Moved:
    """A reader of recordings that are not there any more."""

    def __init__(self) -> None:
        self.opened: list[str] = []

    def blocks(self, source: Source, sample_rate_hz: int) -> Iterator[object]:
        self.opened.append(source.media)
        raise ClipError(Reason.MISSING_FILE, "moved")

    def stop(self) -> None:
        pass


def test_few_recordings_are_opened_for_samples_and_none_at_urls(monkeypatch: pytest.MonkeyPatch):
    """Each class was heard longest in a recording of its own, and every second one is at a URL."""
    media = [f"HTTPS://host/{i}.wav" if i % 2 else f"/gone/{i}.wav" for i in range(200)]
    labels = [f"class {i}" for i in range(len(media))]
    rows = [{"recording": uri, "media": uri, "start_s": 0.0, "is_own": True} for uri in media]
    events = {"recording": media, "label": labels, "start_s": [1.0] * 200, "end_s": [2.0] * 200}
    heard = pa.table({"label": labels, "seconds": [1.0] * 200, "events": [1] * 200})
    summary = Summary(pa.table({}), heard, pa.table({}))
    reader = Moved()
    monkeypatch.setattr(report, "RecordingReader", lambda: reader)
    recordings = pa.Table.from_pylist(rows, schema=RECORDINGS)
    assert list(report._samples(pa.table(events | {"peak_score": [0.9] * 200}), summary, recordings, KALDI128)) == []
    assert reader.opened == [uri for uri in media if uri.startswith("/")][: report.MAX_TRIES]
