"""What a training command is refused for, or told, before anything is trained."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ast_core.errors import ConfigError
from jobs.train import claim
from pipeline import dataset
from tests import fakes
from tests.fakes import SMALL_RECIPE


def argv(data: str, run: Path, *more: str) -> list[str]:
    keys = [word for key, value in SMALL_RECIPE.items() for word in (f"--{key}", value)]
    splits = ["--train-splits", "train", "--eval-splits", "eval"]
    return ["--recipe", "audioset-full", "--data", data, *splits, "--output", str(run), *keys, *more]


def forget_clip_order(run: Path) -> None:
    """As if an earlier version had begun the run."""
    config = json.loads((run / "config.json").read_text())
    del config["clip_order"]
    (run / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("what", ["train", "eval"])
def test_the_same_splits_in_another_order_are_refused_as_batches_and_sums_of_scores_are_others(
    what: str, tmp_path: Path
):
    data, run = str(tmp_path / "data"), tmp_path / "run"
    fakes.write_data(data, splits=[("a", 12), ("b", 12), ("c", 20)])
    splits = {"train": ["c"], "eval": ["c"]} | {what: ["a", "b", "c"]}
    swapped = splits | {what: ["b", "a", "c"]}

    def command(splits: dict[str, list[str]]) -> list[str]:
        return argv(data, run, "--train-splits", *splits["train"], "--eval-splits", *splits["eval"])

    claim(command(splits))
    refusal = f"was begun with --{what}-splits a b c; give them in this order, or another --output"
    with pytest.raises(ConfigError, match=refusal):
        claim(command(swapped))
    forget_clip_order(run)
    with pytest.raises(ConfigError, match=refusal):
        claim(command(swapped))
    claim(command(splits))


@pytest.mark.parametrize("split", ["train", "eval"])
def test_data_that_were_prepared_anew_in_another_order_are_refused(split: str, tone_data: str, tmp_path: Path):
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(tone_data, data)
    claim(argv(str(data), run))
    index = pq.read_table(data / split / "index.parquet")
    order = [1, 0, *range(2, len(index))]  # within a row group: their layout is the same
    dataset.write_table(dataset.index_file(str(data), split), index.take(order))
    with pytest.raises(ConfigError, match="was begun on these clips in another order, the data set was prepared anew"):
        claim(argv(str(data), run))
    forget_clip_order(run)
    claim(argv(str(data), run))
