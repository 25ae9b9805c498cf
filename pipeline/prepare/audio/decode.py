"""Decodes media to a mono waveform of exactly the requested section, with FFmpeg's libraries through PyAV."""

import errno
import functools
import io
import math
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import av
import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
from av.container import InputContainer
from av.error import FFmpegError

from ast_core.errors import DataError
from ast_core.features import KALDI128, MAX_PEAK, FeatureSettings
from pipeline import storage
from pipeline.prepare.audio import headers
from pipeline.prepare.audio.archive_members import read_member
from pipeline.prepare.audio.blocks import MIN_LOST_S, Block, Lost, read_blocks
from pipeline.prepare.audio.mono import CANCELLED_SHARE
from pipeline.prepare.audio.packets import is_longer
from pipeline.prepare.audio.remote_file import RemoteFile
from pipeline.prepare.audio.sections import SEEK_MARGIN_S, Section, chosen_track, read_section
from pipeline.prepare.clip import MAX_CLIP_S, WAVEFORM, ClipError, Reason, each_clip, ragged
from pipeline.prepare.sandbox import Sandbox

DEADLINE_S = 120.0
"""Time limit per clip. A clip that takes longer is hostile, or its storage does not answer."""

MEMORY_BYTES = 2 << 30
"""Memory limit of the process that decodes."""

SHORTFALL_SHARE = 0.05
"""Share of a section that a clip may lack, because recordings often end a little early; above it, `truncated`. And
share of the sound in which channels may cancel each other; above it, `out_of_phase`."""

SILENCE_PEAK = 2.0**-15
"""A waveform with a lower peak is silent: it is less than one step of 16-bit PCM."""

CODEC_DELAY_S = 0.1
"""A header may count up to this much more than the decoder returns, because of codec delay and padding."""

MIN_DECODED_SHARE = 0.5
"""A clip with less decoded sound than this is `truncated`, even if no packets are known to be lost."""

EXPECTED_MORE_S = 0.5
"""Of a remote file so much more than the section is read at one stretch, because bit rates vary."""

FORMATS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,dsf,dts,eac3,flac,flv,loas,matroska,mov,mp3,mpc,mpc8,mpeg,mpegts,nistsphere,"
    "nut,ogg,rm,tak,tta,voc,w64,wav,wv"
)
"""The allowed formats, by FFmpeg's names. Each contains its audio itself. A playlist (HLS, DASH, concat) or a session
(SDP) would lead FFmpeg to other files and hosts, and FFmpeg detects the format by content, not by file name."""


@dataclass(frozen=True)
class Decoded:
    waveform: np.ndarray
    """float32 `[samples]` in [-1, 1], mono, at the features' sample rate."""
    end_s: float
    num_clipped: int


@dataclass(frozen=True)
class Decode:
    """Stage that adds `waveform` to rows with `samples` (already fetched) or `media` (a file)."""

    keep_silent: bool = False
    features: FeatureSettings = KALDI128

    def __call__(self, rows: pa.Table) -> pa.Table:
        rows, decoded = each_clip(rows, "decode", self._one)
        if "samples" in rows.column_names:
            rows = rows.drop_columns(["samples"])
        end_s = [d.end_s if d else row for d, row in zip(decoded, rows["end_s"].to_pylist(), strict=True)]
        rows = rows.set_column(rows.column_names.index("end_s"), "end_s", pa.array(end_s, pa.float64()))
        rows = rows.append_column(
            pa.field("num_clipped", pa.int32()), pa.array([d.num_clipped if d else 0 for d in decoded], pa.int32())
        )
        return rows.append_column("waveform", ragged([d.waveform if d else None for d in decoded], WAVEFORM))

    def _one(self, row: dict[str, Any]) -> Decoded:
        duration_s = None if row["end_s"] is None else row["end_s"] - row["start_s"]
        may_be_clip = row["media_start_s"] is None
        start_s = row["start_s"] if may_be_clip else row["media_start_s"]
        what = (row["media"], row["member"], start_s, duration_s, may_be_clip)
        if row.get("samples") is not None:  # decoded by the fetch
            waveform, num_clipped = np.frombuffer(row["samples"], np.float32), 0
        else:
            waveform, num_clipped = _decoded(*what, features=self.features)
        peak = float(np.abs(waveform).max(initial=0))
        if peak < SILENCE_PEAK and not self.keep_silent:
            sound = f"silence (peak {20 * math.log10(peak):.0f} dBFS)" if peak else "digital silence"
            raise ClipError(Reason.SILENT, f"{sound}; --keep-silent prepares it all the same")
        num_clipped += int((np.abs(waveform) > 1).sum())
        end_s = row["start_s"] + len(waveform) / self.features.sample_rate_hz
        return Decoded(np.clip(waveform, -1, 1), end_s, num_clipped)


