"""Decoding: the right samples, at the right rate, or the right reason."""

import io
from pathlib import Path

import av
import numpy as np
import pytest

from ast_core.features import KALDI128
from pipeline.prepare.audio.decode import Decode, decode_section
from pipeline.prepare.clip import ClipError, Reason, each_clip, in_progress
from tests import fakes


def lag_samples(waveform: np.ndarray, original: np.ndarray, start_s: float, search: int = 3000) -> int:
    """By how many samples `waveform` begins too late in `original`: the peak of their correlation."""
    first = round(start_s * KALDI128.sample_rate_hz) - search
    around = original[first : first + len(waveform) + 2 * search]
    size = 1 << (len(around) + len(waveform)).bit_length()
    correlation = np.fft.irfft(np.fft.rfft(around, size) * np.conj(np.fft.rfft(waveform, size)))
    return int(np.argmax(correlation[: 2 * search])) - search


@pytest.mark.parametrize("suffix", ["flac", "wav"])
@pytest.mark.parametrize("start_s", [0.5, 3.0, 7.137, 25.5])
def test_a_section_of_lossless_media_is_exact_to_the_sample(tmp_path: Path, suffix: str, start_s: float):
    original = fakes.noise(32)
    path = fakes.write_media(tmp_path / f"a.{suffix}", original)
    section = decode_section(str(path), start_s, 4.0)
    assert len(section) == 4 * KALDI128.sample_rate_hz
    assert lag_samples(section, original, start_s) == 0


@pytest.mark.parametrize("suffix", ["webm", "m4a", "ogg"])
def test_seeking_gives_the_same_samples_as_decoding_from_the_start(tmp_path: Path, suffix: str):
    path = fakes.write_media(tmp_path / f"a.{suffix}", fakes.noise(32))
    whole = decode_section(str(path), 0.0, None)
    for start_s in (0.5, 7.137, 25.5):
        section = decode_section(str(path), start_s, 4.0)
        assert len(section) == 4 * KALDI128.sample_rate_hz
        assert lag_samples(section, whole, start_s) == 0


def test_samples_of_16_khz_pcm_are_unchanged(tmp_path: Path):
    original = np.round(fakes.noise(2) * 2**15).astype(np.int16)
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=KALDI128.sample_rate_hz, layout="mono")
        frame = av.AudioFrame.from_ndarray(original[None], format="s16", layout="mono")
        frame.rate = KALDI128.sample_rate_hz
        container.mux(stream.encode(frame))
    decoded = decode_section(str(tmp_path / "a.wav"), 0.0, None)
    np.testing.assert_array_equal(decoded, original.astype(np.float32) / 2**15)


def test_stereo_becomes_the_mean_of_its_channels(tmp_path: Path):
    original = fakes.noise(2)
    path = fakes.write_media(tmp_path / "a.flac", original, channels=2)
    np.testing.assert_allclose(decode_section(str(path), 0.0, None), original, atol=2**-14)


def test_a_resampled_tone_keeps_its_pitch_and_level(tmp_path: Path):
    path = fakes.write_media(tmp_path / "a.wav", fakes.tone(1000, 4))  # 22.05 kHz
    decoded = decode_section(str(path), 1.0, 2.0)
    np.testing.assert_allclose(np.abs(np.fft.rfft(decoded)).argmax() / 2.0, 1000, atol=0.5)
    np.testing.assert_allclose(np.sqrt((decoded**2).mean()), 0.5 / np.sqrt(2), rtol=0.01)


def test_a_section_past_the_end_is_truncated_with_the_available_length(tmp_path: Path):
    path = fakes.write_media(tmp_path / "a.webm", fakes.noise(12))
    with pytest.raises(ClipError, match=r"2\.\d\d s of 10\.00 s asked for") as caught:
        decode_section(str(path), 10.0, 10.0)
    assert caught.value.reason is Reason.TRUNCATED


@pytest.mark.parametrize(("start_s", "there_s"), [(9.5, 0.5), (10.0, 0.0), (12.0, 0.0)])
def test_a_section_past_a_known_end_says_where_the_recording_ends(tmp_path: Path, start_s: float, there_s: float):
    path = fakes.write_media(tmp_path / "a.wav", fakes.noise(10))
    with pytest.raises(ClipError) as caught:
        decode_section(str(path), start_s, 1.0)
    assert caught.value.reason is Reason.TRUNCATED
    assert caught.value.message == f"{there_s:.2f} s of 1.00 s asked for; the recording ends at 10.00 s"
    path.write_bytes(path.read_bytes()[:100_000])  # the header promises more than there is
    with pytest.raises(ClipError, match=r"of 1\.00 s asked for$"):
        decode_section(str(path), 5.0, 1.0)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "webm", "m4a", "mp3"])
def test_a_file_no_longer_than_the_section_is_the_section_if_allowed(tmp_path: Path, suffix: str):
    clip = str(fakes.write_media(tmp_path / f"clip.{suffix}", fakes.noise(10)))
    expected = decode_section(clip, 0.0, 10.0)
    for start_s in (3.0, 30.0):
        np.testing.assert_array_equal(decode_section(clip, start_s, 10.0, may_be_clip=True), expected)
        with pytest.raises(ClipError) as caught:
            decode_section(clip, start_s, 10.0)
        assert caught.value.reason is Reason.TRUNCATED
    recording = str(fakes.write_media(tmp_path / f"recording.{suffix}", fakes.noise(12)))
    expected = decode_section(recording, 2.0, 10.0)
    np.testing.assert_array_equal(decode_section(recording, 2.0, 10.0, may_be_clip=True), expected)
    with pytest.raises(ClipError) as caught:
        decode_section(recording, 30.0, 10.0, may_be_clip=True)
    assert caught.value.reason is Reason.TRUNCATED


