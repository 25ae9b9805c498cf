"""C7 of the review: an option that is not finite or out of bounds is refused before any work."""

from pathlib import Path

import pytest

from ast_core.errors import ConfigError
from jobs.prepare_audioset import main as prepare
from jobs.train import main as train


@pytest.mark.parametrize("value", ["inf", "nan", "-inf", "0", "-1", "1e300"])
@pytest.mark.parametrize("option", ["--timeout-s", "--deadline-s", "--rest-s", "--fetches-per-hour"])
def test_c7_prepare_refuses_numbers_out_of_bounds(option: str, value: str, tmp_path: Path):
    argv = ["--manifest", "none.csv", "--output", str(tmp_path / "data"), f"{option}={value}"]
    with pytest.raises(ConfigError, match=rf"^{option} is .*; use more than 0 and at most "):
        prepare(argv)


@pytest.mark.parametrize("option", ["--limit", "--download-workers"])
def test_c7_prepare_refuses_counts_out_of_bounds(option: str, tmp_path: Path):
    for value in ("0", "-3", str(10**30)):
        with pytest.raises(ConfigError, match=rf"^{option} is "):
            prepare(["--manifest", "none.csv", "--output", str(tmp_path / "data"), f"{option}={value}"])


@pytest.mark.parametrize("value", ["inf", "nan", "-1", "1e300"])
@pytest.mark.parametrize("option", ["--checkpoint-every-s", "--resize-every-s", "--cache-gb"])
def test_c7_train_refuses_numbers_out_of_bounds(option: str, value: str, tmp_path: Path):
    argv = ["--data", "none", "--train-splits", "a", "--eval-splits", "b", "--output", str(tmp_path / "run")]
    with pytest.raises(ConfigError, match=rf"^{option} is .*; use "):
        train(["--recipe", "audioset-balanced", *argv, f"{option}={value}"])
