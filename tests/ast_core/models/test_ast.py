"""The network equals the reference implementation; weights come from the given source or are refused by name."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ast_core import ASTModel
from ast_core.checkpoints import load_original
from ast_core.errors import ConfigError, DataError
from ast_core.models.patchout import Patchout
from ast_core.models.pretrained import resize_pos_embed
from ast_core.models.shapes import MODEL_SIZES
from tests import reference
from tests.ast_core import hostile, small

LOGITS_TOLERANCE = 2e-5
"""Relative to the spread of the reference's logits, for float32 rounding in another order of summation."""
TINY_TIMM_NAME = MODEL_SIZES["tiny224"][0]


def shape_of(case: dict) -> dict:
    return {key: case[key] for key in ("fstride", "tstride", "input_fdim", "input_tdim")}


def deit_weights(model_size: str, salt: str = "public-deit") -> dict[str, Tensor]:
    with torch.device("meta"):  # only shapes
        shapes = {key: tuple(v.shape) for key, v in timm.create_model(MODEL_SIZES[model_size][0]).state_dict().items()}
    return reference.draw_all(shapes, salt)


@pytest.fixture(scope="module")
def deit_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A file of DeiT weights by model size: tiny224 as DeiT's authors publish it, the others as timm does."""
    folder = tmp_path_factory.mktemp("deit")

    def file_of(model_size: str) -> Path:
        file = folder / (f"{model_size}.pth" if model_size == "tiny224" else f"{model_size}.safetensors")
        if not file.exists() and file.suffix == ".pth":
            torch.save({"model": deit_weights(model_size)}, file)
        elif not file.exists():
            save_file(deit_weights(model_size), file)
        return file

    return file_of


@pytest.fixture(scope="module")
def audioset_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AudioSet checkpoint in the format that AST's authors publish."""
    with torch.device("meta"):
        shapes = reference.original_shapes(ASTModel(imagenet_pretrain=False))
    file = tmp_path_factory.mktemp("audioset") / "audioset_10_10.pth"
    torch.save({f"module.{key}": value for key, value in reference.draw_all(shapes, "public-as").items()}, file)
    return file


def test_the_state_dict_equals_the_references_without_its_image_heads():
    case = reference.described()["logits"][0]
    with torch.device("meta"):
        model = ASTModel(case["label_dim"], **shape_of(case), model_size=case["model_size"], imagenet_pretrain=False)
    listed = {key: tuple(shape) for key, shape in reference.described()["state_dict_of_case_0"].items()}
    assert reference.original_shapes(model) == listed
    assert listed.keys() - model.state_dict().keys() == {
        f"v.{head}.{kind}" for head in ("head", "head_dist") for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("case_index", range(8))
def test_logits_parameters_and_tokens_equal_the_references(case_index: int):
    case = reference.described()["logits"][case_index]
    model = ASTModel(case["label_dim"], **shape_of(case), model_size=case["model_size"], imagenet_pretrain=False)
    weights = reference.draw_all(reference.original_shapes(model), reference.described()["salt"])
    load_original(model, {f"module.{key}": value for key, value in weights.items()})
    rng = np.random.Generator(np.random.PCG64(case["input_seed"]))
    fbank = rng.standard_normal((2, case["input_tdim"], case["input_fdim"]), dtype=np.float32) * case["input_scale"]
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(fbank)).numpy()
    expected = reference.figures("ast_reference")[f"logits_{case_index}"]
    assert np.abs(logits - expected).max() < LOGITS_TOLERANCE * expected.std()
    unused = sum(weight.numel() for key, weight in weights.items() if key.startswith("v.head"))
    assert sum(parameter.numel() for parameter in model.parameters()) == case["n_params"] - unused
    assert model.v.pos_embed.shape[1] == case["tokens"]


