"""A new model takes one file and one entry of MODELS: the unchanged jobs train, resume, evaluate and export it."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from ast_core.checkpoints import load_model
from ast_core.errors import ConfigError
from ast_core.models import MODELS, create_model
from ast_core.recipe import Recipe, load_recipe
from ast_core.tagging import tag
from jobs import evaluate, export, train
from tests import fakes
from tests.conftest import OwnFolders
from tests.extending import registration, toy_model

KEYS = ["--model", "mean_over_time", "--input_tdim", "48", "--freqm", "16", "--timem", "8", "--lr", "1e-2"]


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    registration.register()
    yield
    del MODELS["mean_over_time"]


def command(data: str, run: Path, *more: str) -> list[str]:
    splits = ["--train-splits", "train", "--eval-splits", "eval"]
    epochs = ["--epochs", "12", "--wa_start", "1", "--wa_end", "12"]
    return ["--recipe", "audioset-balanced", "--data", data, *splits, "--output", str(run), *KEYS, *epochs, *more]


def check_results(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["map"] > 0.5  # four classes; an untrained model has about 0.25
    assert json.loads((run / "config.json").read_text())["recipe"]["model"] == "mean_over_time"


@pytest.fixture(scope="module")
def run(tone_data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained in this process."""
    run = tmp_path_factory.mktemp("toy") / "run"
    assert train.main(command(tone_data, run, "--num-workers", "0")) == 0
    return run


def test_the_job_trains_a_new_model(run: Path):
    check_results(run)


@pytest.mark.slow
def test_workers_train_resume_and_evaluate_a_new_model(tone_data: str, tmp_path: Path, own_folders: OwnFolders):
    """With a Ray whose workers know the model."""
    run = tmp_path / "run"
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        _temp_dir=str(own_folders.root / "ray-toy"),
        log_to_driver=False,
        runtime_env={"worker_process_setup_hook": "tests.extending.registration.register"},
    )
    try:
        assert train.main(command(tone_data, run, "--num-workers", "1")) == 0
        (run / "summary.json").unlink()  # as if the run had been interrupted after its last checkpoint
        assert train.main(command(tone_data, run, "--num-workers", "1")) == 0
        figures = ["--data", tone_data, "--split", "eval", "--json", str(tmp_path / "figures.json")]
        assert evaluate.main(["--checkpoint", str(run), *figures]) == 0
    finally:
        ray.shutdown()
    check_results(run)
    summary = json.loads((run / "summary.json").read_text())
    assert json.loads((tmp_path / "figures.json").read_text())["map"] == pytest.approx(summary["map"], abs=1e-6)


def test_the_job_exports_a_new_model(run: Path, tmp_path: Path):
    checkpoint = ["--checkpoint", str(run)]
    assert export.main([*checkpoint, "--format", "ours", "--output", str(tmp_path / "folder")]) == 0
    model, config = load_model(tmp_path / "folder")
    assert isinstance(model, toy_model.MeanOverTime)
    scores = tag(model, config, fakes.tone(600.0, 0.5))
    assert scores.shape == (4,)
    with pytest.raises(ConfigError, match="for the model ast, this is mean_over_time"):
        export.main([*checkpoint, "--format", "huggingface", "--output", str(tmp_path / "hf")])


def test_onnx_has_a_new_models_logits(run: Path, tmp_path: Path):
    onnxruntime = pytest.importorskip("onnxruntime")
    file = tmp_path / "toy.onnx"
    assert export.main(["--checkpoint", str(run), "--format", "onnx", "--output", str(file)]) == 0
    fbank = np.random.default_rng(0).standard_normal((3, 48, 128)).astype(np.float32)
    (logits,) = onnxruntime.InferenceSession(file).run(["logits"], {"fbank": fbank})
    model, _ = load_model(run / "best")
    with torch.inference_mode():
        np.testing.assert_allclose(logits, model(torch.from_numpy(fbank)).numpy(), atol=1e-4)


def test_a_new_run_can_start_from_a_new_model(run: Path):
    model, _ = load_model(run / "best")
    other = create_model("mean_over_time", label_dim=2, input_tdim=48)
    other.start_from(model, [3, 0])
    assert torch.equal(other.state_dict()["classifier.bias"], model.state_dict()["classifier.bias"][[3, 0]])


def test_keys_of_another_model_are_refused():
    with pytest.raises(ConfigError, match=r"^fstride is a key of the model ast, but model is mean_over_time"):
        load_recipe("model: mean_over_time\nfstride: 16", {}, origin="test")
    with pytest.raises(ConfigError, match=r"^model is 'nothing'; use one of ast, .*, mean_over_time$"):
        Recipe(model="nothing")
