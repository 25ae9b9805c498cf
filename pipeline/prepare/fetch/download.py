"""The fetch stage: permits, attempts and deadlines around the fetch of one section."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from ast_core.features import KALDI128, FeatureSettings
from pipeline.prepare.clip import URL_SCHEMES, ClipError, Reason, each_clip
from pipeline.prepare.fetch.rate_limiter import Permits, RateLimit, wait_for_permit
from pipeline.prepare.fetch.ytdlp_settings import MAX_FETCH_BYTES, YtDlp, check_tools
from pipeline.prepare.sandbox import Sandbox, temporary_folder
from pipeline.prepare.sources.locate import host_of

MEMORY_BYTES = 2 << 30
"""Memory limit of the process that fetches: yt-dlp reads a page without a limit of its length. Deno needs half of
it."""

ATTEMPTS = {
    Reason.NETWORK: 3,
    Reason.THROTTLED: 3,
    Reason.TIMEOUT: 2,
    Reason.TRUNCATED: 2,
    Reason.SETUP: 2,
    Reason.CRASHED: 2,  # the machine may have been short of memory
    Reason.NOT_AUDIO: 2,  # FFmpeg also reports this if a host sent nothing
}
"""Attempts of one run by reason; any other reason is final at once. After `throttled` the next attempt waits for the
cool-down. The attempts are few, so that one clip that a host refuses does not block an address for all others."""

BACK_OFF_S = 2.0
"""Delay before the second attempt after a transient fault. It is four times as long before the third."""


@dataclass(frozen=True, kw_only=True)
class FetchSettings:
    ytdlp: YtDlp = field(default_factory=YtDlp)
    rate_limit: RateLimit = field(default_factory=RateLimit)
    deadline_s: float = 120.0
    """Limit of one attempt; then its process and the programs that it started are killed."""
    back_off_s: float = BACK_OFF_S


class Download:
    """Stage that adds `samples` to rows whose `media` is a URL; null if the media is a file.

    `samples` are those of the section: float32, mono, at the features' sample rate, as bytes. The section is decoded
    while it is fetched, by the function that decodes files, because only reading a recording shows which of its bytes a
    section needs.
    """

    def __init__(
        self,
        settings: FetchSettings,
        permits: Permits,
        sleep: Callable[[float], None] = time.sleep,
        features: FeatureSettings = KALDI128,
    ) -> None:
        self.settings, self._permits, self._sleep, self._features = settings, permits, sleep, features
        self._fetch = Sandbox(
            "pipeline.prepare.fetch.ytdlp:fetch_with_ytdlp", memory_bytes=MEMORY_BYTES, file_bytes=MAX_FETCH_BYTES
        )

    def stop(self) -> None:
        """End the process that fetches. Otherwise it ends together with this one."""
        self._fetch.stop()

    def __call__(self, rows: pa.Table) -> pa.Table:
        check_tools()  # on this node; the driver has checked only its own
        rows, samples = each_clip(rows, "download", self._one)
        return rows.append_column("samples", pa.array(samples, pa.binary()))

    def _one(self, row: dict[str, Any]) -> bytes | None:
        if not row["media"].startswith(URL_SCHEMES):
            return None
        duration_s = None if row["end_s"] is None else row["end_s"] - row["start_s"]
        failures: list[ClipError] = []
        while True:
            try:
                return self._attempt(row["media"], row["media_start_s"], duration_s, failures)
            except ClipError as err:
                failures.append(err)
                alike = sum(failure.reason is err.reason for failure in failures)
                if alike >= self._attempts(err.reason, row["media"]):
                    raise replace(err, attempts=len(failures)) from None
                if err.reason in (Reason.NETWORK, Reason.TIMEOUT, Reason.TRUNCATED):
                    self._sleep(self.settings.back_off_s * 4 ** (alike - 1))

    def _attempts(self, reason: Reason, url: str) -> int:
        is_of_the_file = reason is Reason.SETUP and host_of(url) in self.settings.rate_limit.own_hosts
        return 1 if is_of_the_file else ATTEMPTS.get(reason, 1)

    def _attempt(self, url: str, start_s: float, duration_s: float | None, failures: list[ClipError]) -> bytes:
        host = host_of(url)
        address = wait_for_permit(self._permits, host, self._sleep)
        reason = None
        try:
            with temporary_folder() as folder:
                samples: np.ndarray = self._fetch(
                    url,
                    start_s,
                    duration_s,
                    settings=self.settings.ytdlp,
                    address=address if address in self.settings.rate_limit.addresses else None,
                    every_client=any(failure.reason is Reason.SETUP for failure in failures),
                    features=self._features,
                    deadline_s=self.settings.deadline_s,
                    folder=folder,
                )
        except ClipError as err:
            reason = err.reason
            raise
        finally:
            self._permits.report(address, host, reason)
        return samples.tobytes()
