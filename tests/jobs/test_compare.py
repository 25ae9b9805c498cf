"""Comparing models: one run each, one table, one page; what is refused, and what a second run trains."""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.train.v2.api.exceptions import WorkerGroupError

from ast_core.errors import ConfigError, DataError, UserError
from ast_core.labels import audioset_labels
from ast_core.metrics import bootstrap_map, tagging_metrics
from jobs.compare import main, parser
from pipeline.compare import measure, published
from pipeline.train import fit
from pipeline.train.evaluation.scores import read_scores
from tests import fakes
from tests.browser import browser, needs_browser
from tests.pages import Page

RECIPE = {
    "input_tdim": 48,
    "norm_stats": "data",
    "freqm": 16,
    "timem": 8,
    "lr": 3e-3,
    "warmup": False,
    "epochs": 2,
    "compile": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "linear": {"model": "linear"},
    "crnn": {"model": "talnet", "embedding_size": 128, "wa_start": 2, "wa_end": 2},
    "small": {"model": "linear", "features": "small64", "input_fdim": 64},
}


@pytest.fixture(scope="module", autouse=True)
def short_measurements() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "MEASURED_S", 0.01)
        yield


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of MODELS by name."""
    folder = tmp_path_factory.mktemp("recipes")
    for name, keys in MODELS.items():
        (folder / f"{name}.yaml").write_text(json.dumps(RECIPE | keys))
    return {name: str(folder / f"{name}.yaml") for name in MODELS}


def argv(data: str, output: Path, recipes: list[str], *more: str) -> list[str]:
    splits = [] if "--folds" in more else ["--train-splits", "train", "--eval-splits", "eval"]
    return ["--recipes", *recipes, "--data", data, *splits, "--output", str(output), "--num-workers", "0", *more]


def read(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "comparison.json").read_text())
    return found


def trained(output: Path) -> dict[str, int]:
    """When each run below a folder wrote its summary."""
    return {str(file.relative_to(output)): file.stat().st_mtime_ns for file in output.rglob("summary.json")}


@pytest.fixture(scope="module")
def output(tone_data: str, recipes: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two models."""
    output = tmp_path_factory.mktemp("compared") / "out"
    assert main(argv(tone_data, output, [recipes["linear"], recipes["crnn"]])) == 0
    return output


def test_comparison_json_has_the_figures_of_each_run(output: Path):
    found = read(output)
    assert [model["name"] for model in found["models"]] == ["linear", "crnn"]
    for model in found["models"]:
        run = output / model["name"] / "seed-0"
        summary = json.loads((run / "summary.json").read_text())
        scores = read_scores(str(run))
        assert scores is not None
        score, target = scores.scores.astype(np.float32), scores.targets()
        for name in ("map", "mauc", "d_prime", "accuracy"):
            assert model[name] == summary[name]
        # Scores are stored in float16 and may be equal there. The figure lies between those of two orders of equal
        # scores: positives after all negatives, one by one, and before them.
        apart = 1e-6 * target * np.arange(1, len(target) + 1)[:, None]
        worst, best = (tagging_metrics(score + sign * apart, target).map for sign in (-1, 1))
        assert worst <= summary["map"] <= best
        shift = summary["map"] - tagging_metrics(score, target).map
        expected = [min(bound + shift, 1) for bound in bootstrap_map(score, target)]
        assert model["map_interval"] == pytest.approx(expected, abs=1e-12)
        assert model["curves"]["epoch"] == [1, 2]
        assert model["runs"][0]["best_epoch"] == summary["best_epoch"]
        assert model["training"]["clips_per_s"] == summary["clips_per_s"]
        assert model["costs"]["inference"]["clips_per_s"] > 0
        assert model["published"] is None
    assert found["models"][0]["averaged"] is None
    assert found["models"][1]["averaged"]["map"] > 0
    assert found["models"][0]["costs"]["parameters"] == sum(
        (128 * 128 + 128, 3 * (2 * 128 + 128 * 128 + 128), 2 * (4 * 128 + 4))
    )
    (pair,) = found["pairs"]
    assert pair["models"] == ["linear", "crnn"]
    maps = [model["map"] for model in found["models"]]
    assert pair["map"]["difference"] == pytest.approx(maps[0] - maps[1], abs=1e-12)
    assert 0 < pair["map"]["p"] <= 1
    assert pair["map"]["p_holm"] == pair["map"]["p"]  # of one pair
    assert found["data"]["audioset"] is None


def test_the_page_shows_both_models_and_loads_nothing(output: Path):
    page = Page((output / "comparison.html").read_text())
    models = page.tables["Models, best first"]
    assert {row[0] for row in models[1:]} == {"linear", "crnn"}
    assert "published mAP" not in models[0]
    assert len(page.tables["Differences between models, largest first"]) == 2
    assert len(page.tables["AP of each class by model"]) == 5
    keys = [row[0] for row in page.tables["Recipe keys in which the models differ"][1:]]
    assert keys == ["model", "embedding_size", "wa_start", "wa_end"]
    assert not [address for address in page.loads if not address.startswith(("#", "data:"))]


