"""The comparison's models are the functions of their reference implementations, and weights go both ways."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from ast_core.checkpoints import load_original, save_original
from ast_core.errors import ConfigError, DataError
from ast_core.features import FEATURES, KALDI128
from ast_core.models import create_model
from ast_core.models.cnn_transformer import positions
from ast_core.models.pooling import SMALLEST
from ast_core.models.simple import FNetTagger
from ast_core.models.tagger import FrameTagger
from tests import reference
from tests.ast_core.models import comparison

TOLERANCE = 1e-4
"""Relative to the spread of the reference's probabilities. Measured: 1e-5 at most."""

SIMILAR = (3, 4, 9, 11, 13)
"""Cases that differ from others by little, and take seconds."""


def probabilities(model: FrameTagger, fbank_BTM: Tensor) -> Tensor:
    if not isinstance(model, FNetTagger):
        return model(fbank_BTM).sigmoid()
    # The reference clamps where ours has a sigmoid. Everything before it is compared.
    frames_BTD = model.frames(fbank_BTM)
    prob_BTC = model.pooling.frame_logits(frames_BTD).clamp(SMALLEST, 1 - SMALLEST)
    weight_BTC = model.pooling.fc_att(frames_BTD).softmax(dim=1).clamp(SMALLEST, 1 - SMALLEST)
    return (prob_BTC * weight_BTC / weight_BTC.sum(dim=1, keepdim=True)).sum(dim=1)


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=pytest.mark.slow if n in SIMILAR else ()) for n in comparison.cases()]
)
def test_a_model_equals_its_reference_and_weights_survive_the_round_trip(number: int, tmp_path: Path):
    case = comparison.cases()[number]
    model = comparison.model_of(case)
    weights = comparison.weights_of(case, model)
    load_original(model, {f"module.{key}": value for key, value in weights.items()})
    with torch.inference_mode():
        ours = probabilities(model, comparison.input_of(case)).numpy()
    expected = reference.figures("comparison_reference")[f"output_{number}"]
    assert np.abs(ours - expected).max() < TOLERANCE * expected.std()
    assert sum(parameter.numel() for parameter in model.parameters()) == case["params"]

    save_original(tmp_path / "again.pth", model)
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert [key for key, value in weights.items() if not torch.equal(again[f"module.{key}"], value)] == []
    assert again.keys() == {f"module.{key}" for key in model.to_original(model.state_dict())}


# --- the reference's state dicts


def talnet() -> FrameTagger:
    return create_model("talnet", 5, 16, 32, embedding_size=32)


def state_of(model: FrameTagger) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.to_original(model.state_dict()).items()}


@pytest.mark.parametrize("left_out", [r"conv\d", r"conv\."])
def test_one_of_the_two_names_of_a_convolution_is_enough(left_out: str):
    theirs = state_of(talnet())
    model = load_original(talnet(), {key: value for key, value in theirs.items() if not re.match(left_out, key)})
    assert all(torch.equal(value, theirs[key]) for key, value in model.to_original(model.state_dict()).items())


def test_two_names_of_a_convolution_with_different_values_are_refused():
    model, theirs = talnet(), state_of(talnet())
    before = model.encoder[0].conv.weight.clone()
    theirs["conv.0.conv.weight"] += 1
    with pytest.raises(DataError, match=r"conv\.0\.conv\.weight and conv1\.conv\.weight are the same tensor in"):
        load_original(model, theirs)
    assert torch.equal(model.encoder[0].conv.weight, before)


def test_keys_with_and_without_the_prefix_are_refused():
    theirs = state_of(talnet())
    with pytest.raises(DataError, match=r"with and without 'module\.'"):
        load_original(talnet(), theirs | {"module.fc_prob.bias": theirs["fc_prob.bias"]})


@pytest.mark.parametrize("key", ["gru.weight_hh_l0", "conv3.conv.bias"])
def test_a_missing_tensor_of_a_reference_is_named(key: str):
    theirs = {name: value for name, value in state_of(talnet()).items() if not name.startswith("conv.")}
    del theirs[key]
    with pytest.raises(DataError, match=rf"missing \['.*{key.rpartition('.')[0][-6:]}"):
        load_original(talnet(), theirs)