def _decoded(*what: Any, features: FeatureSettings) -> tuple[np.ndarray, int]:
    try:
        waveform, num_clipped = _decoder()(*what, features=features, deadline_s=DEADLINE_S)
    except ClipError as err:
        if err.reason is not Reason.CRASHED:
            raise
        # Try once more, because the machine may have been short of memory. If it fails twice, the file is at fault.
        waveform, num_clipped = _decoder()(*what, features=features, deadline_s=DEADLINE_S)
    return waveform, num_clipped


@functools.cache
def _decoder() -> Sandbox:
    """The one sandbox of this process, which all its tasks share."""
    return Sandbox("pipeline.prepare.audio.decode:decode_media", memory_bytes=MEMORY_BYTES)


def decode_media(
    media: str,
    member: str | None,
    start_s: float,
    duration_s: float | None,
    may_be_clip: bool = False,
    features: FeatureSettings = KALDI128,
) -> tuple[np.ndarray, int]:
    """`decode_section` for a file or an archive's member.

    Also returns the number of samples that were clipped before, which an audio store records.
    """
    with open_media(media, member) as (opened, num_clipped):
        waveform = decode_section(opened, start_s, duration_s, may_be_clip=may_be_clip, features=features)
    return waveform, num_clipped


@contextmanager
def open_media(media: str, member: str | None) -> Iterator[tuple[BinaryIO | str, int]]:
    """A file or an archive's member, as `decode_section` takes it, and its samples that were clipped before."""
    if member is not None:
        stored = read_member(media, member)
        with io.BytesIO(stored.audio) as file:
            yield file, stored.num_clipped
        return
    with _open_file(media) as opened:
        yield opened, 0


@contextmanager
def _open_file(uri: str) -> Iterator[BinaryIO | str]:
    """Give FFmpeg a local path (with `file:`, so that it is not read as a protocol), or a seekable remote file."""
    path = uri
    try:
        if "://" in uri:
            fs, path = storage.resolve(uri)
            if not isinstance(fs, pafs.LocalFileSystem):
                with fs.open_input_file(path) as file:
                    yield cast(BinaryIO, RemoteFile(file, file.size()))
                return
        _check_regular(path)
        yield f"file:{path}"
    except FileNotFoundError as err:
        raise ClipError(Reason.MISSING_FILE, f"there is no file {uri}") from err
    except (DataError, PermissionError) as err:
        raise ClipError(Reason.MISSING_FILE, str(err)) from err


def _check_regular(path: str) -> None:
    """Refuse pipes and devices: opening a pipe may block, and a device contains no recording."""
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
    may_be_clip: bool = False,
    features: FeatureSettings = KALDI128,
) -> np.ndarray:
    """float32 `[samples]`, mono, at the sample rate of `features`: `duration_s` from `start_s` on, or all the rest.

    The samples are those that the ffmpeg program gives for the track that it chooses. No silence is added at either
    end. `pipeline.prepare.audio.sections` defines how times count and how holes are filled. The cut is exact to a
    sample if the container's timestamps are. If `may_be_clip` is true and the sound is no longer than the section, the
    whole file is the section and is read from its beginning.

    Raises:
        ClipError: not_audio, truncated, too_long, too_short for one frame, out_of_phase, out_of_range, too_large for
            memory, or network.
    """
    try:
        section, declared_s = _read(file, start_s, duration_s, features.sample_rate_hz, may_be_clip=may_be_clip)
    except FFmpegError as err:
        raise _classified(err, file) from err
    except OSError as err:  # from the file system of a remote file
        raise ClipError(Reason.NETWORK, f"reading it: {err}") from err
    _check_complete(section, start_s, duration_s, declared_s)
    waveform = section.waveform
    if duration_s is not None:
        waveform = waveform[: round(duration_s * features.sample_rate_hz)]
    if start_s > 0 and not len(waveform):
        raise ClipError(Reason.TOO_SHORT, f"the recording ends before {start_s:g} s, where the section begins")
    if features.num_frames(len(waveform)) < 1:
        length_ms = 1000 * len(waveform) / features.sample_rate_hz
        raise ClipError(Reason.TOO_SHORT, f"{length_ms:.1f} ms, less than one frame")
    check_samples(waveform, section.level_share)
    if section.cancelled_share > SHORTFALL_SHARE:
        message = f"its channels cancel each other in {100 * section.cancelled_share:.0f} % of its sound"
        raise ClipError(Reason.OUT_OF_PHASE, message)
    return waveform


