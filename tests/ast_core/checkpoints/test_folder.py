"""Each format restores a saved model bit for bit; a file that is not a checkpoint is refused by name."""

import contextlib
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ast_core import ASTModel
from ast_core.batch import Norm
from ast_core.checkpoints import (
    ModelConfig,
    folder,
    load_model,
    load_original,
    read_checkpoint,
    save_model,
    save_original,
)
from ast_core.checkpoints.published import recognise_published, speechcommands_labels
from ast_core.errors import ConfigError, DataError
from ast_core.features import FeatureSettings
from ast_core.labels import LabelVocabulary, audioset_labels
from ast_core.models.pretrained import from_audioset, to_huggingface, to_original, under_our_names
from tests import damage, reference
from tests.ast_core import hostile, small

LABELS = LabelVocabulary(tuple("abcde"), ("Speech, man", "“Ping”", "Éclair", "犬", "Tab\there"))
CONFIG = ModelConfig(recipe=small.recipe(lr=1e-5, dataset_mean=-4.2677393), norm=small.NORM, labels=LABELS)


@pytest.fixture
def original() -> dict[str, Tensor]:
    """A checkpoint as the reference implementation writes it."""
    weights = reference.draw_all(reference.original_shapes(small.model()), "test")
    return {f"module.{key}": value for key, value in weights.items()}


def test_a_saved_model_comes_back_bit_for_bit(tmp_path: Path):
    model = small.model().eval()
    save_model(tmp_path / "new" / "folder", model.state_dict(), CONFIG)
    again, config = load_model(tmp_path / "new" / "folder")
    assert config == CONFIG
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    with torch.no_grad():
        assert torch.equal(again(small.log_mel(2)), model(small.log_mel(2)))


def test_a_loaded_model_is_ready_for_evaluation(tmp_path: Path):
    save_model(tmp_path, small.model().train().state_dict(), CONFIG)
    assert not any(module.training for module in load_model(tmp_path)[0].modules())


def test_saving_again_replaces_what_was_there(tmp_path: Path):
    for seed in (1, 2):
        save_model(tmp_path, small.model(seed=seed).state_dict(), CONFIG)
    bias = load_model(tmp_path)[0].v.cls_token
    assert torch.equal(bias, small.model(seed=2).v.cls_token)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_folder_without_one_of_its_files_names_it(tmp_path: Path, name: str):
    save_model(tmp_path, small.model().state_dict(), CONFIG)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=rf"is not a model folder: {name} is missing"):
        load_model(tmp_path)


def test_weights_of_another_model_are_refused(tmp_path: Path):
    save_model(tmp_path, small.model(label_dim=6).state_dict(), CONFIG)
    with pytest.raises(DataError, match=r"mlp_head\.1\.(bias|weight) is \(6.*, not \(5"):
        load_model(tmp_path)


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_load_original_fills_every_parameter(tmp_path: Path, original: dict[str, Tensor], prefix: str):
    state = {key.replace("module.", prefix): value for key, value in original.items()}
    torch.save(state, tmp_path / "original.pth")
    for source in (state, tmp_path / "original.pth", str(tmp_path / "original.pth")):
        model = small.model()
        assert load_original(model, source) is model
        wrong = [k for k, value in model.state_dict().items() if not torch.equal(value, original[f"module.{k}"])]
        assert wrong == []


def test_the_model_does_not_share_memory_with_the_checkpoint(original: dict[str, Tensor]):
    model = load_original(small.model(), original)
    original["module.v.cls_token"].zero_()
    assert model.v.cls_token.abs().sum() > 0


def test_a_missing_key_is_named(original: dict[str, Tensor]):
    del original["module.v.blocks.7.attn.qkv.bias"]
    with pytest.raises(DataError, match=r"missing \['v\.blocks\.7\.attn\.qkv\.bias'\], surplus \[\]"):
        load_original(small.model(), original)


def test_a_surplus_key_is_named(original: dict[str, Tensor]):
    with pytest.raises(DataError, match=r"missing \[\], surplus \['extra\.weight'\]"):
        load_original(small.model(), original | {"module.extra.weight": torch.zeros(1)})


