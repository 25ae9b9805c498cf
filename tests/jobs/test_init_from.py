"""`train.py --init-from`: start a run with a trained model's weights, for any input length, strides and classes."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ast_core import ASTModel
from ast_core.batch import Norm
from ast_core.checkpoints import ModelConfig, load_model, save_huggingface, save_model
from ast_core.errors import ConfigError, DataError
from ast_core.labels import LabelVocabulary
from ast_core.models import create_model
from ast_core.models.registry import model_kind
from ast_core.models.shapes import MODEL_SIZES
from ast_core.recipe import Recipe
from jobs.recipe_option import shipped_recipe
from jobs.train import claim, main
from pipeline import storage
from pipeline.dataset import PreparedDataset
from tests.fakes import SMALL_RECIPE

NORM = Norm(-3.5, 4.25)


def made(folder: Path, names: list[str], **changes: object) -> tuple[ASTModel, ModelConfig]:
    """Write a model folder with random weights: tiny224, 64 frames at stride 10."""
    shape = {"model_size": "tiny224", "input_tdim": 64, "fstride": 10, "tstride": 10, "timem": 8, "freqm": 8}
    recipe = Recipe(label_dim=len(names), imagenet_pretrain=False, **shape | changes)
    torch.manual_seed(7)
    model = create_model(**recipe.model_args())
    with torch.no_grad():
        model.mlp_head[1].bias.copy_(torch.arange(len(names)))
    config = ModelConfig(recipe, NORM, LabelVocabulary.from_names(names))
    save_model(folder, model.state_dict(), config)
    return model, config


def argv(data: str, run: Path, model: Path | str, *more: str) -> list[str]:
    usual = {key: value for key, value in SMALL_RECIPE.items() if f"--{key}" not in more}
    keys = [word for key, value in usual.items() for word in (f"--{key}", value)]
    splits = ["--train-splits", "train", "--eval-splits", "eval", "--num-workers", "0"]
    return [
        *("--recipe", "audioset-full", "--data", data, *splits, "--output", str(run)),
        *("--init-from", str(model), *keys, *more),
    ]


def test_case_9_other_classes_get_a_new_head_and_the_rest_is_kept(tone_data: str, tmp_path: Path):
    """From 64 frames at stride 10 (12 × 5 patches) to 48 at stride 16 (8 × 3): the middle positions are used."""
    theirs, _ = made(tmp_path / "own", ["dog", "cat"])
    claimed = claim(argv(tone_data, tmp_path / "run", tmp_path / "own"))
    ours, config = load_model(tmp_path / "run" / "initial")
    expected, found = theirs.state_dict(), ours.state_dict()
    for key in expected:
        if not key.startswith("mlp_head") and key != "v.pos_embed":
            torch.testing.assert_close(found[key], expected[key], rtol=0, atol=0)
    positions = expected["v.pos_embed"]
    grid = positions[:, 2:].reshape(1, 12, 5, -1)[:, 2:10, 1:4]
    torch.testing.assert_close(found["v.pos_embed"][:, 2:], grid.reshape(1, 24, -1), rtol=0, atol=0)
    torch.testing.assert_close(found["v.pos_embed"][:, :2], positions[:, :2], rtol=0, atol=0)
    assert found["mlp_head.1.bias"].shape == (4,)
    assert config.norm == NORM
    assert (claimed.recipe.dataset_mean, claimed.recipe.imagenet_pretrain) == (NORM.mean, False)
    there = storage.read_checked_json(tmp_path / "run" / "config.json")
    assert there["init_from"] == {"model": str(tmp_path / "own"), "mean": NORM.mean, "std": NORM.std}


def test_case_9_same_classes_keep_the_head_in_the_order_of_the_data(tone_data: str, tmp_path: Path):
    names = list(reversed(PreparedDataset.open(tone_data).labels.names))
    theirs, _ = made(tmp_path / "own", names)
    claim(argv(tone_data, tmp_path / "run", tmp_path / "own"))
    found, expected = (model.state_dict() for model in (load_model(tmp_path / "run" / "initial")[0], theirs))
    assert found["mlp_head.1.bias"].tolist() == [3, 2, 1, 0]
    torch.testing.assert_close(found["mlp_head.1.weight"], expected["mlp_head.1.weight"].flip(0), rtol=0, atol=0)


def test_model_of_the_same_shape_starts_with_the_same_outputs(tone_data: str, tmp_path: Path):
    names = list(PreparedDataset.open(tone_data).labels.names)
    theirs, _ = made(tmp_path / "own", names, input_tdim=48, fstride=16, tstride=16)
    claim(argv(tone_data, tmp_path / "run", tmp_path / "own"))
    fbank = torch.randn(2, 48, 128)
    ours, _ = load_model(tmp_path / "run" / "initial")
    torch.testing.assert_close(ours(fbank), theirs.eval()(fbank), rtol=0, atol=0)


def test_case_9_every_readable_format_can_be_used(tone_data: str, tmp_path: Path):
    """A Hugging Face folder, and a run, of which the best model is used."""
    theirs, config = made(tmp_path / "runs" / "1" / "best", ["dog", "cat"])
    save_huggingface(tmp_path / "hf", theirs.state_dict(), config)
    for number, model in enumerate((tmp_path / "runs" / "1", tmp_path / "hf")):
        claim(argv(tone_data, tmp_path / f"from{number}", model))
        ours, ours_config = load_model(tmp_path / f"from{number}" / "initial")
        assert torch.equal(ours.state_dict()["v.cls_token"], theirs.state_dict()["v.cls_token"])
        assert ours_config.norm == NORM


def test_norm_stats_data_and_a_given_norm_override_the_models_norm(tone_data: str, tmp_path: Path):
    made(tmp_path / "own", ["dog", "cat"])
    claim(argv(tone_data, tmp_path / "a", tmp_path / "own", "--norm_stats", "data"))
    assert load_model(tmp_path / "a" / "initial")[1].norm == Norm(*PreparedDataset.open(tone_data).norm(["train"]))
    claim(argv(tone_data, tmp_path / "b", tmp_path / "own", "--dataset_mean", "-1.5"))
    assert load_model(tmp_path / "b" / "initial")[1].norm == replace(NORM, mean=-1.5)


def test_the_models_norm_is_used_with_a_recipe_that_takes_the_datas(tone_data: str, tmp_path: Path):
    made(tmp_path / "own", ["dog", "cat"])
    (tmp_path / "mine.yaml").write_text(shipped_recipe("audioset-full") + "\nnorm_stats: data\n")
    command = argv(tone_data, tmp_path / "a", tmp_path / "own")
    command[1] = str(tmp_path / "mine.yaml")
    claim(command)
    assert load_model(tmp_path / "a" / "initial")[1].norm == NORM


@pytest.mark.parametrize(("key", "theirs"), [("addpos", False), ("n_trans_layers", 2)])
def test_keys_without_weights_of_their_own_must_be_those_of_the_model(key: str, theirs: object):
    """All tensors would load, and the layers would compute something else."""
    ours = Recipe(model="cnn_transformer", addpos=True, n_trans_layers=1)
    why_not = model_kind("cnn_transformer").why_no_start_from
    assert why_not(ours, ours) == ""
    assert f"is of {key} {theirs}, this run is of" in why_not(replace(ours, **{key: theirs}), ours)


def test_other_model_size_is_refused_unless_the_shapes_are_equal(tone_data: str, tmp_path: Path):
    made(tmp_path / "own", ["dog", "cat"])
    refusal = r"^--init-from .*/own is of model_size tiny224, this run is of small224; give --model_size tiny224$"
    with pytest.raises(ConfigError, match=refusal):
        claim(argv(tone_data, tmp_path / "run", tmp_path / "own", "--model_size", "small224"))
    with pytest.raises(DataError, match=r"^.*nowhere is neither a file of weights, nor a folder"):
        claim(argv(tone_data, tmp_path / "run", tmp_path / "nowhere"))
    keys = ["--model_size", "base384", "--imagenet_pretrain", "true", "--audioset_pretrain", "true"]
    with pytest.raises(ConfigError, match=r"^--init-from and audioset_pretrain both name weights to start from"):
        claim(argv(tone_data, tmp_path / "run", tmp_path / "own", *keys))
    assert not (tmp_path / "run").exists()
    assert MODEL_SIZES["base224"][1] == MODEL_SIZES["base384"][1]


def test_run_resumes_without_its_initial_model_but_not_with_another(tone_data: str, tmp_path: Path):
    made(tmp_path / "own", ["dog", "cat"])
    made(tmp_path / "other", ["dog", "cat"])
    run = tmp_path / "run"
    command = argv(tone_data, run, tmp_path / "own", "--epochs", "1", "--wa_start", "1", "--wa_end", "1")
    claim(command)
    shutil.rmtree(tmp_path / "own")
    assert main(command) == 0
    with pytest.raises(ConfigError, match=r"holds another run \(init_from\.model was .*own, is .*other\)"):
        claim([str(tmp_path / "other") if word == str(tmp_path / "own") else word for word in command])


def test_c3_config_records_the_given_and_the_used_settings(tone_data: str, tmp_path: Path):
    run = tmp_path / "run"
    made(tmp_path / "own", ["dog", "cat"])
    keys = ["--epochs", "1", "--wa_start", "1", "--wa_end", "1", "--precision", "fp32", "--attention", "plain"]
    assert main(argv(tone_data, run, tmp_path / "own", *keys)) == 0
    there = storage.read_checked_json(run / "config.json")
    assert there["recipe"]["compile"] is None
    assert there["computed"] == {"device": "cpu", "precision": "fp32", "compile": False, "cuda_graphs": False} | {
        "attention": "plain",
        "float8": "off",
        "micro_batch_size": None,
    }
    assert "computed.attention" in (run / "report.html").read_text()
