"""PSLA's published `.pth` files are evaluated, exported and trained from without a recipe and a labels file."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ast_core.batch import Norm
from ast_core.checkpoints import load_model, save_original
from ast_core.errors import ConfigError, DataError
from ast_core.labels import LabelVocabulary, audioset_labels, fsd50k_labels
from ast_core.models import create_model
from jobs import evaluate, export
from jobs.train import claim
from tests import fakes

CLASSES = {"audioset": audioset_labels(), "fsd50k": fsd50k_labels()}
SPLITS = [("train", 6), ("eval", 3)]

each_data_set = pytest.mark.parametrize("name", [pytest.param("audioset", marks=pytest.mark.slow), "fsd50k"])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By data set, a file as PSLA writes it. The smallest EfficientNet with random weights stands for the b2."""
    folder = tmp_path_factory.mktemp("psla")
    found = {name: folder / f"{name}.pth" for name in CLASSES}
    for name, labels in CLASSES.items():
        torch.manual_seed(len(labels))
        save_original(found[name], create_model("efficientnet", label_dim=len(labels), eff_b=0, att_head=4))
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Data sets with the classes of AudioSet and FSD50K. Those of FSD50K are in another order than PSLA's."""
    folder = tmp_path_factory.mktemp("data")
    orders = {"audioset": 1, "fsd50k": -1}
    for name, labels in CLASSES.items():
        ordered = LabelVocabulary(labels.mids[:: orders[name]], labels.names[:: orders[name]])
        fakes.write_data(str(folder / name), splits=SPLITS, labels=ordered)
    return {name: str(folder / name) for name in CLASSES}


def weights(model: Path) -> dict[str, Tensor]:
    return load_model(model)[0].state_dict()


def equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@each_data_set
def test_a_file_and_its_export_have_the_same_figures(
    local_ray: None,
    name: str,
    files: dict[str, Path],
    data: dict[str, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    exported, again = tmp_path / "exported", tmp_path / "again.pth"
    with caplog.at_level(logging.WARNING):
        assert export.main(["--checkpoint", str(files[name]), "--format", "ours", "--output", str(exported)]) == 0
    assert "is taken for the published checkpoint of its shape" in caplog.text
    config = load_model(exported)[1]
    assert (config.labels, config.norm) == (CLASSES[name], Norm(-4.6476, 4.5699, divisor=1.0))
    assert export.main(["--checkpoint", str(exported), "--format", "original", "--output", str(again)]) == 0
    assert equal(torch.load(again, weights_only=True), torch.load(files[name], weights_only=True))
    figures = []
    for checkpoint in (files[name], exported):
        command = ["--checkpoint", str(checkpoint), "--data", data[name], "--split", "eval", "--bootstrap", "0"]
        command += ["--address", "auto"]  # with one thread: two that wait for each other take three times the CPU time
        assert evaluate.main([*command, "--json", str(tmp_path / "figures.json")]) == 0
        figures.append(json.loads((tmp_path / "figures.json").read_text())["map"])
    assert figures[0] == figures[1] > 0


@each_data_set
def test_a_run_starts_from_a_file_with_its_norm_and_head(
    name: str, files: dict[str, Path], data: dict[str, str], tone_data: str, tmp_path: Path
):
    command = ["--recipe", "psla-efficientnet", "--eff_b", "0", "--input_tdim", "48", "--freqm", "8", "--timem", "8"]
    command += ["--train-splits", "train", "--eval-splits", "eval", "--num-workers", "0"]
    command += ["--init-from", str(files[name])]
    for of, output in ((data[name], tmp_path / "same"), (tone_data, tmp_path / "other")):
        claim([*command, "--data", of, "--output", str(output)])
        assert load_model(output / "initial")[1].norm == Norm(-4.6476, 4.5699, divisor=1.0)
    export.main(["--checkpoint", str(files[name]), "--format", "ours", "--output", str(tmp_path / "exported")])
    theirs, same, other = (weights(tmp_path / run) for run in ("exported", "same/initial", "other/initial"))
    order = slice(None) if name == "audioset" else torch.arange(199, -1, -1)
    assert torch.equal(same["pooling.cla.2.weight"], theirs["pooling.cla.2.weight"][order])
    assert other["pooling.cla.2.weight"].shape[0] == 4
    for initial in (same, other):
        assert all(torch.equal(initial[key], theirs[key]) for key in theirs if key.startswith("encoder."))


def test_a_run_of_another_size_is_refused_with_the_key_to_give(
    files: dict[str, Path], data: dict[str, str], tmp_path: Path
):
    command = ["--recipe", "psla-efficientnet", "--init-from", str(files["audioset"]), "--data", data["audioset"]]
    command += ["--train-splits", "train", "--eval-splits", "eval", "--output", str(tmp_path), "--num-workers", "0"]
    with pytest.raises(ConfigError, match=r"audioset\.pth is of eff_b 0, this run is of 2; give --eff_b 0$"):
        claim(command)


def test_200_classes_of_another_data_set_are_refused_by_name(files: dict[str, Path], tmp_path: Path):
    fakes.write_data(str(tmp_path / "data"), splits=SPLITS, num_classes=200)
    command = ["--checkpoint", str(files["fsd50k"]), "--data", str(tmp_path / "data"), "--split", "eval"]
    with pytest.raises(DataError, match=r"trained for other labels \(200 classes\) .* has 'Accelerating_and_"):
        evaluate.main(command)
