"""Outputs that cannot be what a job would write there are refused before the work, and nothing is changed."""

from pathlib import Path

import pytest

from ast_core.errors import ConfigError, DataError
from jobs import tag, train
from jobs.common import output_file, output_uri
from pipeline import storage
from tests import fakes
from tests.ast_core import small


def test_an_empty_path_is_refused():
    with pytest.raises(ConfigError, match=r"^--output is empty"):
        output_uri("")


def test_a_folder_is_no_output_file(tmp_path: Path):
    with pytest.raises(ConfigError, match=f"^--json {tmp_path} is a folder; give a file$"):
        output_file(str(tmp_path), "--json")
    with pytest.raises(DataError, match=f"^{tmp_path} is a folder; give a file$"):
        storage.write_bytes(str(tmp_path), b"x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [["--format", "csv"], ["--embeddings"], ["--retry-failed"]])
def test_options_on_results_need_an_output(option: list[str]):
    with pytest.raises(ConfigError, match=f"^{option[0]} needs --output, a folder for the results$"):
        tag.main(["--checkpoint", "c", "--input", "a.wav", *option])


@pytest.mark.parametrize("content", ["a model", "a foreign config.json", "a foreign run"])
def test_a_training_changes_no_folder_of_something_else(tone_data: str, tmp_path: Path, content: str):
    there = tmp_path / "there"
    if content == "a model":
        small.save_linear_tagger(there)
    else:
        (there / "initial").mkdir(parents=True)
        (there / "initial" / "notes.txt").write_text("precious")
        (there / "config.json").write_text('{"lr": 1}' if content == "a foreign config.json" else "[1]")
        (there / "summary.json").write_text("{}")
    before = {path: path.read_bytes() for path in there.rglob("*") if path.is_file()}
    with pytest.raises(
        DataError, match=r"there is not empty and holds no run|there/config\.json is damaged: it is not a JSON object"
    ):
        train.main(train_argv(tone_data, there))
    assert {path: path.read_bytes() for path in there.rglob("*") if path.is_file()} == before


def test_a_training_into_a_file_is_refused(tone_data: str, tmp_path: Path):
    (tmp_path / "a.wav").write_text("x")
    with pytest.raises(DataError, match=r"a\.wav is a file, or below one; give a folder"):
        train.main(train_argv(tone_data, tmp_path / "a.wav"))


def train_argv(data: str, output: Path) -> list[str]:
    keys = [word for key, value in fakes.LINEAR_RECIPE.items() for word in (f"--{key}", value)]
    splits = ["--train-splits", "train", "--eval-splits", "eval"]
    return ["--recipe", "esc10", "--data", data, *splits, "--output", str(output), "--num-workers", "0", *keys]