def test_a_wrong_tensor_shape_is_refused_with_both_shapes(original: dict[str, Tensor]):
    wrong = original | {"module.v.pos_embed": torch.zeros(1, 10, 192)}
    with pytest.raises(DataError, match=r"v\.pos_embed is \(1, 10, 192\), not \(1, 34, 192\)"):
        load_original(small.model(), wrong)


def test_a_refused_checkpoint_does_not_change_the_model(original: dict[str, Tensor]):
    model, before = small.model(), small.model().state_dict()
    del original["module.mlp_head.1.bias"]
    with pytest.raises(DataError):
        load_original(model, original)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_missing_checkpoint_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"no weight file .*nowhere\.pth"):
        load_original(small.model(), tmp_path / "nowhere.pth")


@pytest.mark.parametrize("write", [hostile.as_torch_archive, hostile.as_plain_pickle])
def test_a_pickle_with_code_is_not_executed(tmp_path: Path, write: Callable):
    file, folder = tmp_path / "evil.pth", tmp_path / "broken-in"
    write({"module.v.cls_token": hostile.MakesFolder(folder)}, file)
    with pytest.raises((DataError, pickle.UnpicklingError)):
        load_original(small.model(), file)
    assert not folder.exists()
    with contextlib.suppress(RuntimeError):  # shows that the code would run without `weights_only`
        torch.load(file, weights_only=False)
    assert folder.exists()


@pytest.mark.parametrize("content", ["<!DOCTYPE html><p>404", ""])
def test_a_file_that_is_not_a_weight_file_is_a_data_error(tmp_path: Path, content: str):
    (tmp_path / "page.pth").write_text(content)
    with pytest.raises(DataError, match=r"page\.pth"):
        load_original(small.model(), tmp_path / "page.pth")


def test_a_pickle_with_code_is_a_data_error(tmp_path: Path):
    torch.save({"module.v.cls_token": hostile.MakesFolder(tmp_path / "broken-in")}, tmp_path / "evil.pth")
    with pytest.raises(DataError, match=r"evil\.pth"):
        load_original(small.model(), tmp_path / "evil.pth")


def test_truncated_weights_in_a_model_folder_are_a_data_error(tmp_path: Path):
    save_model(tmp_path, small.model().state_dict(), CONFIG)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(DataError, match=str(tmp_path)):
        load_model(tmp_path)


def test_a_truncated_config_in_a_model_folder_is_a_data_error(tmp_path: Path):
    save_model(tmp_path, small.model().state_dict(), CONFIG)
    (tmp_path / "config.json").write_text(CONFIG.to_json()[:200])
    with pytest.raises(DataError, match=str(tmp_path)):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_each_flipped_bit_of_a_model_folder_is_reported_or_harmless(tmp_path: Path, name: str):
    save_model(tmp_path, small.model().state_dict(), CONFIG)
    expected, config = load_model(tmp_path)
    file, rng, lines = tmp_path / name, np.random.default_rng(0), []
    whole = file.read_bytes()
    for _ in range(30):
        file.write_bytes(whole)
        damage.flip_bit(file, rng)
        lines.append(damage.refusal(lambda: load_model(tmp_path)))
        if not lines[-1]:
            again, other = load_model(tmp_path)
            assert other == config
            assert all(map(torch.equal, again.state_dict().values(), expected.state_dict().values()))
    assert all(str(file) in line for line in lines if line)
    assert sum(map(bool, lines)) > 15


def test_a_folder_of_an_earlier_version_is_read_without_checksums(tmp_path: Path):
    model = small.model()
    save_model(tmp_path, model.state_dict(), CONFIG)
    (tmp_path / "config.json").write_text(CONFIG.to_json())
    again, config = load_model(tmp_path)
    assert config == CONFIG
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))


def test_weights_of_another_model_under_a_config_are_refused(tmp_path: Path):
    save_model(tmp_path / "one", small.model(seed=1).state_dict(), CONFIG)
    save_model(tmp_path / "two", small.model(seed=2).state_dict(), CONFIG)
    shutil.copy(tmp_path / "one" / "model.safetensors", tmp_path / "two" / "model.safetensors")
    with pytest.raises(DataError, match=r"two/model\.safetensors is damaged, or not the weights that config\.json"):
        load_model(tmp_path / "two")


