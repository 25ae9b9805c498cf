"""The stage that fetches: turns, attempts and deadlines around one fetch of a section."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from pipeline.prepare.clip import ClipError, Reason, each_clip
from pipeline.prepare.fetch.pacing import Pace, Turn
from pipeline.prepare.fetch.ytdlp import MAX_FETCH_BYTES, YtDlp, check_tools
from pipeline.prepare.sandbox import Isolated
from pipeline.prepare.sources.locate import host_of

MEMORY_BYTES = 2 << 30
"""What the process that fetches may write to: yt-dlp reads a page to its end, and a page may have none. Deno needs
half of it."""

ATTEMPTS = {
    Reason.NETWORK: 3,
    Reason.THROTTLED: 3,
    Reason.TIMEOUT: 2,
    Reason.TRUNCATED: 2,
    Reason.SETUP: 2,
    Reason.CRASHED: 2,  # a machine short of memory may have ended it
    Reason.NOT_AUDIO: 2,  # FFmpeg says the same of a host that sent nothing for once
}
"""In one run; what is not named is final at once. One after `throttled` waits until the address has rested; they are
few, so that a clip which is refused for itself does not keep an address from all others."""

BACK_OFF_S = 2.0
"""Before the second attempt of a transient fault; four times as long before the third."""


URL_SCHEMES = ("http://", "https://")


class Turns(Protocol):
    """A job's `pipeline.prepare.fetch.pacing.Pacer`, wherever it runs."""

    def turn(self, host: str) -> Turn: ...

    def report(self, address: str, host: str, reason: Reason | None) -> None: ...


@dataclass(frozen=True, kw_only=True)
class FetchSettings:
    ytdlp: YtDlp = field(default_factory=YtDlp)
    pace: Pace = field(default_factory=Pace)
    deadline_s: float = 120.0
    """For one attempt, whatever it is doing; then it and the programs it started are ended."""
    back_off_s: float = BACK_OFF_S


class Download:
    """Rows whose `media` is a URL in; the same rows with `samples` out, null where the media is a file.

    These are the section's, float32, mono, 16 kHz, as bytes. Which bytes of a recording a section needs, only reading
    it tells; so it is decoded where it is fetched, by the function that decodes files.
    """

    def __init__(self, settings: FetchSettings, turns: Turns, sleep: Callable[[float], None] = time.sleep) -> None:
        self.settings, self._turns, self._sleep = settings, turns, sleep
        self._fetch = Isolated(
            "pipeline.prepare.fetch.ytdlp:fetch_with_ytdlp", memory_bytes=MEMORY_BYTES, file_bytes=MAX_FETCH_BYTES
        )

    def stop(self) -> None:
        """End the process that fetches. It ends with this one in any case."""
        self._fetch.stop()

    def __call__(self, rows: pa.Table) -> pa.Table:
        check_tools()  # of this node, which the driver has not seen
        rows, samples = each_clip(rows, "download", self._one)
        return rows.append_column("samples", pa.array(samples, pa.binary()))

    def _one(self, row: dict[str, Any]) -> bytes | None:
        if not is_url(row["media"]):
            return None
        duration_s = None if row["end_s"] is None else row["end_s"] - row["start_s"]
        failures: list[ClipError] = []
        while True:
            try:
                return self._attempt(row["media"], row["media_start_s"], duration_s, failures)
            except ClipError as err:
                failures.append(err)
                alike = sum(failure.reason is err.reason for failure in failures)
                if alike >= ATTEMPTS.get(err.reason, 1):
                    raise replace(err, attempts=len(failures)) from None
                if err.reason in (Reason.NETWORK, Reason.TIMEOUT, Reason.TRUNCATED):
                    self._sleep(self.settings.back_off_s * 4 ** (alike - 1))

    def _attempt(self, url: str, start_s: float, duration_s: float | None, failures: list[ClipError]) -> bytes:
        host = host_of(url)
        address = self._wait_for_turn(host)
        reason = None
        try:
            samples: np.ndarray = self._fetch(
                url,
                start_s,
                duration_s,
                settings=self.settings.ytdlp,
                address=address if address in self.settings.pace.addresses else None,
                every_client=any(failure.reason is Reason.SETUP for failure in failures),
                deadline_s=self.settings.deadline_s,
            )
        except ClipError as err:
            reason = err.reason
            raise
        finally:
            self._turns.report(address, host, reason)
        return samples.tobytes()

    def _wait_for_turn(self, host: str) -> str:
        while True:
            address, wait_s = self._turns.turn(host)
            if address is not None:
                return address
            self._sleep(wait_s)


def is_url(media: str) -> bool:
    return media.startswith(URL_SCHEMES)
