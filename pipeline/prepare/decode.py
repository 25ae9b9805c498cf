"""Media → mono 16 kHz waveform of exactly the section asked for, by FFmpeg's libraries through PyAV."""

import errno
import functools
import io
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import av
import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import soxr
from av.error import FFmpegError

from ast_core.errors import DataError
from ast_core.frames import SAMPLE_RATE_HZ, num_frames_of
from pipeline import storage
from pipeline.prepare.archives import read_member
from pipeline.prepare.clip import MAX_CLIP_S, WAVEFORM, ClipError, Reason, each_clip, ragged
from pipeline.prepare.isolated import Isolated
from pipeline.prepare.memory import keep_freed_memory

DEADLINE_S = 120.0
"""A clip's own time; one that takes longer is hostile, or lies on storage that does not answer."""

MEMORY_BYTES = 2 << 30
"""That the process which decodes may write to."""

SEEK_MARGIN_S = 1.0
"""Decoding starts this much before the section: codecs with a memory (Opus, AAC) need a run-up."""

GAP_S = 0.05
"""A timestamp this far from where the samples stand is a hole in the recording; less is the container's rounding."""

SHORTFALL_SHARE = 0.05
"""A clip may lack this share of what was asked for (recordings end a little early); more is `truncated`."""

SILENCE_PEAK = 2.0**-15
"""Below one step of 16-bit PCM there is no sound."""

CODEC_DELAY_S = 0.1
"""A first timestamp within this of 0 is a codec's delay; beyond it, the recording was cut out of a longer one."""

MIN_RATE_HZ, MAX_RATE_HZ = 1_000, 768_000
"""Of sound. A header may claim anything, and seconds of it would be a handful of samples or gigabytes."""

FORMATS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,dsf,dts,eac3,flac,flv,loas,matroska,mov,mp3,mpc,mpc8,mpeg,mpegts,nistsphere,"
    "nut,ogg,rm,tak,tta,voc,w64,wav,wv"
)
"""What is read, by FFmpeg's names. Each holds its audio itself; a playlist (HLS, DASH, concat) or a session (SDP)
sends FFmpeg to other files and hosts, and FFmpeg goes by the content, not by the file's name."""

DURATION_IN_HEADER = {"flac", "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2"}
"""By FFmpeg's names. An MP3's may be a guess by its first frames, and a WAV file's is capped by the file's size."""

DTYPES: dict[str, type[np.generic]] = {
    "u8": np.uint8,
    "s16": np.int16,
    "s32": np.int32,
    "flt": np.float32,
    "dbl": np.float64,
}
"""By FFmpeg's name of the kind of sample, without the `p` of those that have a plane a channel."""

VALUES_AT_ONCE = 1 << 20
"""Of all channels, before they become mono: FFmpeg's frames wait in memory for so long."""


@dataclass(frozen=True)
class Decoded:
    waveform: np.ndarray
    """float32 `[samples]` in [-1, 1], mono, 16 kHz."""
    end_s: float
    num_clipped: int


@dataclass(frozen=True)
class Decode:
    """Rows with `audio` (bytes) or `media` (a file) in, rows with `waveform` out, one for one."""

    keep_silent: bool = False

    def __call__(self, rows: pa.Table) -> pa.Table:
        keep_freed_memory()  # for the stages that follow in this process; FFmpeg works in another
        rows, decoded = each_clip(rows, "decode", self._one)
        if "audio" in rows.column_names:
            rows = rows.drop_columns(["audio"])
        end_s = [d.end_s if d else row for d, row in zip(decoded, rows["end_s"].to_pylist(), strict=True)]
        rows = rows.set_column(rows.column_names.index("end_s"), "end_s", pa.array(end_s, pa.float64()))
        rows = rows.append_column(
            pa.field("num_clipped", pa.int32()), pa.array([d.num_clipped if d else 0 for d in decoded], pa.int32())
        )
        return rows.append_column("waveform", ragged([d.waveform if d else None for d in decoded], WAVEFORM))

    def _one(self, row: dict[str, Any]) -> Decoded:
        duration_s = None if row["end_s"] is None else row["end_s"] - row["start_s"]
        audio = row.get("audio")
        may_be_clip = row["media_start_s"] is None
        start_s = row["start_s"] if may_be_clip else row["media_start_s"]
        what = (row["media"] if audio is None else audio, row["member"], start_s, duration_s, may_be_clip)
        try:
            waveform, num_clipped = _decoder()(*what, deadline_s=DEADLINE_S)
        except ClipError as err:
            if err.reason is not Reason.CRASHED:
                raise
            # Once more: a machine short of memory may have ended it. A file that does it twice is at fault.
            waveform, num_clipped = _decoder()(*what, deadline_s=DEADLINE_S)
        peak = float(np.abs(waveform).max(initial=0))
        if peak < SILENCE_PEAK and not self.keep_silent:
            raise ClipError(Reason.SILENT, "digital silence; --keep-silent prepares it all the same")
        num_clipped += int((np.abs(waveform) > 1).sum())
        return Decoded(np.clip(waveform, -1, 1), row["start_s"] + len(waveform) / SAMPLE_RATE_HZ, num_clipped)


