"""The samples of a section of a recording: which frames of which track, at which time, and what is missing.

Time. A section's times count from the beginning of the file as FFmpeg's program counts them (`-ss`): from the
container's start time, which may lie before the first sample of the sound. A section that starts at 0 begins with the
first sample. Within a recording, samples are counted; a timestamp only matters where it leaves the count by more than
`GAP_S`. There, as for FFmpeg's program,

- times that start again, as in chained Ogg or files that were joined, go on where the samples stand;
- a jump of more than `DISCONTINUITY_S` in a format whose clock may jump (MPEG-TS, Ogg) is another clock, not a pause.

Any other jump forward is a hole of the recording, and here the rule is not the program's, which closes it: silence of
that length takes its place, so that what follows keeps its time. A hole with lost data in it, a packet that cannot be
decoded or bytes that no packet has, is counted in `missing_s`; without, the recorder sent nothing while it was quiet.
"""

import errno
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.format import Flags
from av.stream import Disposition

from pipeline.prepare.clip import MAX_CLIP_S, ClipError, Reason
from pipeline.prepare.mono import Mono

SEEK_MARGIN_S = 1.0
"""Decoding starts this much before the section: codecs with a memory (Opus, AAC) need a run-up."""

GAP_S = 0.05
"""A timestamp this far from where the samples stand is a jump; less is the rounding or the jitter of the container."""

DISCONTINUITY_S = 10.0
"""The program's `-dts_delta_threshold`."""

START_TOLERANCE_S = 0.1
"""A first frame this close to the start time of its track is the first of the recording: codecs have delays."""

LOST_SHARE = 0.5
"""A hole is one of lost data if this share of the bytes that it would take at the rate so far belongs to no packet."""

MIN_RATE_HZ, MAX_RATE_HZ = 1_000, 768_000
"""Sample rates of sound. A header may claim any, and seconds of it would be a handful of samples or gigabytes."""

SEEKABLE = {"aiff", "au", "caf", "flac", "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2", "ogg", "w64", "wav"}
"""FFmpeg's names of formats in which a seek is exact to a sample. Others are read, not decoded, from the beginning."""


UNTIMED = {"aac", "ac3", "amr", "dts", "eac3", "loas", "mp3"}
"""FFmpeg's names of formats without timestamps: those that it makes up count bytes that are no sound as well."""


@dataclass(frozen=True)
class Section:
    waveform: np.ndarray
    """float32 `[samples]`, mono, 16 kHz. It may exceed [-1, 1]."""
    length_s: float
    decoded_s: float
    """What came out of the decoder; the rest of `length_s` fills holes."""
    missing_s: float
    """Of `length_s`, what was lost to damage."""
    level_share: float
    """See `Mono.level_share`."""


def chosen_track(container: InputContainer) -> av.AudioStream | None:
    """The track that FFmpeg's program takes: a default one before others, then the one with most channels."""

    def rank(track: av.AudioStream) -> tuple[bool, bool, int]:
        channels = track.codec_context.channels
        return channels > 0, Disposition.default in Disposition(track.disposition), channels

    known = [track for track in container.streams.audio if track.codec_context is not None]  # to this FFmpeg
    return max(known, key=rank, default=None)  # the first of equals


