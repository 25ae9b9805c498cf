"""The samples of a section of a recording: which frames of which track, at which time, and what is missing.

Time. A section's times count from the beginning of the file as FFmpeg's program counts them (`-ss`): from the
container's start time, which may lie before the first sample of the sound; in MPEG-TS and the like from that sample. A
section that starts at 0 begins with the first sample. Within a recording, samples are counted; a timestamp only matters
where it leaves the count by more than `GAP_S`. There, as for FFmpeg's program,

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

LOST_SHARE = 0.5
"""A hole is one of lost data if this share of the bytes that it would take at the rate so far belongs to no packet."""

MIN_RATE_HZ, MAX_RATE_HZ = 1_000, 768_000
"""Sample rates of sound. A header may claim any, and seconds of it would be a handful of samples or gigabytes."""

MP4 = "mov,mp4,m4a,3gp,3g2,mj2"

SEEKABLE = {MP4, "aiff", "au", "caf", "flac", "matroska,webm", "ogg", "w64", "wav"}
"""FFmpeg's names of formats in which a seek is exact to a sample. Others are read, not decoded, from the beginning."""


OF_SAMPLES = {"aiff", "au", "w64", "wav"}
"""FFmpeg's names of formats whose times it reckons by bytes: wrongly for G.722 in WAV, so only PCM's are used."""

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
    may_seek: bool = True,
) -> Section:
    """Decode `duration_s` from `start_s` on, or all the rest up to a little more than MAX_CLIP_S.

    What is missing at either end is left out, never made up.

    Raises:
        ClipError: not_audio.
        FFmpegError: nothing could be decoded, or memory did not suffice.
    """
    zero_s = _start_s(container, track)
    packets = _Packets(container, track)
    run_up_s = zero_s + start_s - SEEK_MARGIN_S if may_seek and not packets.must_count else -math.inf
    cutter = _Cutter(start_s, duration_s, is_timed=packets.is_timed, tick_s=float(track.time_base or 1))
    cutter.sound_end_s = None if packets.end_s is None else packets.end_s - zero_s
    for decoded in packets.frames(run_up_s):
        if cutter.take(decoded, zero_s):
            break
    if packets.error is not None and not cutter.has_begun:
        raise packets.error
    return cutter.section([(begin_s - zero_s, end_s - zero_s) for begin_s, end_s in packets.lost_s])


def _start_s(container: InputContainer, track: av.AudioStream) -> float:
    """When the recording begins, by its clock: with its first track, or where the clock may jump, with this one."""
    if _clock_may_jump(container) and track.start_time is not None and track.time_base is not None:
        return float(track.start_time * track.time_base)
    return (container.start_time or 0) / av.time_base


def _clock_may_jump(container: InputContainer) -> bool:
    return Flags.ts_discont in Flags(container.format.flags)


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


class _Decoded(NamedTuple):
    frame: av.AudioFrame
    after_damage: bool
    """A packet before it could not be decoded."""
    after_skip: bool
    """Packets before it were passed over."""


class _Read(NamedTuple):
    packet: av.Packet
    num_claimed: int
    """Bytes of the packets of all tracks before this one."""
    num_unclaimed: int
    """Bytes before this packet that belong to none."""


@dataclass
class _Clock:
    """Where the timestamps of a track have come to."""

    offset: int = 0
    """What the timestamps of the file are moved by."""
    first: int = 0
    expected: int | None = None
    """The next packet's timestamp, moved."""
    num_unclaimed: int = 0
    """See `_Read`; before the last packet."""

    def move(self, packet: av.Packet) -> None:
        assert packet.pts is not None
        if self.offset:
            packet.pts += self.offset
            packet.dts = packet.pts
        if self.expected is None:
            self.first = packet.pts
        self.expected = packet.pts + (packet.duration or 0)


