"""Length of the sound according to a file's header, for formats in which FFmpeg does not report it.

FFmpeg limits the length of WAV, W64, CAF and AVI to the file's size, and estimates that of an MP3 file from the bit
rate of its first frames. Neither shows whether a file was cut.
"""

import io
import re
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import takewhile
from typing import BinaryIO, NamedTuple

import av
from av.container import InputContainer

DECLARED_BY_STREAM = {
    "aiff",
    "ape",
    "au",
    "dsf",
    "flac",
    "mov,mp4,m4a,3gp,3g2,mj2",
    "nistsphere",
    "rm",
    "tak",
    "tta",
    "wv",
}
"""Formats (FFmpeg's names) whose header gives the length of a stream, which FFmpeg reports unchanged."""

DECLARED_BY_FILE = {"matroska,webm", "flv"}
"""Formats whose header gives the length of the whole file. It is that of the sound only if there is no other stream."""

MAX_BYTES = 1 << 62
"""A header with a larger size was written before the writer knew the size."""

STREAMED_BYTES = {0, 0x7F000000, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF}
"""Sizes that a writer leaves in a header if it cannot go back to fill in the right one. SoX leaves 0x7F000000 in AIFF
and 0x7FFFF000 in WAV."""

HEAD_BYTES = 1 << 20
"""The chunks before the samples end within this many bytes, except in files made to deceive."""

OGG_PAGE, OGG_IS_FIRST = b"OggS\0", 2
"""The beginning of a page, and the bit of the next byte that marks the first page of a logical stream."""

OGG_SIZES_AT = 27
"""Position in a page's header of the sizes of its segments, a byte each. The byte before is their number."""

OGG_HEAD_BYTES = OGG_SIZES_AT + 255

OGG_END_BYTES = 1 << 17
"""More bytes than two pages have."""

W64_DATA = b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"
ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")


def declared_s(
    container: InputContainer, track: av.AudioStream, opened: Callable[[], AbstractContextManager[BinaryIO]]
) -> float | None:
    """Length of the track in seconds according to the file's header; None if the header does not give it.

    `opened` gives the container's file from its beginning. It is used only for formats that FFmpeg does not report.
    """
    name = container.format.name
    tick_s = float(track.time_base or 0)
    if name in DECLARED_BY_STREAM:
        length_s = None if track.duration is None else track.duration * tick_s
        return None if name in {"aiff", "au"} and _is_streamed((length_s or 0) * _bytes_per_s(track)) else length_s
    if name in DECLARED_BY_FILE:
        duration = container.duration if len(container.streams) == 1 else None
        if duration is None:
            return None
        delay_s = track.codec_context.delay / (track.codec_context.sample_rate or 1)  # decoded, then cut off
        return (duration - max(0, container.start_time or 0)) / av.time_base - delay_s  # counted from timestamp 0
    if name == "caf":
        return (track.frames or 0) / track.codec_context.sample_rate or None if _is_pcm(track) else None
    if name == "avi":
        return (track.frames or 0) * tick_s or None
    if name not in _PARSERS:
        return None
    with opened() as file:
        return _PARSERS[name](file, track)


def _is_streamed(num_bytes: float) -> bool:
    """Whether the samples take one of `STREAMED_BYTES`, rounded down to whole samples of all channels."""
    return any(0 <= size - round(num_bytes) < 256 for size in STREAMED_BYTES if size)


def _is_pcm(track: av.AudioStream) -> bool:
    return track.codec_context.name.startswith("pcm_")


def _wav_s(file: BinaryIO, track: av.AudioStream) -> float | None:
    """RIFF, RF64 and BW64: for PCM the size of chunk `data`, otherwise the number of samples in chunk `fact`."""
    if file.read(4) not in {b"RIFF", b"RF64", b"BW64"}:
        return None
    file.seek(12)
    bytes_per_s, rate_hz = _bytes_per_s(track), track.codec_context.sample_rate
    num_samples = size_64 = 0
    while len(head := file.read(8)) == 8 and file.tell() < HEAD_BYTES:
        name, size = head[:4], int.from_bytes(head[4:], "little")
        if name == b"data":
            if not bytes_per_s:
                return num_samples / rate_hz if num_samples and rate_hz else None
            size = size_64 if size == 0xFFFFFFFF and size_64 else size
            return None if size in STREAMED_BYTES or size > MAX_BYTES else size / bytes_per_s
        body = file.read(min(size, 32)) if name in {b"fact", b"ds64"} else b""
        if name == b"fact" and len(body) >= 4:
            num_samples = struct.unpack_from("<I", body)[0]
        elif name == b"ds64" and len(body) >= 16:
            size_64 = struct.unpack_from("<Q", body, 8)[0]
        file.seek(size + size % 2 - len(body), 1)
    return None


def _w64_s(file: BinaryIO, track: av.AudioStream) -> float | None:
    head = file.read(HEAD_BYTES)
    at = head.find(W64_DATA)
    if at < 0 or len(head) < at + 24 or not (bytes_per_s := _bytes_per_s(track)):
        return None
    size = struct.unpack_from("<Q", head, at + 16)[0] - 24
    return size / bytes_per_s if 0 < size < MAX_BYTES else None