# --- any naming


def test_a_state_dict_of_any_naming_is_converted_bit_for_bit(original: dict[str, Tensor]):
    ours = load_original(small.model(), original).state_dict()
    bare = {key.removeprefix("module."): value for key, value in original.items()}
    for naming in (original, bare, ours, to_original(ours), to_huggingface(ours)):
        again = under_our_names(naming)
        assert again.keys() == ours.keys()
        assert [key for key in ours if not torch.equal(again[key], ours[key])] == []


def test_a_state_dict_with_two_naming_schemes_is_refused(original: dict[str, Tensor]):
    ours = load_original(small.model(), original).state_dict()
    for other in (original, to_huggingface(ours)):
        with pytest.raises(DataError, match="mix two naming schemes"):
            under_our_names(ours | other)


def test_only_the_two_image_heads_may_be_surplus(original: dict[str, Tensor]):
    with pytest.raises(DataError, match=r"surplus \['v\.header\.weight'\]"):
        load_original(small.model(), original | {"module.v.header.weight": torch.zeros(1)})


def test_save_original_writes_the_keys_and_shapes_of_the_reference_implementation(tmp_path: Path):
    model = small.model()
    save_original(tmp_path / "out.pth", model.state_dict())
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    expected = {f"module.{key}": shape for key, shape in reference.original_shapes(model).items()}
    assert {key: tuple(value.shape) for key, value in written.items()} == expected
    heads = [value for key, value in written.items() if key.startswith("module.v.head")]
    assert len(heads) == 4
    assert not any(head.any() for head in heads)
    assert all(torch.equal(written[f"module.{key}"], value) for key, value in model.state_dict().items())


def test_both_formats_of_an_audioset_checkpoint_give_the_same_start():
    shapes = reference.original_shapes(small.model(label_dim=527)) | {"v.pos_embed": (1, 1214, 192)}
    original = reference.draw_all(shapes, "audioset")
    start = from_audioset(original, (12, 50))
    again = from_audioset(to_huggingface(under_our_names(original)), (12, 50))
    assert (
        start.keys()
        == again.keys()
        == small.model().state_dict().keys()
        - {f"mlp_head.{layer}.{kind}" for layer in (0, 1) for kind in ("weight", "bias")}
    )
    assert all(torch.equal(start[key], again[key]) for key in start)


# --- weight files, which do not contain their recipe and classes

AUDIOSET_NORM, SPEECHCOMMANDS_NORM = Norm(-4.2677393, 4.5689974), Norm(-6.845978, 5.5654526)


def published_model(label_dim: int, stride: int, num_frames: int) -> ASTModel:
    with torch.device("meta"):  # only shapes
        return ASTModel(label_dim, stride, stride, input_tdim=num_frames, imagenet_pretrain=False)


@pytest.mark.parametrize(
    ("file", "label_dim", "num_tokens", "stride", "num_frames"),
    [
        ("audioset_10_10_0.4593.pth", 527, 1214, 10, 1024),  # 0.4495, 0.4483 and 0.4475 have the same shape
        ("audioset_12_12_0.4467.pth", 527, 852, 12, 1024),
        ("audioset_14_14_0.4431.pth", 527, 659, 14, 1024),
        ("audioset_16_16_0.4422.pth", 527, 514, 16, 1024),
        ("speechcommands_10_10_0.9812.pth", 35, 146, 10, 128),
    ],
)
def test_each_published_shape_is_recognised(file: str, label_dim: int, num_tokens: int, stride: int, num_frames: int):
    shapes = reference.original_shapes(published_model(label_dim, stride, num_frames))
    assert shapes["v.pos_embed"] == (1, num_tokens, 768)
    state = {f"module.{key}": torch.empty(shape, device="meta") for key, shape in shapes.items()}
    recipe, labels = recognise_published(under_our_names(state), origin=file)
    assert (recipe.model_size, recipe.label_dim, recipe.fstride, recipe.tstride) == (
        "base384",
        label_dim,
        stride,
        stride,
    )
    assert (recipe.input_fdim, recipe.input_tdim) == (128, num_frames)
    norm = Norm(recipe.dataset_mean, recipe.dataset_std)
    if label_dim == 527:
        assert (labels, norm) == (audioset_labels(), AUDIOSET_NORM)
    else:
        assert (labels, norm) == (speechcommands_labels(), SPEECHCOMMANDS_NORM)


