"""The jobs with every model: two workers resume mid-epoch, average weights, evaluate and export. All of it is slow."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from ast_core.checkpoints import load_model, load_original
from ast_core.errors import ConfigError
from ast_core.models import MODELS, create_model
from jobs import evaluate, export
from jobs.train import main
from pipeline.train import checkpoints
from pipeline.train.evaluation.scores import read_scores
from tests.ast_core.models.small_models import SMALL

KEYS: dict[str, Any] = {"input_tdim": 48, "freqm": 16, "timem": 8, "lr": 1e-3, "batch_size": 10, "epochs": 3}
KEYS |= {"wa_start": 2, "wa_end": 3, "warmup": False, "norm_stats": "data", "precision": "fp32"}
AST_KEYS = {"fstride": 16, "tstride": 16}
WITHOUT_REFERENCE = ("convnext",)
SAME_ON_ANY_NUMBER_OF_WORKERS = ("ast", "convnext")
"""The models without BatchNorm and dropout."""
RESUMED_TOLERANCE = 1e-4
"""Relative difference of losses. Sums over two ranks are in another order, and nothing else differs."""

pytestmark = pytest.mark.slow


def recipe_of(name: str, folder: Path) -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(KEYS | {"model": name} | SMALL.get(name, {}) | (AST_KEYS if name == "ast" else {})))
    return file


def train(recipe: Path, data: str, run: Path, num_workers: int) -> None:
    command = ["--recipe", str(recipe), "--data", data, "--train-splits", "train", "--eval-splits", "eval"]
    command += ["--output", str(run), "--num-workers", str(num_workers), "--cpus-per-worker", "1"]
    command += ["--imagenet_pretrain", "false"] if "imagenet_pretrain" in MODELS[recipe.stem].keys else []
    assert main([*command, "--log-every-steps", "1", "--checkpoint-every-s", "0"]) == 0


def losses(run: Path, kind: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == kind]


def weights(model: Path) -> dict[str, Tensor]:
    return load_model(model)[0].state_dict()


@pytest.fixture(scope="module", params=MODELS)
def run(
    request: pytest.FixtureRequest, local_ray: None, tone_data: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of the model that gives its name to the recipe, on two workers."""
    folder = tmp_path_factory.mktemp(request.param)
    train(recipe_of(request.param, folder), tone_data, folder / "run", 2)
    return folder / "run"


def name_of(run: Path) -> str:
    (recipe,) = run.parent.glob("*.yaml")
    return recipe.stem


def test_a_run_resumes_in_the_middle_of_an_epoch_to_the_same_losses(run: Path, tone_data: str, tmp_path: Path):
    resumed = Path(shutil.copytree(run, tmp_path / "resumed"))
    before, latest = sorted((resumed / "checkpoints").glob("epoch-*"))
    assert before.name.startswith("epoch-0002-step-000004")
    (latest / "state.pt").write_bytes(b"damaged")
    (resumed / "summary.json").unlink()
    train(next(run.parent.glob("*.yaml")), tone_data, resumed, 2)
    for kind in ("step", "epoch"):
        assert losses(resumed, kind) == pytest.approx(losses(run, kind), rel=RESUMED_TOLERANCE)
    expected = weights(run / "averaged")
    for key, value in weights(resumed / "averaged").items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4)


def test_one_worker_has_the_losses_of_two_where_nothing_is_drawn_or_shared(run: Path, tone_data: str, tmp_path: Path):
    if name_of(run) not in SAME_ON_ANY_NUMBER_OF_WORKERS:
        pytest.skip("tests/ast_core/models/test_training.py compares the ranks of a model with BatchNorm or dropout")
    train(next(run.parent.glob("*.yaml")), tone_data, tmp_path / "one", 1)
    assert losses(tmp_path / "one", "step") == pytest.approx(losses(run, "step"), rel=1e-3)


def test_the_stored_model_has_the_scores_of_the_run(run: Path, tone_data: str, tmp_path: Path):
    """Its mAP may differ where scores nearly tie, as those of an EfficientNet do after 15 steps."""
    command = ["--checkpoint", str(run / "best"), "--data", tone_data, "--split", "eval", "--bootstrap", "0"]
    assert evaluate.main([*command, "--scores", str(tmp_path / "scores.parquet")]) == 0
    table, kept = pq.read_table(tmp_path / "scores.parquet"), read_scores(str(run))
    assert table["clip_id"].to_pylist() == kept.clip_id.to_pylist()
    found = np.stack([table[name].to_numpy() for name in table.column_names[1:]], axis=1)
    np.testing.assert_allclose(found, kept.scores.astype(np.float32), rtol=1e-3, atol=1e-4)


def test_the_averaged_weights_are_the_mean_of_the_epochs(run: Path):
    """A checkpoint of epoch 3 has the weights after epoch 2, the first that is averaged; the last one those after 3."""
    before, last = (checkpoints.load_state(str(folder)) for folder in sorted((run / "checkpoints").glob("epoch-*")))
    assert (before["progress"]["num_averaged"], last["progress"]["num_averaged"]) == (1, 2)
    second, third, averaged = before["progress"]["averaged"], last["model"], weights(run / "averaged")
    for key, value in averaged.items():
        torch.testing.assert_close(value, ((second[key] + third[key]) / 2).to(value.dtype), rtol=0, atol=0)
    changed = [key for key in averaged if not torch.equal(second[key], third[key])]
    assert {key for key in averaged if "running" in key} <= set(changed)


def test_the_trained_model_is_exported_to_onnx_and_to_its_references_format(run: Path, tmp_path: Path):
    name, checkpoint = name_of(run), ["--checkpoint", str(run)]
    assert export.main([*checkpoint, "--format", "onnx", "--output", str(tmp_path / "tagger.onnx")]) == 0  # compares
    original = [*checkpoint, "--format", "original", "--output", str(tmp_path / "model.pth")]
    if name in WITHOUT_REFERENCE:
        with pytest.raises(ConfigError, match="has no reference implementation"):
            export.main(original)
        return
    assert export.main(original) == 0
    model, config = load_model(run / "best")
    again = load_original(create_model(**config.recipe.model_args()), tmp_path / "model.pth").state_dict()
    assert [key for key, value in model.state_dict().items() if not torch.equal(again[key], value)] == []
