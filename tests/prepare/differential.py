"""Generated files of every common kind, to compare our decoding with that of the ffmpeg program.

A file depends only on its number: container and codec, rate, channels, and one odd property. `verdict` reads the whole
file and a section of it, and compares both with the program's output.
"""

import functools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from ast_core.features import KALDI128
from pipeline.prepare.audio.decode import decode_section
from pipeline.prepare.audio.packets import GAP_S
from pipeline.prepare.audio.sections import chosen_track
from pipeline.prepare.clip import ClipError, Reason
from tests.prepare.sound import Cut, error_level, ffmpeg, lag, program, programs, signal, write

LENGTH_S = 2.4
RATES_HZ = (8000, 16_000, 22_050, 32_000, 44_100, 48_000, 96_000)
NOT_RANDOM = ("-aac_pns", 0)
"""AAC's noise substitution is random in the decoder, and differs after a seek."""
EXPERIMENTAL = ("-strict", -2)

ENCODINGS: dict[str, tuple[str, tuple[object, ...]]] = {
    "mp3": ("mp3", ("-b:a", "128k")),
    "mp3 vbr, id3v1": ("mp3", ("-q:a", 4, "-write_id3v1", 1)),
    "mp3 without xing": ("mp3", ("-write_xing", 0, "-id3v2_version", 0)),
    "mp2": ("mp2", ()),
    "aac in adts": ("aac", ("-c:a", "aac", *NOT_RANDOM)),
    "aac in latm": ("latm", ("-c:a", "aac", "-f", "latm", *NOT_RANDOM)),
    "ac3": ("ac3", ()),
    "eac3": ("eac3", ()),
    "dts": ("dts", ("-c:a", "dca", *EXPERIMENTAL)),
    "amr": ("amr", ("-ar", 8000, "-ac", 1)),
    "aac in m4a": ("m4a", ("-c:a", "aac", *NOT_RANDOM)),
    "aac in m4a, faststart": ("m4a", ("-c:a", "aac", *NOT_RANDOM, "-movflags", "faststart")),
    "aac in mp4, fragmented": ("mp4", ("-c:a", "aac", *NOT_RANDOM, "-movflags", "frag_keyframe+empty_moov")),
    "aac in mp4, no edit list": ("mp4", ("-c:a", "aac", *NOT_RANDOM, "-use_editlist", 0)),
    "alac in m4a": ("m4a", ("-c:a", "alac")),
    "mp3 in mp4": ("mp4", ("-c:a", "libmp3lame", "-ar", 44_100)),
    "opus in mp4": ("mp4", ("-c:a", "libopus", *EXPERIMENTAL)),
    "ac3 in mp4": ("mp4", ("-c:a", "ac3")),
    "flac in mp4": ("mp4", ("-c:a", "flac", *EXPERIMENTAL)),
    "pcm in mov": ("mov", ("-c:a", "pcm_s16le")),
    "opus in webm": ("webm", ("-c:a", "libopus")),
    "opus in webm, live": ("webm", ("-c:a", "libopus", "-live", 1)),
    "vorbis in webm": ("webm", ("-c:a", "libvorbis")),
    "aac in matroska": ("mka", ("-c:a", "aac", *NOT_RANDOM)),
    "mp3 in matroska": ("mka", ("-c:a", "libmp3lame")),
    "flac in matroska": ("mka", ("-c:a", "flac")),
    "ac3 in matroska": ("mka", ("-c:a", "ac3")),
    "pcm in matroska": ("mka", ("-c:a", "pcm_s24le")),
    "opus in ogg": ("ogg", ("-c:a", "libopus")),
    "vorbis in ogg": ("ogg", ("-c:a", "libvorbis")),
    "flac in ogg": ("ogg", ("-c:a", "flac")),
    "flac": ("flac", ()),
    "wavpack": ("wv", ()),
    "tta": ("tta", ()),
    "wav": ("wav", ("-c:a", "pcm_s16le")),
    **{f"wav, {codec}": ("wav", ("-c:a", codec)) for codec in (
        "pcm_u8", "pcm_s24le", "pcm_s32le", "pcm_s64le", "pcm_f32le", "pcm_f64le", "pcm_alaw", "pcm_mulaw",
        "adpcm_ima_wav", "adpcm_ms", "g722",
    )},
    "rf64": ("wav", ("-c:a", "pcm_s16le", "-rf64", "always")),
    "w64": ("w64", ()),
    "aiff": ("aiff", ()),
    "aiff, 24 bits": ("aiff", ("-c:a", "pcm_s24be")),
    "caf": ("caf", ("-c:a", "pcm_s16be")),
    "alac in caf": ("caf", ("-c:a", "alac")),
    "au": ("au", ()),
    "voc": ("voc", ()),
    "aac in mpegts": ("ts", ("-c:a", "aac", *NOT_RANDOM)),
    "mp2 in mpegts": ("ts", ("-c:a", "mp2")),
    "ac3 in mpegts": ("ts", ("-c:a", "ac3")),
    "mp2 in mpeg": ("mpg", ("-c:a", "mp2")),
    "ac3 in mpeg": ("vob", ("-c:a", "ac3")),
    "mp3 in avi": ("avi", ("-c:a", "libmp3lame")),
    "pcm in avi": ("avi", ("-c:a", "pcm_s16le")),
    "aac in flv": ("flv", ("-c:a", "aac", *NOT_RANDOM)),
    "mp3 in flv": ("flv", ("-c:a", "libmp3lame", "-ar", 44_100)),
    "wma": ("wma", ("-c:a", "wmav2")),
    "wma 1": ("wma", ("-c:a", "wmav1")),
    "ac3 in rm": ("rm", ("-c:a", "ac3")),
    "flac in nut": ("nut", ("-c:a", "flac")),
    "pcm in nut": ("nut", ("-c:a", "pcm_s16le")),
    "opus in nut": ("nut", ("-c:a", "libopus")),
}  # fmt: skip
"""File extension, and options of the ffmpeg program."""