@functools.cache
def _decoder() -> Isolated:
    """One child for this process, whatever number of tasks pass through it."""
    return Isolated("pipeline.prepare.decode:decode_media", memory_bytes=MEMORY_BYTES)


def decode_media(
    media: str | bytes, member: str | None, start_s: float, duration_s: float | None, may_be_clip: bool = False
) -> tuple[np.ndarray, int]:
    """`decode_section` of a file or an archive's member, or of the bytes of a section that was cut out of a recording.

    Also the number of samples that were clipped before, as an archive of kept audio remembers it.
    """
    if isinstance(media, bytes):
        with io.BytesIO(media) as file:
            return decode_section(file, start_s, duration_s, whole=False), 0
    if member is not None:
        kept = read_member(media, member)
        with io.BytesIO(kept.audio) as file:
            return decode_section(file, start_s, duration_s, may_be_clip=may_be_clip), kept.num_clipped
    with _open_media(media) as opened:
        return decode_section(opened, start_s, duration_s, may_be_clip=may_be_clip), 0


@contextmanager
def _open_media(uri: str) -> Iterator[BinaryIO | str]:
    """A local path for FFmpeg to open by itself (`file:`, lest it reads as a protocol), or a seekable remote file."""
    path = uri
    try:
        if "://" in uri:
            fs, path = storage.resolve(uri)
            if not isinstance(fs, pafs.LocalFileSystem):
                with fs.open_input_file(path) as file:
                    yield file
                return
        _check_regular(path)
        yield f"file:{path}"
    except FileNotFoundError as err:
        raise ClipError(Reason.MISSING_FILE, f"there is no file {uri}") from err
    except (DataError, PermissionError) as err:
        raise ClipError(Reason.MISSING_FILE, str(err)) from err


def _check_regular(path: str) -> None:
    """Opening a pipe may wait for ever, and a device is nobody's recording."""
    try:
        mode = os.stat(path).st_mode
    except OSError as err:
        raise ClipError(Reason.MISSING_FILE, f"there is no file {path} ({err.strerror})") from err
    if not stat.S_ISREG(mode):
        raise ClipError(Reason.NOT_AUDIO, f"{path} is a folder, a pipe or a device")


