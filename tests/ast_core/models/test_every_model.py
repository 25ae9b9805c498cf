"""What the rest of the project expects of every model in the registry, including those that are added."""

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ast_core.batch import Norm
from ast_core.checkpoints import ModelConfig, load_model, load_original, save_model, save_original
from ast_core.checkpoints.onnx import save_onnx
from ast_core.errors import ConfigError
from ast_core.features import KALDI128
from ast_core.labels import LabelVocabulary
from ast_core.models import MODELS, create_model
from ast_core.models.tagger import FrameTagger, Tagger
from ast_core.recipe import Recipe
from tests.ast_core.models.small_models import SMALL

NUM_FRAMES, NUM_MEL_BINS = 96, 64
LABELS = LabelVocabulary.from_names(("dog", "cat", "rain", "bell"))
"""As many as EfficientNet has attention heads, so that classes and heads cannot be told apart by their number."""
WITHOUT_REFERENCE = ("convnext",)
ONNX_IN_SECONDS = ("linear",)
BF16_TOLERANCE = 0.15
"""Relative to the spread of the logits, which 50 layers of random weights round differently on each processor.

Measured: 0.007 for ast, talnet, cnn_transformer and efficientnet, 0.066 for mobilenetv2 on a processor with bf16 units.
"""

every_model = pytest.mark.parametrize("name", MODELS)


def recipe(name: str) -> Recipe:
    shape = {"input_tdim": NUM_FRAMES, "input_fdim": NUM_MEL_BINS, "timem": 8, "freqm": 8, "label_dim": len(LABELS)}
    return Recipe(model=name, precision="fp32", **shape | SMALL.get(name, {}))


def config(name: str) -> ModelConfig:
    return ModelConfig(recipe(name), Norm(-4.0, 4.5), LABELS, replace(KALDI128, num_mel_bins=NUM_MEL_BINS))


@cache
def model_of(name: str) -> Tagger:
    """A model in evaluation mode, which tests do not change."""
    torch.manual_seed(0)
    model = new_model(name)
    # Norms and running statistics like those of a trained model: with 0 and 1, an exchange of them would not show.
    for value in model.state_dict().values():
        if value.is_floating_point() and value.ndim == 1:
            value.add_(torch.rand_like(value) * 0.2)
    return model.eval()


def new_model(name: str, **changes: Any) -> Tagger:
    return create_model(**recipe(name).model_args() | changes).eval()


def clips(num_clips: int = 3, num_frames: int = NUM_FRAMES, seed: int = 0) -> Tensor:
    return 0.5 * torch.randn(num_clips, num_frames, NUM_MEL_BINS, generator=torch.Generator().manual_seed(seed))


@every_model
@torch.inference_mode()
def test_shapes_and_types(name: str):
    model, fbank = model_of(name), clips()
    logits, features = model(fbank), model.forward_features(fbank)
    assert (logits.shape, logits.dtype) == ((3, len(LABELS)), torch.float32)
    assert features.shape[0] == 3
    assert features.ndim == 2
    assert logits.isfinite().all()
    assert any(key.startswith(f"{model.head}.") for key in model.state_dict())
    assert model.forward_flops() > 1000


@every_model
@torch.inference_mode()
def test_frames_and_other_lengths_where_a_model_has_them(name: str):
    model = model_of(name)
    if isinstance(model, FrameTagger):
        frames = model.frame_logits(clips(2))
        assert frames.shape == (2, NUM_FRAMES // model.frame_stride, len(LABELS))
        assert frames.isfinite().all()
    if model.takes_any_length:
        assert model(clips(2, num_frames=3 * NUM_FRAMES)).shape == (2, len(LABELS))
    else:
        with pytest.raises(ValueError, match="input is"):
            model(clips(2, num_frames=3 * NUM_FRAMES))


@every_model
@torch.inference_mode()
def test_a_clip_alone_has_the_logits_that_it_has_in_a_batch(name: str):
    model, fbank = model_of(name), clips()
    torch.testing.assert_close(model(fbank)[1:2], model(fbank[1:2]), rtol=1e-4, atol=1e-4)


@every_model
def test_the_gradient_reaches_every_parameter(name: str):
    model = copy.deepcopy(model_of(name)).train()
    target = torch.eye(len(LABELS))[:3]
    torch.nn.functional.binary_cross_entropy_with_logits(model(clips()), target).backward()
    without = [key for key, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []
    assert all(value.grad.isfinite().all() for value in model.parameters())


@every_model
@torch.no_grad()
def test_bf16_differs_from_fp32_by_rounding(name: str):
    model, fbank = model_of(name), clips(2)
    expected = model(fbank)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(fbank)
    assert logits.isfinite().all()
    assert (logits != logits.bfloat16()).any()  # otherwise likely classes would tie
    assert (logits.float() - expected).abs().max() < BF16_TOLERANCE * expected.std()


@every_model
@torch.no_grad()
def test_a_model_folder_and_the_references_format_keep_the_function(name: str, tmp_path: Path):
    model = model_of(name)
    save_model(tmp_path / "model", model.state_dict(), config(name))
    again, read = load_model(tmp_path / "model")
    assert read == config(name)
    torch.testing.assert_close(again(clips()), model(clips()), rtol=1e-4, atol=1e-5)  # loaded weights lie elsewhere
    if name in WITHOUT_REFERENCE:
        with pytest.raises(ConfigError, match="has no reference implementation"):
            save_original(tmp_path / "model.pth", model)
        return
    save_original(tmp_path / "model.pth", model)
    loaded = load_original(new_model(name), tmp_path / "model.pth")
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


@every_model
@torch.no_grad()
def test_a_model_for_other_classes_starts_from_another(name: str):
    model = model_of(name)
    order = [3, 1, 2, 0]
    reordered = new_model(name)
    reordered.start_from(model, order)
    torch.testing.assert_close(reordered(clips()), model(clips())[:, order])
    other = new_model(name, label_dim=7)
    other.start_from(model)
    torch.testing.assert_close(other.forward_features(clips()), model.forward_features(clips()))


@every_model
@torch.no_grad()
def test_an_average_of_weights_includes_running_statistics(name: str):
    """The sum of state dicts, divided by their number, loads. Counters of batches stay whole numbers."""
    first = model_of(name).state_dict()
    second = {key: value + 2 for key, value in first.items()}
    model = new_model(name)
    model.load_state_dict({key: (first[key] + second[key]) / 2 for key in first})
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, first[key] + 1)
        assert value.dtype == first[key].dtype


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ONNX_IN_SECONDS else pytest.mark.slow) for name in MODELS if name != "ast"],
)
def test_onnx_has_the_models_logits(name: str, tmp_path: Path):
    assert save_onnx(tmp_path / "tagger.onnx", model_of(name), config(name)) < 1e-4


@every_model
def test_compiled_parts_are_not_stored(name: str):
    model = copy.deepcopy(model_of(name))
    keys = model.state_dict().keys()
    part = model.part_to_compile()
    assert part is not None
    copied, small_input = part
    assert copied(small_input).shape[0] == 2
    model.compile_parts(backend="eager", dynamic=False)
    assert model.state_dict().keys() == keys


def test_only_training_uses_the_compiled_encoder():
    calls: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        calls.append("compiled")
        return graph

    model = copy.deepcopy(model_of("linear"))
    model.compile_parts(backend=backend, dynamic=False)
    model(clips())
    assert calls == []
    model.train()(clips())
    assert calls != []