def _read(
    file: BinaryIO | str,
    start_s: float,
    duration_s: float | None,
    sample_rate_hz: int,
    *,
    may_be_clip: bool,
) -> tuple[Section, float | None]:
    """The section, and the length of the sound according to the file's header."""
    with _opened(file) as (container, track):
        opened = functools.partial(_bytes_of, file)
        is_seekable = isinstance(file, str) or file.seekable()
        declared_s = headers.declared_s(container, track, opened) if is_seekable else None
        if isinstance(file, RemoteFile):
            file.expect(_share(container, start_s, duration_s))
        limit_s = None
        if may_be_clip and duration_s is not None and start_s > 0:
            limit_s = (1 + SHORTFALL_SHARE) * duration_s + CODEC_DELAY_S
            if isinstance(file, io.BytesIO):  # of an archive, where audio is the section unless it cannot be
                limit_s = max(limit_s, start_s)
        if limit_s is None or (declared_s is not None and declared_s > limit_s):
            may_seek = container.format.name != "ogg" or (is_seekable and not _is_chained_ogg(file, opened))
            section = read_section(
                container, track, start_s, duration_s, sample_rate_hz=sample_rate_hz, may_seek=may_seek
            )
            return section, declared_s
        is_recording = is_longer(container, track, limit_s)
    start_s = start_s if is_recording else 0.0
    return _read(file, start_s, duration_s, sample_rate_hz, may_be_clip=False)


def _share(container: InputContainer, start_s: float, duration_s: float | None) -> float:
    """About which share of the file's bytes a section takes, with what is decoded before it."""
    if not container.duration:
        return 0.0
    length_s = container.duration / av.time_base
    wanted_s = length_s - start_s if duration_s is None else duration_s
    return (wanted_s + min(start_s, SEEK_MARGIN_S) + EXPECTED_MORE_S) / length_s


def _is_chained_ogg(file: BinaryIO | str, opened: Callable[[], AbstractContextManager[BinaryIO]]) -> bool:
    """Whether the file is a chain. Times start again in each link, so a seek may end in the wrong one."""
    with opened() as beginning:
        return headers.is_chained_ogg(beginning, every_page=isinstance(file, str | io.BytesIO))


@contextmanager
def _opened(file: BinaryIO | str) -> Iterator[tuple[InputContainer, av.AudioStream]]:
    """Open the container at its beginning, and choose the track."""
    if not isinstance(file, str) and file.seekable():
        file.seek(0)
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "file" if isinstance(file, str) else "none"}
    with av.open(file, mode="r", metadata_errors="ignore", container_options=options) as container:
        if (track := chosen_track(container)) is None:
            raise ClipError(Reason.NOT_AUDIO, f"no audio stream that FFmpeg decodes ({container.format.name})")
        yield container, track


@contextmanager
def _bytes_of(file: BinaryIO | str) -> Iterator[BinaryIO]:
    """The file from its beginning. Its position is restored afterwards."""
    if isinstance(file, str):
        with open(file.removeprefix("file:"), "rb") as opened:
            yield opened
        return
    before = file.tell()
    file.seek(0)
    yield file
    file.seek(before)