TIMED = {"mp4", "mov", "m4a", "webm", "mka", "ts", "mpg", "vob", "flv", "nut", "wma", "ogg"}
UNTIMED = {"mp3", "mp2", "aac", "latm", "ac3", "eac3", "dts", "amr"}
"""The program derives times of these from the number of bytes, including bytes that are not sound. We count samples."""
WITH_PICTURE = {"mp4", "mov", "m4a", "mka", "ts", "mpg", "vob", "nut"}
LENGTH_AT: dict[str, Callable[[bytes], int]] = {
    "wav": lambda media: media.find(b"data") + 4,
    "au": lambda media: 8,
    "aiff": lambda media: media.find(b"SSND") + 4,
    "caf": lambda media: media.find(b"data") + 4,
    "w64": lambda media: media.find(b"data\xf3\xac") + 16,
}


class Odd(NamedTuple):
    """An odd property. `make` gets a random generator, the file to change, and a second file."""

    make: Callable[["Maker", str, np.random.Generator], bytes]
    endings: set[str] | None = None


@dataclass(frozen=True)
class Made:
    number: int
    encoding: str
    odd: str
    path: Path
    channels: int
    start_s: float
    """Start of the section."""
    expected_s: float
    """Length of the sound by the file's header, or of the files that were joined."""
    plain: bytes
    """The file without its odd property."""

    @property
    def name(self) -> str:
        return f"{self.number}: {self.encoding}, {self.odd}, section from {self.start_s:.3f} s ({self.path.name})"


