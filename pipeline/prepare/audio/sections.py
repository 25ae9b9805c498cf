"""The samples of a section of a recording: which frames of which track, at which time, and what is missing.

Times count from the beginning of the file, as in the ffmpeg program (`-ss`): from the container's start time, which may
be before the first sample; in MPEG-TS and similar formats from the first sample. A section that starts at 0 begins with
the first sample. Within a recording, samples are counted. A timestamp matters only if it differs from the count by more
than `GAP_S`. Then, as in the ffmpeg program,

- times that start again, as in chained Ogg or joined files, continue from the count of samples;
- a jump of more than `DISCONTINUITY_S` in a format whose clock may jump (MPEG-TS, Ogg) is another clock, not a pause.

Any other jump forward is a hole of the recording. The ffmpeg program closes it; here silence of the same length fills
it, so that the rest keeps its time. A hole with lost data (a packet that cannot be decoded, or bytes that belong to no
packet) is counted in `missing_s`. Otherwise the recorder sent nothing during silence.
"""

import math
import statistics
from dataclasses import dataclass

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition

from pipeline.prepare.audio.mono import Mono
from pipeline.prepare.audio.packets import GAP_S, Decoded, Packets, clock_may_jump
from pipeline.prepare.clip import MAX_CLIP_S, ClipError, Reason

SEEK_MARGIN_S = 1.0
"""Decoding starts this much before the section, because some codecs (Opus, AAC) depend on earlier packets."""

MIN_RATE_HZ, MAX_RATE_HZ = 1_000, 768_000
"""Allowed sample rates. A header may claim any rate, at which a second has a handful of samples or gigabytes."""


UNREAD = (
    "FFmpeg reads only the first of the recordings that were joined in this file, as the next has another rate, "
    "channels or codec"
)


@dataclass(frozen=True)
class Section:
    waveform: np.ndarray
    """float32 `[samples]`, mono, at the rate asked for. It may exceed [-1, 1]."""
    length_s: float
    decoded_s: float
    """Duration of the decoder's output. The rest of `length_s` fills holes."""
    missing_s: float
    """The part of `length_s` that was lost by damage."""
    level_share: float
    """See `Mono.level_share`."""
    cancelled_share: float
    """See `Mono.cancelled_share`."""


def chosen_track(container: InputContainer) -> av.AudioStream | None:
    """The track that the ffmpeg program takes: default tracks first, then the one with the most channels."""

    def preference(track: av.AudioStream) -> tuple[bool, bool, int]:
        channels = track.codec_context.channels
        return channels > 0, Disposition.default in Disposition(track.disposition), channels

    known = [track for track in container.streams.audio if track.codec_context is not None]  # FFmpeg has the codec
    return max(known, key=preference, default=None)  # the first of equal tracks


def read_section(
    container: InputContainer,
    track: av.AudioStream,
    start_s: float,
    duration_s: float | None,
    *,
    sample_rate_hz: int,
    may_seek: bool = True,
) -> Section:
    """Decode `duration_s` from `start_s` on, or all the rest up to a little more than MAX_CLIP_S.

    Sound that is missing at either end is left out, not replaced.

    Raises:
        ClipError: not_audio; truncated, if FFmpeg cannot read how the file continues.
        FFmpegError: nothing could be decoded, or there was not enough memory.
    """
    zero_s = clock_start_s(container, track)
    packets = Packets(container, track)
    cutter = Cutter(start_s, duration_s, is_timed=packets.is_timed, tick_s=float(track.time_base or 1))
    cutter.sound_end_s = None if packets.end_s is None else packets.end_s - zero_s
    for decoded in packets.frames(run_up_s(packets, zero_s + start_s, may_seek=may_seek)):
        if cutter.take(decoded, zero_s):
            break
    else:
        if packets.unread is not None and cutter.has_begun:
            raise ClipError(Reason.TRUNCATED, UNREAD)
    if packets.error is not None and not cutter.has_begun:
        raise packets.error
    return cutter.section([(begin_s - zero_s, end_s - zero_s) for begin_s, end_s in packets.lost_s], sample_rate_hz)


def run_up_s(packets: Packets, begin_s: float, *, may_seek: bool) -> float:
    """The timestamp from which packets are decoded for a section that begins at the timestamp `begin_s`."""
    return begin_s - SEEK_MARGIN_S if may_seek and not packets.must_count else -math.inf


def clock_start_s(container: InputContainer, track: av.AudioStream) -> float:
    """When the recording begins on its clock: with its first track, or with this one if the clock may jump."""
    if clock_may_jump(container) and track.start_time is not None and track.time_base is not None:
        return float(track.start_time * track.time_base)
    return (container.start_time or 0) / av.time_base