@needs_browser
def test_a_browser_opens_the_page_from_disk_without_errors(output: Path, tmp_path: Path):
    with browser(tmp_path / "profile") as chromium:
        chromium.open(f"file://{output}/comparison.html")
        assert chromium.run("return document.querySelectorAll('.charts svg').length") == 4
        best = "return document.querySelector('#models tbody tr').cells[0].textContent.trim()"
        models = sorted(read(output)["models"], key=lambda model: -model["map"])
        assert chromium.run(best) == models[0]["name"]
        assert chromium.console() == []


def test_published_figures_stand_beside_those_on_audioset(
    recipes: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A data set with AudioSet's classes stands for it, once the numbers of clips are those of a small one."""
    fakes.write_data(str(tmp_path / "data"), splits=[("train", 12), ("eval", 6)], labels=audioset_labels())
    command = argv(str(tmp_path / "data"), tmp_path / "out", [recipes["linear"]], "--epochs", "1")
    assert main(command) == 0
    assert read(tmp_path / "out")["data"]["audioset"] is None
    assert "published mAP" not in Page((tmp_path / "out" / "comparison.html").read_text()).text
    monkeypatch.setattr(published, "PARTS", {"full": range(13, 20), "balanced": range(10, 13)})
    monkeypatch.setattr(published, "EVALUATION", range(5, 7))
    linear = published.Published("balanced", {"model": "linear", "features": "kaldi128"}, 0.25, 0.125, "as a test")
    monkeypatch.setattr(published, "PUBLISHED", (*published.PUBLISHED, linear))
    assert main(command) == 0
    found = read(tmp_path / "out")
    assert found["data"]["audioset"] == "balanced"
    assert found["models"][0]["published"] == {"map": 0.25, "comparison_map": 0.125, "note": "as a test"}
    columns, row = Page((tmp_path / "out" / "comparison.html").read_text()).tables["Models, best first"]
    assert columns[-2:] == ["published mAP", "as the comparison’s authors got it"]
    assert row[-2:] == ["0.2500\nas a test", "0.1250"]


def test_a_second_run_trains_only_what_is_missing(
    output: Path, tone_data: str, recipes: dict[str, str], capsys: pytest.CaptureFixture[str]
):
    before, costs = trained(output), {model["name"]: model["costs"] for model in read(output)["models"]}
    with pytest.raises(ConfigError, match=r"^small, seed 0: the recipe is for .* again with --features small64, or"):
        main(argv(tone_data, output, [*recipes.values()]))
    assert trained(output) == before
    (output / "crnn" / "seed-0" / "summary.json").unlink()  # as if it had been interrupted
    assert main(argv(tone_data, output, [recipes["linear"], recipes["crnn"]])) == 0
    assert "2 runs, 1 of them finished" in capsys.readouterr().out
    after = trained(output)
    assert after["linear/seed-0/summary.json"] == before["linear/seed-0/summary.json"]
    assert {model["name"]: model["costs"] for model in read(output)["models"]}["linear"] == costs["linear"]


@pytest.mark.slow
def test_variants_seeds_and_folds_are_runs_of_their_own(recipes: dict[str, str], tmp_path: Path):
    data = str(tmp_path / "data")
    fakes.write_data(data, splits=[("red", 12), ("green", 12), ("blue", 12)])
    more = ["--vary", "lr=1e-3,3e-3", "--seeds", "2", "--folds", "red", "blue", "--epochs", "1"]
    assert main(argv(data, tmp_path / "out", [recipes["linear"]], *more)) == 0
    found = read(tmp_path / "out")
    assert [model["name"] for model in found["models"]] == ["linear-lr-1e-3", "linear-lr-3e-3"]
    for model in found["models"]:
        assert [(run["seed"], run["fold"]) for run in model["runs"]] == [
            (0, "red"),
            (0, "blue"),
            (1, "red"),
            (1, "blue"),
        ]
        maps = np.array([run["map"] for run in model["runs"]])
        assert model["map"] == pytest.approx(maps.mean())
        assert model["map_std_over_seeds"] == pytest.approx(maps.reshape(2, 2).mean(axis=1).std(ddof=1))
        assert "seed" not in model["recipe"]
        for run in model["runs"]:
            config = json.loads((Path(run["uri"]) / "config.json").read_text())
            assert set(config["eval_splits"]) == {run["fold"]}
            assert set(config["train_splits"]) == {"red", "green", "blue"} - {run["fold"]}
            assert config["recipe"]["seed"] == run["seed"]
    assert "± " in (tmp_path / "out" / "comparison.html").read_text()


def test_a_model_that_fails_does_not_stop_the_others(tone_data: str, recipes: dict[str, str], tmp_path: Path):
    diverges = ["--vary", "lr=3e-3,1e38", "--epochs", "1"]
    with pytest.raises(
        UserError, match=r"^1 of 2 models failed, linear-lr-1e38, seed 0: .*comparison.json has the others"
    ):
        main(argv(tone_data, tmp_path, [recipes["linear"]], *diverges))
    found = read(tmp_path)
    assert [model["name"] for model in found["models"]] == ["linear-lr-3e-3"]
    assert [one["name"] for one in found["failed"]] == ["linear-lr-1e38"]
    assert "Failed:" in (tmp_path / "comparison.html").read_text()


def test_after_a_failure_the_models_other_runs_are_not_trained_and_finished_ones_are_named(
    tone_data: str, recipes: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(argv(tone_data, tmp_path, [recipes["linear"]], "--epochs", "1", "--lr", "3e-3")) == 0
    shutil.copytree(tmp_path / "linear", tmp_path / "linear-lr-3e-3")
    more = ["--epochs", "1", "--seeds", "3", "--vary", "lr=3e-3,1e38"]
    with pytest.raises(UserError, match=r"^1 of 2 models failed, linear-lr-1e38, seed 0: [^(]*$"):
        main(argv(tone_data, tmp_path, [recipes["linear"]], *more))
    printed = capsys.readouterr().out
    assert "6 runs, 1 of them finished" in printed
    assert printed.count("not trained: another run of this model failed") == 2
    assert len(trained(tmp_path / "linear-lr-3e-3")) == 3
    assert not trained(tmp_path / "linear-lr-1e38")


def test_finished_runs_of_a_model_that_failed_are_named(
    tone_data: str, recipes: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    train_run = fit.train_run

    def second_fails(claimed: fit.ClaimedRun, held: Any) -> None:
        if claimed.uri.endswith("seed-1"):
            raise UserError("it diverged")
        train_run(claimed, held)

    monkeypatch.setattr(fit, "train_run", second_fails)
    failure = "linear, seed 1: it diverged (finished, and kept: linear, seed 0)"
    with pytest.raises(UserError, match=f"^1 of 1 models failed, {re.escape(failure)}$"):
        main(argv(tone_data, tmp_path, [recipes["linear"]], "--epochs", "1", "--seeds", "2"))
    assert not (tmp_path / "comparison.json").exists()


def test_an_unforeseen_error_in_a_worker_does_not_stop_the_other_models(
    output: Path,
    tone_data: str,
    recipes: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    shutil.copytree(output, tmp_path / "out")
    train_run = fit.train_run

    def linear_fails(claimed: fit.ClaimedRun, held: Any) -> None:
        if "linear" in claimed.uri:
            raise WorkerGroupError("Traceback (most recent call last):\nKeyError: 'a bug'\n", {})
        train_run(claimed, held)

    monkeypatch.setattr(fit, "train_run", linear_fails)
    with pytest.raises(UserError, match=r"^1 of 2 models failed, linear, seed 0: KeyError: 'a bug'; .*has the others$"):
        main(argv(tone_data, tmp_path / "out", [recipes["linear"], recipes["crnn"]]))
    assert "in linear_fails" in capsys.readouterr().err
    assert [model["name"] for model in read(tmp_path / "out")["models"]] == ["crnn"]


def test_a_bug_in_this_process_ends_the_comparison(
    tone_data: str, recipes: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(fit, "train_run", broken)
    with pytest.raises(RuntimeError, match=r"^a bug$"):
        main(argv(tone_data, tmp_path, [recipes["linear"]]))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("scores.parquet", None),
        ("scores.parquet", b"PAR1 damaged"),
        ("config.json", b"{"),
        ("model.safetensors", b"damaged"),
    ],
)
def test_a_damaged_run_loses_only_its_own_model(
    file: str, damage: bytes | None, output: Path, tone_data: str, recipes: dict[str, str], tmp_path: Path
):
    shutil.copytree(output, tmp_path / "out")
    broken = tmp_path / "out" / "linear" / "seed-0" / "best" / file
    broken.unlink()
    if damage is not None:
        broken.write_bytes(damage)
    (tmp_path / "out" / "comparison.json").unlink()  # it has the costs, for which the weights are read
    with pytest.raises(UserError, match=r"^1 of 2 models failed, linear\b.*best/?.*comparison\.json has the others"):
        main(argv(tone_data, tmp_path / "out", [recipes["linear"], recipes["crnn"]]))
    found = read(tmp_path / "out")
    assert [model["name"] for model in found["models"]] == ["crnn"]
    assert [one["name"] for one in found["failed"]] == ["linear"]


def test_a_model_that_cannot_be_measured_loses_only_itself(
    output: Path, tone_data: str, recipes: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(output, tmp_path / "out")
    (tmp_path / "out" / "comparison.json").unlink()
    predict = measure.predict

    def fails_for_linear(model: Any, *args: Any, **kwargs: Any) -> Any:
        if "Linear" in type(model).__name__:
            raise MemoryError
        return predict(model, *args, **kwargs)

    monkeypatch.setattr(measure, "predict", fails_for_linear)
    with pytest.raises(UserError, match=r"^1 of 2 models failed, linear: the machine has too little memory"):
        main(argv(tone_data, tmp_path / "out", [recipes["linear"], recipes["crnn"]]))
    assert [model["name"] for model in read(tmp_path / "out")["models"]] == ["crnn"]


@pytest.mark.slow
def test_workers_train_and_a_task_measures_each_model(
    local_ray: None, tone_data: str, recipes: dict[str, str], tmp_path: Path
):
    command = argv(tone_data, tmp_path, [recipes["linear"], recipes["crnn"]], "--num-workers", "1")
    assert main(command) == 0
    for model in read(tmp_path)["models"]:
        assert model["training"]["memory_gb"] > 0
        assert model["costs"]["inference"]["threads"] == 2  # all CPUs of this Ray
        assert model["costs"]["inference"]["clips_per_s"] > 0


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (["--folds", "train", "--train-splits", "train"], ConfigError, "--folds sets the splits of each run"),
        (["--folds", "yellow"], DataError, "no split 'yellow'"),
        (["--recipe", "small"], ConfigError, "--recipe is an option of jobs/train.py; give --recipes"),
        (["--learning_rate", "1"], ConfigError, "no recipe key 'learning_rate'; did you mean lr?"),
        (["--vary", "lr"], ConfigError, "--vary is lr; use KEY=VALUE,VALUE"),
        (["--vary", "lr=1e-3,1e-3"], ConfigError, "lr or one of its values is given twice"),
        (["--vary", "seed=1,2"], ConfigError, "give --seeds N"),
        (["--vary", "data=a,b"], ConfigError, "--vary data=a,b: data is no recipe key; `jobs/train.py --help` lists"),
        (["--vary", "recipe=small,esc50"], ConfigError, "recipe is no recipe key"),
        (["--vary", "device=cpu,cuda"], ConfigError, "device is no recipe key"),
        (["--vary", "help=1"], ConfigError, "help is no recipe key"),
        (["--vary", "learning_rate=1,2"], ConfigError, "learning_rate is no recipe key; did you mean lr?"),
        (["--vary", "lr=1e-3", "--lr", "1e-4"], ConfigError, "--lr is given twice"),
        (["--num_workers", "1"], ConfigError, "num_workers is not a recipe key; the option is --num-workers"),
        (["--seeds", "0"], ConfigError, "--seeds is 0; use 1 to 100"),
        (["--num-workers", "-1"], ConfigError, "--num-workers is -1"),
    ],
)
def test_an_invalid_command_is_refused_before_training(
    more: list[str], error: type, message: str, tone_data: str, recipes: dict[str, str], tmp_path: Path
):
    with pytest.raises(error, match=message):
        main(argv(tone_data, tmp_path, [recipes["linear"]], *more))
    assert not list(tmp_path.iterdir())


def test_two_models_of_one_name_are_refused(tone_data: str, recipes: dict[str, str], tmp_path: Path):
    with pytest.raises(ConfigError, match=r"recipe .*linear\.yaml is given twice; keep one, and give --seeds 2"):
        main(argv(tone_data, tmp_path / "out", [recipes["linear"], recipes["linear"]]))
    (tmp_path / "linear.yaml").write_text("model: linear")
    with pytest.raises(ConfigError, match=r"both called linear; rename one of the files"):
        main(argv(tone_data, tmp_path / "out", [recipes["linear"], str(tmp_path / "linear.yaml")]))


def test_a_model_in_place_of_a_recipe_is_explained(tone_data: str, tmp_path: Path):
    with pytest.raises(
        ConfigError, match=r"^no recipe 'talnet'; use .*; talnet is a model, which --model talnet trains"
    ):
        main(argv(tone_data, tmp_path / "out", ["talnet"]))


def test_the_examples_of_the_help_can_be_pasted_into_a_shell():
    (example,) = re.findall(r"    python jobs/compare.py --recipes compare.*\\\n.*\n", parser().format_help())
    assert shlex.split(example)[-2:] == ["--output", "comparison"]


def test_splits_or_folds_are_required(tone_data: str, recipes: dict[str, str], tmp_path: Path):
    with pytest.raises(ConfigError, match=r"^give --train-splits and --eval-splits, or --folds$"):
        main(["--recipes", recipes["linear"], "--data", tone_data, "--output", str(tmp_path / "out")])
