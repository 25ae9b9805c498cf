"""A recording of any length as blocks of waveform, in the memory of one block.

The rules are those of `sections`, with one difference: a hole longer than `MAX_FILLED_S` is left out instead of filled
with silence, so a block may begin later than the one before it ends. All blocks of a file without such a hole are
together the samples of the section, to the bit.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import av
import numpy as np
from av.container import InputContainer

from pipeline.prepare.audio.mono import Resampler
from pipeline.prepare.audio.packets import Packets
from pipeline.prepare.audio.sections import UNREAD, Cutter, clock_start_s, lost_part_s, run_up_s
from pipeline.prepare.clip import Reason

MAX_RECORDING_S = 1e6
"""Longest recording: eleven days, as the latest start of a clip in a list."""

MAX_FILLED_S = 10.0
"""A longer hole is left out: by one wrong timestamp it may be days long."""

MIN_LOST_S = 1.0
"""Less lost sound is not reported. A codec loses some hundredths of a second at each damaged packet."""


STOPPED = "FFmpeg cannot read how the file goes on"


@dataclass(frozen=True)
class Lost:
    """A part of a recording that could not be read."""

    begin_s: float
    end_s: float | None
    """None: up to an unknown end."""
    reason: Reason
    message: str


@dataclass(frozen=True)
class Block:
    """Consecutive samples, and what was lost before their end."""

    begin_s: float | None
    """Where the samples begin in the recording; None if they follow those of the block before."""
    samples: np.ndarray
    """float32 `[samples]`, mono, at the rate asked for. They may exceed [-1, 1]."""
    level_share: float
    """See `Mono.level_share`; of the samples that were decoded for this block."""
    lost: tuple[Lost, ...] = ()
    is_end: bool = False
    """Whether it has no samples, and its `lost` is what should follow the last sample."""


def read_blocks(
    container: InputContainer,
    track: av.AudioStream,
    start_s: float,
    duration_s: float | None,
    *,
    sample_rate_hz: int,
    block_s: float,
    may_seek: bool = True,
) -> Iterator[Block]:
    """Decode `duration_s` from `start_s` on, or all the rest, in blocks of about `block_s`.

    Raises:
        FFmpegError: nothing could be decoded, or there was not enough memory.
        ClipError: not_audio.
    """
    zero_s = clock_start_s(container, track)
    packets = Packets(container, track)
    length_s = MAX_RECORDING_S if duration_s is None else duration_s
    cutter = _BlockCutter(start_s, length_s, packets, float(track.time_base or 1), sample_rate_hz)
    cutter.sound_end_s = None if packets.end_s is None else packets.end_s - zero_s
    cutter.clock_zero_s = zero_s
    for decoded in packets.frames(run_up_s(packets, zero_s + start_s, may_seek=may_seek)):
        is_complete = cutter.take(decoded, zero_s)
        if is_complete or cutter.waiting_s >= block_s:
            cutter.cut()
        yield from cutter.ready()
        if is_complete:
            break
    else:
        if packets.error is not None and not cutter.has_begun:
            raise packets.error
    if cutter.has_begun:
        cutter.end_run()
        yield from cutter.ready()
        if packets.unread is not None:  # a seek may lead behind damage, but not into a joined recording
            lost = Lost(cutter.position_s, None, Reason.TRUNCATED, STOPPED if may_seek else UNREAD)
            yield Block(None, np.empty(0, np.float32), 1.0, (lost,), is_end=may_seek)


class _BlockCutter(Cutter):
    """A cutter from which samples are taken while it works. A *run* is what has no hole that was left out."""

    def __init__(self, start_s: float, duration_s: float, packets: Packets, tick_s: float, sample_rate_hz: int) -> None:
        super().__init__(start_s, duration_s, is_timed=packets.is_timed, tick_s=tick_s)
        self.clock_zero_s = 0.0
        self.lost: list[Lost] = []
        self._packets = packets
        self._resampler = Resampler(sample_rate_hz)
        self._ready: list[Block] = []
        self._cut_s = 0.0  # of `_length_s`
        self._run_begin_s: float | None = None
        self._is_run_begun = False

    @property
    def waiting_s(self) -> float:
        """Seconds that were taken since the last cut."""
        return self._length_s - self._cut_s

    @property
    def position_s(self) -> float:
        """Where the next sample lies in the recording."""
        return self._next_wanted / self._rate_hz

    def ready(self) -> Iterator[Block]:
        blocks, self._ready = self._ready, []
        yield from blocks

    def cut(self, *, ends_run: bool = False) -> None:
        """Make a block of what was taken since the last cut."""
        begin_s = None if self._is_run_begun else self._begin_of_run_s()
        level_share = self._mono.level_share()
        parts = [self._resampler.add(rate_hz, samples) for rate_hz, samples in self._mono.drain()]
        if ends_run:
            parts.append(self._resampler.finish())
        samples = np.concatenate([np.empty(0, np.float32), *parts])
        self._cut_s = self._length_s
        if len(samples) or self.lost:
            self._is_run_begun = self._is_run_begun or len(samples) > 0
            self._ready.append(Block(begin_s if len(samples) else None, samples, level_share, tuple(self.lost)))
            self.lost.clear()

    def end_run(self) -> None:
        self.cut(ends_run=True)
        self._is_run_begun = False

    def _begin_of_run_s(self) -> float:
        return round(max(0.0, self.position_s - self.waiting_s), 6)  # a difference of sums of durations

    def _fill(self, num_samples: int) -> None:
        hole = self._hole_s(num_samples)
        lost_s = lost_part_s(hole, [(b - self.clock_zero_s, e - self.clock_zero_s) for b, e in self._packets.lost_s])
        begin_s, length_s = self.position_s, num_samples / self._rate_hz
        is_filled = length_s <= MAX_FILLED_S
        if lost_s >= MIN_LOST_S or not is_filled:
            why = f"{lost_s:.2f} s are damaged" if lost_s else "there are no samples: damage, or the recorder paused"
            self.lost.append(Lost(begin_s, begin_s + length_s, Reason.TRUNCATED, why))
        if is_filled:
            self._mono.add_silence(num_samples, self._rate_hz)
        else:
            self.end_run()
            self._cut_s += length_s  # `take` counts the hole as length
