"""Files that were once read wrongly, each compared with the output of the ffmpeg program."""

import random
import re
import struct
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torchaudio

from pipeline.prepare.audio.decode import Decode, decode_section
from pipeline.prepare.audio.features import clip_fbank
from pipeline.prepare.audio.mono import Mono
from pipeline.prepare.clip import ClipError, Reason, in_progress
from tests import fakes
from tests.conftest import SHARED
from tests.prepare.sound import error_level, ffmpeg, lag, program, signal, write

ESC10 = SHARED / "data" / "esc10"
RATE_HZ = 44_100
NO_DICE = ("-aac_pns", 0)
"""AAC's noise substitution is random in the decoder, and differs after a seek."""
SAME = 0.004
"""Limit of the RMS of the difference of two resamplers over that of the sound."""


@pytest.fixture(scope="module")
def ten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten seconds of the known signal."""
    return write(tmp_path_factory.mktemp("ten") / "ten.wav", signal(10, RATE_HZ), RATE_HZ, "-c:a", "pcm_s16le")


@pytest.fixture(scope="module")
def lame(ten: Path) -> bytes:
    path = ten.with_name("lame.mp3")
    ffmpeg("-i", ten, "-c:a", "libmp3lame", "-b:a", "192k", path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def m4a(ten: Path) -> bytes:
    ffmpeg("-i", ten, "-c:a", "aac", *NO_DICE, "-movflags", "faststart", ten.with_name("aac.m4a"))
    return ten.with_name("aac.m4a").read_bytes()


def reason_of(path: Path, start_s: float = 0.0, duration_s: float | None = None, **how: bool) -> ClipError:
    with pytest.raises(ClipError) as caught:
        decode_section(str(path), start_s, duration_s, **how)
    return caught.value


def check_is_the_programs(path: Path, num_samples: int, *, slack: int = 1) -> np.ndarray:
    decoded, expected = decode_section(str(path), 0.0, None), program(path)
    assert abs(len(decoded) - len(expected)) <= 1
    assert abs(len(decoded) - num_samples) <= slack
    assert error_level(decoded, expected) < SAME
    return decoded


def placed(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# A1: first timestamps


@pytest.mark.parametrize("options", [["-b:a", "192k"], ["-q:a", "4"], ["-id3v2_version", "0", "-write_id3v1", "1"]])
def test_case_1_mp3_priming_is_removed(ten: Path, tmp_path: Path, options: list[str]):
    ffmpeg("-i", ten, "-c:a", "libmp3lame", *options, path := tmp_path / "a.mp3")
    decoded = check_is_the_programs(path, 160_000, slack=0)
    assert lag(decoded, signal(10))[0] == 0
    np.testing.assert_allclose(decode_section(str(path), 3.0, 2.0)[800:-800], decoded[48_800:79_200], atol=1e-4)


def test_case_7_a_late_first_timestamp_adds_no_silence(ten: Path, tmp_path: Path):
    ffmpeg("-i", ten, "-c:a", "flac", "-output_ts_offset", "0.09", path := tmp_path / "a.mka")
    decoded = check_is_the_programs(path, 160_000, slack=0)
    assert lag(decoded, signal(10))[0] == 0
    ffmpeg("-i", ten, "-c:a", "wmav2", path := tmp_path / "a.wma")
    check_is_the_programs(path, 159_753)  # the program also drops the first block


def test_case_24_sound_that_begins_late_is_complete(ten: Path, tmp_path: Path):
    path = with_picture(ten, tmp_path / "late.mp4", 10.6, "-itsoffset", "0.6")
    check_is_the_programs(path, 160_496)
    assert len(decode_section(str(path), 0.0, 10.0)) == 160_000
    assert len(decode_section(str(path), 30.0, 10.0, may_be_clip=True)) == 160_000
    section = decode_section(str(path), 3.0, 2.0)  # by the picture's clock, like the program
    assert lag(section, program(path, 3.0, 2.0)) == (0, pytest.approx(1, abs=1e-4))
    assert lag(section, decode_section(str(path), 0.0, None))[0] == -(48_000 - 9228)  # 0.5768 s of 16 kHz


def with_picture(sound: Path, path: Path, picture_s: float, *before_sound: object) -> Path:
    picture = ("-f", "lavfi", "-i", f"color=s=64x64:r=10:d={picture_s}")
    codecs = ("-map", "0:v", "-map", "1:a", "-c:v", "mpeg4", "-c:a", "aac", *NO_DICE)
    ffmpeg(*picture, *before_sound, "-i", sound, *codecs, path)
    return path


def test_case_24_a_pause_without_packets_is_silence(ten: Path, tmp_path: Path):
    """The program closes such a hole. Here the sound after it keeps its time."""
    ffmpeg("-i", ten, "-c:a", "libopus", whole := tmp_path / "a.webm")
    path = without_packets(whole, tmp_path / "dtx.webm", 4.0, 6.0)
    decoded, undisturbed = decode_section(str(path), 0.0, None), decode_section(str(whole), 0.0, None)
    assert len(program(path)) == 128_000
    assert len(decoded) == len(undisturbed) == 160_000
    np.testing.assert_allclose(decoded[:63_000], undisturbed[:63_000], atol=1e-4)
    assert np.abs(decoded[65_000:95_000]).max() < 1e-4
    np.testing.assert_allclose(decoded[98_000:], undisturbed[98_000:], atol=0.02)  # Opus needs a run-up
    section = decode_section(str(path), 7.0, 2.0)
    assert lag(section, undisturbed)[0] == 7 * -16_000


def without_packets(source: Path, target: Path, begin_s: float, end_s: float) -> Path:
    with av.open(str(source)) as read, av.open(str(target), "w") as written:
        track = written.add_stream_from_template(read.streams.audio[0])
        for packet in read.demux(read.streams.audio[0]):
            if packet.pts is not None and not begin_s <= packet.pts * packet.time_base < end_s:
                packet.stream = track
                written.mux(packet)
    return target


def test_a_pause_that_is_most_of_the_clip_is_truncated(ten: Path, tmp_path: Path):
    ffmpeg("-i", ten, "-c:a", "libopus", whole := tmp_path / "a.webm")
    error = reason_of(without_packets(whole, tmp_path / "dtx.webm", 2.0, 8.0))
    assert (error.reason, "by its timestamps" in error.message) == (Reason.TRUNCATED, True)


@pytest.mark.parametrize("offset_s", [0.005, 0.02, 0.3])
def test_pcm_in_mov_that_starts_later_is_complete(ten: Path, tmp_path: Path, offset_s: float):
    """For other codecs the program cuts the end, because their last packet is longer than the sound."""
    ffmpeg("-i", ten, "-c:a", "pcm_s16le", "-output_ts_offset", offset_s, path := tmp_path / "a.mov")
    check_is_the_programs(path, 160_000)


# A2: timestamps that start again


@pytest.mark.parametrize("codec", ["libvorbis", "libopus", "flac"])
def test_case_2_every_link_of_a_chained_ogg_is_read(tmp_path: Path, codec: str):
    sound, links = signal(10, RATE_HZ), []
    for half in (sound[: 5 * RATE_HZ], sound[5 * RATE_HZ :]):
        links.append(write(tmp_path / "half.ogg", half, RATE_HZ, "-c:a", codec, "-b:a", "160k").read_bytes())
    path = placed(tmp_path / "chained.ogg", b"".join(links))
    decoded = check_is_the_programs(path, 160_000, slack=60)
    for begin_s in (0.0, 6.0):
        section = decode_section(str(path), begin_s, 3.0)
        begin = round(begin_s * 16_000)
        np.testing.assert_allclose(section[400:-400], decoded[begin + 400 : begin + 47_600], atol=1e-3)
        late, correlation = lag(section, signal(10)[begin : begin + 48_000])
        assert (abs(late) < 60, correlation > 0.7) == (True, True)  # Vorbis: 128 samples late
    with path.open("rb") as file:  # of a remote file the two ends are read first
        np.testing.assert_array_equal(decode_section(file, 6.0, 3.0), decode_section(str(path), 6.0, 3.0))
    assert reason_of(path, 8.0, 3.0).reason is Reason.TRUNCATED


@pytest.mark.parametrize(
    ("rate_hz", "channels", "codec"), [(22_050, 1, "libvorbis"), (RATE_HZ, 2, "libvorbis"), (48_000, 1, "libopus")]
)
def test_case_2_different_links_are_not_the_end_of_the_file(tmp_path: Path, rate_hz: int, channels: int, codec: str):
    """The program stops there, because it cannot read them ("Changing stream parameters in multistream ogg")."""
    first = write(tmp_path / "first.ogg", signal(2, RATE_HZ), RATE_HZ, "-c:a", "libvorbis").read_bytes()
    planes = np.stack([signal(2, rate_hz, seed=1)] * channels)
    path = placed(
        tmp_path / "chained.ogg", first + write(tmp_path / "second.ogg", planes, rate_hz, "-c:a", codec).read_bytes()
    )
    assert len(program(path)) == 32_000
    error = reason_of(path)
    assert (error.reason, "only the first of the recordings" in error.message) == (Reason.TRUNCATED, True)
    assert len(decode_section(str(path), 0.5, 1.0)) == 16_000


def test_a_section_after_a_join_is_found_by_counting(tmp_path: Path):
    """Packets are skipped by their timestamps, which start again in the second file."""
    sound = signal(10, RATE_HZ)
    halves = [sound[: 5 * RATE_HZ], sound[5 * RATE_HZ :]]
    parts = [write(tmp_path / "half.ts", half, RATE_HZ, "-c:a", "mp2").read_bytes() for half in halves]
    path = placed(tmp_path / "joined.ts", b"".join(parts))
    decoded = decode_section(str(path), 0.0, None)
    assert error_level(decoded, program(path)) < SAME
    section = decode_section(str(path), 7.0, 2.0)
    assert abs(lag(section, decoded)[0] + 7 * 16_000) <= 2


# A3: lengths that are estimated, or those of another stream


def test_case_5_an_estimated_length_does_not_make_a_recording_a_clip(tmp_path: Path):
    sound = signal(54, RATE_HZ)
    bare = ("-write_xing", "0", "-id3v2_version", "0")
    loud = write(tmp_path / "a.mp3", sound[: 4 * RATE_HZ], RATE_HZ, "-b:a", "320k", *bare).read_bytes()
    rest = write(tmp_path / "b.mp3", sound[4 * RATE_HZ :], RATE_HZ, "-b:a", "32k", *bare).read_bytes()
    path = placed(tmp_path / "AbCdEfGhIjK.mp3", loud + rest)
    with av.open(str(path)) as container:
        assert container.duration < 10 * av.time_base  # FFmpeg's estimate
    section = decode_section(str(path), 30.0, 10.0, may_be_clip=True)
    assert error_level(section, program(path, 30.0, 10.0)) < SAME


def test_case_23_the_length_of_a_picture_is_not_that_of_the_sound(ten: Path, tmp_path: Path):
    path = with_picture(ten, tmp_path / "AbCdEfGhIjK.mp4", 11.2)
    section = decode_section(str(path), 30.0, 10.0, may_be_clip=True)
    assert (len(section), lag(section, signal(10))[0]) == (160_000, 0)
    longer = with_picture(ten, tmp_path / "recording.mp4", 11.2)
    assert lag(decode_section(str(longer), 2.0, 5.0, may_be_clip=True), signal(10))[0] == -32_000


# A4: bytes that are not packets


@pytest.mark.parametrize(
    "behind",
    [
        bytes(5000),
        b"LYRICSBEGININD0000200.000021LYRICS200TAG" + bytes(125),
        b"<html><body>404 not found</body></html>\n",
    ],
)
def test_case_3_bytes_after_the_frames_are_skipped(lame: bytes, tmp_path: Path, behind: bytes):
    check_is_the_programs(placed(tmp_path / "a.mp3", lame + behind), 160_000, slack=0)


def test_case_4_a_bad_packet_is_a_hole_of_one_frame(m4a: bytes, tmp_path: Path):
    path = placed(tmp_path / "bad.m4a", damaged(m4a, len(m4a) // 2, 60))
    good = decode_section(str(placed(tmp_path / "good.m4a", m4a)), 0.0, None)
    decoded = decode_section(str(path), 0.0, None)
    assert len(decoded) == len(good) == 160_000
    differs = np.flatnonzero(np.abs(decoded - good) > 1e-3)
    assert 0 < differs[-1] - differs[0] < 4 * 1024 * 16_000 / RATE_HZ  # the frame, and half of each neighbour
    assert len(program(path)) < 160_000 - 300  # the program closes the hole
    section = decode_section(str(path), 7.0, 2.0)
    assert lag(section, good)[0] == 7 * -16_000


def damaged(media: bytes, at: int, num_bytes: int) -> bytes:
    return media[:at] + bytes(num_bytes) + media[at + num_bytes :]


@pytest.mark.parametrize("num_bytes", [5000, 300_000])
def test_the_last_mpegts_frame_is_read_before_trailing_bytes(ten: Path, tmp_path: Path, num_bytes: int):
    """FFmpeg's demuxer reports "try again" there, and returns the last frame only at the end."""
    ffmpeg("-i", ten, "-c:a", "ac3", "-ac", 1, path := tmp_path / "a.ts")
    expected = decode_section(str(path), 0.0, None)
    placed(path, path.read_bytes() + bytes(num_bytes))
    np.testing.assert_array_equal(check_is_the_programs(path, 160_000, slack=600), expected)