class Maker:
    """Encoded files by encoding, rate, channels and content. Each is made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.encoded = functools.cache(self._encoded)
        self.sound = functools.cache(self._sound)

    def make(self, number: int) -> Made:
        rng = np.random.default_rng([15, number])
        encoding = list(ENCODINGS)[number % len(ENCODINGS)]
        ending, _ = ENCODINGS[encoding]
        odds = [name for name, odd in ODDS.items() if odd.endings is None or ending in odd.endings]
        odd = str(rng.choice(odds))
        key = (encoding, int(rng.choice(RATES_HZ[2:5])), int(rng.integers(1, 3)))
        if number % 3 == 0:
            key = (encoding, int(rng.choice(RATES_HZ)), int(rng.choice([1, 2, 6], p=[0.4, 0.4, 0.2])))
        self.key = key
        self.expected_s = LENGTH_S * (2 if odd == "joined" else 1)
        media = ODDS[odd].make(self, ending, rng)
        path = self.folder / f"made-{number}.{ending}"
        path.write_bytes(media)
        start_s = float(rng.choice([0.0, 0.3, 1.2, 1.437, round(float(rng.uniform(0, 2)), 3)]))
        return Made(number, encoding, odd, path, key[2], start_s, self.expected_s, self.plain())

    def plain(self) -> bytes:
        return self.encoded(*self.key, 0, ())

    def second(self) -> bytes:
        return self.encoded(*self.key, 1, ())

    def with_options(self, *options: object) -> bytes:
        return self.encoded(*self.key, 0, options)

    def _sound(self, rate_hz: int, channels: int, seed: int) -> Path:
        planes = np.stack([signal(LENGTH_S, rate_hz, seed=10 * seed + channel) for channel in range(channels)])
        return write(self.folder / f"sound-{rate_hz}-{channels}-{seed}.wav", planes, rate_hz, "-c:a", "pcm_s24le")

    def _encoded(self, encoding: str, rate_hz: int, channels: int, seed: int, more: tuple[object, ...]) -> bytes:
        ending, options = ENCODINGS[encoding]
        path = self.folder / f"encoded.{ending}"
        inputs: list[object] = ["-i", self.sound(rate_hz, channels, seed)]
        if "picture" in more:
            at = more.index("picture")
            length_s, offset_s = more[at + 1 : at + 3]
            more = (*more[:at], *more[at + 3 :])
            picture = ["-f", "lavfi", "-i", f"color=s=64x64:r=25:d={length_s}"]
            codec = ["-c:v", "mpeg1video" if ending in {"mpg", "vob"} else "mpeg4"]
            inputs = [*picture, "-itsoffset", offset_s, *inputs, "-map", "0:v", "-map", "1:a", *codec]
        if "tracks" in more:
            default = more[more.index("tracks") + 1]
            more = more[2:]
            flags = [
                "-disposition:a:0",
                ["0", "default"][default == 0],
                "-disposition:a:1",
                ["0", "default"][default == 1],
            ]
            inputs = [*inputs, "-i", self.sound(rate_hz, channels, 7), "-map", 0, "-map", 1, *flags]
        try:
            ffmpeg(*inputs, *options, *more, path)
        except AssertionError:  # the encoder does not support this rate or number of channels
            ffmpeg(*inputs, *options, *more, "-ar", 44_100, "-ac", 2, path)
        return path.read_bytes()


def _zeroed(media: bytes, begin: int, size: int) -> bytes:
    return media[:begin] + bytes(len(media[begin : begin + size])) + media[begin + size :]


def _damaged(maker: Maker, ending: str, rng: np.random.Generator) -> bytes:
    media = maker.plain()
    for _ in range(rng.integers(1, 4)):
        media = _zeroed(media, int(rng.integers(len(media) // 5, len(media) * 4 // 5)), int(2 ** rng.uniform(3, 10)))
    return media


def _much_damaged(maker: Maker, ending: str, rng: np.random.Generator) -> bytes:
    media = maker.plain()
    return _zeroed(media, int(len(media) * rng.uniform(0.2, 0.5)), int(len(media) * rng.uniform(0.1, 0.4)))


def _flipped(maker: Maker, ending: str, rng: np.random.Generator) -> bytes:
    media = np.frombuffer(maker.plain(), np.uint8).copy()
    places = rng.integers(len(media) // 5, len(media) * 4 // 5, size=rng.integers(1, 6))
    media[places] ^= (1 << rng.integers(8, size=len(places))).astype(np.uint8)
    return media.tobytes()


def _tag_before(maker: Maker, ending: str, rng: np.random.Generator) -> bytes:
    return _id3(rng) + maker.plain()


def _id3(rng: np.random.Generator) -> bytes:
    """An ID3v2.4 tag with a picture."""
    size = int(2 ** rng.uniform(7, 15))
    frame = b"APIC" + _synchsafe(size) + b"\0\0" + rng.bytes(size)
    return b"ID3\4\0\0" + _synchsafe(len(frame)) + frame


def _synchsafe(size: int) -> bytes:
    return bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))


def _tag_between(maker: Maker, ending: str, rng: np.random.Generator) -> bytes:
    media = maker.plain()
    at = int(rng.integers(len(media) // 4, len(media) * 3 // 4))
    return media[:at] + _id3(rng) + media[at:]


BEHIND = (
    bytes(5000),
    b"LYRICSBEGININD0000200.000021LYRICS200TAG" + bytes(125),
    b"TAG" + b"title".ljust(125, b"\0"),
    b"<html><body>404 not found</body></html>\n",
    b"APETAGEX\xd0\x07\0\0\x20\0\0\0\0\0\0\0\0\0\0\x80" + bytes(8),
)


def _behind(maker: Maker, ending: str, rng: np.random.Generator) -> bytes:
    return maker.plain() + BEHIND[rng.integers(len(BEHIND))]


def _lying_length(maker: Maker, ending: str, rng: np.random.Generator) -> bytes:
    media, at = maker.plain(), LENGTH_AT[ending](maker.plain())
    wide = ending in {"caf", "w64"}
    if media.startswith(b"RF64"):  # its 64-bit length is in a separate chunk
        at, wide = media.find(b"ds64") + 16, True
    order = "<" if ending in {"wav", "w64"} else ">"
    size = struct.unpack_from(f"{order}{'Q' if wide else 'I'}", media, at)[0]
    lies = [size // 2, size * 2, 2**64 - 1] if wide else [0, 0xFFFFFFFF, 0x7FFFF000, size // 2, size * 2]
    lie = lies[rng.integers(len(lies))]
    if lie == size * 2:  # half a size is less than another field says; the other lies mean "unknown"
        maker.expected_s *= 2
    return media[:at] + struct.pack(f"{order}{'Q' if wide else 'I'}", lie) + media[at + (8 if wide else 4) :]


def _without_packets(maker: Maker, ending: str, rng: np.random.Generator) -> bytes:
    """Leave a hole in the timestamps, as if the recorder had sent nothing for a while."""
    begin_s, length_s = rng.uniform(0.4, 1.2), rng.choice([0.06, 0.1, 0.4, 0.9])
    source, target = maker.folder / f"whole.{ending}", maker.folder / f"holed.{ending}"
    source.write_bytes(maker.plain())
    with av.open(str(source)) as read, av.open(str(target), "w") as written:
        track = written.add_stream_from_template(read.streams.audio[0])
        for packet in read.demux(read.streams.audio[0]):
            if packet.dts is not None and not begin_s <= packet.dts * packet.time_base < begin_s + length_s:
                packet.stream = track
                written.mux(packet)
    return target.read_bytes()


ODDS: dict[str, Odd] = {
    "nothing": Odd(lambda maker, ending, rng: maker.plain()),
    "cut short": Odd(lambda maker, ending, rng: (m := maker.plain())[: int(len(m) * rng.uniform(0.3, 1))]),
    "damaged": Odd(_damaged),
    "much damaged": Odd(_much_damaged),
    "flipped bits": Odd(_flipped),
    "tag before": Odd(_tag_before, {"mp3", "mp2", "aac", "flac", "tta", "ac3"}),
    "tag between": Odd(_tag_between, {"mp3", "mp2", "aac", "ac3", "eac3", "ogg", "ts"}),
    "bytes behind": Odd(_behind),
    "joined": Odd(
        lambda maker, ending, rng: maker.plain() + maker.second(),
        {"mp3", "mp2", "aac", "latm", "ac3", "eac3", "dts", "ogg", "ts", "mpg", "vob", "mka", "webm", "flv", "flac"},
    ),
    "lying length": Odd(_lying_length, set(LENGTH_AT)),
    "starts later": Odd(
        lambda maker, ending, rng: maker.with_options("-output_ts_offset", float(rng.choice([0.02, 0.09, 0.3, 7.5]))),
        TIMED - {"ogg", "wma"},
    ),
    "longer picture": Odd(lambda maker, ending, rng: maker.with_options("picture", 3.2, 0), WITH_PICTURE),
    "late sound": Odd(
        lambda maker, ending, rng: maker.with_options("picture", 2.8, float(rng.choice([0.04, 0.15, 0.3]))),
        WITH_PICTURE,
    ),
    "two tracks": Odd(
        lambda maker, ending, rng: maker.with_options("tracks", int(rng.integers(3))),
        {"mka", "m4a", "mp4", "mov", "ts", "nut"},
    ),
    "hole": Odd(_without_packets, {"mp4", "m4a", "webm", "mka", "flv", "nut"}),
}  # fmt: skip

BROKEN = {
    "cut short",
    "damaged",
    "much damaged",
    "flipped bits",
    "tag between",
    "lying length",
    "hole",
    "joined",
    "late sound",
}
"""Odd properties that may remove sound."""

ENOUGH = 0.96
"""With a smaller share of the sound, `truncated` is correct: the limit of 5 %, with a tolerance of one block."""
SAME = 0.01
"""Limit of the RMS of a difference over that of the sound. Resampling and rounding to 16 bits stay well below."""
TICK = 9
"""Tolerance for timestamps in whole milliseconds: half a millisecond, and the rounding of the cut."""
LAST = 2400
"""Samples of the last packets. Versions of FFmpeg differ in how they decode an incomplete packet."""


def verdict(made: Made) -> str:
    """`equal`, `refused: REASON`, `rule: …` for a documented difference, or `UNEXPLAINED: …`."""
    whole, section = programs(made.path, Cut(), Cut(made.start_s, 1.0), channels=_channels(made.path), resampler="soxr")
    outcome = _verdict_whole(made, whole)
    return outcome if outcome != "equal" else _verdict_section(made, section, whole)


def _channels(path: Path) -> int:
    try:
        with av.open(str(path)) as container:
            track = chosen_track(container)
            return 1 if track is None else track.codec_context.channels
    except av.FFmpegError:
        return 1


def _decoded(path: Path, start_s: float, duration_s: float | None) -> np.ndarray | ClipError:
    try:
        return decode_section(str(path), start_s, duration_s)
    except ClipError as err:
        return err


def _verdict_whole(made: Made, theirs: np.ndarray) -> str:
    ours = _decoded(made.path, 0.0, None)
    if isinstance(ours, ClipError):
        return _verdict_refused(made, ours, theirs)
    if abs(len(ours) - len(theirs)) <= 2 and error_level(ours, theirs) < SAME:
        return "equal"
    if made.odd in BROKEN and abs(len(ours) - len(theirs)) <= LAST and error_level(ours[:-LAST], theirs[:-LAST]) < SAME:
        return "rule: a packet that was cut off"
    if len(theirs) < len(ours) and _is_with_holes(ours, theirs):
        return "rule: a hole is silence" if made.odd in BROKEN else "UNEXPLAINED: holes"
    if _loses_frames(made.path) and 0 < len(theirs) - len(ours) <= LAST and _is_with_holes(theirs, ours):
        return "rule: a packet that failed after a frame"
    if made.odd in BROKEN and same_where_repeatable(ours, _runs(made.path)):
        return "rule: the program's samples differ from run to run"
    late, correlation = lag(ours, theirs)
    return (
        f"UNEXPLAINED: {len(ours)} for {len(theirs)} samples, lag {late}, correlation {correlation:.4f}, "
        f"difference {error_level(ours, theirs):.3f}"
    )


def _runs(path: Path) -> list[np.ndarray]:
    """The program's output for the whole file, several times.

    FFmpeg's AAC decoder fills some damaged frames with what happens to be in its memory, so two runs of the program
    differ. With 16 runs, two equally frequent outputs are both seen but for one time in 30,000.
    """
    return [program(path, channels=_channels(path), resampler="soxr") for _ in range(16)]


def same_where_repeatable(ours: np.ndarray, runs: list[np.ndarray], around: int = 200) -> bool:
    """Whether the runs differ from each other, and ours equal them at all other samples.

    `around` samples beside a difference are left out too: the resampler spreads it.
    """
    if any(len(run) != len(ours) for run in runs):
        return False
    spread = np.ptp(np.stack(runs), axis=0)
    differs = np.convolve(spread > SAME * np.abs(runs[0]).max(), np.ones(2 * around + 1), "same") > 0
    same = error_level(ours[~differs], runs[0][~differs]) < SAME
    return bool(differs.any()) and float(differs.mean()) < LAST / len(ours) and same


def _loses_frames(path: Path) -> bool:
    """Whether PyAV drops a frame: it raises the decoder's error for the rest of a packet that gave a frame."""
    with av.open(str(path)) as container:
        track = chosen_track(container)
        assert track is not None
        for packet in container.demux(track):
            try:
                packet.decode()
            except av.FFmpegError as err:
                if "avcodec_receive_frame" in str(err):
                    return True
    return False


