"""Recordings of any length from untrusted media: blocks of waveform from a sandbox, in bounded memory.

The process that decodes keeps the recording open between blocks, so each second is decoded once. If it crashes, hangs
or cannot read on, the recording is opened again behind the damage, and the part between is reported.
"""

import itertools
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np

from pipeline.prepare.audio.blocks import Block, Lost
from pipeline.prepare.audio.decode import DEADLINE_S, MEMORY_BYTES, check_samples, decode_blocks, open_media
from pipeline.prepare.clip import URL_SCHEMES, ClipError, Reason
from pipeline.prepare.sandbox import Sandbox, temporary_folder

BLOCK_S = 60.0
"""Length of a block: 4 MB at 16 kHz."""

FIRST_SKIP_S = 60.0
"""Where reading stopped, the first attempt to go on begins this much later, and each further one twice as much."""

MAX_SKIPS = 12
"""Number of such attempts: the last one begins a day and a half later."""

MAX_URL_BYTES = 8 << 30
"""Limit of the bytes of a recording at a URL: a week in a good codec."""

FIRST_BLOCK_S = 3600.0
"""Time limit of the first block of a recording at a URL. A site that has it in pieces, or a host without byte ranges,
may have to send all of it before."""

FINAL = {
    Reason.MISSING_FILE,
    Reason.PRIVATE_HOST,
    Reason.UNAVAILABLE,
    Reason.RESTRICTED,
    Reason.THROTTLED,
    Reason.SETUP,
}
"""Failures that concern the whole file, so that no later part is tried."""


@dataclass(frozen=True)
class Source:
    """A recording, or a section of one."""

    media: str
    """Path, URI or URL."""
    member: str | None = None
    start_s: float = 0.0
    end_s: float | None = None
    """None: up to the end of the media."""
    own_hosts: tuple[tuple[str, int], ...] = ()
    """Hosts that the user named, which may have private addresses."""


class RecordingReader:
    """Reads recordings, one after the other, through a sandbox of its own.

    Args:
        limit_s: time for a recording, however many attempts it takes.
        memory_bytes: memory limit of the sandbox.
    """

    def __init__(self, *, limit_s: float = math.inf, memory_bytes: int = MEMORY_BYTES) -> None:
        self.limit_s = limit_s
        self._sandbox = Sandbox("pipeline.prepare.stream:next_block", memory_bytes=memory_bytes)
        self._numbers = itertools.count()

    def stop(self) -> None:
        """End the process that decodes. Otherwise it ends together with this one."""
        self._sandbox.stop()

    def blocks(self, source: Source, sample_rate_hz: int) -> Iterator[Block]:
        """The blocks of a recording, in order. What could not be read is their `lost`.

        A block's `begin_s` is None if its samples follow those of the block before. A block may have no samples.

        Raises:
            ClipError: nothing of it could be read.
            UserError: a fault of this machine, which concerns every recording.
        """
        ends_s = time.monotonic() + self.limit_s
        position_s = begin_s = source.start_s
        has_any, num_attempts = False, 0
        damage: Lost | None = None  # where reading stopped, until it goes on
        while True:
            num_attempts += 1
            stopped = None
            try:
                for block in self._run(source, begin_s, sample_rate_hz, ends_s, is_first=not has_any):
                    if block.is_end:
                        stopped = block.lost[-1]
                        break
                    if not len(block.samples):
                        yield block
                        continue
                    position_s = position_s if block.begin_s is None else block.begin_s
                    yield block if damage is None else _after(damage, block, position_s)
                    position_s += len(block.samples) / sample_rate_hz
                    has_any, damage, num_attempts = True, None, 0
            except ClipError as err:
                if not has_any and (err.reason is not Reason.CRASHED or num_attempts > 1):
                    raise
                if not has_any:
                    continue  # the machine may have been short of memory
                stopped = Lost(position_s, source.end_s, err.reason, err.message)
            if stopped is None:
                break
            damage = damage or stopped
            begin_s = damage.begin_s + FIRST_SKIP_S * 2 ** max(0, num_attempts - 1)
            is_beyond = damage.end_s is not None and begin_s >= damage.end_s
            is_out_of_time = time.monotonic() >= ends_s
            if is_beyond or is_out_of_time or num_attempts > MAX_SKIPS or not has_any or stopped.reason in FINAL:
                break
        if damage is not None:
            yield Block(None, np.empty(0, np.float32), 1.0, (damage,))

    def _run(
        self, source: Source, begin_s: float, sample_rate_hz: int, ends_s: float, *, is_first: bool
    ) -> Iterator[Block]:
        """The blocks from `begin_s` on, as far as one process reads them."""
        key = next(self._numbers)
        what = (source.media, source.member, begin_s, source.end_s, source.own_hosts, sample_rate_hz)
        is_url = _is_url(source.media, source.member)
        with temporary_folder() if is_url else nullcontext("") as folder:
            for number in itertools.count():
                left_s = ends_s - time.monotonic()
                if left_s <= 0:
                    raise ClipError(Reason.TIMEOUT, f"not read within {self.limit_s:g} s")
                limit_s = FIRST_BLOCK_S if is_url and number == 0 and is_first else DEADLINE_S
                packed = self._sandbox(key, number, what, deadline_s=min(limit_s, left_s), folder=folder)
                if packed is None:
                    return
                yield _unpacked(packed)


