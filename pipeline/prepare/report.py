"""What a preparation says: progress while it runs, and a table at its end."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.prepare.clip import Reason

EVERY_S = 5.0


class Progress:
    """Clips done, rate, time left and failures by reason, one line every few seconds."""

    def __init__(self, num_clips: int, say: Callable[[str], None]) -> None:
        self.num_clips = num_clips
        self.failures: Counter[str] = Counter()
        self._done = 0
        self._say = say
        self._began_s = self._said_s = time.monotonic()

    def add(self, reason: str | None, clips: int) -> None:
        self._done += clips
        if reason is not None:
            self.failures[reason] += clips
        now_s = time.monotonic()
        if now_s - self._said_s >= EVERY_S or self._done == self.num_clips:
            self._said_s = now_s
            self._say(self.line(now_s - self._began_s))

    def line(self, elapsed_s: float) -> str:
        rate = self._done / max(elapsed_s, 1e-9)
        left_s = (self.num_clips - self._done) / rate if rate else float("inf")
        failed = ", ".join(f"{n} {reason}" for reason, n in self.failures.most_common())
        line = f"prepared {self._done:,} of {self.num_clips:,} clips  {rate:.1f} clips/s  {left_s:.0f} s left"
        return line + (f"  failed: {failed}" if failed else "")


@dataclass(frozen=True)
class SplitReport:
    split: str
    num_listed: int
    info: dict[str, Any]
    """The split's entry of dataset.json."""


def advice(reports: Sequence["SplitReport"]) -> str:
    """What may yet be had, by the same command; empty if nothing."""
    again = sum(n for report in reports for reason, n in report.info["failures"].items() if Reason(reason).retry)
    return f"worth another try by the same command: {again:,} of the failed clips" if again else ""


def table(reports: Sequence[SplitReport]) -> str:
    """Listed, prepared and failed clips of each split, and the failures by reason."""
    width = max(len("split"), *(len(report.split) for report in reports))
    lines = [f"{'split':{width}}  {'listed':>9}  {'prepared':>9}  {'failed':>7}  why"]
    for report in reports:
        failures = report.info["failures"]
        why = ", ".join(f"{n} {reason}" for reason, n in sorted(failures.items(), key=lambda item: -item[1]))
        counts = f"{report.num_listed:>9,}  {report.info['clips']:>9,}  {sum(failures.values()):>7,}"
        lines.append(f"{report.split:{width}}  {counts}  {why}".rstrip())
    return "\n".join(lines)
