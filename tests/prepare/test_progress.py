"""Output of a preparation while it runs."""

from threading import Event

import pytest

from ast_core.errors import DataError
from pipeline import progress_lines
from pipeline.prepare import progress
from pipeline.prepare.fetch.rate_limiter import Fetching


def test_a_line_of_progress():
    shown = progress.Progress(1000, print)
    assert shown.line(5.0) == "done: 0 of 1,000 clips  0.0 clips/s  left: unknown"
    cooling_down = {"192.0.2.1 at host": ("throttled", 90.0), "192.0.2.2 at host": ("setup", 7200.0)}
    assert shown.line(5.0, Fetching(1234, {})).endswith("left: unknown  fetches: 1,234")
    shown.add(None, 190)
    shown.add("unavailable", 7)
    shown.add("silent", 3)
    assert shown.line(100.0, Fetching(250, cooling_down)) == (
        "done: 200 of 1,000 clips  2.0 clips/s  left: 6 min 40 s  fetches: 250  failed: 7 unavailable, 3 silent  "
        "cooling down: 192.0.2.1 at host (throttled, 1 min 30 s more), 192.0.2.2 at host (setup, 2 h more)"
    )


def test_the_table_and_the_advice_at_the_end():
    numbers = {"listed": 12_000, "clips": 9_000, "no_longer_listed": 1_500, "moved": 0}
    info = {**numbers, "failures": {"crashed": 1_900, "network": 1_100}}
    report = progress.SplitReport("train", info)
    assert "1,900 crashed, 1,100 network, no longer listed 1,500" in progress.table([report])
    again = "worth another try by the same command: {} of the failed clips"
    assert progress.advice([report]) == again.format("1,100")  # of an earlier version
    assert progress.advice([progress.SplitReport("train", info | {"tried_again": 1_228})]) == again.format("1,228")


def test_a_rate_limiter_that_does_not_answer_does_not_delay_the_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress_lines, "EVERY_S", 0.01)
    monkeypatch.setattr(progress_lines, "LAST_LINE_S", 0.1)
    asked, lines = Event(), []

    def fetching() -> None:
        asked.set()
        Event().wait()

    def fail() -> None:
        with progress.Progress(1, lines.append, fetching):
            asked.wait()
            raise DataError("why it failed")

    with pytest.raises(DataError):
        fail()
    assert lines == ["done: 0 of 1 clips  0.0 clips/s  left: unknown"]
