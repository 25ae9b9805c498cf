"""What is saved comes back bit for bit, and what is no checkpoint of ours or the original's is refused by name."""

import contextlib
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ast_core.checkpoints import ModelConfig, load_model, load_original, save_model
from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary
from tests import reference
from tests.ast_core import hostile, small

LABELS = LabelVocabulary(tuple("abcde"), ("Speech, man", "“Ping”", "Éclair", "犬", "Tab\there"))
CONFIG = ModelConfig(recipe=small.recipe(lr=1e-5, dataset_mean=-4.2677393), norm=small.NORM, labels=LABELS)


@pytest.fixture
def original() -> dict[str, Tensor]:
    """A checkpoint as the original writes it."""
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
    with pytest.raises(DataError, match=rf"is no model folder: {name} is missing"):
        load_model(tmp_path)


def test_weights_of_another_model_are_refused(tmp_path: Path):
    save_model(tmp_path, small.model(label_dim=6).state_dict(), CONFIG)
    with pytest.raises(DataError, match=r"mlp_head\.1\.(bias|weight) is \(6.*, not \(5"):
        load_model(tmp_path)


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_an_original_checkpoint_fills_every_parameter(tmp_path: Path, original: dict[str, Tensor], prefix: str):
    state = {key.replace("module.", prefix): value for key, value in original.items()}
    torch.save(state, tmp_path / "original.pth")
    for source in (state, tmp_path / "original.pth", str(tmp_path / "original.pth")):
        model = small.model()
        assert load_original(model, source) is model
        wrong = [k for k, value in model.state_dict().items() if not torch.equal(value, original[f"module.{k}"])]
        assert wrong == []


def test_the_model_does_not_share_the_checkpoints_memory(original: dict[str, Tensor]):
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


def test_a_shape_that_does_not_fit_is_named_with_both(original: dict[str, Tensor]):
    wrong = original | {"module.v.pos_embed": torch.zeros(1, 10, 192)}
    with pytest.raises(DataError, match=r"v\.pos_embed is \(1, 10, 192\), not \(1, 34, 192\)"):
        load_original(small.model(), wrong)


def test_a_refused_checkpoint_leaves_the_model_as_it_was(original: dict[str, Tensor]):
    model, before = small.model(), small.model().state_dict()
    del original["module.mlp_head.1.bias"]
    with pytest.raises(DataError):
        load_original(model, original)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_missing_checkpoint_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"no weight file .*nowhere\.pth"):
        load_original(small.model(), tmp_path / "nowhere.pth")


@pytest.mark.parametrize("write", [hostile.as_torch_archive, hostile.as_plain_pickle])
def test_a_pickle_that_is_more_than_weights_is_not_executed(tmp_path: Path, write: Callable):
    file, folder = tmp_path / "evil.pth", tmp_path / "broken-in"
    write({"module.v.cls_token": hostile.MakesFolder(folder)}, file)
    with pytest.raises((DataError, pickle.UnpicklingError)):
        load_original(small.model(), file)
    assert not folder.exists()
    with contextlib.suppress(RuntimeError):  # a careless reader would have run it
        torch.load(file, weights_only=False)
    assert folder.exists()


@pytest.mark.parametrize("content", ["<!DOCTYPE html><p>404", ""])
def test_a_file_that_is_no_archive_is_a_data_error(tmp_path: Path, content: str):
    (tmp_path / "page.pth").write_text(content)
    with pytest.raises(DataError, match=r"page\.pth"):
        load_original(small.model(), tmp_path / "page.pth")


def test_a_pickle_that_is_more_than_weights_is_a_data_error(tmp_path: Path):
    torch.save({"module.v.cls_token": hostile.MakesFolder(tmp_path / "broken-in")}, tmp_path / "evil.pth")
    with pytest.raises(DataError, match=r"evil\.pth"):
        load_original(small.model(), tmp_path / "evil.pth")


def test_a_torn_file_in_a_model_folder_is_a_data_error(tmp_path: Path):
    save_model(tmp_path, small.model().state_dict(), CONFIG)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(DataError, match=str(tmp_path)):
        load_model(tmp_path)


def test_a_torn_config_in_a_model_folder_is_a_data_error(tmp_path: Path):
    save_model(tmp_path, small.model().state_dict(), CONFIG)
    (tmp_path / "config.json").write_text(CONFIG.to_json()[:200])
    with pytest.raises(DataError, match=str(tmp_path)):
        load_model(tmp_path)
