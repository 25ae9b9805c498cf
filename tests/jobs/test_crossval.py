"""Cross-validation: one training run per fold, and a table of the results."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ast_core.errors import ConfigError, DataError
from jobs.crossval import folds_of, main
from pipeline.train.cross_validation import summarise, table
from tests.fakes import LINEAR_RECIPE, write_data

FOLDS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("folds") / "data"
    write_data(str(folder), splits=[(fold, 12) for fold in FOLDS])
    return str(folder)


def argv(data: str, output: Path, *more: str) -> list[str]:
    recipe = LINEAR_RECIPE | {"norm_stats": "data", "epochs": "2", "wa_start": "2", "wa_end": "2"}
    usual = {key: value for key, value in recipe.items() if f"--{key}" not in more}
    keys = [word for key, value in usual.items() for word in (f"--{key}", value)]
    return ["--recipe", "esc10", "--data", data, "--output", str(output), "--num-workers", "0", *keys, *more]


def epochs_of(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "epoch"]


def test_each_fold_is_evaluated_by_a_model_not_trained_on_it(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(argv(data, tmp_path)) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "folds.json").read_text())
    assert found["metric"] == "accuracy"
    assert list(found["folds"]) == list(FOLDS)
    for fold in FOLDS:
        config = json.loads((tmp_path / fold / "config.json").read_text())
        assert set(config["eval_splits"]) == {fold}
        assert set(config["train_splits"]) == {*FOLDS} - {fold}
        by_epoch = {record["epoch"]: record["accuracy"] for record in epochs_of(tmp_path / fold)}
        figures = found["folds"][fold]
        assert figures["best"] == by_epoch[figures["best_epoch"]] == max(by_epoch.values())
        assert figures["common"] == by_epoch[found["common_epoch"]]
        assert figures["averaged"] == pytest.approx(by_epoch[2], abs=1e-9)  # the average of one epoch
    shown = table(found, "accuracy")
    assert shown in printed
    assert "chosen on that fold itself" in shown

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert before
    (tmp_path / "folds.json").unlink()
    assert main(argv(data, tmp_path)) == 0
    again = capsys.readouterr().out
    assert again.count("this run is finished") == 3
    assert shown in again
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    with pytest.raises(ConfigError, match="red holds another run"):
        main(argv(data, tmp_path, "--lr", "1e-3"))


def test_common_epoch_has_the_best_mean_over_the_folds():
    curves = {"a": [0.1, 0.6, 0.9, 0.2, 0.2, 0.2, 0.2], "b": [0.8, 0.7, 0.1, 0.2, 0.2, 0.2]}
    found = summarise(
        {
            name: {
                "by_epoch": dict(enumerate(curve, 1)),
                "best_epoch": curve.index(max(curve)) + 1,
                "averaged": None,
            }
            for name, curve in curves.items()
        }
    )
    assert found["common_epoch"] == 2
    assert found["folds"]["a"] == {"best_epoch": 3, "best": 0.9, "common": 0.6, "last": pytest.approx(0.34)} | {
        "averaged": None
    }
    assert found["mean"] == pytest.approx({"best": 0.85, "common": 0.65, "last": 0.31, "averaged": None})
    assert found["std"]["best"] == pytest.approx(0.1 / 2**0.5)  # of a sample of two
    assert "mean" in (shown := table(found, "map"))
    assert "0.6500" in shown
    assert "–" in shown


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (["--splits", "red", "yellow"], DataError, "no split 'yellow'; it has red, green, blue"),
        (["--splits", "red"], ConfigError, "red is one; give more of red, green, blue as --splits, or"),
        (["--splits", "red", "red"], DataError, "split 'red' is given twice"),
        (["--train-splits", "red"], ConfigError, "--train-splits is set by the job for each fold"),
        (["--learning_rate", "1"], ConfigError, "no recipe key 'learning_rate'"),
    ],
)
def test_invalid_command_is_refused_before_training(
    data: str, tmp_path: Path, more: list[str], error: type, message: str
):
    with pytest.raises(error, match=message):
        main(argv(data, tmp_path, *more))
    assert not list(tmp_path.iterdir())


def of_sizes(**num_clips: int) -> Any:
    """As much of a data set as choosing its folds takes."""
    return SimpleNamespace(splits=[*num_clips], info={"splits": {s: {"clips": n} for s, n in num_clips.items()}})


def test_splits_without_clips_are_no_folds(capsys: pytest.CaptureFixture[str]):
    assert folds_of(of_sizes(a=3, b=0, c=2), None) == ["a", "c"]
    assert capsys.readouterr().out == "left out, as they have no clips: b\n"
    with pytest.raises(ConfigError, match=r"; train is one; write fold1, fold2, … into the list's column split, and"):
        folds_of(of_sizes(train=9, test=0), None)
    with pytest.raises(ConfigError, match="; none has clips; write fold1"):
        folds_of(of_sizes(train=0), None)


def test_usual_splits_as_folds_get_a_warning(capsys: pytest.CaptureFixture[str]):
    assert folds_of(of_sizes(train=1200, test=300), None) == ["train", "test"]
    assert capsys.readouterr().out == (
        "warning: splits called train, test are rarely folds of equal size (clips: train 1,200, test 300); each is "
        "trained on and evaluated on in turn\n"
    )
    folds_of(of_sizes(fold1=2, fold2=2), None)
    assert capsys.readouterr().out == ""


def test_folder_of_something_else_is_refused_before_any_fold_is_trained(data: str, tmp_path: Path):
    (tmp_path / "blue").mkdir()
    (tmp_path / "blue" / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match="blue is not empty and holds no run"):
        main(argv(data, tmp_path))
    assert not list(tmp_path.rglob("metrics.jsonl"))
    assert [path.name for path in (tmp_path / "blue").iterdir()] == ["thesis.tex"]


def test_help_names_the_folds(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "--splits FOLD" in capsys.readouterr().out
