"""A track's packets and frames, with a continuous clock, and what was lost between them.

The rules are in `pipeline.prepare.audio.sections`.
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
"""A timestamp this far from the count of samples is a jump. Less is the container's rounding or jitter."""

DISCONTINUITY_S = 10.0
"""The ffmpeg program's `-dts_delta_threshold`."""

LOST_SHARE = 0.5
"""A hole has lost data if at least this share of the bytes expected at the rate so far belongs to no packet."""

MAX_AGAIN = 100
"""How often the demuxer may ask to be called again. It does so every 64 KiB in bytes that are not packets."""

MP4 = "mov,mp4,m4a,3gp,3g2,mj2"

SEEKABLE = {MP4, "aiff", "au", "caf", "flac", "matroska,webm", "mp3", "ogg", "w64", "wav"}
"""Formats (FFmpeg's names) in which a seek is exact to a sample. In MP3 FFmpeg itself then reads from the start and
counts the frames. Other formats are read packet by packet from the beginning, without decoding."""

OF_SAMPLES = {"aiff", "au", "w64", "wav"}
"""Formats (FFmpeg's names) whose times FFmpeg computes from bytes. That is wrong for G.722 in WAV, so only PCM uses
it."""

UNTIMED = {"aac", "ac3", "amr", "dts", "eac3", "loas", "mp3"}
"""Formats (FFmpeg's names) without timestamps. FFmpeg's own ones also count bytes that are not sound."""


WITHOUT_PAUSES = {"flac", "wv"}
"""Formats (FFmpeg's names) that number their samples one after the other, so that a jump is always lost data. FFmpeg's
parser of FLAC gives damaged bytes to the packet before them."""


def clock_may_jump(container: InputContainer) -> bool:
    return Flags.ts_discont in Flags(container.format.flags)


def is_longer(container: InputContainer, track: av.AudioStream, limit_s: float) -> bool:
    """Whether the track is longer than `limit_s` according to its packets. A header may estimate or mean the
    picture."""
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
    """Packets before it were skipped."""


@dataclass
class _Clock:
    """The position in a track's timestamps."""

    offset: int = 0
    """Correction that is added to the timestamps of the file."""
    first: int = 0
    expected: int | None = None
    """Corrected timestamp at which the next packet is expected."""
    num_unclaimed: int = 0
    """Largest number of bytes so far that belonged to no packet."""
    position: int | None = -1
    """Byte position of the last packet. All packets of an Ogg page have the position of the page."""
    num_unclaimed_before: int = 0
    """`num_unclaimed` before the first packet at that position. A page of Ogg gives only the time of its last
    packet."""

    def move(self, packet: av.Packet, pts: int) -> None:
        """Advance to a packet whose timestamp in the file is `pts`."""
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
    """A track's packets and frames, with a continuous clock, and what was lost between and within packets."""

    def __init__(self, container: InputContainer, track: av.AudioStream) -> None:
        self.container, self.track = container, track
        self.must_count = container.format.name in OF_SAMPLES and not track.codec_context.name.startswith("pcm_")
        self.is_timed = container.format.name not in UNTIMED and not self.must_count
        self._tick_s = float(track.time_base or 1)
        self._packets = self.continuous()
        self._num_claimed = self._num_unclaimed = 0
        """Bytes before the last packet that was read: those of the packets of all tracks, and those of no packet."""
        self.error: FFmpegError | None = None
        """The last error of the demuxer or the decoder."""
        self.unread: FFmpegError | None = None
        """Why the demuxer does not read the rest of a complete file."""
        self.lost_s: list[tuple[float, float]] = []
        """Spans of lost data, on the container's clock."""
        self.end_s = self._end_s()
        """When the sound ends on the container's clock, if that is within the last packet."""

    def frames(self, run_up_s: float) -> Iterator[Decoded]:
        """Yield the first frame, and all frames from `run_up_s` on.

        Packets between them are not decoded, and not read if the format has exact seeks. A packet that cannot be
        decoded is skipped.
        """
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
                continue  # its time is unknown, as is that of samples that the decoder held back (WMA)
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
                continue  # by the packet's end: FLAC has packets of many seconds
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
        """Packets with their timestamps corrected where the clock starts again. See the head of this file."""
        gap = GAP_S / self._tick_s
        self._clock = clock = _Clock()
        jumped: tuple[av.Packet, int, int] | None = None
        for packet in self._read():
            num_claimed, num_unclaimed = self._num_claimed, self._num_unclaimed
            pts = packet.pts
            if jumped is not None:
                self._classify_jump(*jumped, pts)
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
            self._classify_jump(*jumped, None)
            yield jumped[0]

    def _classify_jump(
        self, packet: av.Packet, num_claimed: int, num_unclaimed: int, following_pts: int | None
    ) -> None:
        """Classify a jump: a single wrong timestamp, another clock, lost data or a pause."""
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
        elif self.container.format.name in WITHOUT_PAUSES or (
            lost_bytes * (clock.expected - clock.first) > LOST_SHARE * num_claimed * jump
        ):
            self.lost_s.append((clock.expected * self._tick_s, (clock.expected + jump) * self._tick_s))
        clock.move(packet, pts)

    def _read(self) -> Iterator[av.Packet]:
        """The track's packets. As in the ffmpeg program, the first error of the demuxer ends the file.

        It is one flat loop, because a recording that is read from its beginning has thousands of packets before the
        section.
        """
        first_byte: int | None = None
        num_claimed = num_unclaimed = 0
        track_index = self.track.index
        for _ in range(MAX_AGAIN):
            try:
                for packet in self.container.demux():
                    size = packet.size
                    if not size:
                        continue  # an empty packet, which flushes a decoder
                    pos = packet.pos
                    if pos is not None and pos >= 0:
                        first_byte = pos if first_byte is None else first_byte
                        num_unclaimed = pos - first_byte - num_claimed
                    if packet.stream_index == track_index:
                        self._num_claimed, self._num_unclaimed = num_claimed, num_unclaimed
                        yield packet
                    num_claimed += size
            except BlockingIOError:  # MPEG-TS raises it in long stretches without packets, and the program continues
                continue
            except FFmpegError as err:
                self._fail(err)
                if self.container.format.name == "ogg":  # its links differ in rate, channels or codec
                    self.unread = err
            return

    def _end_s(self) -> float | None:
        """When the sound ends, if that is within the last packet.

        The ffmpeg program cuts MP4 there, except for PCM and a few other codecs. A fragmented file has no packet table,
        and so no such end.
        """
        track, name = self.track, self.track.codec_context.codec.name
        is_uncut = name in {"opus", "libopus", "dca"} or name.startswith("pcm_")
        if self.container.format.name != MP4 or not track.frames or is_uncut:
            return None
        if track.duration is None or not len(track.index_entries):  # a damaged table may be empty
            return None
        if track.index_entries[-1].timestamp >= track.duration:
            return None
        return track.duration * self._tick_s

    def _fail(self, err: FFmpegError) -> None:
        if err.errno == errno.ENOMEM:
            raise err
        self.error = err