def test_speech_commands_words_are_in_the_order_of_the_published_checkpoint():
    labels = speechcommands_labels()
    assert len(labels) == len(set(labels.names)) == 35
    assert [labels.names[i] for i in (0, 5, 19, 34)] == ["backward", "on", "visual", "one"]
    assert [labels.mids[i] for i in (0, 34)] == ["/m/spcmd00", "/m/spcmd34"]


def as_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict as in the authors' files, with image heads that are not zero."""
    return {key: value + 1 if ".head" in key else value for key, value in to_original(state).items()}


def test_a_file_of_save_original_is_not_taken_for_a_published_checkpoint(tmp_path: Path):
    """It may have the published shape but other classes or another norm."""
    shapes = {key: value.shape for key, value in published_model(35, 10, 128).state_dict().items()}
    state = {key: torch.tensor(0.001).expand(shape) for key, shape in shapes.items()}
    torch.save(to_original(state), tmp_path / "ours.pth")
    with pytest.raises(DataError, match=r"ours\.pth is not a published checkpoint; give its recipe and its labels"):
        read_checkpoint(tmp_path / "ours.pth")
    words = LabelVocabulary.from_names(sorted(speechcommands_labels().names))
    recipe = small.recipe(model_size="base384", fstride=10, tstride=10, input_tdim=128, label_dim=35)
    assert read_checkpoint(tmp_path / "ours.pth", recipe=recipe, labels=words)[1].labels == words


def test_the_weight_file_of_a_model_folder_is_refused_with_the_folder(tmp_path: Path):
    save_model(tmp_path, small.model().state_dict(), CONFIG)
    with pytest.raises(DataError, match=rf"give the folder {tmp_path}"):
        read_checkpoint(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("label_dim", "num_frames", "naming"),
    [(527, 1024, as_published), (527, 1024, to_huggingface), (35, 128, as_published)],
)
def test_a_published_file_is_read_without_recipe_and_labels(
    tmp_path: Path, label_dim: int, num_frames: int, naming: Callable, caplog: pytest.LogCaptureFixture
):
    shapes = {key: value.shape for key, value in published_model(label_dim, 10, num_frames).state_dict().items()}
    # Each tensor repeats one number, so the file of 350 MB of weights is small. The numbers differ, so a swap shows.
    state = {key: torch.tensor(0.001 * i).expand(shape) for i, (key, shape) in enumerate(shapes.items())}
    torch.save(naming(state), tmp_path / "published.pth")
    model, config = read_checkpoint(tmp_path / "published.pth")
    assert f"is taken for the published checkpoint of its shape: {label_dim} classes" in caplog.text
    assert config.norm == (AUDIOSET_NORM if label_dim == 527 else SPEECHCOMMANDS_NORM)
    assert config.labels == (audioset_labels() if label_dim == 527 else speechcommands_labels())
    assert config.recipe.precision == "fp32"  # for comparison with the paper's figures
    assert model.input_shape == (num_frames, 128)
    assert not model.training
    assert [key for key, value in model.state_dict().items() if (value != state[key].flatten()[0]).any()] == []


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_of_another_shape_is_read_with_its_recipe_and_labels(
    tmp_path: Path, original: dict[str, Tensor], suffix: str
):
    write = torch.save if suffix == "pth" else save_file
    write(original, tmp_path / f"mine.{suffix}")
    recipe = small.recipe(dataset_mean=-5.0, dataset_std=3.0, label_dim=None)
    model, config = read_checkpoint(tmp_path / f"mine.{suffix}", recipe=recipe, labels=LABELS)
    assert config == ModelConfig(replace(recipe, label_dim=5), Norm(-5.0, 3.0), LABELS)
    with torch.no_grad():
        assert torch.equal(model(small.log_mel(2)), load_original(small.model(), original)(small.log_mel(2)))
    given = read_checkpoint(tmp_path / f"mine.{suffix}", recipe=recipe, labels=LABELS, norm=small.NORM)
    assert given[1].norm == small.NORM


