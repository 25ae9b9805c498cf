"""From a trained run: thresholds from its kept scores, and `export.py --push-to-hub` to a hub on loopback."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from ast_core.calibration import ModelCalibration, calibrate
from ast_core.checkpoints import load_model, read_checkpoint
from ast_core.errors import ConfigError
from jobs import calibrate as calibrate_job
from jobs import export, train
from pipeline.train import models
from pipeline.train.evaluation.scores import read_scores
from tests import fakes
from tests.processes import in_new_process
from tests.train import loopback_hub
from tests.train.loopback_hub import Hub


@pytest.fixture(scope="module")
def run(local_ray: None, tone_data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a linear model on tones, calibrated from the scores that it kept."""
    run = tmp_path_factory.mktemp("runs") / "run"
    recipe = fakes.LINEAR_RECIPE | {"norm_stats": "data", "batch_size": "12", "epochs": "4", "lr": "3e-3"}
    recipe |= {"wa_start": "3", "wa_end": "4"}
    splits = ["--data", tone_data, "--train-splits", "train", "--eval-splits", "eval"]
    where = ["--recipe", "audioset-balanced", "--output", str(run), "--num-workers", "0", "--cpus-per-worker", "1"]
    assert train.main([*splits, *where, *(f"--{key}={value}" for key, value in recipe.items())]) == 0
    assert calibrate_job.main(["--checkpoint", str(run)]) == 0
    return run


def test_kept_scores_give_the_calibration(run: Path, capsys: pytest.CaptureFixture[str]):
    kept = read_scores(str(run))
    assert kept is not None
    model, config = models.read(models.find(str(run)))
    facts = {"scores": "best/scores.parquet", "clips": 21, "goal": "f1", "value": 0.0}
    expected = calibrate(kept.scores, kept.targets(), facts=facts)
    assert models.read_calibration(models.find(str(run)), model, config) == expected
    with pytest.raises(ConfigError, match=r"averaged has no best/scores.parquet; give --data and --split"):
        calibrate_job.main(["--checkpoint", str(run / "averaged")])


@pytest.fixture
def hub() -> Iterator[Hub]:
    with loopback_hub.serving() as hub:
        yield hub


def exported(hub: Hub, folder: Path, *argv: str, token: str | None = loopback_hub.TOKEN) -> tuple[int, str, str]:
    return in_new_process(loopback_hub.export_here, argv, env=hub.env(folder / "home", token))


def test_a_run_is_uploaded_with_its_card_and_calibration(hub: Hub, run: Path, tmp_path: Path):
    status, out, err = exported(hub, tmp_path, "--checkpoint", str(run), "--format", "ours", "--push-to-hub", "tagger")
    assert (status, err) == (0, "")
    assert out == f"uploaded to {hub.endpoint}/somebody/tagger\n"
    assert hub.repos == {"somebody/tagger": True}  # private
    files = hub.files["somebody/tagger"]
    assert set(files) == {"README.md", "config.json", "model.safetensors", "calibration.json"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    model, config = load_model(tmp_path)
    trained, _ = models.read(models.find(str(run)))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in trained.state_dict().items())
    made = models.read_calibration(str(tmp_path), model, config)
    assert isinstance(made, ModelCalibration)
    np.testing.assert_array_equal(made.thresholds(), calibration_of(run).thresholds())
    text = files["README.md"].decode()
    summary = json.loads((run / "summary.json").read_text())
    (result,) = [one for one in ModelCard(text).data.eval_results if one.metric_type == "map"]
    assert result.metric_value == pytest.approx(summary["map"], abs=1e-6)
    assert 'load_model(snapshot_download("somebody/tagger"))' in text
    assert "`calibration.json` has the maps and thresholds" in text
    assert str(run.parent) not in text


def calibration_of(run: Path) -> ModelCalibration:
    uri = models.find(str(run))
    made = models.read_calibration(uri, *models.read(uri))
    assert made is not None
    return made


def test_a_second_upload_replaces_the_files_and_the_output_has_them_too(hub: Hub, run: Path, tmp_path: Path):
    given = ["--checkpoint", str(run), "--format", "original", "--output", str(tmp_path / "tagger.pth")]
    to = ["--push-to-hub", "group/tagger", "--public"]
    for more in ([], ["--force"]):
        status, out, err = exported(hub, tmp_path, *given, *to, *more)
        assert (status, err) == (0, "")
    assert hub.repos == {"group/tagger": False}
    assert hub.commits == 2
    assert set(hub.files["group/tagger"]) == {"README.md", "tagger.pth"}
    assert out.startswith(
        f"uploaded to {hub.endpoint}/group/tagger\nwrote {tmp_path / 'tagger.pth'}: linear, 4 classes"
    )
    assert (tmp_path / "tagger.pth").read_bytes() == hub.files["group/tagger"]["tagger.pth"]
    assert 'hf_hub_download("group/tagger", "tagger.pth")' in hub.files["group/tagger"]["README.md"].decode()


def test_an_output_folder_with_a_card_can_be_replaced_and_read(hub: Hub, run: Path, tmp_path: Path):
    given = ["--checkpoint", str(run), "--format", "ours", "--output", str(tmp_path / "model"), "--push-to-hub", "a"]
    assert exported(hub, tmp_path, *given)[0] == 0
    assert (tmp_path / "model" / "README.md").is_file()
    assert exported(hub, tmp_path, *given, "--force")[0] == 0
    read_checkpoint(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "token", "expected"),
    [
        ("tagger", None, "error: --push-to-hub tagger needs a token; log in with `hf auth login`, or set HF_TOKEN"),
        ("tagger", "hf_wrong", "error: the hub does not let this token write to tagger (HTTP 401); log in with"),
        ("a/b/c", loopback_hub.TOKEN, "error: --push-to-hub a/b/c is not a name of a repository: "),
        (
            "others/tagger",
            loopback_hub.TOKEN,
            "error: the hub does not let this token write to others/tagger (HTTP 403",
        ),
    ],
)
def test_a_missing_right_is_one_line(name: str, token: str | None, expected: str, hub: Hub, run: Path, tmp_path: Path):
    hub.forbids = ("others/tagger",)
    given = ["--checkpoint", str(run), "--format", "ours", "--push-to-hub", name]
    status, out, err = exported(hub, tmp_path, *given, token=token)
    assert (status, out) == (2, "")
    assert err.startswith(expected)
    assert "hf_wrong" not in err
    assert hub.files == {}


def test_without_an_output_and_a_hub_nothing_is_done(run: Path):
    with pytest.raises(ConfigError, match=r"^give --output, --push-to-hub, or both$"):
        export.main(["--checkpoint", str(run), "--format", "ours"])