def read_section(
    container: InputContainer,
    track: av.AudioStream,
    start_s: float,
    duration_s: float | None,
    *,
    whole: bool,
    may_seek: bool = True,
) -> Section:
    """Decode `duration_s` from `start_s` on, or all the rest up to a little more than MAX_CLIP_S.

    What is missing at either end is left out, never made up. In a `whole` recording times count from the beginning of
    the file; a section cut out of one has the times of the whole.

    Raises:
        ClipError: not_audio.
        FFmpegError: nothing could be decoded, or memory did not suffice.
    """
    zero_s = (container.start_time or 0) / av.time_base if whole else 0.0
    run_up_s = zero_s + start_s - SEEK_MARGIN_S if may_seek else -math.inf
    tick_s = float(track.time_base or 1)
    packets = _Packets(container, track)
    cutter = _Cutter(start_s, duration_s, is_timed=packets.is_timed, tick_s=tick_s)
    if start_s > SEEK_MARGIN_S and may_seek and container.format.name in SEEKABLE:
        if whole and (first := next(packets.frames(-math.inf), None)) and first[0].time is not None:
            cutter.set_grid(first[0], first[0].time - zero_s)
        container.seek(round(run_up_s * av.time_base))
    track_start_s = None if track.start_time is None else track.start_time * tick_s
    for frame, after_damage in packets.frames(run_up_s):
        is_first = track_start_s is None or frame.time is None or frame.time - track_start_s < START_TOLERANCE_S
        stamp_s = None if frame.time is None else frame.time - zero_s
        if packets.end_s is not None:
            cutter.end_at(packets.end_s - zero_s)
        if cutter.take(frame, stamp_s, is_first=is_first, after_damage=after_damage):
            break
    if packets.error is not None and not cutter.has_begun:
        raise packets.error
    return cutter.section([(begin_s - zero_s, end_s - zero_s) for begin_s, end_s in packets.lost_s])


def is_longer(container: InputContainer, track: av.AudioStream, limit_s: float) -> bool:
    """Whether the track lasts longer than a time, by its packets: a header may guess, or speak of the picture."""
    first_s, total_s = None, 0.0
    for packet in _Packets(container, track).continuous():
        if packet.pts is None or packet.duration is None:
            continue
        tick_s = float(packet.time_base)
        first_s = packet.pts * tick_s if first_s is None else first_s
        total_s += packet.duration * tick_s
        if max(total_s, (packet.pts + packet.duration) * tick_s - first_s) > limit_s:
            return True
    return False


class _Read(NamedTuple):
    packet: av.Packet
    num_claimed: int
    """Bytes of the packets of all tracks before this one."""
    num_unclaimed: int
    """Bytes before this packet that belong to none."""


