"""The ONNX file that takes a waveform gives the scores of `tag` for each window, in ONNX Runtime alone."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from ast_core.calibration import CalibrationMap, ClassCalibration, ModelCalibration, Threshold
from ast_core.checkpoints import ModelConfig, onnx_waveform
from ast_core.checkpoints.onnx import save_onnx, session, traced
from ast_core.checkpoints.onnx_int8 import save_int8
from ast_core.checkpoints.onnx_waveform import Features, Scores, save_onnx_waveform
from ast_core.errors import DataError
from ast_core.features import KALDI128, SMALL64, FeatureSettings, log_mel
from ast_core.labels import LabelVocabulary
from ast_core.models import create_model
from ast_core.models.tagger import Tagger
from ast_core.recipe import Recipe
from ast_core.tagging import tag
from pipeline.prepare.audio.decode import decode_media
from pipeline.tag.windows import window_starts
from tests import fakes
from tests.ast_core import small
from tests.conftest import SHARED

NUM_FRAMES = 64
LABELS = LabelVocabulary.from_names(["Speech, man", "Éclair", "犬", "dog", "cat"])
SHAPE = {"model": "linear", "hidden": 256, "n_layers": 1, "input_tdim": NUM_FRAMES, "label_dim": len(LABELS)}
CONFIG = ModelConfig(Recipe(**SHAPE, timem=0, freqm=0), small.NORM, LABELS)
WINDOW, HOP = KALDI128.num_samples(NUM_FRAMES), NUM_FRAMES * 160


def calibration(*maps: CalibrationMap) -> ModelCalibration:
    return ModelCalibration(
        tuple(ClassCalibration(one, Threshold(0.1 * (i + 1), 1.0, 1.0), 20, True) for i, one in enumerate(maps))
    )


CALIBRATION = calibration(
    CalibrationMap("none"),
    CalibrationMap("temperature", (2.5,)),
    CalibrationMap("platt", (0.7, -1.1)),
    CalibrationMap("isotonic", (0.1, 0.4, 0.4001, 0.8, 0.0, 0.2, 0.6, 0.9)),
    CalibrationMap("isotonic", (0.5, 0.3)),
)


@pytest.fixture(scope="module")
def model() -> Tagger:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return create_model(**CONFIG.recipe.model_args()).eval()


@pytest.fixture(scope="module")
def network(model: Tagger, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("network") / "network.onnx"
    save_onnx(file, model, CONFIG)
    return file


@pytest.fixture(scope="module")
def file(network: Path) -> Path:
    file = network.parent / "tagger.onnx"
    assert save_onnx_waveform(file, network, CONFIG, CALIBRATION, thresholds=CALIBRATION.thresholds().tolist()) < 1e-4
    return file


@pytest.fixture(scope="module", autouse=True)
def features_are_traced_once() -> Iterator[None]:
    """Tracing them takes seconds."""
    programs: list[torch.onnx.ONNXProgram] = []

    def once(module: torch.nn.Module, *args: object, **kwargs: object) -> torch.onnx.ONNXProgram:
        if not isinstance(module, Features):
            return traced(module, *args, **kwargs)
        if not programs:
            programs.append(traced(module, *args, **kwargs))
        return programs[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_waveform, "traced", once)
        yield


def run(file: Path, waveform: np.ndarray) -> list[np.ndarray]:
    return session(file, num_threads=1).run(["scores", "start_s", "end_s"], {"waveform": waveform})


@pytest.mark.parametrize(
    "num_samples", [400, WINDOW - 1, WINDOW, WINDOW + 399, WINDOW + 400, WINDOW + HOP, 3 * WINDOW + 1000]
)
def test_each_window_gets_the_calibrated_scores_of_tag(file: Path, model: Tagger, num_samples: int):
    waveform = 1.2 * fakes.tone(700.0, num_samples / 16_000) + fakes.noise(num_samples / 16_000, seed=num_samples)
    scores, start_s, end_s = run(file, waveform)
    starts = window_starts(num_samples, WINDOW, HOP, 400)
    assert start_s == pytest.approx(np.array(starts) / 16_000)
    assert end_s == pytest.approx(np.minimum(np.array(starts) + HOP, num_samples) / 16_000)
    raw = np.stack([tag(model, CONFIG, waveform[start : start + WINDOW]).numpy() for start in starts])
    np.testing.assert_allclose(scores, CALIBRATION(raw), atol=2e-4)


def test_less_sound_than_a_frame_has_no_window(file: Path):
    scores, start_s, _ = run(file, np.zeros(399, np.float32))
    assert (scores.shape, start_s.shape) == ((0, len(LABELS)), (0,))


def test_the_metadata_have_labels_thresholds_norm_and_features(file: Path):
    metadata = {entry.key: json.loads(entry.value) for entry in onnx.load(file).metadata_props}
    assert [label["display_name"] for label in metadata["labels"]] == list(LABELS.names)
    assert metadata["thresholds"] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert metadata["is_calibrated"] is True
    assert metadata["features"]["sample_rate_hz"] == 16_000
    assert metadata["norm"]["mean"] == small.NORM.mean


def test_without_a_calibration_scores_are_sigmoids(network: Path, model: Tagger, tmp_path: Path):
    save_onnx_waveform(tmp_path / "raw.onnx", network, CONFIG, thresholds=[0.5] * len(LABELS))
    waveform = fakes.noise(0.5)
    np.testing.assert_allclose(run(tmp_path / "raw.onnx", waveform)[0][0], tag(model, CONFIG, waveform), atol=2e-4)


def test_a_file_with_other_scores_is_not_kept(network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Scores, "forward", lambda _, logits: logits.sigmoid()[0] + 0.01)
    with pytest.raises(DataError, match=r"scores are off by 1\.0e-02; it was not kept"):
        save_onnx_waveform(tmp_path / "new.onnx", network, CONFIG, thresholds=[0.5] * len(LABELS))
    assert list(tmp_path.iterdir()) == []


def test_calibration_in_torch_equals_that_in_numpy():
    scores = np.linspace(0, 1, 401, dtype=np.float32)
    logits = torch.from_numpy(scores).logit().clamp(-30, 30)
    module = Scores(CALIBRATION, len(LABELS))
    ours = np.stack([module(logit.expand(1, len(LABELS))).numpy() for logit in logits])
    expected = CALIBRATION(np.repeat(logits.sigmoid().numpy()[:, None], len(LABELS), axis=1))
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def features_session(
    settings: FeatureSettings, num_frames: int, folder: Path
) -> tuple[Features, onnxruntime.InferenceSession]:
    recipe = Recipe(**SHAPE | {"input_tdim": num_frames}, input_fdim=settings.num_mel_bins, timem=0, freqm=0)
    features = Features(ModelConfig(recipe, small.NORM, LABELS, settings)).eval()
    whole = (torch.zeros(features.window_samples), torch.tensor(features.window_samples))
    features(*whole)
    traced(features, whole, ["samples", "num_samples"], ["fbank"]).save(folder / "features.onnx", external_data=False)
    return features, session(folder / "features.onnx", num_threads=1)


def sounds() -> dict[str, np.ndarray]:
    """Generated sounds, and recordings if they are there."""
    noise, silence = fakes.noise(5.1), np.zeros(81_600, np.float32)
    chord = sum(fakes.tone(hz, 5.1) / 4 for hz in (262.0, 330.0, 392.0))
    found = {"noise": noise, "quiet noise": noise / 1000, "silence": silence, "chord in noise": chord + noise / 300}
    found["short"] = noise[:20_000]
    for path in sorted((SHARED / "data" / "esc10").glob("*/1-*-A.ogg"))[:20]:
        found[path.name] = np.clip(decode_media(str(path), None, 0.0, None)[0], -1, 1)
    return found


@pytest.mark.parametrize(("settings", "num_frames"), [(KALDI128, 498), (SMALL64, 200)], ids=["kaldi128", "small64"])
def test_features_in_the_file_equal_log_mel(settings: FeatureSettings, num_frames: int, tmp_path: Path):
    features, run_features = features_session(settings, num_frames, tmp_path)
    norm = small.NORM
    for name, sound in sounds().items():
        sound = sound[: features.window_samples]
        samples = np.zeros(features.window_samples, np.float32)
        samples[: len(sound)] = sound
        (found,) = run_features.run(None, {"samples": samples, "num_samples": np.array(len(sound))})
        waveform = torch.from_numpy(sound)
        expected = log_mel(waveform - waveform.mean(), settings)[:num_frames]
        raw = found[0] * norm.divisor * norm.std + norm.mean
        in_nats = settings.log_scale.nats_per_unit * np.abs(raw[: len(expected)] - expected.numpy())
        assert in_nats.max() < 1e-3, name
        assert np.abs(raw[len(expected) :]).max(initial=0) < 1e-6, "padding is 0"


@pytest.mark.parametrize(
    ("shape", "share"),
    [
        ({"model": "talnet", "embedding_size": 256}, 0.35),  # convolutions and a GRU
        pytest.param({"model": "mobilenetv2", "imagenet_pretrain": False}, 0.3, marks=pytest.mark.slow),
    ],
)
def test_int8_weights_of_convolutions_are_stored_small_and_compute_alike(
    shape: dict[str, object], share: float, tmp_path: Path
):
    recipe = Recipe(**shape, input_tdim=NUM_FRAMES, label_dim=len(LABELS), timem=0, freqm=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model(**recipe.model_args()).eval()
    save_onnx(tmp_path / "network.onnx", model, ModelConfig(recipe, small.NORM, LABELS))
    save_int8(tmp_path / "int8.onnx", tmp_path / "network.onnx")
    sizes = [(tmp_path / name).stat().st_size for name in ("int8.onnx", "network.onnx")]
    assert sizes[0] < share * sizes[1]
    fbank = fakes.noise(4 * NUM_FRAMES * 128 / 16_000).reshape(4, NUM_FRAMES, 128) * 3
    after, before = (session(tmp_path / n).run(["logits"], {"fbank": fbank})[0] for n in ("int8.onnx", "network.onnx"))
    assert 0 < np.abs(after - before).max() < 0.15 * before.std()


def test_int8_weights_make_the_file_smaller_and_change_scores_little(network: Path, file: Path, tmp_path: Path):
    save_int8(tmp_path / "int8.onnx", network)
    assert (tmp_path / "int8.onnx").stat().st_size < 0.4 * network.stat().st_size
    save_onnx_waveform(
        tmp_path / "tagger.onnx", tmp_path / "int8.onnx", CONFIG, CALIBRATION, thresholds=[0.5] * 5, tolerance=0.05
    )
    waveform = fakes.noise(1.0)
    np.testing.assert_allclose(run(tmp_path / "tagger.onnx", waveform)[0], run(file, waveform)[0], atol=0.02)
    # Two products of an input of 8 bits and a weight of 7 bits fit into 16 bits on every processor.
    stored = [onnx.numpy_helper.to_array(each) for each in onnx.load(tmp_path / "int8.onnx").graph.initializer]
    weights = [each for each in stored if each.dtype == np.int8 and each.ndim == 2]
    assert weights
    assert max(np.abs(each.astype(int)).max() for each in weights) <= 64
