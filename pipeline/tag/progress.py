"""How far a tagging is: counts that workers send, and a line every few seconds."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

from pipeline.prepare.fetch.rate_limiter import Fetching, Permits
from pipeline.progress_lines import ProgressLines
from pipeline.text_table import duration

SEND_EVERY_S = 0.5

TAGGED = ""
"""The outcome of a recording that did not fail."""


class Tally(Protocol):
    """Counts recordings by outcome (TAGGED, or the reason of the failure) and seconds of windows."""

    def add(self, outcomes: Mapping[str, int], seconds: float) -> None: ...


class LocalTally:
    """Counts in this process; under Ray, in an actor."""

    def __init__(self) -> None:
        self._outcomes: Counter[str] = Counter()
        self._seconds = 0.0

    def add(self, outcomes: Mapping[str, int], seconds: float) -> None:
        self._outcomes.update(outcomes)
        self._seconds += seconds

    def total(self) -> tuple[dict[str, int], float]:
        return dict(self._outcomes), self._seconds


class RemoteTally:
    """A worker's view of a LocalTally in an actor. It does not wait for it, and sends its counts now and then: a call
    for each short recording would take as long as to decode it.
    """

    def __init__(self, actor: Any) -> None:
        self._actor, self._waiting, self._sent_s = actor, LocalTally(), 0.0

    def add(self, outcomes: Mapping[str, int], seconds: float) -> None:
        self._waiting.add(outcomes, seconds)
        if time.monotonic() - self._sent_s >= SEND_EVERY_S:
            self.send()

    def send(self) -> None:
        """Send what has not been sent."""
        waiting, self._waiting, self._sent_s = self._waiting, LocalTally(), time.monotonic()
        self._actor.add.remote(*waiting.total())


class Progress:
    """Prints how many recordings are tagged, how fast, and how many failed for which reason."""

    def __init__(
        self,
        num_recordings: int,
        say: Callable[[str], None],
        total: Callable[[], tuple[dict[str, int], float]],
        permits: Permits | None = None,
    ) -> None:
        self.num_recordings, self._permits = num_recordings, permits
        self._say, self._total = say, total
        self._lines = ProgressLines(self._try_to_show)

    def __enter__(self) -> "Progress":
        self._lines.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._lines.__exit__(kind)
        if kind is None:
            self._try_to_show(self._lines.elapsed_s())

    def line(
        self, outcomes: Mapping[str, int], seconds: float, elapsed_s: float, fetching: Fetching | None = None
    ) -> str:
        done = sum(outcomes.values())
        parts = [f"done: {done:,} of {self.num_recordings:,} recordings", f"{seconds / 3600:.2f} h of audio"]
        if elapsed_s:
            parts.append(f"{seconds / elapsed_s:,.0f} × real time")
        if 0 < done < self.num_recordings:
            parts.append(f"left: {duration(elapsed_s * (self.num_recordings - done) / done)}")
        if failed := Counter({reason: n for reason, n in outcomes.items() if reason != TAGGED}).most_common():
            parts.append("failed: " + ", ".join(f"{n:,} {reason}" for reason, n in failed))
        if fetching is not None:
            parts += filter(None, [fetching.cooling_in_words()])
        return "  ".join(parts)

    def _show(self, elapsed_s: float) -> None:
        fetching = None if self._permits is None else self._permits.fetching()
        self._say(self.line(*self._total(), elapsed_s, fetching))

    def _try_to_show(self, elapsed_s: float) -> None:
        with suppress(Exception):  # the actor may be starting, or starting again; the work does not depend on it
            self._show(elapsed_s)
