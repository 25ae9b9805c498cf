"""A track's packets and frames, with a clock that goes on, and what was lost between them.

`pipeline.prepare.audio.sections` says what the rules are.
"""

import errno
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import av
from av.container import InputContainer
from av.error import FFmpegError
from av.format import Flags

GAP_S = 0.05
"""A timestamp this far from where the samples stand is a jump; less is the rounding or the jitter of the container."""

DISCONTINUITY_S = 10.0
"""The program's `-dts_delta_threshold`."""

LOST_SHARE = 0.5
"""A hole is one of lost data if this share of the bytes that it would take at the rate so far belongs to no packet."""

MAX_AGAIN = 100
"""How often the demuxer may ask to be called again, which in bytes that are no packets it does every 64 KiB."""

MP4 = "mov,mp4,m4a,3gp,3g2,mj2"

SEEKABLE = {MP4, "aiff", "au", "caf", "flac", "matroska,webm", "mp3", "ogg", "w64", "wav"}
"""FFmpeg's names of formats in which a seek is exact to a sample. In MP3 FFmpeg itself then reads from the start and
counts the frames. Other formats are read, not decoded, from the beginning packet by packet."""

OF_SAMPLES = {"aiff", "au", "w64", "wav"}
"""FFmpeg's names of formats whose times it reckons by bytes: wrongly for G.722 in WAV, so only PCM's are used."""

UNTIMED = {"aac", "ac3", "amr", "dts", "eac3", "loas", "mp3"}
"""FFmpeg's names of formats without timestamps: those that it makes up count bytes that are no sound as well."""


def clock_may_jump(container: InputContainer) -> bool:
    return Flags.ts_discont in Flags(container.format.flags)


def is_longer(container: InputContainer, track: av.AudioStream, limit_s: float) -> bool:
    """Whether the track lasts longer than a time, by its packets: a header may guess, or speak of the picture."""
    first, total = None, 0
    limit = limit_s / float(track.time_base or 1)
    for packet in Packets(container, track).continuous():
        pts, duration = packet.pts, packet.duration
        if pts is None or duration is None:
            continue
        first = pts if first is None else first
        total += duration
        if total > limit or pts + duration - first > limit:
            return True
    return False


class Decoded(NamedTuple):
    frame: av.AudioFrame
    after_damage: bool
    """A packet before it could not be decoded."""
    after_skip: bool
    """Packets before it were passed over."""


@dataclass
class _Clock:
    """Where the timestamps of a track have come to."""

    offset: int = 0
    """What the timestamps of the file are moved by."""
    first: int = 0
    expected: int | None = None
    """The next packet's timestamp, moved."""
    num_unclaimed: int = 0
    """The most bytes that belonged to no packet, before any so far."""
    position: int | None = -1
    """Of the last packet. All packets of an Ogg page have that of the page."""
    num_unclaimed_before: int = 0
    """`num_unclaimed` before the first packet there: a page of Ogg tells the time of its last packet alone."""

    def move(self, packet: av.Packet, pts: int) -> None:
        """Go on to a packet whose timestamp is `pts` in the file."""
        if self.offset:
            pts += self.offset
            packet.pts = packet.dts = pts
        if self.expected is None:
            self.first = pts
        self.expected = pts + (packet.duration or 0)

    def count(self, position: int | None, num_unclaimed: int) -> None:
        if position != self.position:
            self.position, self.num_unclaimed_before = position, self.num_unclaimed
        if num_unclaimed > self.num_unclaimed:
            self.num_unclaimed = num_unclaimed