class _Packets:
    """A track's packets and frames, with a clock that goes on, and what was lost between and within packets."""

    def __init__(self, container: InputContainer, track: av.AudioStream) -> None:
        self.container, self.track = container, track
        self.must_count = container.format.name in OF_SAMPLES and not track.codec_context.name.startswith("pcm_")
        self.is_timed = container.format.name not in UNTIMED and not self.must_count
        self._tick_s = float(track.time_base or 1)
        self._packets = self.continuous()
        self.error: FFmpegError | None = None
        """The last that the demuxer or the decoder had."""
        self.lost_s: list[tuple[float, float]] = []
        """From when to when, on the container's clock, data were lost."""
        self.end_s = self._end_s()
        """When the sound ends on the container's clock, if that is within the last packet."""

    def frames(self, run_up_s: float) -> Iterator[_Decoded]:
        """The first frame, and all from a time on; what lies between costs no decoding, and where a seek is exact no
        reading. A packet that cannot be decoded is passed over."""
        for decoded in self._decoded(-math.inf):
            yield decoded
            frame = decoded.frame
            if frame.time is not None and frame.time + frame.samples / frame.rate < run_up_s:
                break
        else:
            return
        if self.container.format.name in SEEKABLE:
            self.container.seek(round(run_up_s * av.time_base))
            self._packets = self.continuous()
        rest = self._decoded(run_up_s)
        for decoded in rest:
            if decoded.frame.time is None:
                continue  # Nobody knows where it stands, as with what the decoder kept back (WMA) of the first packet.
            yield decoded._replace(after_skip=True)
            break
        yield from rest

    def _decoded(self, run_up_s: float) -> Iterator[_Decoded]:
        damaged = False
        run_up = run_up_s / self._tick_s
        for packet in self._packets:
            end = None if packet.pts is None else packet.pts + (packet.duration or 0)
            if end is not None and end <= run_up:
                continue  # by its end: FLAC has packets of many seconds
            try:
                frames: Any = packet.decode()
            except FFmpegError as err:
                self._fail(err)
                damaged = True
                if packet.pts is not None and end is not None and self.is_timed:
                    self.lost_s.append((packet.pts * self._tick_s, end * self._tick_s))
                continue
            for frame in frames:
                yield _Decoded(frame, damaged, False)
                damaged = False
        try:
            flushed: Any = self.track.codec_context.decode(None)
            for frame in flushed:
                yield _Decoded(frame, damaged, False)
        except FFmpegError as err:
            self._fail(err)

    def continuous(self) -> Iterator[av.Packet]:
        """Packets with their timestamps moved where the clock starts again. See the head of this file."""
        gap = GAP_S / self._tick_s
        self._clock = clock = _Clock()
        jumped: _Read | None = None
        for read in self._read():
            if jumped is not None:
                self._settle(jumped, read.packet.pts)
                yield jumped.packet
                jumped = None
            packet = read.packet
            if packet.pts is not None:
                if clock.expected is not None and not -gap <= packet.pts + clock.offset - clock.expected <= gap:
                    jumped = read
                    continue
                clock.move(packet)
            clock.num_unclaimed = read.num_unclaimed
            yield packet
        if jumped is not None:
            self._settle(jumped, None)
            yield jumped.packet

    def _settle(self, read: _Read, following_pts: int | None) -> None:
        """Say what a jump is: a lone wrong timestamp, another clock, lost data or a pause."""
        clock, packet = self._clock, read.packet
        assert clock.expected is not None
        assert packet.pts is not None
        jump = packet.pts + clock.offset - clock.expected
        after = clock.expected + (packet.duration or 0)
        lost_bytes = read.num_unclaimed - clock.num_unclaimed
        if following_pts is not None and abs(following_pts + clock.offset - after) <= GAP_S / self._tick_s:
            packet.pts = clock.expected - clock.offset
        elif jump < 0 or (_clock_may_jump(self.container) and jump > DISCONTINUITY_S / self._tick_s):
            clock.offset -= jump
        elif lost_bytes * (clock.expected - clock.first) > LOST_SHARE * read.num_claimed * jump:
            self.lost_s.append((clock.expected * self._tick_s, (clock.expected + jump) * self._tick_s))
        clock.move(packet)
        clock.num_unclaimed = read.num_unclaimed

    def _read(self) -> Iterator[_Read]:
        """As for the program, the first error of the demuxer is the end of the file."""
        first_byte: int | None = None
        num_claimed = num_unclaimed = 0
        try:
            for packet in self.container.demux():
                size, pos = packet.size, packet.pos
                if not size:
                    continue  # what flushes a decoder
                if pos is not None and pos >= 0:
                    first_byte = pos if first_byte is None else first_byte
                    num_unclaimed = pos - first_byte - num_claimed
                if packet.stream_index == self.track.index:
                    yield _Read(packet, num_claimed, num_unclaimed)
                num_claimed += size
        except FFmpegError as err:
            self._fail(err)

    def _end_s(self) -> float | None:
        """When the sound ends, if that is within the last packet.

        FFmpeg's program cuts MP4 there, but not these codecs, nor PCM. A fragmented file has no table of packets, so no
        such end.
        """
        track, name = self.track, self.track.codec_context.codec.name
        is_uncut = name in {"opus", "libopus", "dca"} or name.startswith("pcm_")
        if self.container.format.name != MP4 or not track.frames or is_uncut:
            return None
        if track.duration is None or track.index_entries[-1].timestamp >= track.duration:
            return None
        return track.duration * self._tick_s

    def _fail(self, err: FFmpegError) -> None:
        if err.errno == errno.ENOMEM:
            raise err
        self.error = err