def decode_section(
    file: BinaryIO | str,
    start_s: float,
    duration_s: float | None,
    *,
    whole: bool = True,
    may_be_clip: bool = False,
) -> np.ndarray:
    """float32 `[samples]`, mono, 16 kHz: `duration_s` from `start_s` on, or all the rest.

    The cut is exact to a sample where the container's timestamps are. In a `whole` recording times count from its
    beginning, even where its timestamps start elsewhere; a section cut out of one has the timestamps of the whole.
    A file that `may_be_clip` is read from its beginning if it is no longer than the section: then it is the section.

    Raises:
        ClipError: not_audio, truncated, too_long, too_short for one frame, too_large for memory, or network.
    """
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "file" if isinstance(file, str) else "none"}
    try:
        with av.open(file, mode="r", metadata_errors="ignore", container_options=options) as container:
            if not container.streams.audio:
                raise ClipError(Reason.NOT_AUDIO, f"no audio stream ({container.format.name})")
            declared_s = _declared_s(container)
            if may_be_clip and _is_no_longer(container, duration_s):
                start_s = 0.0
            section = _read(container, start_s, duration_s, whole=whole)
    except FFmpegError as err:
        raise _classified(err, file) from err
    except OSError as err:  # of a remote file, from our own file system
        raise ClipError(Reason.NETWORK, f"reading it: {err}") from err
    covered_s = section.num_decoded / section.rate_hz
    length_s = len(section.samples) / section.rate_hz
    if duration_s is not None and covered_s < (1 - SHORTFALL_SHARE) * duration_s:
        raise ClipError(Reason.TRUNCATED, f"{covered_s:.2f} s of {duration_s:.2f} s asked for")
    if duration_s is None and covered_s < (1 - SHORTFALL_SHARE) * length_s:
        raise ClipError(Reason.TRUNCATED, f"{covered_s:.2f} s of sound in {length_s:.2f} s, by its timestamps")
    if duration_s is None and length_s > MAX_CLIP_S:
        raise ClipError(Reason.TOO_LONG, f"more than {MAX_CLIP_S:.0f} s; give start_s and end_s")
    if duration_s is None and declared_s is not None:
        shortfall_s = declared_s - start_s - length_s
        if shortfall_s > max(SHORTFALL_SHARE * (declared_s - start_s), CODEC_DELAY_S):
            raise ClipError(Reason.TRUNCATED, f"{length_s:.2f} s of {declared_s - start_s:.2f} s by its header")
    waveform = section.samples
    if section.rate_hz != SAMPLE_RATE_HZ:
        waveform = soxr.resample(waveform, section.rate_hz, SAMPLE_RATE_HZ)
    if duration_s is not None:
        waveform = waveform[: round(duration_s * SAMPLE_RATE_HZ)]
    if num_frames_of(len(waveform)) < 1:
        raise ClipError(Reason.TOO_SHORT, f"{len(waveform) / SAMPLE_RATE_HZ * 1000:.1f} ms, less than one frame")
    if not np.isfinite(waveform).all():  # samples may be floating point
        raise ClipError(Reason.NOT_AUDIO, "its samples are not all finite numbers")
    return waveform


def _declared_s(container: av.container.InputContainer) -> float | None:
    """How long the sound is by the file's header, where FFmpeg takes it from there and does not reckon it by the size.

    Matroska says it of the whole, so of the sound only where that is all there is.
    """
    if container.format.name not in DURATION_IN_HEADER:
        return None
    stream = container.streams.audio[0]
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return None if container.duration is None or len(container.streams) > 1 else container.duration / av.time_base


def _is_no_longer(container: av.container.InputContainer, duration_s: float | None) -> bool:
    if container.duration is None or duration_s is None:
        return False
    return container.duration / av.time_base <= (1 + SHORTFALL_SHARE) * duration_s


def _classified(err: FFmpegError, file: BinaryIO | str) -> Exception:
    if isinstance(file, str) and err.errno in {errno.ENOENT, errno.EACCES}:
        return err  # which file it was, the caller knows
    if isinstance(file, str) and err.errno in {errno.ENOTDIR, errno.ENAMETOOLONG}:
        return ClipError(Reason.MISSING_FILE, f"there is no such file: {err.strerror}")
    if err.errno == errno.ENOMEM:
        return ClipError(Reason.TOO_LARGE, "takes more memory than a clip may")
    if err.errno == errno.EIO:  # what a WebM file gives that ends within its head, and a disk that is failing
        return ClipError(Reason.TRUNCATED, f"FFmpeg: {err.strerror}")
    note = "; or of a format that is not read, as playlists are" if err.errno == errno.EINVAL else ""
    return ClipError(Reason.NOT_AUDIO, f"FFmpeg: {err.strerror}{note}")


@dataclass(frozen=True)
class _Section:
    samples: np.ndarray
    rate_hz: int
    num_decoded: int
    """Samples that came out of the decoder; the rest fill holes."""


