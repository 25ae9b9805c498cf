"""Output of a preparation: progress while it runs, and a table at its end."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline import ray_metrics
from pipeline.prepare.clip import Reason, printable
from pipeline.prepare.fetch.rate_limiter import Fetching, RateLimit
from pipeline.progress_lines import ProgressLines
from pipeline.redaction import without_secrets
from pipeline.text_table import duration, text_table


class Progress:
    """Prints a line every few seconds: clips done, rate, time left, fetches, failures by reason, cool-downs.

    A clip counts as done or failed when its shard is written. With a low rate limit that takes long, so fetches are
    counted too.
    """

    def __init__(
        self, num_clips: int, say: Callable[[str], None], fetching: Callable[[], Fetching | None] | None = None
    ) -> None:
        self.num_clips = num_clips
        self.failures: Counter[str] = Counter()
        self._done = 0
        self._say, self._fetching = say, fetching or (lambda: None)
        self._lines = ProgressLines(lambda elapsed_s: self._say(self.line(elapsed_s, self._fetching())))

    def __enter__(self) -> "Progress":
        self._lines.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._lines.__exit__(kind)
        if kind is not KeyboardInterrupt:
            self._say(self.line(self._lines.elapsed_s()))

    def add(self, reason: str | None, clips: int) -> None:
        self._done += clips
        ray_metrics.prepared_clips().inc(clips, {"outcome": reason or "prepared"})
        if reason is not None:
            self.failures[reason] += clips

    def line(self, elapsed_s: float, fetching: Fetching | None = None) -> str:
        rate = self._done / max(elapsed_s, 1e-9)
        left = duration((self.num_clips - self._done) / rate) if rate else "unknown"
        parts = [f"done: {self._done:,} of {self.num_clips:,} clips", f"{rate:.1f} clips/s", f"left: {left}"]
        if fetching:
            parts.append(f"fetches: {fetching.num_ended:,}")
        if self.failures:
            parts.append("failed: " + ", ".join(f"{n:,} {reason}" for reason, n in self.failures.most_common()))
        if fetching and (cooling := fetching.cooling_in_words()):
            parts.append(cooling)
        return without_secrets("  ".join(parts))  # a proxy may have a password


@dataclass(frozen=True)
class SplitReport:
    split: str
    info: dict[str, Any]
    """The split's entry of dataset.json."""

    @property
    def num_listed(self) -> int:
        num_listed: int = self.info["listed"]
        return num_listed

    @property
    def num_unaccounted(self) -> int:
        """Listed clips that are neither prepared nor failed. It is 0 if nothing went wrong."""
        return self.num_listed - self.info["clips"] - sum(self.info["failures"].values())

    @property
    def num_tried_again(self) -> int:
        """Failed clips that the next run tries again without being asked."""
        by_reason = sum(n for reason, n in self.info["failures"].items() if Reason(reason).retry)
        num_tried_again: int = self.info.get("tried_again", by_reason)  # earlier versions did not count them
        return num_tried_again


def advice(reports: Sequence["SplitReport"]) -> str:
    """A line on clips that the same command may still be able to prepare; empty if there are none."""
    again = sum(report.num_tried_again for report in reports)
    return f"worth another try by the same command: {again:,} of the failed clips" if again else ""


def refused_line(refused: pa.Table, num_clips: int) -> str:
    """A line on the rows of a list that are refused beside `num_clips` clips; empty if there are none."""
    if not len(refused):
        return ""
    reasons = Counter(refused["reason"].to_pylist()).most_common()
    first = refused.select(["clip_id", "message"]).slice(0, 1).to_pylist()[0]
    return printable(
        f"{len(refused):,} of {num_clips + len(refused):,} rows are refused: "
        f"{', '.join(f'{num:,} {reason}' for reason, num in reasons)} (first: {first['clip_id']}: {first['message']})",
        600,
    )


def plan_of(
    num_clips: int, num_fetches: int, num_done: int, rate_limit: RateLimit, *, own_addresses: bool = False
) -> str:
    """What a run will do, and how long its fetches will take. The number of nodes is not known here."""
    lines = [f"to do: {num_clips:,} clips, {num_fetches:,} of them to be fetched; done: {num_done:,}"]
    if num_fetches and math.isfinite(rate_limit.fetches_per_hour):
        ways = f"{len(rate_limit.addresses)} addresses" if len(rate_limit.addresses) > 1 else "one address"
        took = duration(rate_limit.seconds_for(num_fetches)) + (
            ", divided by the number of nodes" if own_addresses else ""
        )
        lines.append(
            f"at {rate_limit.fetches_per_hour:g} fetches an hour from {ways}: {took}, and longer if it is throttled"
        )
    elif num_fetches:
        lines.append("the fetches have no rate limit: --fetches-per-hour N limits how many an address may make")
    return "\n".join(lines)


def table(reports: Sequence[SplitReport]) -> str:
    """Listed, prepared and failed clips of each split, the failures by reason, and the clips that left the index."""
    rows = []
    for report in reports:
        failures = report.info["failures"]
        left = {"no longer listed": report.info["no_longer_listed"], "moved": report.info["moved"]}
        why = [f"{n:,} {reason}" for reason, n in sorted(failures.items(), key=lambda item: -item[1])]
        why += [f"{what} {n:,}" for what, n in left.items() if n]
        counts = (report.num_listed, report.info["clips"], sum(failures.values()))
        rows.append([report.split, *(f"{count:,}" for count in counts), ", ".join(why)])
    return text_table(["split", "listed", "prepared", "failed", "why"], rows, "lrrrl")