class Cutter:
    """Cuts a section out of frames in order. Positions are in samples of the current rate."""

    def __init__(self, start_s: float, duration_s: float | None, *, is_timed: bool, tick_s: float) -> None:
        self.start_s, self.is_timed, self.tick_s = start_s, is_timed, tick_s
        self.max_length_s = MAX_CLIP_S if duration_s is None else duration_s
        self.sound_end_s: float | None = None
        """When the sound ends, if that is within a packet."""
        self._mono = Mono()
        self._rate_hz = 0
        self._zero = 0  # timestamp of position 0
        self._position: int | None = None  # of the next sample
        self._next_wanted = self._end = 0
        self._grid = 0  # position of the second frame; frames of equal size begin at multiples from it
        self._drifts: list[int] | None = None  # timestamp minus position, of frames after a skip
        self._sizes: set[int] = set()  # sizes of these frames
        self._decoded_s = self._length_s = 0.0
        self._holes_s: list[tuple[float, float]] = []

    @property
    def has_begun(self) -> bool:
        return self._position is not None

    def take(self, decoded: Decoded, zero_s: float) -> bool:
        """Add a frame, and return whether the section is complete. `zero_s` is the timestamp of time 0."""
        frame = decoded.frame
        rate_hz, num_samples, time_s = frame.rate, frame.samples, frame.time  # each access makes a new object
        if rate_hz != self._rate_hz:
            self._change_rate(rate_hz)
        stamp = None if time_s is None else round((time_s - zero_s) * rate_hz) - self._zero
        if self._position is None:
            self._begin(stamp or 0, num_samples)
        elif decoded.after_skip:
            assert stamp is not None, "a frame after a skip has a timestamp"
            self._position, self._drifts, self._sizes = stamp, [0] if self.is_timed else None, {num_samples}
        elif stamp is not None and self.is_timed:
            self._follow(stamp, num_samples, after_damage=decoded.after_damage)
        assert self._position is not None
        begin, self._position = self._position, self._position + num_samples
        if self._position > self._next_wanted and self._drifts:
            begin = self._corrected_begin(begin, num_samples)
            self._position = begin + num_samples
        if self._position <= self._next_wanted:
            return False  # before the section; hours of frames must not be collected
        if begin > self._next_wanted:
            hole = min(begin, self._end) - self._next_wanted
            self._fill(hole)
            self._next_wanted += hole
            self._length_s += hole / self._rate_hz
        num_taken = min(self._position, self._end) - self._next_wanted
        if num_taken > 0:
            self._mono.add(frame, self._next_wanted - begin, self._next_wanted - begin + num_taken)
            self._next_wanted += num_taken
            self._length_s += num_taken / self._rate_hz
            self._decoded_s += num_taken / self._rate_hz
        return self._next_wanted >= self._end

    def section(self, lost_s: list[tuple[float, float]], sample_rate_hz: int) -> Section:
        """The section; `lost_s` has the spans of lost data, by timestamps.

        If samples arrived in such a span all the same, because the decoder continued in a packet, nothing is missing.
        """
        missing_s = sum(lost_part_s(hole, lost_s) for hole in self._holes_s)
        waveform = self._mono.waveform(sample_rate_hz)
        shares = (self._mono.level_share(), self._mono.cancelled_share())
        return Section(waveform, self._length_s, self._decoded_s, missing_s, *shares)

    def _hole_s(self, num_samples: int) -> tuple[float, float]:
        """Where a hole of this length lies on the clock of timestamps, if it begins with the next sample."""
        begin_s = (self._zero + self._next_wanted) / self._rate_hz
        return begin_s, begin_s + num_samples / self._rate_hz

    def _fill(self, num_samples: int) -> None:
        """Fill a hole with silence."""
        self._mono.add_silence(num_samples, self._rate_hz)
        self._holes_s.append(self._hole_s(num_samples))

    def _begin(self, stamp: int, num_samples: int) -> None:
        if self.start_s == 0:
            self._zero, self._position = stamp, 0
        else:
            self._position = stamp
            self._next_wanted = max(self._next_wanted, stamp)  # there is no sound before it, and no silence is added
        self._grid = self._position + num_samples
        if self.sound_end_s is not None:
            self._end = min(self._end, round(self.sound_end_s * self._rate_hz) - self._zero)

    def _follow(self, stamp: int, num_samples: int, *, after_damage: bool) -> None:
        assert self._position is not None
        drift = stamp - self._position
        if drift > (num_samples // 2 if after_damage else GAP_S * self._rate_hz):
            frames = round(drift / num_samples) * num_samples  # missing frames usually have the size of this one
            self._position += frames if self._is_rounding(frames - drift) else drift
            if self._drifts:
                self._drifts, self._sizes = [0], set()
        elif self._drifts:
            self._drifts.append(drift)
        self._sizes.add(num_samples)

    def _corrected_begin(self, begin: int, num_samples: int) -> int:
        """The position of a frame by all timestamps of the run-up: a single one is rounded, or a block off (Vorbis)."""
        begin += statistics.median_low(self._drifts or [0])
        self._drifts = None
        on_grid = self._grid + round((begin - self._grid) / num_samples) * num_samples
        return on_grid if self._sizes == {num_samples} and self._is_rounding(on_grid - begin) else begin

    def _is_rounding(self, num_samples: int) -> bool:
        """Whether a difference is at most one tick of the container's clock."""
        return abs(num_samples) <= self.tick_s * self._rate_hz + 1

    def _change_rate(self, rate_hz: int) -> None:
        if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
            raise ClipError(Reason.NOT_AUDIO, f"a sample rate of {rate_hz} Hz")
        if not self._rate_hz:
            self._next_wanted = round(self.start_s * rate_hz)
            self._end = self._next_wanted + math.ceil(self.max_length_s * rate_hz) + 1
        else:
            ratio = rate_hz / self._rate_hz
            self._zero, self._next_wanted = round(self._zero * ratio), round(self._next_wanted * ratio)
            self._end = math.ceil(self._end * ratio)
            self._position = None if self._position is None else round(self._position * ratio)
            self._grid, self._drifts = self._position or 0, None
        self._rate_hz = rate_hz


def lost_part_s(hole: tuple[float, float], lost_s: list[tuple[float, float]]) -> float:
    """How much of a hole was lost. Holes are located by samples, `lost_s` by timestamps; they may differ by `GAP_S`."""
    begin_s, end_s = hole
    near_s = [end - begin for begin, end in lost_s if begin < end_s + GAP_S and end > begin_s - GAP_S]
    return min(end_s - begin_s, sum(near_s))