def decode_blocks(
    file: BinaryIO | str, start_s: float, duration_s: float | None, *, sample_rate_hz: int, block_s: float
) -> Iterator[Block]:
    """`decode_section` for a recording of any length: its blocks (`blocks.read_blocks`), without checks.

    If the header promises more than there is, a last block without samples says so (`is_end`).

    Raises:
        ClipError: not_audio, truncated, too_large for memory, or network.
    """
    try:
        with _opened(file) as (container, track):
            opened = functools.partial(_bytes_of, file)
            is_seekable = isinstance(file, str) or file.seekable()
            declared_s = headers.declared_s(container, track, opened) if is_seekable else None
            may_seek = container.format.name != "ogg" or (is_seekable and not _is_chained_ogg(file, opened))
            end_s = start_s
            for block in read_blocks(
                container,
                track,
                start_s,
                duration_s,
                sample_rate_hz=sample_rate_hz,
                block_s=block_s,
                may_seek=may_seek,
            ):
                end_s = (end_s if block.begin_s is None else block.begin_s) + len(block.samples) / sample_rate_hz
                yield block
    except FFmpegError as err:
        raise _classified(err, file) from err
    except OSError as err:
        raise ClipError(Reason.NETWORK, f"reading it: {err}") from err
    if duration_s is None and declared_s is not None and declared_s - end_s > MIN_LOST_S:
        message = f"the sound ends at {end_s:.2f} s of {declared_s:.2f} s by its header"
        lost = Lost(end_s, declared_s, Reason.TRUNCATED, message)
        yield Block(None, np.empty(0, np.float32), 1.0, (lost,), is_end=True)


def _check_complete(section: Section, start_s: float, duration_s: float | None, declared_s: float | None) -> None:
    """Raises ClipError if too much of the sound is missing."""
    length_s, there_s = section.length_s, section.length_s - section.missing_s
    if duration_s is not None and there_s < (1 - SHORTFALL_SHARE) * duration_s:
        is_all = declared_s is not None and not section.missing_s and start_s + length_s >= declared_s - CODEC_DELAY_S
        why = f"; the recording ends at {declared_s:.2f} s" if is_all else ""
        raise ClipError(Reason.TRUNCATED, f"{there_s:.2f} s of {duration_s:.2f} s asked for{why}")
    if duration_s is None and there_s < (1 - SHORTFALL_SHARE) * length_s:
        raise ClipError(Reason.TRUNCATED, f"{section.missing_s:.2f} s of {length_s:.2f} s are damaged")
    if section.decoded_s < MIN_DECODED_SHARE * length_s:
        raise ClipError(Reason.TRUNCATED, f"{section.decoded_s:.2f} s of sound in {length_s:.2f} s, by its timestamps")
    if duration_s is not None:
        return
    if length_s > MAX_CLIP_S:
        raise ClipError(Reason.TOO_LONG, f"more than {MAX_CLIP_S:.0f} s; give start_s and end_s")
    if declared_s is not None:
        shortfall_s = declared_s - start_s - length_s
        if shortfall_s > max(SHORTFALL_SHARE * (declared_s - start_s), CODEC_DELAY_S):
            raise ClipError(Reason.TRUNCATED, f"{length_s:.2f} s of {declared_s - start_s:.2f} s by its header")


def check_samples(waveform: np.ndarray, level_share: float) -> None:
    """Raises ClipError if channels cancel each other, or samples are out of range."""
    if not np.isfinite(waveform).all():  # floating-point files may contain NaN
        raise ClipError(Reason.NOT_AUDIO, "its samples are not all finite numbers")
    if level_share < CANCELLED_SHARE:
        message = f"its channels cancel each other: their mean has {100 * level_share:.2g} % of their level"
        raise ClipError(Reason.OUT_OF_PHASE, message)
    if (peak := float(np.abs(waveform).max(initial=0))) > MAX_PEAK:
        raise ClipError(
            Reason.OUT_OF_RANGE, f"its samples reach {peak:,.0f} where 1 is full scale: integers as floats?"
        )


def _classified(err: FFmpegError, file: BinaryIO | str) -> Exception:
    if isinstance(file, str) and err.errno in {errno.ENOENT, errno.EACCES}:
        return err  # the caller knows which file it was
    if isinstance(file, str) and err.errno in {errno.ENOTDIR, errno.ENAMETOOLONG}:
        return ClipError(Reason.MISSING_FILE, f"there is no such file: {err.strerror}")
    if err.errno == errno.ENOMEM:
        return ClipError(Reason.TOO_LARGE, "takes more memory than a clip may")
    if err.errno == errno.EIO:  # a WebM file that ends in its header, or a failing disk
        return ClipError(Reason.TRUNCATED, f"FFmpeg: {err.strerror}")
    note = "; or of a format that is not read, as playlists are" if err.errno == errno.EINVAL else ""
    return ClipError(Reason.NOT_AUDIO, f"FFmpeg: {err.strerror}{note}")