def _bytes_per_s(track: av.AudioStream) -> float:
    """Bytes per second of PCM samples; 0 for other codecs."""
    codec = track.codec_context
    bits = re.search(r"\d+", codec.name.removeprefix("pcm_")) if _is_pcm(track) else None
    width = {"pcm_alaw": 8, "pcm_mulaw": 8}.get(codec.name, int(bits[0]) if bits else 0)
    return codec.sample_rate * codec.channels * width / 8


def _asf_s(file: BinaryIO, track: av.AudioStream) -> float | None:
    """The play duration of the file properties, without `preroll`, which is not sound."""
    head = file.read(HEAD_BYTES)
    at = head.find(ASF_PROPERTIES)
    if at < 0 or len(head) < at + 92:
        return None
    duration, _, preroll_ms, flags = struct.unpack_from("<QQQI", head, at + 64)
    length_s = duration / 1e7 - preroll_ms / 1e3
    return length_s if length_s > 0 and not flags & 1 else None  # flag 1: a broadcast, of unknown length


def _mp3_s(file: BinaryIO, track: av.AudioStream) -> float | None:
    """Length by the number of frames that the first frame gives (Xing, Info, VBRI)."""
    at = 0
    while True:
        file.seek(at)
        tag = file.read(10)
        if len(tag) < 10 or tag[:3] != b"ID3":
            break
        at += 10 + (tag[6] << 21 | tag[7] << 14 | tag[8] << 7 | tag[9])
    file.seek(at)
    first = file.read(4096)
    num_frames = num_padding = 0
    if (found := re.search(b"Xing|Info", first)) and len(first) >= found.end() + 140:
        flags, num_frames = struct.unpack_from(">II", first, found.end())
        num_frames *= flags & 1
        encoder = found.end() + 4 + 4 * (flags & 1) + 2 * (flags & 2) + 25 * (flags & 4) + (flags & 8) // 2
        if first[encoder : encoder + 4] in {b"LAME", b"Lavc", b"Lavf"}:  # 12 bits of delay, 12 bits of padding
            delays = int.from_bytes(first[encoder + 21 : encoder + 24])
            num_padding = (delays >> 12) + (delays & 0xFFF)
    elif (vbri := first.find(b"VBRI")) >= 0 and len(first) >= vbri + 18:
        num_frames = struct.unpack_from(">I", first, vbri + 14)[0]
    rate_hz = track.codec_context.sample_rate
    if not num_frames or not rate_hz:
        return None
    return (num_frames * (1152 if rate_hz >= 32_000 else 576) - num_padding) / rate_hz


_PARSERS = {"wav": _wav_s, "w64": _w64_s, "asf": _asf_s, "mp3": _mp3_s}


def is_chained_ogg(file: BinaryIO, *, every_page: bool) -> bool:
    """Whether the file is a chain, several Ogg files in one: a logical stream begins after others have gone on.

    Without `every_page` only the two ends of the file are read. That detects chains whose streams have different serial
    numbers, as the format requires and nearly all have.
    """
    if not every_page:
        firsts = takewhile(lambda page: page.is_first, _ogg_pages(file.read(OGG_END_BYTES)))
        known_serials = {page.serial for page in firsts}
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - OGG_END_BYTES))
        return any(page.serial not in known_serials for page in _ogg_pages(file.read(OGG_END_BYTES))[-1:])
    goes_on = False
    at = _next_ogg_page(file, 0)
    while at is not None:
        file.seek(at)
        head = file.read(OGG_HEAD_BYTES)
        is_first = bool(head[len(OGG_PAGE)] & OGG_IS_FIRST)
        if is_first and goes_on:
            return True
        goes_on = goes_on or not is_first
        sizes = head[OGG_SIZES_AT : OGG_SIZES_AT + head[OGG_SIZES_AT - 1]]
        end = at + OGG_SIZES_AT + len(sizes) + sum(sizes)
        file.seek(end)
        # After damage the next page is looked for behind this page's header, because its sizes may be wrong.
        at = end if _is_ogg_page(file.read(OGG_HEAD_BYTES)) else _next_ogg_page(file, at + 1)
    return False


def _is_ogg_page(head: bytes) -> bool:
    return len(head) >= OGG_SIZES_AT and head.startswith(OGG_PAGE)


def _next_ogg_page(file: BinaryIO, position: int) -> int | None:
    """Position of the next page's header at or after `position`."""
    file.seek(position)
    data = b""
    while block := file.read(1 << 20):
        position -= len(data)
        data += block
        if (found := data.find(OGG_PAGE)) >= 0:
            file.seek(position + found)
            return position + found if _is_ogg_page(file.read(OGG_SIZES_AT)) else None
        position += len(data)
        data = data[1 - len(OGG_PAGE) :]
    return None


class _OggPage(NamedTuple):
    is_first: bool
    """Whether the page is the first of its logical stream."""
    serial: bytes


def _ogg_pages(data: bytes) -> list[_OggPage]:
    """The pages whose headers are in `data`."""
    found = re.finditer(rb"OggS\0(.).{8}(.{4})", data, re.DOTALL)
    return [_OggPage(bool(page[1][0] & OGG_IS_FIRST), page[2]) for page in found]