def test_positions_are_written_and_not_read():
    made = create_model("cnn_transformer", 5, 16, 32, embedding_size=32)
    theirs = state_of(made)
    assert torch.equal(theirs["positional_encoding.pe"], positions(16, 32)[None])
    theirs["positional_encoding.pe"] = torch.zeros(1, 400, 32)
    assert load_original(create_model("cnn_transformer", 5, 24, 32, embedding_size=32), theirs).input_shape == (24, 32)


def test_a_model_without_a_reference_says_so(tmp_path: Path):
    with pytest.raises(ConfigError, match="has no reference implementation; use our own format"):
        save_original(tmp_path / "x.pth", create_model("convnext", 2, 64, 64, model_size="atto"))


# --- functions


def test_the_encoder_layer_of_the_cnn_transformer_is_shared():
    twice, thrice = (create_model("cnn_transformer", 5, 16, 32, embedding_size=32, n_trans_layers=n) for n in (2, 3))
    thrice.load_state_dict(twice.state_dict())
    fbank = torch.randn(1, 16, 32)
    assert not torch.allclose(twice.eval()(fbank), thrice.eval()(fbank))


def test_efficientnet_pads_as_for_images_whatever_the_length():
    """b2 is made for images of 260 pixels, which become 130, 65, 33 and 17: three times, both sides get the same."""
    sides = [m.sides[:2] for m in create_model("efficientnet", 2).encoder.modules() if hasattr(m, "sides")]
    assert sides == [(0, 1), (0, 1), (2, 2), (1, 1), (2, 2)]


def test_seconds_per_frame_follow_the_features():
    assert talnet().seconds_per_frame(KALDI128) == pytest.approx(0.04)
    at_22_khz = replace(KALDI128, sample_rate_hz=22_050)  # 10 ms are 220 whole samples there
    assert talnet().seconds_per_frame(at_22_khz) == pytest.approx(4 * 220 / 22_050)
    assert create_model("efficientnet", 2, eff_b=0).seconds_per_frame(FEATURES["kaldi128"]) == pytest.approx(0.32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_pool_layers": 3}, "n_conv_layers is 10 and n_pool_layers is 3; use a multiple of n_pool_layers"),
        ({"embedding_size": 100}, "embedding_size is 100; use a multiple of input_fdim, 64"),
        ({"input_fdim": 80}, "input_fdim is 80; use a multiple of 32"),
        ({"input_tdim": 3}, "input_tdim is 3; use 4 or more"),
    ],
)
def test_convolutions_that_do_not_fit_the_input_are_refused(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        create_model("talnet", 5, **{"input_tdim": 16, "input_fdim": 64} | settings)


# --- ImageNet weights


@pytest.fixture(scope="module")
def image_weights() -> dict[str, Tensor]:
    """timm's weights of MobileNetV2 for colour images, with its classifier, drawn at random."""
    torch.manual_seed(1)
    return timm.create_model("mobilenetv2_100").state_dict()


def test_a_file_of_imagenet_weights_fills_the_encoder(image_weights: dict[str, Tensor], tmp_path: Path):
    torch.save(image_weights, tmp_path / "timm.pth")
    model = create_model("mobilenetv2", 3, imagenet_pretrain=True, imagenet_weights=tmp_path / "timm.pth")
    ours = model.encoder.state_dict()
    torch.testing.assert_close(ours.pop("conv_stem.weight"), image_weights["conv_stem.weight"].sum(1, keepdim=True))
    assert [key for key, value in ours.items() if not torch.equal(value, image_weights[key])] == []


def test_weights_of_another_network_are_refused(image_weights: dict[str, Tensor], tmp_path: Path):
    torch.save(image_weights, tmp_path / "timm.pth")
    with pytest.raises(DataError, match=r"timm\.pth does not fit the model"):
        create_model("efficientnet", 3, eff_b=0, imagenet_pretrain=True, imagenet_weights=tmp_path / "timm.pth")
    with pytest.raises(DataError, match=r"timm's weights of this network: conv1\.weight is missing"):
        create_model("resnet50", 3, imagenet_pretrain=True, imagenet_weights=tmp_path / "timm.pth")


def test_weights_that_cannot_be_fetched_name_the_remedies(monkeypatch: pytest.MonkeyPatch):
    def refuse(name: str, **_: object) -> None:
        raise OSError(f"no network for {name}")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(DataError, match=r"could not fetch mobilenetv2_100\.ra_in1k \(OSError: .*imagenet_weights"):
        create_model("mobilenetv2", 3, imagenet_pretrain=True)
