"""PSLA's published checkpoints are recognised by their shapes, and used with their own normalisation."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ast_core.batch import Norm
from ast_core.checkpoints import load_model, read_checkpoint, save_model, save_original
from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary, audioset_labels, fsd50k_labels
from ast_core.models import create_model
from ast_core.recipe import Recipe
from ast_core.tagging import model_input_of


@pytest.mark.parametrize(("size", "num_heads"), [(0, 4), (1, 1), (2, 0)])
def test_size_heads_classes_and_norm_are_recognised(
    size: int, num_heads: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    written = create_model("efficientnet", eff_b=size, att_head=num_heads)
    save_original(tmp_path / "as_mdl_0.pth", written)
    model, config = read_checkpoint(tmp_path / "as_mdl_0.pth")
    assert (config.recipe.model, config.recipe.eff_b, config.recipe.att_head) == ("efficientnet", size, num_heads)
    assert (config.recipe.input_tdim, config.labels) == (1056, audioset_labels())
    assert config.norm == Norm(-4.6476, 4.5699, divisor=1.0)
    assert "input of mean -4.6476 and std 4.5699" in caplog.text
    assert all(torch.equal(value, written.state_dict()[key]) for key, value in model.state_dict().items())


def test_the_input_is_divided_by_the_std_alone(tmp_path: Path):
    model = create_model("efficientnet", eff_b=0)
    save_original(tmp_path / "as_mdl_0.pth", model)
    _, config = read_checkpoint(tmp_path / "as_mdl_0.pth")
    save_model(tmp_path / "ours", model.state_dict(), config)
    _, again = load_model(tmp_path / "ours")
    assert again == config
    padding = model_input_of(np.zeros(16_000, np.float32), again)[0, -1]
    torch.testing.assert_close(padding, torch.full((128,), 4.6476 / 4.5699))


def test_200_classes_are_those_of_fsd50k(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    save_original(tmp_path / "fsd_mdl_wa.pth", create_model("efficientnet", label_dim=200, eff_b=0))
    _, config = read_checkpoint(tmp_path / "fsd_mdl_wa.pth")
    assert (config.recipe.input_tdim, config.labels) == (3000, fsd50k_labels())
    assert config.norm == Norm(-4.6476, 4.5699, divisor=1.0)
    assert "200 classes, Accelerating_and_revving_and_vroom first and Zipper_(clothing) last" in caplog.text


def test_averaged_counters_and_the_classifier_of_imagenet_do_not_matter(tmp_path: Path):
    """PSLA divides all tensors by the number of epochs, and its earlier files have a layer that is never used."""
    model = create_model("efficientnet", eff_b=0)
    save_original(tmp_path / "clean.pth", model)
    theirs = torch.load(tmp_path / "clean.pth", weights_only=True)
    counters = [key for key in theirs if key.endswith("num_batches_tracked")]
    theirs |= {key: torch.tensor(20_192.5) for key in counters}
    theirs |= {"module.effnet._fc.weight": torch.ones(1000, 1280), "module.effnet._fc.bias": torch.ones(1000)}
    torch.save(theirs, tmp_path / "as_mdl_0_wa.pth")
    read, _ = read_checkpoint(tmp_path / "as_mdl_0_wa.pth")
    for key, value in read.state_dict().items():
        if key.endswith("num_batches_tracked"):
            assert (value.dtype, value.item()) == (torch.int64, 20_192)
        else:
            assert torch.equal(value, model.state_dict()[key]), key


def test_other_classes_need_a_recipe_and_labels(tmp_path: Path):
    file = tmp_path / "fsd50k_mdl_wa.pth"
    model = create_model("efficientnet", label_dim=3, eff_b=0)
    save_original(file, model)
    with pytest.raises(DataError, match="is not a published checkpoint; give its recipe and its labels"):
        read_checkpoint(file)
    recipe = Recipe(model="efficientnet", eff_b=0, att_head=4, norm_divisor=1)
    read, config = read_checkpoint(file, recipe=recipe, labels=LabelVocabulary.from_names(("a", "b", "c")))
    assert config.norm.divisor == 1
    assert torch.equal(read.state_dict()["pooling.head_weight"], model.state_dict()["pooling.head_weight"])


def test_a_file_of_another_model_is_read_by_its_recipe(tmp_path: Path):
    file = tmp_path / "talnet.pth"
    model = create_model("talnet", 2, embedding_size=128)
    save_original(file, model)
    with pytest.raises(DataError, match="for another model, give its recipe and labels"):
        read_checkpoint(file)
    recipe = Recipe(model="talnet", embedding_size=128)
    read, _ = read_checkpoint(file, recipe=recipe, labels=LabelVocabulary.from_names(("a", "b")))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in read.state_dict().items())