@pytest.mark.parametrize("kind", ["zeroed", "tag between", "joined"])
def test_case_4_mp3_frames_continue_after_foreign_bytes(lame: bytes, tmp_path: Path, kind: str):
    tag = lame[: 10 + (lame[8] << 7 | lame[9])]
    middle = len(lame) // 2
    path = tmp_path / "a.mp3"
    media = {"zeroed": damaged(lame, middle, 600), "tag between": lame[:middle] + tag + lame[middle:]}
    path.write_bytes(media.get(kind, lame + lame))
    check_is_the_programs(path, 320_000 if kind == "joined" else 160_000, slack=1000)


def test_damage_of_more_than_a_twentieth_is_truncated(m4a: bytes, tmp_path: Path):
    whole = len(m4a)
    few = placed(tmp_path / "few.m4a", damaged(m4a, whole // 2, whole // 40))
    assert len(decode_section(str(few), 0.0, None)) == 160_000
    many = placed(tmp_path / "many.m4a", damaged(m4a, whole // 2, whole // 8))
    assert reason_of(many).reason is Reason.TRUNCATED
    assert reason_of(many, 4.0, 5.0).reason is Reason.TRUNCATED
    assert len(decode_section(str(many), 1.0, 3.0)) == 48_000  # this section is undamaged


@pytest.mark.parametrize("damage", ["zeros", "noise", "cut"])
def test_damage_in_flac_is_no_pause(tmp_path: Path, damage: str):
    """FLAC numbers its samples, and FFmpeg's parser gives damaged bytes to the packet before them."""
    path = fakes.write_media(tmp_path / "a.flac", fakes.noise(10.0))
    whole = bytearray(path.read_bytes())
    begin, end = len(whole) * 4 // 10, len(whole) * 5 // 10
    if damage == "cut":
        del whole[begin:end]
    else:
        whole[begin:end] = bytes(end - begin) if damage == "zeros" else random.Random(0).randbytes(end - begin)
    path.write_bytes(whole)
    for start_s, duration_s in ((0.0, None), (2.0, 8.0)):
        with pytest.raises(ClipError) as failed:
            decode_section(str(path), start_s, duration_s)
        assert failed.value.reason is Reason.TRUNCATED
    assert len(decode_section(str(path), 6.0, 2.0)) == 32_000


def test_mp4_with_an_empty_table_of_packets_is_truncated(m4a: bytes, tmp_path: Path):
    at = m4a.index(b"stsz")
    path = placed(tmp_path / "bad.m4a", m4a[:at] + b"free" + m4a[at + 4 :])
    assert reason_of(path).reason is Reason.TRUNCATED
    assert reason_of(path, 3.0, 2.0).reason is Reason.TRUNCATED


def test_lost_bytes_are_not_a_pause(ten: Path, tmp_path: Path):
    """A hole in the timestamps of WebM is a pause, unless the file has bytes there that belong to no packet."""
    ffmpeg("-i", ten, "-c:a", "libopus", "-cluster_time_limit", "500", path := tmp_path / "a.webm")
    media = path.read_bytes()
    broken = placed(tmp_path / "broken.webm", damaged(media, len(media) // 3, len(media) // 5))
    assert len(program(broken)) < 150_000
    assert reason_of(broken).reason is Reason.TRUNCATED


@pytest.mark.parametrize("codec", ["libvorbis", "libopus", "flac"])
def test_a_lost_ogg_page_is_not_a_pause(tmp_path: Path, codec: str):
    """Packets have the position of their page, and the time of the first one after a lost page is unknown."""
    ogg = write(tmp_path / "a.ogg", signal(6, RATE_HZ), RATE_HZ, "-c:a", codec)
    media = ogg.read_bytes()
    pages = [match.start() for match in re.finditer(b"OggS", media)]
    lost = next(page for page in pages if page > len(media) // 2)
    broken = placed(tmp_path / "broken.ogg", damaged(media, lost + 200, 40))
    assert len(program(broken)) < 90_000
    assert reason_of(broken).reason is Reason.TRUNCATED


@pytest.mark.parametrize("codec", ["libvorbis", "libopus"])
def test_case_24_a_pause_in_ogg_is_silence(tmp_path: Path, codec: str):
    whole = write(tmp_path / "a.ogg", signal(6, 48_000), 48_000, "-c:a", codec, "-page_duration", "200000")
    path = without_packets(whole, tmp_path / "pause.ogg", 2.0, 3.0)
    assert len(decode_section(str(path), 0.0, None)) == pytest.approx(96_000, abs=200)


def test_frames_whose_packet_has_no_timestamp_are_not_missing(tmp_path: Path):
    """FFmpeg's parser joins a FLAC frame with a wrong checksum to the next ones; the decoder does not check it."""
    flac = write(tmp_path / "a.flac", signal(3, RATE_HZ), RATE_HZ, "-c:a", "flac").read_bytes()
    frames = [at for at in range(len(flac)) if flac[at : at + 2] == b"\xff\xf8"]
    path = placed(tmp_path / "bad.flac", flac[: frames[9] - 1] + bytes([flac[frames[9] - 1] ^ 1]) + flac[frames[9] :])
    decoded, expected = decode_section(str(path), 0.0, None), program(path)
    assert abs(len(decoded) - len(expected)) <= 1
    assert error_level(decoded, expected) < SAME


# A5: lengths in headers


def test_case_22_a_wav_cut_short_is_truncated(ten: Path, tmp_path: Path):
    media = ten.read_bytes()
    at = media.index(b"data") + 8
    cut = media[: at + 4 * RATE_HZ * 2]
    error = reason_of(placed(tmp_path / "cut.wav", cut))
    assert (error.reason, error.message) == (Reason.TRUNCATED, "4.00 s of 10.00 s by its header")
    assert reason_of(placed(tmp_path / "c.wav", cut), 30.0, 5.0, may_be_clip=True).reason is Reason.TRUNCATED
    for size in (0, 0xFFFFFFFF, 0x7FFFF000):  # written by programs that cannot go back
        streamed = placed(tmp_path / "streamed.wav", media[: at - 4] + struct.pack("<I", size) + media[at:])
        assert len(decode_section(str(streamed), 0.0, None)) == 160_000


@pytest.mark.parametrize(
    ("name", "at"),
    [("a.au", lambda media: 8), ("a.aiff", lambda media: media.index(b"COMM") + 10)],
)
def test_placeholder_sizes_of_streaming_writers_are_not_lengths(tmp_path: Path, name: str, at: Callable[[bytes], int]):
    path = write(tmp_path / name, np.stack([signal(2, RATE_HZ)] * 2), RATE_HZ, "-c:a", "pcm_s16be")
    media = path.read_bytes()
    size = 0x7FFFF000 if name == "a.au" else 0x7F000000 // 4  # AIFF has a number of samples
    path.write_bytes(media[: at(media)] + struct.pack(">I", size) + media[at(media) + 4 :])
    assert len(decode_section(str(path), 0.0, None)) == 32_000


@pytest.mark.parametrize("rate_hz", [8000, 16_000])
def test_a_header_that_includes_codec_delay_does_not_truncate(tmp_path: Path, rate_hz: int):
    path = write(tmp_path / "a.mka", signal(1.5, rate_hz), rate_hz, "-c:a", "libmp3lame")
    check_is_the_programs(path, 24_000)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.aiff", []),
        ("a.caf", []),
        ("a.w64", []),
        ("a.au", []),
        ("rf64.wav", ["-rf64", "always"]),
        ("24.wav", ["-c:a", "pcm_s24le"]),
        ("float.wav", ["-c:a", "pcm_f32le"]),
        ("adpcm.wav", ["-c:a", "adpcm_ima_wav"]),
        ("a.mp3", []),
        ("a.flac", []),
        ("a.tta", []),
        ("a.wv", []),
        ("a.wma", []),
        ("a.avi", ["-c:a", "pcm_s16le"]),
        ("a.webm", []),
        ("faststart.m4a", ["-movflags", "faststart"]),
    ],
)
def test_a_file_shorter_than_its_header_says_is_truncated(ten: Path, tmp_path: Path, name: str, options: list[str]):
    ffmpeg("-i", ten, *options, path := tmp_path / name)
    assert len(decode_section(str(path), 0.0, None)) == pytest.approx(160_000, rel=0.01)
    error = reason_of(placed(tmp_path / f"cut-{name}", path.read_bytes()[: path.stat().st_size * 2 // 5]))
    assert (error.reason, "by its header" in error.message) == (Reason.TRUNCATED, True)


@pytest.mark.parametrize(("name", "codec"), [("a.wma", "wmav2"), ("a.wma", "wmav1"), ("a.asf", "libmp3lame")])
@pytest.mark.parametrize("kind", ["whole", "zeroed", "cut"])
def test_a_section_of_asf_past_the_end_is_truncated(ten: Path, tmp_path: Path, name: str, codec: str, kind: str):
    """At the end, the WMA decoder returns samples of the first packet, which have no timestamp."""
    ffmpeg("-i", ten, "-c:a", codec, path := tmp_path / name)
    media, expected = path.read_bytes(), program(path, 5.0, 1.0)
    if kind == "zeroed":
        path.write_bytes(damaged(media, len(media) // 3, len(media) // 10))
    elif kind == "cut":
        path.write_bytes(media[: len(media) * 7 // 10])
    for start_s in (9.0, 11.0, 40.0):
        assert reason_of(path, start_s, 2.0).reason is Reason.TRUNCATED
    late, correlation = lag(decode_section(str(path), 5.0, 1.0), expected)
    assert (abs(late) <= 16, correlation > 0.7) == (True, True)  # timestamps are whole milliseconds, not samples


# B: the values of samples


@pytest.mark.parametrize("residue", [0.0, 1e-4, 0.02])
def test_case_20_channels_that_cancel_are_refused(tmp_path: Path, residue: float):
    sound, other = signal(2, RATE_HZ), signal(2, RATE_HZ, seed=1)
    stereo = np.stack([sound + residue * other, -sound])
    path = write(tmp_path / "a.wav", stereo, RATE_HZ, "-c:a", "pcm_f32le")
    for keep_silent in (False, True):
        row = Decode(keep_silent)(in_progress(fakes.clips({"clip_id": "a", "media": str(path)}))).to_pylist()[0]
        assert (row["reason"], "cancel each other" in row["message"]) == ("out_of_phase", True)
        assert row["waveform"] == []


def test_channels_that_differ_or_are_empty_do_not_cancel(tmp_path: Path):
    sound, other = signal(2, RATE_HZ), signal(2, RATE_HZ, seed=1)
    for planes in ([sound, other], [sound, 0 * sound], [sound, -0.8 * sound], [sound] + 5 * [0 * sound]):
        path = write(tmp_path / "a.wav", np.stack(planes), RATE_HZ, "-c:a", "pcm_s16le")
        assert error_level(decode_section(str(path), 0.0, None), program(path, channels=len(planes))) < 0.01


@pytest.mark.parametrize(("cancelled_s", "is_refused"), [(1.0, True), (0.3, True), (0.1, False)])
def test_channels_that_cancel_in_a_part_are_refused(tmp_path: Path, cancelled_s: float, is_refused: bool):
    """The limit is 5 % of the time with sound: of 3 s here, and not of the silence behind."""
    sound = signal(6, RATE_HZ) * (np.arange(6 * RATE_HZ) < 3 * RATE_HZ)
    other = np.where(np.abs(np.arange(len(sound)) / RATE_HZ - 1.5) < cancelled_s / 2, -sound, sound)
    for codec in ("pcm_s16le", "pcm_f64le", "flac"):
        path = write(
            tmp_path / f"a.{'flac' if codec == 'flac' else 'wav'}", np.stack([sound, other]), RATE_HZ, "-c:a", codec
        )
        if not is_refused:
            assert len(decode_section(str(path), 0.0, None)) == 6 * 16_000
            continue
        error = reason_of(path)
        assert (error.reason, "cancel each other in " in error.message) == (Reason.OUT_OF_PHASE, True)


@pytest.mark.parametrize(("level", "is_refused"), [(1e-4, False), (0.1, True)])
def test_faint_channels_that_cancel_beside_a_loud_event_are_no_loss(tmp_path: Path, level: float, is_refused: bool):
    """Levels of opposite noise beside an event of 0.3 s; 40 dB below it is the limit."""
    sound, noise = signal(10, RATE_HZ), level * signal(10, RATE_HZ, seed=1)
    event = sound * (np.abs(np.arange(len(sound)) / RATE_HZ - 5) < 0.15)
    path = write(tmp_path / "a.wav", np.stack([event + noise, event - noise]), RATE_HZ, "-c:a", "pcm_f32le")
    if is_refused:
        assert reason_of(path).reason is Reason.OUT_OF_PHASE
    else:
        assert len(decode_section(str(path), 0.0, None)) == 10 * 16_000


def test_faint_channels_that_cancel_throughout_are_refused(tmp_path: Path):
    noise = 1e-4 * signal(2, RATE_HZ)
    path = write(tmp_path / "a.wav", np.stack([noise, -noise]), RATE_HZ, "-c:a", "pcm_f32le")
    assert reason_of(path).reason is Reason.OUT_OF_PHASE


def test_drained_samples_do_not_count_in_the_shares_of_the_next():
    def frame(*channels: np.ndarray) -> av.AudioFrame:
        made = av.AudioFrame.from_ndarray(np.stack(channels).astype(np.float32), "fltp", "stereo")
        made.sample_rate = RATE_HZ
        return made

    mono, sound = Mono(), signal(1, RATE_HZ)
    mono.add(frame(sound, -sound), 0, RATE_HZ)
    assert (mono.level_share(), mono.cancelled_share()) == (0.0, pytest.approx(1.0))
    mono.drain()
    assert (mono.level_share(), mono.cancelled_share()) == (1.0, 0.0)
    mono.add(frame(sound, sound), 0, RATE_HZ)
    assert (mono.level_share(), mono.cancelled_share()) == (pytest.approx(1.0), 0.0)


@pytest.mark.parametrize("constant", [0.01, 0.1, 0.5])
def test_a_constant_part_beside_noise_is_no_cancellation(tmp_path: Path, constant: float):
    for level in 2.0 ** np.arange(-18, -11):
        planes = constant + level * np.stack([signal(1, RATE_HZ), signal(1, RATE_HZ, seed=1)])
        path = write(tmp_path / "a.wav", planes, RATE_HZ, "-c:a", "pcm_f32le")
        assert len(decode_section(str(path), 0.0, None)) == 16_000


@pytest.mark.parametrize("scale", [100, 128, 32_768, 2**23, 2**31])
@pytest.mark.parametrize("codec", ["pcm_f32le", "pcm_f64le"])
def test_case_21_floats_of_integer_size_are_refused(tmp_path: Path, scale: float, codec: str):
    path = write(tmp_path / "a.wav", scale * signal(1, RATE_HZ), RATE_HZ, "-c:a", codec)
    error = reason_of(path)
    assert (error.reason, "its samples reach" in error.message) == (Reason.OUT_OF_RANGE, True)


def test_float_peaks_above_full_scale_are_clipped_and_counted(tmp_path: Path):
    path = write(tmp_path / "a.wav", 4 * signal(1, RATE_HZ), RATE_HZ, "-c:a", "pcm_f32le")
    out = Decode()(in_progress(fakes.clips({"clip_id": "a", "media": str(path)})))
    assert (out["reason"].to_pylist(), out["num_clipped"][0].as_py() > 100) == ([None], True)


def test_case_25_the_default_track_is_read(ten: Path, tmp_path: Path):
    other = write(tmp_path / "other.wav", signal(10, RATE_HZ, seed=9), RATE_HZ)
    for default in (0, 1):
        flags = ("-disposition:a:0", ["0", "default"][1 - default], "-disposition:a:1", ["0", "default"][default])
        ffmpeg("-i", other, "-i", ten, "-map", 0, "-map", 1, "-c:a", "flac", *flags, path := tmp_path / "a.mkv")
        decoded = check_is_the_programs(path, 160_000)
        assert (lag(decoded, signal(10))[1] > 0.99) == bool(default)


def test_without_a_default_the_track_with_most_channels_is_read(ten: Path, tmp_path: Path):
    other = write(tmp_path / "other.wav", signal(10, RATE_HZ, seed=9), RATE_HZ)
    flags = ("-disposition:a:0", 0, "-disposition:a:1", 0, "-ac:a:0", 1, "-ac:a:1", 2)
    ffmpeg("-i", other, "-i", ten, "-map", 0, "-map", 1, "-c:a", "flac", *flags, path := tmp_path / "a.mkv")
    decoded = decode_section(str(path), 0.0, None)
    assert error_level(decoded, program(path, channels=2)) < SAME
    assert lag(decoded, signal(10))[1] > 0.99


# Found together with the cases, and cases that were right from the beginning


def integers(dtype: type, bits: int) -> bytes:
    samples = (signal(2) * 2.0 ** (bits - 1)).astype(dtype).tobytes()
    form = struct.pack("<HHIIHH", 1, 1, 16_000, 16_000 * bits // 8, bits // 8, bits)
    body = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(samples)) + samples
    return b"RIFF" + struct.pack("<I", len(body)) + body


def test_pcm_of_64_bit_integers_is_read(tmp_path: Path):
    path = placed(tmp_path / "a.wav", integers(np.int64, 64))
    np.testing.assert_allclose(decode_section(str(path), 0.0, None), signal(2), atol=1e-6)
    assert error_level(decode_section(str(path), 0.0, None), program(path)) < 1e-5


def test_a_wav_with_two_data_chunks_is_read_like_the_ffmpeg_program(tmp_path: Path):
    first, second = integers(np.int16, 16), integers(np.int16, 16)
    path = placed(tmp_path / "a.wav", first + second[36:])
    decoded, expected = decode_section(str(path), 0.0, None), program(path)
    assert (len(decoded), error_level(decoded, expected) < 1e-5) == (len(expected), True)


@pytest.mark.parametrize(
    ("name", "rate_hz", "options"),
    [
        *((f"{codec}.wav", RATE_HZ, ["-c:a", codec]) for codec in ("pcm_u8", "pcm_s24le", "pcm_s32le", "pcm_f64le")),
        *((f"{codec}.wav", 8000, ["-c:a", codec]) for codec in ("pcm_alaw", "pcm_mulaw", "adpcm_ms")),
        *((f"{rate_hz}.wav", rate_hz, []) for rate_hz in (8000, 22_050, 96_000, 192_000)),
        ("a.w64", RATE_HZ, []),
        ("a.caf", RATE_HZ, []),
        ("alac.caf", RATE_HZ, ["-c:a", "alac"]),
        ("a.aiff", RATE_HZ, []),
        ("a.ac3", RATE_HZ, []),
        ("a.wv", RATE_HZ, []),
    ],
)
def test_cases_33_and_35_headers_rates_and_codecs(tmp_path: Path, name: str, rate_hz: int, options: list[str]):
    path = write(tmp_path / name, signal(2, rate_hz), rate_hz, *options)
    decoded, expected = decode_section(str(path), 0.0, None), program(path, resampler="soxr")
    assert abs(len(decoded) - len(expected)) <= 1
    assert error_level(decoded, expected) < 0.001


def riff(*chunks: tuple[bytes, bytes], data_bytes: int | None = None) -> bytes:
    """A WAV file of these chunks; `data_bytes` is the declared length of the last one."""
    parts = [
        name + struct.pack("<I", len(body) if data_bytes is None or name != b"data" else data_bytes) + body
        for name, body in chunks
    ]
    body = b"WAVE" + b"".join(part + b"\0" * (len(part) % 2) for part in parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


_PCM = struct.pack("<HHIIHH", 1, 1, 16_000, 32_000, 2, 16)
_EXTENSIBLE = struct.pack("<HHIIHH", 0xFFFE, 1, 16_000, 48_000, 3, 24) + struct.pack("<HHI", 22, 20, 4)
_EXTENSIBLE += bytes.fromhex("0100000000001000800000aa00389b71")
_INFO = b"INFOISFT" + struct.pack("<I", 6) + b"Zoom\0\0"


@pytest.mark.parametrize(
    "kind",
    ["plain", "20 bits in 24", "odd list", "zeros in a list", "broadcast", "bytes behind", "odd length", "sphere"],
)
def test_case_33_headers_as_recorders_write_them(tmp_path: Path, kind: str):
    sound = signal(2)
    pcm = np.round(sound * 32767).astype("<i2").tobytes()
    wide = (np.round(sound * 2**19).astype("<i4") << 4).astype("<i4").view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
    sphere = b"NIST_1A\n   1024\nsample_rate -i 16000\nchannel_count -i 1\nsample_n_bytes -i 2\nsample_sig_bits -i 16\n"
    sphere += f"sample_count -i {len(sound)}\nsample_byte_format -s2 01\nsample_coding -s3 pcm\nend_head\n".encode()
    media = {
        "plain": riff((b"fmt ", _PCM), (b"data", pcm)),
        "20 bits in 24": riff((b"fmt ", _EXTENSIBLE), (b"data", wide)),
        "odd list": riff((b"fmt ", _PCM), (b"LIST", _INFO[:-1]), (b"data", pcm)),
        "zeros in a list": riff((b"fmt ", _PCM), (b"LIST", b"INFO" + bytes(384_000)), (b"data", pcm)),
        "broadcast": riff(
            (b"bext", bytes(338) + struct.pack("<Q", 480_000) + bytes(256)), (b"fmt ", _PCM), (b"data", pcm)
        ),
        "bytes behind": riff((b"fmt ", _PCM), (b"data", pcm)) + bytes(100_000),
        "odd length": riff((b"fmt ", _PCM), (b"data", pcm), data_bytes=len(pcm) - 1),
        "sphere": sphere.ljust(1024) + pcm,
    }[kind]
    path = placed(tmp_path / ("a.sph" if kind == "sphere" else "a.wav"), media)
    decoded = decode_section(str(path), 0.0, None)
    assert abs(len(decoded) - len(sound)) <= (kind == "odd length")
    np.testing.assert_allclose(decoded, sound[: len(decoded)], atol=4e-5)
    assert abs(len(program(path)) - len(decoded)) <= 1


def test_case_34_a_list_without_its_pad_byte_is_not_audio(tmp_path: Path):
    media = integers(np.int16, 16)
    odd = media[:36] + b"LIST" + struct.pack("<I", 5) + b"INFOx" + media[36:]
    path = placed(tmp_path / "a.wav", odd)
    assert (len(program(path)), reason_of(path).reason) == (0, Reason.NOT_AUDIO)


def test_case_36_lengths_are_exact(tmp_path: Path):
    for num_samples, length_s in ((163_840, 10.24), (400, 0.025)):
        path = write(tmp_path / "a.wav", signal(length_s), 16_000)
        assert len(decode_section(str(path), 0.0, None)) == num_samples
    for length_s in (0.024, 0.0):
        path = write(tmp_path / "a.wav", signal(length_s), 16_000)
        assert reason_of(path).reason is Reason.TOO_SHORT


def test_case_37_all_channels_count_equally(tmp_path: Path):
    sound = signal(1)
    for channels, at in ((6, 2), (2, 0)):
        planes = np.zeros((channels, len(sound)), np.float32)
        planes[at] = sound
        path = write(tmp_path / "a.wav", planes + 0.3, 16_000, "-c:a", "pcm_s24le")
        np.testing.assert_allclose(decode_section(str(path), 0.0, None), sound / channels + 0.3, atol=1e-6)


@pytest.mark.skipif(not ESC10.is_dir(), reason="needs the clips of ESC-10 next to the project")
def test_case_44_the_fbank_of_real_clips_matches_the_ffmpeg_program():
    clips = [sorted(folder.glob("*.ogg"))[0] for folder in sorted(ESC10.iterdir()) if folder.is_dir()]
    assert len(clips) == 10
    for path in clips:
        expected = torch.from_numpy(program(path, resampler="soxr").copy())  # the other one differs below 8 kHz
        kaldi = torchaudio.compliance.kaldi.fbank(
            (expected - expected.mean()).unsqueeze(0),
            sample_frequency=16_000,
            num_mel_bins=128,
            frame_shift=10,
            htk_compat=True,
            use_energy=False,
            window_type="hanning",
            dither=0.0,
        )
        ours = clip_fbank(decode_section(str(path), 0.0, None))
        assert ours.shape == kaldi.shape
        assert np.abs(ours - kaldi.numpy()).mean() < 0.01
