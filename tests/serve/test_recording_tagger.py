"""From the body of a request to its tags: the answers of tag.py, for any container and raw samples; else a reason."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.prepare.audio.mono import Resampler
from pipeline.serve.limits import Limits
from pipeline.serve.recording_tagger import RecordingTagger
from pipeline.serve.refusals import Refusal
from pipeline.serve.upload import Pcm, Upload
from pipeline.tag.events import EventSettings
from pipeline.tag.inputs import find_inputs
from pipeline.tag.predictor import Predicted, Predictor
from pipeline.tag.work import TagSettings, settings_for, tag_here
from tests import fakes
from tests.tag import stub

LIMITS = Limits(max_recording_s=30.0, timeout_s=20.0)


@pytest.fixture(scope="module")
def settings() -> TagSettings:
    return settings_for([stub.member()], np.full(3, 0.5), window_s=1.0, hop_s=0.5, events=EventSettings())


@pytest.fixture(scope="module")
def tagger(settings: TagSettings) -> Iterator[RecordingTagger]:
    predictor = Predictor([stub.member()], torch.device("cpu"), embeddings=False, frames=False)
    tagger = RecordingTagger(settings, stub.LABELS, predictor, LIMITS, num_readers=1)
    yield tagger
    tagger.stop()


@pytest.fixture(scope="module")
def waveform() -> np.ndarray:
    return stub.mixture(12.0, 2, seed=3)[0]


def refusal(tagger: RecordingTagger, upload: Upload) -> Refusal:
    with pytest.raises(Refusal) as raised:
        tagger(upload)
    return raised.value


@pytest.mark.parametrize("suffix", ["wav", "mp3", "webm"])
def test_a_file_gets_the_tags_of_tag_py(
    tagger: RecordingTagger, settings: TagSettings, waveform: np.ndarray, tmp_path: Path, suffix: str
):
    path = fakes.write_media(tmp_path / f"r.{suffix}", waveform)
    answer = tagger(Upload(path.read_bytes(), top=2, window_scores=True))
    ((_, expected),) = tag_here(find_inputs([str(path)]), [stub.member()], settings, "cpu")
    names = stub.LABELS.names
    assert [(e["label"], e["start_s"], e["end_s"]) for e in answer["events"]] == [
        (names[label], round(start_s, 3), round(end_s, 3))
        for label, start_s, end_s in zip(
            expected.events.label, expected.events.start_s, expected.events.end_s, strict=True
        )
    ]
    assert len(answer["events"]) == answer["num_events"] >= 2
    assert [w["start_s"] for w in answer["windows"]] == pytest.approx(expected.start_s, abs=1e-3)
    assert {len(w["classes"]) for w in answer["windows"]} == {2}
    best = int(expected.scores_WC.max(axis=0).argmax())
    assert answer["classes"][0] == {"label": names[best], "mid": stub.LABELS.mids[best], "score": 0.9526}
    json.dumps(answer)


def test_it_says_up_to_where_windows_are_read(tagger: RecordingTagger):
    told: list[float] = []
    waveform = fakes.noise(29.0)
    answer = tagger(Upload(waveform.astype("<f4").tobytes(), Pcm("f32le", 16_000)), told.append)
    assert len(told) > 1
    assert told == sorted(told)
    assert told[-1] == pytest.approx(answer["end_s"])


@pytest.mark.parametrize(("kind", "scale"), [("s16le", 32_767.0), ("f32le", 1.0)])
def test_raw_samples_get_the_tags_of_a_file(tagger: RecordingTagger, waveform: np.ndarray, kind: str, scale: float):
    at_16k = (waveform * scale).astype({"s16le": "<i2", "f32le": "<f4"}[kind]).tobytes()
    answer = tagger(Upload(at_16k, Pcm(kind, 16_000)))
    resampler = Resampler(48_000)
    faster = np.concatenate([resampler.add(16_000, waveform), resampler.finish()])
    at_48k = (faster * scale).astype({"s16le": "<i2", "f32le": "<f4"}[kind]).tobytes()
    assert tagger(Upload(at_48k, Pcm(kind, 48_000)))["events"] == answer["events"]
    assert answer["num_events"] >= 2


def test_a_threshold_of_the_request_decides_its_events(tagger: RecordingTagger, waveform: np.ndarray):
    body = waveform.astype("<f4").tobytes()
    assert tagger(Upload(body, Pcm("f32le", 16_000), threshold=0.96))["events"] == []


def test_what_is_no_recording_gets_a_reason(tagger: RecordingTagger, tmp_path: Path, waveform: np.ndarray):
    ogg = fakes.write_media(tmp_path / "r.ogg", waveform).read_bytes()
    playlist = b"#EXTM3U\n#EXTINF:5\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
    for body in (b"not audio", ogg[:100], playlist, b"\x00" * 5000, b"<svg onload=alert(1)>"):
        found = refusal(tagger, Upload(body))
        assert (found.status, found.reason) == (422, "not_audio")
    for body, reason in (
        (b"123", "not_audio"),
        (np.full(16_000, np.nan, "<f4").tobytes(), "not_audio"),
        (np.full(16_000, 1e6, "<f4").tobytes(), "out_of_range"),
        (np.zeros(100, "<f4").tobytes(), "too_short"),
    ):
        assert refusal(tagger, Upload(body, Pcm("f32le", 16_000))).reason == reason


def test_too_long_a_recording_is_refused(tagger: RecordingTagger, tmp_path: Path):
    path = fakes.write_media(tmp_path / "r.flac", fakes.noise(31.0))
    for upload in (Upload(path.read_bytes()), Upload(np.zeros(31 * 16_000, "<f4").tobytes(), Pcm("f32le", 16_000))):
        found = refusal(tagger, upload)
        assert (found.status, found.reason) == (413, "too_long")
        assert found.message == "a request may have 30 s of sound; jobs/tag.py takes any length"


def test_a_damaged_recording_says_what_is_lost(tagger: RecordingTagger, tmp_path: Path, waveform: np.ndarray):
    body = fakes.write_media(tmp_path / "r.wav", waveform).read_bytes()
    answer = tagger(Upload(body[: len(body) // 2]))
    (lost,) = answer["lost"]
    assert (lost["reason"], lost["start_s"]) == ("truncated", pytest.approx(6.0, abs=0.1))


def test_a_recording_has_its_time_and_the_next_one_is_tagged(settings: TagSettings, tmp_path: Path):
    predictor = Predictor([stub.member()], torch.device("cpu"), embeddings=False, frames=False)
    tagger = RecordingTagger(settings, stub.LABELS, predictor, Limits(timeout_s=0.01), num_readers=1)
    body = fakes.write_media(tmp_path / "r.mp3", fakes.noise(5.0)).read_bytes()
    found = refusal(tagger, Upload(body))
    assert (found.status, found.reason) == (504, "timeout")
    tagger.limits, tagger._readers.queue[0].limit_s = LIMITS, LIMITS.timeout_s
    assert tagger(Upload(body))["end_s"] == pytest.approx(5.0, abs=0.1)
    tagger.stop()


class SlowScorer:
    """Scores 0.1, a tenth of a second after it is asked."""

    input_frames = 100

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, fbank_NTM: np.ndarray) -> Predicted:
        self.num_calls += 1
        time.sleep(0.1)
        return Predicted(np.full((len(fbank_NTM), 3), 0.1, np.float32), None, None)


@pytest.mark.parametrize("is_file", [False, True])
@pytest.mark.parametrize("ends", ["time", "request"])
def test_scoring_stops_when_nobody_waits_for_the_answer(
    settings: TagSettings, tmp_path: Path, is_file: bool, ends: str
):
    scorer, waveform = SlowScorer(), fakes.noise(20.0)  # 39 windows, so five calls
    tagger = RecordingTagger(settings, stub.LABELS, scorer, LIMITS, num_readers=1)
    upload = Upload(waveform.astype("<f4").tobytes(), Pcm("f32le", 16_000))
    if is_file:
        upload = Upload(fakes.write_media(tmp_path / "r.wav", waveform).read_bytes())
        tagger(upload)  # the process that decodes takes half a second to start
    scorer.num_calls, tagger.limits = 0, Limits(timeout_s=0.15 if ends == "time" else 20.0)
    with pytest.raises(Refusal) as raised:
        tagger(upload, is_wanted=lambda: ends == "time" or scorer.num_calls < 2)
    tagger.stop()
    assert (raised.value.status, raised.value.reason) == (504, "timeout")
    assert scorer.num_calls <= 2


def test_answers_name_no_file_of_the_server(tagger: RecordingTagger, waveform: np.ndarray):
    for body in (b"not audio", waveform.astype("<f4").tobytes()[:-1], b"RIFF\x00\x00\x00\x00WAVE"):
        for pcm in (None, Pcm("f32le", 16_000)):
            try:
                text = json.dumps(tagger(Upload(body, pcm)))
            except Refusal as found:
                text = found.message
            assert "/" not in text.replace("jobs/tag.py", ""), text