class _Packets:
    """A track's packets and frames, with a clock that goes on, and what was lost between and within packets."""

    def __init__(self, container: InputContainer, track: av.AudioStream) -> None:
        self.container, self.track = container, track
        self.is_timed = container.format.name not in UNTIMED
        self.error: FFmpegError | None = None
        """The last that the demuxer or the decoder had."""
        self.lost_s: list[tuple[float, float]] = []
        """From when to when, on the container's clock, data were lost."""
        self.end_s: float | None = None
        """When the sound ends on the container's clock, where an edit list of MP4 cuts the last packet."""

    def frames(self, run_up_s: float) -> Iterator[tuple[av.AudioFrame, bool]]:
        """Decode from a time on; what lies before costs no decoding. A packet that cannot be decoded is passed over.

        Yields frames, and whether such a packet came before.
        """
        damaged = False
        for packet in self.continuous():
            tick_s = float(packet.time_base)
            end_s = None if packet.pts is None else (packet.pts + (packet.duration or 0)) * tick_s
            if end_s is not None and end_s <= run_up_s:
                continue  # by its end: FLAC has packets of many seconds
            try:
                frames: Any = packet.decode()
            except FFmpegError as err:
                self._fail(err)
                damaged = True
                if end_s is not None and packet.duration and self.is_timed:
                    self.lost_s.append((end_s - packet.duration * tick_s, end_s))
                continue
            for frame in frames:
                yield frame, damaged
                damaged = False
        try:
            flushed: Any = self.track.codec_context.decode(None)
            for frame in flushed:
                yield frame, damaged
        except FFmpegError as err:
            self._fail(err)

    def continuous(self) -> Iterator[av.Packet]:
        """Packets with their timestamps moved where the clock starts again. See the head of this file."""
        tick_s = float(self.track.time_base or 1)
        gap, discontinuity = GAP_S / tick_s, DISCONTINUITY_S / tick_s
        clock_may_jump = Flags.ts_discont in Flags(self.container.format.flags)
        offset, first = 0, 0
        expected: int | None = None  # timestamp of the next packet
        unclaimed_before = 0
        for (packet, num_claimed, num_unclaimed), following_pts in self._with_following_pts():
            if packet.pts is not None:
                packet.pts += offset
                if expected is None:
                    first = packet.pts
                elif abs(jump := packet.pts - expected) > gap:
                    after = expected + (packet.duration or 0)
                    if following_pts is not None and abs(following_pts + offset - after) <= gap:
                        packet.pts = expected  # this timestamp alone is wrong
                    elif jump < 0 or (clock_may_jump and jump > discontinuity):
                        offset -= jump
                        packet.pts = expected
                    elif (num_unclaimed - unclaimed_before) * (expected - first) > LOST_SHARE * num_claimed * jump:
                        self.lost_s.append((expected * tick_s, packet.pts * tick_s))
                expected = packet.pts + (packet.duration or 0)
                packet.dts = packet.pts
            unclaimed_before = num_unclaimed
            yield packet

    def _with_following_pts(self) -> Iterator[tuple[_Read, int | None]]:
        waiting: _Read | None = None
        for read in self._read():
            if waiting is not None:
                yield waiting, read.packet.pts
            waiting = read
        if waiting is not None:
            yield waiting, None

    def _read(self) -> Iterator[_Read]:
        """As for the program, the first error of the demuxer is the end of the file."""
        first_byte: int | None = None
        num_claimed = num_unclaimed = 0
        try:
            for packet in self.container.demux():
                if not packet.size:
                    continue  # what flushes a decoder
                if packet.pos is not None and packet.pos >= 0:
                    first_byte = packet.pos if first_byte is None else first_byte
                    num_unclaimed = packet.pos - first_byte - num_claimed
                if packet.stream_index == self.track.index:
                    if packet.pos == first_byte and packet.has_sidedata("skip_samples"):
                        self.end_s = self._edited_end_s()
                    yield _Read(packet, num_claimed, num_unclaimed)
                num_claimed += packet.size
        except FFmpegError as err:
            self._fail(err)

    def _edited_end_s(self) -> float | None:
        """FFmpeg's program cuts what lies behind an edit list that has cut the beginning, but for these codecs."""
        name, track = self.track.codec_context.codec.name, self.track
        if self.container.format.name != "mov,mp4,m4a,3gp,3g2,mj2" or name in {"opus", "libopus", "dca", "vorbis"}:
            return None
        if track.duration is None or track.time_base is None:
            return None
        return float(((track.start_time or 0) + track.duration) * track.time_base)

    def _fail(self, err: FFmpegError) -> None:
        if err.errno == errno.ENOMEM:
            raise err
        self.error = err