def _verdict_refused(made: Made, error: ClipError, theirs: np.ndarray) -> str:
    there_s = len(theirs) / KALDI128.sample_rate_hz
    peak = float(np.abs(theirs).max(initial=0))
    explained = {
        Reason.NOT_AUDIO: there_s < 0.025 or not np.isfinite(theirs).all(),
        Reason.TOO_SHORT: there_s < 0.03,
        Reason.TRUNCATED: there_s < ENOUGH * made.expected_s,
        Reason.OUT_OF_RANGE: peak > 10,
        Reason.OUT_OF_PHASE: error.reason is Reason.OUT_OF_PHASE and _opposite_share(made.path) > 0.04,
    }.get(error.reason, False)
    if explained:
        return f"refused: {error.reason}"
    if error.reason is Reason.TRUNCATED and made.odd in BROKEN:
        return _verdict_damaged(made, error, theirs, Cut())
    return f"UNEXPLAINED: {error}, and the program has {there_s:.2f} s"


def _opposite_share(path: Path, block: int = 2000) -> float:
    """Share of the program's blocks with sound in which one of two channels is the other with the opposite sign.

    As in `Mono`, a block more than 40 dB below the loudest has no sound.
    """
    samples = np.frombuffer(ffmpeg("-i", path, "-f", "f32le", "-c:a", "pcm_f32le", "-", check=False), "<f4")
    planes = samples[: len(samples) // 2 * 2].reshape(-1, 2).T
    blocks = [planes[:, at : at + block] for at in range(0, planes.shape[1] - block + 1, block)]
    found = np.array([np.corrcoef(of_both)[0, 1] for of_both in blocks])
    power = np.array([of_both.var(axis=1).mean() for of_both in blocks])
    with_sound = found[np.isfinite(found) & (power >= 1e-4 * power.max(initial=0))]
    return float(np.mean(with_sound < -0.99)) if len(with_sound) and _channels(path) == 2 else 0.0


def _verdict_damaged(made: Made, error: ClipError, theirs: np.ndarray, cut: Cut) -> str:
    """Whether the program fills its output with samples that were not in the file before the damage.

    `theirs` is its output for the whole file; `cut` is the section in question.
    """
    path = made.path.with_name(f"plain-{made.path.name}")
    path.write_bytes(made.plain)
    before = programs(path, cut, channels=_channels(path), resampler="soxr")[0]
    path.unlink()
    share = _share_of(before, theirs, round((cut.start_s or 0) * KALDI128.sample_rate_hz))
    if share < ENOUGH:
        return "refused: truncated, the program's samples are damaged"
    return f"UNEXPLAINED: {error}, and the program has {100 * share:.0f} % of the sound"


def _verdict_section(made: Made, theirs: np.ndarray, whole: np.ndarray) -> str:
    ours = _decoded(made.path, made.start_s, 1.0)
    counted = whole[round(made.start_s * KALDI128.sample_rate_hz) :]
    if isinstance(ours, ClipError):
        if ours.reason is Reason.TRUNCATED and len(theirs) < ENOUGH * KALDI128.sample_rate_hz:
            return "equal"  # the section is after the end
        is_untimed = made.path.suffix[1:] in UNTIMED
        if ours.reason is Reason.TRUNCATED and is_untimed and len(counted) < ENOUGH * KALDI128.sample_rate_hz:
            return "rule: samples are counted"
        if ours.reason is Reason.TRUNCATED and made.odd in BROKEN:
            return _verdict_damaged(made, ours, whole, Cut(made.start_s, 1.0))
        return f"UNEXPLAINED: section {ours}, and the program has {len(theirs)} samples"
    if made.start_s == 0 and len(theirs) < len(ours):  # the sound begins late
        theirs = whole[: len(ours)]
    for expected in (theirs, counted[: len(ours)]):
        late, correlation = lag(_low(ours), _low(expected)) if len(expected) else (0, 0.0)
        if abs(late) <= TICK and correlation > 0.95 and abs(len(ours) - len(expected)) <= TICK:
            return "equal"
    if _is_with_holes(ours, theirs) and made.odd in BROKEN:
        return "rule: a hole is silence"
    late, correlation = lag(_low(ours), _low(theirs)) if len(theirs) else (0, 0.0)
    if made.odd in BROKEN and abs(late) <= GAP_S * KALDI128.sample_rate_hz + TICK and correlation > 0.95:
        return "rule: a small jump of the timestamps"
    return f"UNEXPLAINED: section {len(ours)} for {len(theirs)} samples, lag {late}, correlation {correlation:.4f}"


def _low(samples: np.ndarray) -> np.ndarray:
    """Frequencies below 1 kHz, where a shift by a fraction of a sample does not matter."""
    spectrum = np.fft.rfft(samples)
    spectrum[len(samples) * 1000 // KALDI128.sample_rate_hz :] = 0
    return np.fft.irfft(spectrum, len(samples)) if len(samples) > 1 else samples


def _is_with_holes(ours: np.ndarray, theirs: np.ndarray, block: int = 800) -> bool:
    """Whether ours are the program's samples in order, with silence between some of them."""
    if not len(theirs):
        return False
    ours, theirs = _low(ours), _low(theirs)
    ahead, strange, level = 0, 0, float(np.abs(theirs).max())
    total = max(0, len(ours) - len(theirs))
    for begin in range(0, len(ours) - block, block):
        mine = ours[begin : begin + block]
        same = theirs[max(0, begin - ahead) :][:block]
        if len(same) == block and _place_of(mine, same) == 0:
            continue
        if float(np.abs(mine).max()) < 0.05 * level:
            continue
        first = max(0, begin - total - 100)
        window = theirs[first : begin - ahead + block + 100]
        found = _place_of(mine, window)
        if found is None:
            strange += 1
        else:
            ahead = begin - first - found
    return strange <= 8


def _share_of(before: np.ndarray, after: np.ndarray, begin: int, block: int = 400, reach: int = 8000) -> float:
    """Share of samples from `begin` on that occur in `after`, at most `reach` samples from their position."""
    before, after = _low(before), _low(after)
    found = [
        _place_of(before[at : at + block], after[max(0, begin + at - reach) : begin + at + block + reach]) is not None
        for at in range(0, len(before) - block + 1, block)
    ]
    return float(np.mean(found)) if found else 0.0


def _place_of(block: np.ndarray, within: np.ndarray) -> int | None:
    """Position of a block in other samples; None if it does not occur."""
    if len(within) < len(block):
        return None
    windows = np.lib.stride_tricks.sliding_window_view(within, len(block))
    scale = np.linalg.norm(block) * np.sqrt(np.convolve(within**2, np.ones(len(block)), "valid"))
    correlation = windows @ block / np.maximum(scale, 1e-9)
    best = int(np.argmax(correlation))
    return best if correlation[best] > 0.9 else None