class Packets:
    """A track's packets and frames, with a clock that goes on, and what was lost between and within packets."""

    def __init__(self, container: InputContainer, track: av.AudioStream) -> None:
        self.container, self.track = container, track
        self.must_count = container.format.name in OF_SAMPLES and not track.codec_context.name.startswith("pcm_")
        self.is_timed = container.format.name not in UNTIMED and not self.must_count
        self._tick_s = float(track.time_base or 1)
        self._packets = self.continuous()
        self._num_claimed = self._num_unclaimed = 0
        """Bytes before the last packet that was read: those of the packets of all tracks, and those of none."""
        self.error: FFmpegError | None = None
        """The last that the demuxer or the decoder had."""
        self.unread: FFmpegError | None = None
        """Why the demuxer does not read the rest of a whole file."""
        self.lost_s: list[tuple[float, float]] = []
        """From when to when, on the container's clock, data were lost."""
        self.end_s = self._end_s()
        """When the sound ends on the container's clock, if that is within the last packet."""

    def frames(self, run_up_s: float) -> Iterator[Decoded]:
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

    def _decoded(self, run_up_s: float) -> Iterator[Decoded]:
        damaged = False
        run_up = run_up_s / self._tick_s
        for packet in self._packets:
            pts = packet.pts
            end = None if pts is None else pts + (packet.duration or 0)
            if end is not None and end <= run_up:
                continue  # by its end: FLAC has packets of many seconds
            try:
                frames: Any = packet.decode()
            except FFmpegError as err:
                self._fail(err)
                damaged = True
                if pts is not None and end is not None and self.is_timed:
                    self.lost_s.append((pts * self._tick_s, end * self._tick_s))
                continue
            for frame in frames:
                yield Decoded(frame, damaged, False)
                damaged = False
        try:
            flushed: Any = self.track.codec_context.decode(None)
            for frame in flushed:
                yield Decoded(frame, damaged, False)
        except FFmpegError as err:
            self._fail(err)

    def continuous(self) -> Iterator[av.Packet]:
        """Packets with their timestamps moved where the clock starts again. See the head of this file."""
        gap = GAP_S / self._tick_s
        self._clock = clock = _Clock()
        jumped: tuple[av.Packet, int, int] | None = None
        for packet in self._read():
            num_claimed, num_unclaimed = self._num_claimed, self._num_unclaimed
            pts = packet.pts
            if jumped is not None:
                self._settle(*jumped, pts)
                yield jumped[0]
                jumped = None
            if pts is not None:
                if clock.expected is not None and not -gap <= pts + clock.offset - clock.expected <= gap:
                    jumped = (packet, num_claimed, num_unclaimed)
                    continue
                clock.move(packet, pts)
            clock.count(packet.pos, num_unclaimed)
            yield packet
        if jumped is not None:
            self._settle(*jumped, None)
            yield jumped[0]

    def _settle(self, packet: av.Packet, num_claimed: int, num_unclaimed: int, following_pts: int | None) -> None:
        """Say what a jump is: a lone wrong timestamp, another clock, lost data or a pause."""
        clock, pts = self._clock, packet.pts
        assert clock.expected is not None
        assert pts is not None
        jump = pts + clock.offset - clock.expected
        after = clock.expected + (packet.duration or 0)
        clock.count(packet.pos, num_unclaimed)
        lost_bytes = clock.num_unclaimed - clock.num_unclaimed_before
        if following_pts is not None and abs(following_pts + clock.offset - after) <= GAP_S / self._tick_s:
            packet.pts = pts = clock.expected - clock.offset
        elif jump < 0 or (clock_may_jump(self.container) and jump > DISCONTINUITY_S / self._tick_s):
            clock.offset -= jump
        elif lost_bytes * (clock.expected - clock.first) > LOST_SHARE * num_claimed * jump:
            self.lost_s.append((clock.expected * self._tick_s, (clock.expected + jump) * self._tick_s))
        clock.move(packet, pts)

    def _read(self) -> Iterator[av.Packet]:
        """The track's packets. As for the program, the first error of the demuxer is the end of the file.

        One flat loop: a recording that is read from its beginning has thousands of packets before the section.
        """
        first_byte: int | None = None
        num_claimed = num_unclaimed = 0
        track_index = self.track.index
        for _ in range(MAX_AGAIN):
            try:
                for packet in self.container.demux():
                    size = packet.size
                    if not size:
                        continue  # what flushes a decoder
                    pos = packet.pos
                    if pos is not None and pos >= 0:
                        first_byte = pos if first_byte is None else first_byte
                        num_unclaimed = pos - first_byte - num_claimed
                    if packet.stream_index == track_index:
                        self._num_claimed, self._num_unclaimed = num_claimed, num_unclaimed
                        yield packet
                    num_claimed += size
            except BlockingIOError:  # MPEG-TS says so where many bytes hold no packet, and the program goes on
                continue
            except FFmpegError as err:
                self._fail(err)
                if self.container.format.name == "ogg":  # whose links differ, in rate, channels or codec
                    self.unread = err
            return

    def _end_s(self) -> float | None:
        """When the sound ends, if that is within the last packet.

        FFmpeg's program cuts MP4 there, but not these codecs, nor PCM. A fragmented file has no table of packets, so no
        such end.
        """
        track, name = self.track, self.track.codec_context.codec.name
        is_uncut = name in {"opus", "libopus", "dca"} or name.startswith("pcm_")
        if self.container.format.name != MP4 or not track.frames or is_uncut:
            return None
        if track.duration is None or not len(track.index_entries):  # damage may leave a table of nothing
            return None
        if track.index_entries[-1].timestamp >= track.duration:
            return None
        return track.duration * self._tick_s

    def _fail(self, err: FFmpegError) -> None:
        if err.errno == errno.ENOMEM:
            raise err
        self.error = err