class _Cutter:
    """Frames in their order → the samples of a section. Positions are in samples of the rate at that place."""

    def __init__(self, start_s: float, duration_s: float | None, *, is_timed: bool, tick_s: float) -> None:
        self.start_s, self.is_timed, self.tick_s = start_s, is_timed, tick_s
        self.max_length_s = MAX_CLIP_S if duration_s is None else duration_s
        self._mono = Mono()
        self._rate_hz = 0
        self._zero = 0  # of the timestamps
        self._position: int | None = None  # of the next sample
        self._next_wanted = self._end = 0
        self._drifts: list[int] | None = None  # timestamp less position of the run-up's frames
        self._sizes: set[int] = set()  # of the run-up's frames
        self._grid: int | None = None  # where the recording's second frame begins
        self._decoded_s = self._length_s = 0.0

    @property
    def has_begun(self) -> bool:
        return self._position is not None

    def end_at(self, end_s: float) -> None:
        """The sound has no samples from this time on, by the timestamps."""
        self._end = min(self._end, round(end_s * self._rate_hz) - self._zero) if self._rate_hz else self._end

    def set_grid(self, first: av.AudioFrame, stamp_s: float) -> None:
        """If all frames but the first are of one size, the recording's `first` tells where they may begin."""
        self._change_rate(first.rate)
        self._grid = round(stamp_s * first.rate) + first.samples

    def take(self, frame: av.AudioFrame, stamp_s: float | None, *, is_first: bool, after_damage: bool) -> bool:
        """Returns whether the section is complete."""
        if frame.rate != self._rate_hz:
            self._change_rate(frame.rate)
        stamp = None if stamp_s is None else round(stamp_s * frame.rate) - self._zero
        if self._position is None:
            self._begin(stamp or 0, is_first=is_first)
        elif stamp is not None and self.is_timed:
            self._follow(stamp, frame.samples, after_damage=after_damage)
        assert self._position is not None
        self._sizes.add(frame.samples)
        begin, self._position = self._position, self._position + frame.samples
        if self._position <= self._next_wanted:
            return False  # not yet there; hours of this must not pile up
        if self._drifts:
            begin = self._settled(begin, frame.samples)
            self._position = begin + frame.samples
            if self._position <= self._next_wanted:
                return False
        if begin > self._next_wanted:
            hole = min(begin, self._end) - self._next_wanted
            self._mono.add_silence(hole, self._rate_hz)
            self._next_wanted += hole
            self._length_s += hole / self._rate_hz
        num_taken = min(self._position, self._end) - self._next_wanted
        if num_taken > 0:
            self._mono.add(frame, self._next_wanted - begin, self._next_wanted - begin + num_taken)
            self._next_wanted += num_taken
            self._length_s += num_taken / self._rate_hz
            self._decoded_s += num_taken / self._rate_hz
        return self._next_wanted >= self._end

    def section(self, lost_s: list[tuple[float, float]]) -> Section:
        """`lost_s`: from when to when data were lost, by the timestamps."""
        zero_s = self._zero / self._rate_hz if self._rate_hz else 0.0
        begin_s, end_s = zero_s + self.start_s, zero_s + self.start_s + self._length_s
        missing_s = sum(max(0.0, min(end, end_s) - max(begin, begin_s)) for begin, end in lost_s)
        return Section(self._mono.waveform(), self._length_s, self._decoded_s, missing_s, self._mono.level_share())

    def _begin(self, stamp: int, *, is_first: bool) -> None:
        if self.start_s == 0:
            self._zero, self._position = stamp, 0
            return
        self._position = stamp
        if is_first:
            self._next_wanted = max(self._next_wanted, stamp)  # before it there was no sound, and silence is none
        else:
            self._drifts = [0]

    def _settled(self, begin: int, num_samples: int) -> int:
        """Where a frame begins, by the timestamps of the run-up: one alone is rounded, or a block off (Vorbis)."""
        begin += statistics.median_low(self._drifts or [0])
        self._drifts = None
        if self._grid is None or self._sizes != {num_samples}:
            return begin
        on_grid = self._grid + round((begin - self._grid) / num_samples) * num_samples
        return on_grid if abs(on_grid - begin) <= self.tick_s * self._rate_hz + 1 else begin

    def _follow(self, stamp: int, num_samples: int, *, after_damage: bool) -> None:
        assert self._position is not None
        tolerance = num_samples // 2 if after_damage else round(GAP_S * self._rate_hz)
        drift = stamp - self._position
        if drift > tolerance:
            frames = round(drift / num_samples) * num_samples  # of the size of this one, as most are that are missing
            self._position += frames if abs(frames - drift) <= self.tick_s * self._rate_hz + 1 else drift
            if self._drifts:
                self._drifts, self._sizes = [0], set()
        elif self._drifts:
            self._drifts.append(drift)

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
        self._rate_hz = rate_hz