def _read(container: av.container.InputContainer, start_s: float, duration_s: float | None, *, whole: bool) -> _Section:
    """Mono samples of the section at the source's rate. What is missing at the end is not there, holes within are 0."""
    stream = container.streams.audio[0]
    first_stamp_s = (container.start_time or 0) / av.time_base
    zero_s = first_stamp_s if whole and abs(first_stamp_s) > CODEC_DELAY_S else 0.0
    run_up_s = zero_s + start_s - SEEK_MARGIN_S
    if start_s > SEEK_MARGIN_S:
        container.seek(round(run_up_s * av.time_base))
    rate_hz = next_wanted = end = 0  # of the first frame: a stream's own rate may be half of what its decoder gives
    mono = _Mono()
    position: int | None = None  # of the next sample, counted from the beginning of the recording
    try:
        for frame in _frames(container, stream, run_up_s):
            if not rate_hz:
                rate_hz = frame.rate
                if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
                    raise ClipError(Reason.NOT_AUDIO, f"a sample rate of {rate_hz} Hz")
                next_wanted = round(start_s * rate_hz)
                num_wanted = MAX_CLIP_S * rate_hz + 1 if duration_s is None else duration_s * rate_hz
                end = next_wanted + math.ceil(num_wanted)
            elif frame.rate != rate_hz:
                raise ClipError(Reason.NOT_AUDIO, f"its sample rate changes from {rate_hz} to {frame.rate} Hz")
            stamped = None if frame.time is None else round((frame.time - zero_s) * rate_hz)
            if position is None or (stamped is not None and abs(stamped - position) > GAP_S * rate_hz):
                position = stamped or 0
            begin, position = position, position + frame.samples
            if position <= next_wanted:
                continue  # not yet there; hours of this must not pile up
            if begin > next_wanted:
                mono.add_silence(min(begin, end) - next_wanted)
                next_wanted = min(begin, end)
            mono.add(frame, next_wanted - begin, min(position, end) - begin)
            next_wanted = min(position, end)
            if next_wanted >= end:
                break
    except FFmpegError as err:
        # A damaged end: what came before it counts, and the caller measures it.
        if not mono.num_decoded:
            raise
        if duration_s is None:
            decoded_s = mono.num_decoded / rate_hz
            raise ClipError(Reason.TRUNCATED, f"damaged after {decoded_s:.2f} s ({err.strerror})") from err
    return _Section(mono.samples(), rate_hz or SAMPLE_RATE_HZ, mono.num_decoded)


def _frames(container: av.container.InputContainer, stream: av.AudioStream, run_up_s: float) -> Iterator[av.AudioFrame]:
    """Decoded from a time on. A container is sought by clusters of seconds; what lies before costs no decoding."""
    run_up = run_up_s / float(stream.time_base or 1)
    for packet in container.demux(stream):
        if packet.pts is None or packet.pts + (packet.duration or 0) > run_up:  # FLAC has packets of many seconds
            yield from packet.decode()


class _Mono:
    """Frames in, one float32 waveform `[samples]` in [-1, 1] out: the mean of the channels.

    A frame lasts some 20 ms, and to make arrays of each took longer than decoding it; so frames of one kind wait for
    each other.
    """

    def __init__(self) -> None:
        self.num_decoded = 0
        self._done: list[np.ndarray] = []
        self._waiting: list[tuple[av.AudioFrame, int, int]] = []
        self._kind: tuple[str, int] = ("", 0)
        self._values_waiting = 0

    def add(self, frame: av.AudioFrame, begin: int, end: int) -> None:
        """Samples `begin` to `end` of a frame."""
        kind = (frame.format.name, frame.layout.nb_channels)
        if kind != self._kind or self._values_waiting >= VALUES_AT_ONCE:
            self._flush()
            self._kind = kind
        self._waiting.append((frame, begin, end))
        self._values_waiting += frame.samples * kind[1]
        self.num_decoded += end - begin

    def add_silence(self, num_samples: int) -> None:
        self._flush()
        self._done.append(np.zeros(num_samples, np.float32))

    def samples(self) -> np.ndarray:
        self._flush()
        return np.concatenate([np.empty(0, np.float32), *self._done])

    def _flush(self) -> None:
        if not self._waiting:
            return
        (name, num_channels), planar = self._kind, self._kind[0].endswith("p")
        if (dtype := DTYPES.get(name.removesuffix("p"))) is None:
            raise ClipError(Reason.NOT_AUDIO, f"samples of the kind {name}")
        step = 1 if planar else num_channels
        planes = [
            np.concatenate(
                [
                    np.frombuffer(memoryview(frame.planes[i]), dtype, frame.samples * step)[begin * step : end * step]
                    for frame, begin, end in self._waiting
                ]
            )
            for i in range(num_channels if planar else 1)
        ]
        values = np.stack(planes) if planar else planes[0].reshape(-1, num_channels).T
        if dtype == np.uint8:
            values = (values.astype(np.float32) - 128) / 128
        elif np.issubdtype(dtype, np.integer):
            values = values.astype(np.float32) / np.float32(1 << (8 * values.itemsize - 1))
        self._done.append(values.mean(axis=0, dtype=np.float32))
        self._waiting, self._values_waiting = [], 0