def test_a_recording_that_ends_a_little_early_keeps_its_length(tmp_path: Path):
    path = fakes.write_media(tmp_path / "a.flac", fakes.noise(9.8))
    assert len(decode_section(str(path), 0.0, 10.0)) == round(9.8 * KALDI128.sample_rate_hz)


def test_a_file_cut_in_its_middle_is_truncated(tmp_path: Path):
    path = fakes.write_media(tmp_path / "a.webm", fakes.noise(30))
    half = path.read_bytes()[: path.stat().st_size // 2]
    assert len(decode_section(io.BytesIO(half), 2.0, 5.0)) == 5 * KALDI128.sample_rate_hz
    with pytest.raises(ClipError) as caught:
        decode_section(io.BytesIO(half), 20.0, 5.0)
    assert caught.value.reason is Reason.TRUNCATED


def test_a_whole_recording_shorter_than_its_header_says_is_truncated(tmp_path: Path):
    whole = fakes.write_media(tmp_path / "a.webm", fakes.noise(30)).read_bytes()
    for start_s in (0.0, 12.0):
        decoded = decode_section(io.BytesIO(whole), start_s, None)
        assert len(decoded) / KALDI128.sample_rate_hz == pytest.approx(30 - start_s, abs=0.01)
        with pytest.raises(ClipError, match=rf"\d\.\d\d s of {30 - start_s:.0f}\.\d\d s by its header") as caught:
            decode_section(io.BytesIO(whole[: len(whole) // 2]), start_s, None)
        assert caught.value.reason is Reason.TRUNCATED


@pytest.mark.parametrize("content", [b"", b"<html><body>Sign in</body></html>", bytes(range(256)) * 40])
def test_non_audio_is_refused_as_such(content: bytes):
    with pytest.raises(ClipError) as caught:
        decode_section(io.BytesIO(content), 0.0, 5.0)
    assert caught.value.reason is Reason.NOT_AUDIO


def test_audio_below_one_frame_or_above_five_minutes_is_refused(tmp_path: Path):
    for duration_s, reason in ((0.02, Reason.TOO_SHORT), (301.0, Reason.TOO_LONG)):
        path = fakes.write_media(tmp_path / "a.flac", fakes.noise(duration_s))
        with pytest.raises(ClipError) as caught:
            decode_section(str(path), 0.0, None)
        assert caught.value.reason is reason


def test_a_batch_keeps_each_row_with_its_waveform_or_reason(tmp_path: Path):
    good = fakes.write_media(tmp_path / "good.flac", fakes.noise(1))
    silent = fakes.write_media(tmp_path / "silent.flac", np.zeros(16_000, np.float32))
    rows = fakes.clips(
        {"clip_id": "good", "media": str(good)},
        {"clip_id": "silent", "media": str(silent)},
        {"clip_id": "missing", "media": str(tmp_path / "nothing.flac")},
    )
    out = Decode()(in_progress(rows))
    assert out["reason"].to_pylist() == [None, "silent", "missing_file"]
    assert [len(waveform) for waveform in out["waveform"].to_pylist()] == [16_000, 0, 0]
    assert out["end_s"].to_pylist() == [1.0, None, None]
    assert Decode(keep_silent=True)(in_progress(rows))["reason"].to_pylist() == [None, None, "missing_file"]


def test_the_message_tells_digital_silence_from_very_quiet_sound(tmp_path: Path):
    messages = []
    for peak in (0.0, 1e-5):
        with av.open(str(tmp_path / "a.wav"), "w") as container:
            stream = container.add_stream("pcm_f32le", rate=16_000, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.full((1, 16_000), peak, np.float32), format="flt", layout="mono")
            frame.rate = 16_000
            container.mux(stream.encode(frame))
        out = Decode()(in_progress(fakes.clips({"clip_id": "a", "media": str(tmp_path / "a.wav")})))
        messages += out["message"].to_pylist()
    assert [message.partition(";")[0] for message in messages] == ["digital silence", "silence (peak -100 dBFS)"]


def test_an_unforeseen_error_becomes_a_row_that_is_tried_again():
    def work(row: dict) -> str:
        if row["clip_id"] == "odd":
            raise AttributeError("a library's own\nmistake")
        return "fine"

    rows = in_progress(fakes.clips({"clip_id": "odd", "media": "x"}, {"clip_id": "good", "media": "y"}))
    rows, results = each_clip(rows, "decode", work)
    assert results == [None, "fine"]
    assert rows["reason"].to_pylist() == ["unforeseen", None]
    assert rows["message"][0].as_py() == "AttributeError: a library's own mistake"
    assert Reason.UNFORESEEN.retry


def test_peaks_beyond_full_scale_are_clipped_and_counted(tmp_path: Path):
    loud = np.tile(np.float32([0.9, -0.9]), 8000)
    with av.open(str(tmp_path / "loud.wav"), "w") as container:
        stream = container.add_stream("pcm_f32le", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(2 * loud[None], format="flt", layout="mono")
        frame.rate = 16_000
        container.mux(stream.encode(frame))
    out = Decode()(in_progress(fakes.clips({"clip_id": "loud", "media": str(tmp_path / "loud.wav")})))
    assert out["num_clipped"].to_pylist() == [16_000]
    assert np.abs(out["waveform"].combine_chunks().flatten().to_numpy()).max() == 1.0