class _Cutter:
    """Frames in their order → the samples of a section. Positions are in samples of the rate at that place."""

    def __init__(self, start_s: float, duration_s: float | None, *, is_timed: bool, tick_s: float) -> None:
        self.start_s, self.is_timed, self.tick_s = start_s, is_timed, tick_s
        self.max_length_s = MAX_CLIP_S if duration_s is None else duration_s
        self.sound_end_s: float | None = None
        """When the sound ends, if that is within a packet."""
        self._mono = Mono()
        self._rate_hz = 0
        self._zero = 0  # of the timestamps
        self._position: int | None = None  # of the next sample
        self._next_wanted = self._end = 0
        self._grid = 0  # where the recording's second frame begins, and others of the same size may
        self._drifts: list[int] | None = None  # timestamp less position of frames after a skip
        self._sizes: set[int] = set()  # of these frames
        self._decoded_s = self._length_s = 0.0
        self._holes_s: list[tuple[float, float]] = []

    @property
    def has_begun(self) -> bool:
        return self._position is not None

    def take(self, decoded: _Decoded, zero_s: float) -> bool:
        """Returns whether the section is complete. `zero_s`: the timestamp of time 0."""
        frame = decoded.frame
        if frame.rate != self._rate_hz:
            self._change_rate(frame.rate)
        stamp = None if frame.time is None else round((frame.time - zero_s) * frame.rate) - self._zero
        if self._position is None:
            self._begin(stamp or 0, frame.samples)
        elif decoded.after_skip:
            assert stamp is not None, "a frame after a skip has a timestamp"
            self._position, self._drifts, self._sizes = stamp, [0] if self.is_timed else None, {frame.samples}
        elif stamp is not None and self.is_timed:
            self._follow(stamp, frame.samples, after_damage=decoded.after_damage)
        assert self._position is not None
        begin, self._position = self._position, self._position + frame.samples
        if self._position > self._next_wanted and self._drifts:
            begin = self._settled(begin, frame.samples)
            self._position = begin + frame.samples
        if self._position <= self._next_wanted:
            return False  # not yet there; hours of this must not pile up
        if begin > self._next_wanted:
            hole = min(begin, self._end) - self._next_wanted
            self._mono.add_silence(hole, self._rate_hz)
            hole_begin_s = (self._zero + self._next_wanted) / self._rate_hz
            self._holes_s.append((hole_begin_s, hole_begin_s + hole / self._rate_hz))
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
        """`lost_s`: from when to when data were lost, by the timestamps. Where samples came all the same, as from a
        decoder that goes on within a packet, nothing is missing."""
        missing_s = sum(_missing_s(hole, lost_s) for hole in self._holes_s)
        return Section(self._mono.waveform(), self._length_s, self._decoded_s, missing_s, self._mono.level_share())

    def _begin(self, stamp: int, num_samples: int) -> None:
        if self.start_s == 0:
            self._zero, self._position = stamp, 0
        else:
            self._position = stamp
            self._next_wanted = max(self._next_wanted, stamp)  # before it there was no sound, and silence is none
        self._grid = self._position + num_samples
        if self.sound_end_s is not None:
            self._end = min(self._end, round(self.sound_end_s * self._rate_hz) - self._zero)

    def _follow(self, stamp: int, num_samples: int, *, after_damage: bool) -> None:
        assert self._position is not None
        drift = stamp - self._position
        if drift > (num_samples // 2 if after_damage else GAP_S * self._rate_hz):
            frames = round(drift / num_samples) * num_samples  # of the size of this one, as most are that are missing
            self._position += frames if self._is_rounding(frames - drift) else drift
            if self._drifts:
                self._drifts, self._sizes = [0], set()
        elif self._drifts:
            self._drifts.append(drift)
        self._sizes.add(num_samples)

    def _settled(self, begin: int, num_samples: int) -> int:
        """Where a frame begins, by the timestamps of the run-up: one alone is rounded, or a block off (Vorbis)."""
        begin += statistics.median_low(self._drifts or [0])
        self._drifts = None
        on_grid = self._grid + round((begin - self._grid) / num_samples) * num_samples
        return on_grid if self._sizes == {num_samples} and self._is_rounding(on_grid - begin) else begin

    def _is_rounding(self, num_samples: int) -> bool:
        """Whether a difference is no more than a tick of the container's clock."""
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


def _missing_s(hole: tuple[float, float], lost_s: list[tuple[float, float]]) -> float:
    """How much of a hole was lost. Its place is by samples and theirs by timestamps, which may differ by `GAP_S`."""
    begin_s, end_s = hole
    near_s = [end - begin for begin, end in lost_s if begin < end_s + GAP_S and end > begin_s - GAP_S]
    return min(end_s - begin_s, sum(near_s))