@pytest.mark.parametrize("case_index", range(7))
def test_deit_weights_are_adapted_as_in_the_reference(case_index: int, deit_file: Callable[[str], Path]):
    case = reference.described()["deit_adaptation"][case_index]
    file = deit_file(case["model_size"])
    model = ASTModel(10, **shape_of(case), model_size=case["model_size"], imagenet_weights=file)
    expected = reference.figures("ast_reference")
    assert_pos_embed(model, expected[f"deit_pos_embed_{case_index}"], expected[f"deit_pos_sum_{case_index}"])
    filters = expected[f"deit_proj_{case_index}"]
    ours = model.v.patch_embed.proj.weight.detach().numpy()[: len(filters)]
    np.testing.assert_allclose(ours, filters, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case_index", range(4))
def test_an_audioset_checkpoint_is_adapted_as_in_the_reference(case_index: int, audioset_file: Path):
    case = reference.described()["audioset_adaptation"][case_index]
    model = ASTModel(
        case["label_dim"],
        **shape_of(case),
        audioset_pretrain=True,
        audioset_weights=audioset_file,
    )
    expected = reference.figures("ast_reference")
    assert_pos_embed(model, expected[f"as_pos_embed_{case_index}"], expected[f"as_pos_sum_{case_index}"])
    name = "v.blocks.11.mlp.fc2.weight"
    assert torch.equal(model.state_dict()[name], reference.draw(name, (768, 3072), "public-as"))
    assert model.mlp_head[1].weight.shape == (case["label_dim"], 768)


def assert_pos_embed(model: ASTModel, first_channels: np.ndarray, sums: np.ndarray) -> None:
    pos_embed = model.v.pos_embed.detach().numpy()[0]
    np.testing.assert_allclose(pos_embed[:, : first_channels.shape[1]], first_channels, rtol=0, atol=1e-6)
    whole = pos_embed.astype(np.float64)
    np.testing.assert_allclose([whole.sum(), np.abs(whole).sum()], sums, rtol=1e-6, atol=1e-3)


def test_deit_weights_fill_every_parameter_except_the_classifier(deit_file: Callable[[str], Path]):
    weights = deit_weights("tiny224")
    loaded = ASTModel(5, **small.SHAPE, imagenet_weights=deit_file("tiny224")).v.state_dict()
    adapted = {"pos_embed", "patch_embed.proj.weight"}
    assert loaded.keys() == {key for key in weights if not key.startswith("head")}
    assert [key for key in loaded.keys() - adapted if not torch.equal(loaded[key], weights[key])] == []
    torch.testing.assert_close(loaded["patch_embed.proj.weight"], weights["patch_embed.proj.weight"].sum(1, True))
    # The middle 8 × 4 of 14 × 14 patches, 7 - 8//2 and 7 - 4//2 from the edges.
    middle = weights["pos_embed"][0, 2:].view(14, 14, -1)[3:11, 5:9].flatten(0, 1)
    assert torch.equal(loaded["pos_embed"][0], torch.cat([weights["pos_embed"][0, :2], middle]))


def test_without_a_file_timm_fetches_the_weights(monkeypatch: pytest.MonkeyPatch, deit_file: Callable[[str], Path]):
    weights, asked = deit_weights("tiny224"), []

    def create_model(name: str, *, pretrained: bool) -> SimpleNamespace:
        asked.append((name, pretrained))
        return SimpleNamespace(state_dict=lambda: weights)

    local = ASTModel(5, **small.SHAPE, imagenet_weights=deit_file("tiny224")).v.state_dict()
    monkeypatch.setattr(timm, "create_model", create_model)
    fetched = ASTModel(5, **small.SHAPE).v.state_dict()
    assert asked == [(TINY_TIMM_NAME, True)]
    assert all(torch.equal(fetched[key], local[key]) for key in local)


def test_without_a_network_the_error_names_imagenet_weights(monkeypatch: pytest.MonkeyPatch):
    def no_network(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(DataError, match=rf"{TINY_TIMM_NAME}.*imagenet_weights"):
        ASTModel(5, **small.SHAPE)


@pytest.mark.parametrize("model_size", MODEL_SIZES)
def test_timm_knows_the_weights_of_each_size(model_size: str):
    assert timm.is_model(MODEL_SIZES[model_size][0])


@pytest.mark.parametrize("axis", [0, 1])
def test_a_stretched_positional_embedding_is_linear_and_keeps_its_prefix(axis: int):
    grid, new_grid = (4, 6), ((9, 6), (4, 11))[axis]
    ramp = torch.arange(grid[axis], dtype=torch.float32)
    image = ramp.view(-1, 1).expand(grid) if axis == 0 else ramp.view(1, -1).expand(grid)
    prefix = torch.tensor([100.0, 200.0])
    resized = resize_pos_embed(torch.cat([prefix, image.flatten()]).view(1, -1, 1), grid, new_grid).view(-1)
    # Bilinear between pixel centres: output i is at (i + 1/2) · old/new - 1/2 of the input, clamped at the edges.
    at = (torch.arange(new_grid[axis]) + 0.5) * grid[axis] / new_grid[axis] - 0.5
    stretched = at.clamp(0, grid[axis] - 1)
    expected = stretched.view(-1, 1).expand(new_grid) if axis == 0 else stretched.view(1, -1).expand(new_grid)
    torch.testing.assert_close(resized, torch.cat([prefix, expected.flatten()]))


def test_every_parameter_gets_a_gradient():
    model = small.model()
    logits = model(small.log_mel(2))
    (logits * torch.randn_like(logits)).sum().backward()
    names = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert names == []


def test_c20_the_last_block_uses_plain_attention_too(monkeypatch: pytest.MonkeyPatch):
    model, fbank = small.model().eval(), small.log_mel(2)
    model.set_fused_attention(True)
    expected = model(fbank)
    model.set_fused_attention(False)
    monkeypatch.setattr(F, "scaled_dot_product_attention", Mock(side_effect=AssertionError("fused")))
    torch.testing.assert_close(model(fbank), expected, rtol=1e-4, atol=1e-5)
    model.set_fused_attention(True)
    with pytest.raises(AssertionError, match="fused"):
        model(fbank)


def all_tokens(model: ASTModel, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All tokens `[batch, tokens, dim]` after all blocks, and the logits, as the reference implementation computes."""
    tokens = model.v.norm(model.v.blocks(model.v._pos_embed(model.v.patch_embed(clips.transpose(1, 2).unsqueeze(1)))))
    return tokens, model.mlp_head((tokens[:, 0] + tokens[:, 1]) / 2)


@pytest.mark.parametrize("fused", [False, True])
def test_the_short_last_block_changes_neither_logits_nor_gradients(fused: bool):
    """The difference from computing all tokens in all blocks is float32 rounding."""
    clips, found = small.log_mel(2), []
    for whole in (False, True):
        model = small.model()
        model.set_fused_attention(fused)
        logits = all_tokens(model, clips)[1] if whole else model(clips)
        logits.square().sum().backward()
        found.append([logits, *(parameter.grad for parameter in model.parameters())])
    for short, whole in zip(*found, strict=True):
        assert (short - whole).abs().max() <= 1e-5 * whole.abs().max() + 1e-8


@pytest.mark.parametrize("checkpointing", [False, True])
def test_patchout_keeps_the_drawn_rows_and_columns_with_their_positions(checkpointing: bool):
    model, clips = small.model(), small.log_mel(2)
    model.set_activation_checkpointing(checkpointing)
    rows, columns = [0, 3, 6], [1, 2]
    patchout = Patchout(np.array(rows), np.array(columns))
    entered, embedded = [], model.v._pos_embed(model.v.patch_embed(clips.transpose(1, 2).unsqueeze(1)))
    model.v.blocks[0].register_forward_pre_hook(lambda _module, args: entered.append(args[0]))
    logits = model(clips, patchout)
    prefix, grid = embedded[:, :2], embedded[:, 2:].unflatten(1, (8, 4))
    kept = torch.cat([prefix, *(grid[:, row, column].unsqueeze(1) for row in rows for column in columns)], dim=1)
    assert torch.equal(entered[0], kept)
    torch.testing.assert_close(logits, model.mlp_head(model.v.norm(model.v.blocks(kept))[:, :2].mean(dim=1)))
    logits.sum().backward()
    moved = model.v.pos_embed.grad[0, 2:].abs().sum(dim=1).unflatten(0, (8, 4)) > 0
    assert moved.nonzero().tolist() == [[row, column] for row in rows for column in columns]


def test_evaluation_ignores_patchout():
    model, clips = small.model(), small.log_mel(2)
    everything = model(clips)
    assert torch.equal(model(clips, Patchout(np.arange(8), np.arange(4))), everything)
    few = Patchout(np.array([1]), np.array([2]))
    assert not torch.allclose(model(clips, few), everything)
    assert torch.equal(model.eval()(clips, few), everything)


def test_the_embedding_is_the_mean_of_class_and_distillation_token():
    model, clips = small.model().eval(), small.log_mel(2)
    with torch.no_grad():
        tokens, logits = all_tokens(model, clips)
        embedding = model.forward_features(clips)
        torch.testing.assert_close(embedding, (tokens[:, 0] + tokens[:, 1]) / 2)
        torch.testing.assert_close(model.mlp_head(embedding), logits)
        torch.testing.assert_close(model(clips), logits)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("fstride", 0),
        ("fstride", 17),
        ("tstride", -1),
        ("tstride", 17),
        ("input_fdim", 15),
        ("input_tdim", 8),
        ("model_size", "base512"),
        ("label_dim", 0),
    ],
)
def test_an_impossible_setting_is_refused_with_its_value(setting: str, value: object):
    with pytest.raises(ConfigError, match=rf"{setting} is '?{value}'?; use"):
        ASTModel(**{"imagenet_pretrain": False, "label_dim": 5} | small.SHAPE | {setting: value})


def test_audioset_pretraining_is_refused_for_unpublished_models():
    with pytest.raises(ConfigError, match="audioset_pretrain is true but model_size is tiny224; use base384"):
        ASTModel(audioset_pretrain=True, audioset_weights="a.pth", model_size="tiny224")
    with pytest.raises(ConfigError, match=r"audioset_pretrain .* set imagenet_pretrain true"):
        ASTModel(audioset_pretrain=True, audioset_weights="a.pth", imagenet_pretrain=False)


@pytest.mark.parametrize("shape", [(2, 128, 64), (2, 63, 128), (2, 64, 64), (64, 128)])
def test_a_wrong_input_shape_is_refused_with_the_expected_one(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"\(64, 128\).*input_tdim and input_fdim"):
        small.model()(torch.zeros(shape))


@pytest.mark.parametrize("pretrain", ["imagenet", "audioset"])
def test_a_missing_weight_file_is_named(tmp_path: Path, pretrain: str):
    file = tmp_path / "nowhere.pth"
    args = {f"{pretrain}_pretrain": True, f"{pretrain}_weights": file}
    with pytest.raises(DataError, match=r"no weight file .*nowhere\.pth"), torch.device("meta"):
        ASTModel(**args)


@pytest.mark.parametrize("write", [hostile.as_torch_archive, hostile.as_plain_pickle])
def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path: Path, write: Callable):
    write({"model": hostile.MakesFolder(tmp_path / "broken-in")}, tmp_path / "weights.pth")
    with pytest.raises(DataError, match=r"weights\.pth has no weights that can be read safely"):
        ASTModel(5, **small.SHAPE, imagenet_weights=tmp_path / "weights.pth")
    assert not (tmp_path / "broken-in").exists()


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_file_that_is_not_a_weight_file_is_a_data_error(tmp_path: Path, name: str):
    (tmp_path / name).write_text("<!DOCTYPE html><p>404")
    with pytest.raises(DataError, match=name):
        ASTModel(5, **small.SHAPE, imagenet_weights=tmp_path / name)


def test_weights_that_are_not_a_mapping_are_a_data_error(tmp_path: Path):
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(DataError, match=r"list\.pth"):
        ASTModel(5, **small.SHAPE, imagenet_weights=tmp_path / "list.pth")


def test_deit_weights_of_another_size_are_a_data_error(deit_file: Callable[[str], Path]):
    with pytest.raises(DataError, match=r"tiny224\.pth"):
        ASTModel(5, **small.SHAPE | {"model_size": "small224"}, imagenet_weights=deit_file("tiny224"))


@pytest.mark.parametrize("key", ["dist_token", "blocks.3.attn.qkv.weight"])
def test_a_missing_key_of_deit_is_named(tmp_path: Path, key: str):
    weights = deit_weights("tiny224")
    del weights[key]
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(DataError, match=rf"{key}"):
        ASTModel(5, **small.SHAPE, imagenet_weights=tmp_path / "weights.pth")


def test_a_checkpoint_of_another_grid_is_refused_as_audioset_weights(tmp_path: Path):
    state = {f"module.{key}": value for key, value in small.model().state_dict().items()}
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(DataError, match="1214 tokens expected"), torch.device("meta"):
        ASTModel(audioset_pretrain=True, audioset_weights=tmp_path / "other.pth")


@torch.no_grad()
def test_as_many_classes_as_channels_are_reordered_in_the_classifier_alone():
    shape = {"model_size": "tiny224", "label_dim": 192, "imagenet_pretrain": False, "input_tdim": 32}
    model, reordered = ASTModel(**shape), ASTModel(**shape)
    model.mlp_head[0].weight.copy_(torch.rand(192))
    order = torch.randperm(192, generator=torch.Generator().manual_seed(0)).tolist()
    reordered.start_from(model, order)
    model.eval(), reordered.eval()
    clips = torch.randn(1, 32, 128)
    torch.testing.assert_close(reordered(clips), model(clips)[:, order])