def _is_url(media: str, member: str | None) -> bool:
    return member is None and media.startswith(URL_SCHEMES)


def _after(stopped: Lost, block: Block, begin_s: float) -> Block:
    """The first block behind damage, with the damage."""
    message = stopped.message if stopped.end_s is None else f"{begin_s - stopped.begin_s:.2f} s are damaged"
    lost = Lost(stopped.begin_s, begin_s, stopped.reason, message)
    return replace(block, lost=(lost, *block.lost))


# In the sandbox


@dataclass
class _Open:
    key: int
    number: int
    blocks: Iterator[Block]


_open: _Open | None = None


def next_block(key: int, number: int, what: tuple[Any, ...]) -> list[Any] | None:
    """The next block of a recording, as numbers, text and samples; None after the last one.

    Raises:
        ClipError: crashed, if this process is not the one that read the blocks before.
    """
    global _open
    if number == 0:
        _open = _Open(key, 0, _checked(_blocks(*what), what[-1]))
    elif _open is None or (_open.key, _open.number) != (key, number):
        raise ClipError(Reason.CRASHED, "its process ended")
    assert _open is not None
    _open.number += 1
    block = next(_open.blocks, None)
    return None if block is None else _packed(block)


def _blocks(
    media: str, member: str | None, start_s: float, end_s: float | None, own_hosts: Any, sample_rate_hz: int
) -> Iterator[Block]:
    duration_s = None if end_s is None else end_s - start_s
    with _opened(media, member, own_hosts) as file:
        yield from decode_blocks(file, start_s, duration_s, sample_rate_hz=sample_rate_hz, block_s=BLOCK_S)


def _opened(media: str, member: str | None, own_hosts: Any) -> AbstractContextManager[BinaryIO | str]:
    if not _is_url(media, member):
        return _without_count(media, member)
    from pipeline.prepare.fetch.ytdlp import open_url  # yt-dlp takes long to import
    from pipeline.prepare.fetch.ytdlp_settings import YtDlp

    return open_url(media, settings=YtDlp(own_hosts=tuple(map(tuple, own_hosts))), max_bytes=MAX_URL_BYTES)


@contextmanager
def _without_count(media: str, member: str | None) -> Iterator[BinaryIO | str]:
    with open_media(media, member) as (file, _):
        yield file


def _checked(blocks: Iterator[Block], sample_rate_hz: int) -> Iterator[Block]:
    """Leave out blocks whose channels cancel each other throughout, or with impossible samples.

    A preparation also refuses a clip whose channels cancel each other in a part.
    """
    position_s, is_cut = 0.0, False
    for block in blocks:
        begin_s = position_s if block.begin_s is None else block.begin_s
        position_s = begin_s + len(block.samples) / sample_rate_hz
        if block.is_end:
            yield block
            continue
        try:
            check_samples(block.samples, block.level_share)
            yield replace(block, begin_s=begin_s) if is_cut and len(block.samples) else block
            is_cut = False
        except ClipError as err:
            is_cut = True
            lost = (*block.lost, Lost(begin_s, position_s, err.reason, err.message))
            yield Block(None, np.empty(0, np.float32), 1.0, lost)


def _packed(block: Block) -> list[Any]:
    lost = [[part.begin_s, part.end_s, str(part.reason), part.message] for part in block.lost]
    return [block.begin_s, block.samples, block.level_share, lost, block.is_end]


def _unpacked(packed: list[Any]) -> Block:
    begin_s, samples, level_share, lost, is_end = packed
    parts = tuple(Lost(begin_s, end_s, Reason(reason), message) for begin_s, end_s, reason, message in lost)
    return Block(begin_s, samples, level_share, parts, is_end)