def test_given_recipe_and_labels_win_over_those_of_a_published_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(folder, "recognise_published", lambda *_, **__: (small.recipe(lr=0.5), LABELS))
    torch.save(as_published(small.model().state_dict()), tmp_path / "known.pth")
    other = LabelVocabulary.from_names("vwxyz")
    known, given = read_checkpoint(tmp_path / "known.pth")[1], read_checkpoint(tmp_path / "known.pth", labels=other)[1]
    assert (known.recipe.lr, known.labels, given.recipe.lr, given.labels) == (0.5, LABELS, 0.5, other)
    recipe = small.recipe(lr=0.25, dataset_mean=1.5)
    given = read_checkpoint(tmp_path / "known.pth", recipe=recipe)[1]
    assert (given.recipe, given.norm.mean, given.labels) == (recipe, 1.5, LABELS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"mine\.pth .* give its recipe and its labels"),
        ({"labels": LABELS}, r"mine\.pth .* give its recipe \("),
        ({"recipe": small.recipe()}, r"mine\.pth .* give its labels \("),
        ({"recipe": small.recipe(fstride=10), "labels": LABELS}, r"v\.pos_embed is \(1, 34, 192\), not \(1, 50, 192\)"),
        (
            {"recipe": small.recipe(), "labels": LabelVocabulary.from_names("ab")},
            "label_dim is 5, but there are 2 labels",
        ),
        ({"recipe": small.recipe(norm_stats="data"), "labels": LABELS}, "give norm"),
    ],
)
def test_an_unknown_file_is_refused_with_what_to_give(tmp_path: Path, given: dict[str, Any], message: str):
    save_original(tmp_path / "mine.pth", small.model().state_dict())
    with pytest.raises(DataError, match=message):
        read_checkpoint(tmp_path / "mine.pth", **given)


def test_weights_of_another_model_or_a_missing_file_are_refused(tmp_path: Path):
    torch.save({"cls_token": torch.zeros(1, 1, 192)}, tmp_path / "deit.pth")
    with pytest.raises(DataError, match=r"deit\.pth does not contain the weights of an AST"):
        read_checkpoint(tmp_path / "deit.pth")
    with pytest.raises(DataError, match=r"no weight file .*nowhere"):
        read_checkpoint(tmp_path / "nowhere")


def test_our_folder_is_read_as_saved_and_refuses_recipe_labels_and_norm(tmp_path: Path):
    model = small.model()
    save_model(tmp_path, model.state_dict(), CONFIG)
    again, config = read_checkpoint(tmp_path)
    assert config == CONFIG
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    for given in ({"recipe": small.recipe()}, {"labels": LABELS}, {"norm": small.NORM}):
        with pytest.raises(ConfigError, match="only for a weight file"):
            read_checkpoint(tmp_path, **given)


@pytest.mark.parametrize("write", [hostile.as_torch_archive, hostile.as_plain_pickle])
def test_reading_a_checkpoint_executes_no_code(tmp_path: Path, write: Callable):
    write({"module.v.cls_token": hostile.MakesFolder(tmp_path / "broken-in")}, tmp_path / "evil.pth")
    with pytest.raises(DataError, match=r"evil\.pth"):
        read_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "broken-in").exists()


def test_a_config_that_is_not_json_is_a_data_error(tmp_path: Path):
    save_model(tmp_path, small.model().state_dict(), CONFIG)
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(DataError, match=r"config\.json"):
            read_checkpoint(tmp_path)


def test_features_of_another_number_of_mel_bins_than_the_recipes_are_refused():
    with pytest.raises(ConfigError, match=r"^input_fdim is 128, but the features have 64 mel bins$"):
        replace(CONFIG, features=FeatureSettings(num_mel_bins=64))
