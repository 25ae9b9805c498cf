"""Before training starts, unsuitable data are refused, and doubtful data give one warning line each."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ast_core.batch import Norm
from ast_core.errors import ConfigError
from ast_core.labels import LabelVocabulary
from ast_core.recipe import Recipe
from jobs.train import claim
from pipeline import dataset
from pipeline.dataset import Clips, PreparedDataset
from pipeline.train import data_checks
from tests import fakes
from tests.fakes import LINEAR_RECIPE
from tests.train import made

LABELS = LabelVocabulary.from_names(["dog", "cat", "rain", "wind", "sea"])


def clips(labels: Sequence[Sequence[int]], split: str = "train") -> Clips:
    made_up = made.clips_of([f"nowhere/{split}.parquet"] * len(labels), list(range(len(labels))))
    ids = pa.array([f"{split}{i}" for i in range(len(labels))])
    return replace(made_up, labels=pa.array(labels, dataset.LABELS), clip_id=ids)


def class_lines(train: Sequence[Sequence[int]], evaluation: Sequence[Sequence[int]], num_classes: int) -> list[str]:
    labels = LabelVocabulary.from_names(LABELS.names[:num_classes])
    return data_checks.check_classes(Recipe(loss="BCE"), labels, clips(train), clips(evaluation))


ALL = [[0], [1], [2], [3], [4]]


def test_case_12_one_class_is_refused_for_ce_and_a_warning_for_bce():
    one = LabelVocabulary.from_names(["dog"])
    with pytest.raises(ConfigError, match=r"^loss CE takes two classes or more, its loss of one class is 0; use"):
        data_checks.check_classes(Recipe(loss="CE"), one, clips([[0]]), clips([[0]]))
    assert class_lines([[0], [0]], [[0]], 1) == [
        "warning: every training clip has every class (1): there is nothing to tell apart, and any model scores 1; "
        "add clips without them",
        "warning: every evaluation clip has the class 'dog': its AP is 1 whatever the scores",
    ]
    assert class_lines([[0, 1], [1, 0]], [[0], [1]], 2)[0].startswith(
        "warning: every training clip has every class (2)"
    )


def test_case_12_classes_without_positives_or_negatives_are_named():
    assert class_lines(ALL, ALL, 5) == []
    assert class_lines([[0], [0, 1]], ALL[:2], 2) == [
        "warning: every training clip has the class 'dog': nothing teaches what its absence sounds like"
    ]
    assert class_lines([[0], [1]], ALL, 5) == [
        "warning: no training clip has 3 of the classes ('rain', 'wind', 'sea'): nothing teaches what it sounds like"
    ]
    assert class_lines(ALL, [[4], [3]], 5) == [
        "warning: no evaluation clip has 3 of the classes ('dog', 'cat', 'rain'): its AP and AUC are undefined and "
        "left out of the means"
    ]
    assert class_lines([[0]], [[1], [1, 0]], 5)[1] == (
        "warning: no training clip has 4 of the classes ('cat', 'rain', 'wind', …): nothing teaches what it sounds like"
    )
    assert class_lines(ALL, [[], []], 5) == ["warning: no evaluation clip has a label: mAP and AUC are undefined"]


def test_case_21_data_without_variance_are_refused():
    with pytest.raises(ConfigError, match=r"^norm_stats data: the std of a, b is 0, all clips are the same sound or"):
        data_checks.check_norm(Norm(-15.9, 0.0), ["a", "b"])
    for norm in (Norm(float("nan"), 4.5), Norm(-4.0, float("nan"))):
        with pytest.raises(ConfigError, match=r"^norm_stats data: mean and std of train are .*nan"):
            data_checks.check_norm(norm, ["train"])
    data_checks.check_norm(Norm(-4.0, 4.5), ["train"])


def test_case_21_a_split_of_silence_is_refused_by_the_command(tmp_path: Path):
    data = str(tmp_path / "data")
    fakes.write_data(data, waveform=np.zeros(8000, np.float32))
    with pytest.raises(ConfigError, match=r"^norm_stats data: the std of train is 0"):
        claim(argv(data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_case_21_silence_is_said_where_the_norm_is_the_recipes(tone_data: str, tmp_path: Path):
    data = str(tmp_path / "data")
    fakes.write_data(data, waveform=np.zeros(8000, np.float32))
    words = argv(data, tmp_path / "run")
    words[words.index("--norm_stats") + 1] = "recipe"
    said = claim(words).about
    for what in ("training", "evaluation"):
        line = f"warning: the std of the {what} clips is 0, all are the same sound or silence: there is nothing to hear"
        assert line in said
    assert "the std of" not in "\n".join(claim(argv(tone_data, tmp_path / "other")).about)


def test_case_13_cut_and_padded_shares_are_reported():
    frames = np.array([48, 100, 200], np.int16)
    assert data_checks.length_lines(frames, 48, "training") == [
        "warning: 2 of 3 training clips are longer than the model's input (input_tdim 48, 0.48 s): 68 % of their sound "
        "is not used; train with --input_tdim 200, which holds the longest, or cut the clips into sections by start_s "
        "and end_s in the list"  # 204 of 300 frames
    ]
    assert data_checks.length_lines(frames[:1], 47, "training") == []  # as the 401 centred frames of 10 s in 400
    assert data_checks.length_lines(frames[:1], 512, "evaluation") == [
        "warning: 91 % of the model's input (input_tdim 512, 5.12 s) is padding, as the evaluation clips are shorter; "
        "--input_tdim 48 holds the longest and takes less time"
    ]
    (advice,) = data_checks.length_lines(frames[:1], 512, "training", timem=96)  # a recipe with timem 96 refuses 48
    assert advice.endswith("; --input_tdim 48 --timem 9 holds the longest and takes less time")
    assert data_checks.length_lines(np.full(20_000, 998, np.int16), 1024, "training") == []
    assert data_checks.length_lines(np.full(20_000, 32_000, np.int16), 1024, "training")[0].endswith(
        "97 % of their sound is not used; cut the clips into sections by start_s and end_s in the list"  # 320 s
    )


def test_case_1_a_short_run_gets_a_shorter_warm_up_and_a_line():
    recipe = Recipe(epochs=25, batch_size=12)
    fitted, lines = data_checks.fit_warmup(recipe, 8)
    assert fitted == replace(recipe, warmup_steps=2)
    assert lines == [
        "warm-up takes 1,000 steps, this run has 25; warmup_steps is now 2 "
        "(--warmup_steps 1000 is the reference implementation's value)"
    ]
    asked = replace(recipe, warmup_steps=1000)
    assert data_checks.fit_warmup(asked, 8) == (
        asked,
        [
            "warning: warm-up takes 1,000 steps, this run has 25: the learning rate never reaches lr; lower "
            "warmup_steps, or leave it out"
        ],
    )
    assert data_checks.fit_warmup(recipe, 22_160) == (replace(recipe, warmup_steps=1000), [])
    without = replace(recipe, warmup=False)
    assert data_checks.fit_warmup(without, 8) == (without, [])


def test_warnings_about_too_large_batches_and_few_steps():
    assert data_checks.step_lines(Recipe(epochs=25, batch_size=12), 8) == [
        "warning: batch_size 12 is larger than the 8 training clips: an epoch is one step; lower batch_size, or raise "
        "epochs",
        "warning: this run has 25 steps (25 epochs of 8 clips), which are few; if its loss is still high at the end, "
        "raise epochs, or lower batch_size",
    ]
    assert data_checks.step_lines(Recipe(epochs=25, batch_size=12), 48) == []


def argv(data: str, run: Path, *more: str, train: str = "train", evaluation: str = "eval") -> list[str]:
    keys = [word for key, value in (LINEAR_RECIPE | {"norm_stats": "data"}).items() for word in (f"--{key}", value)]
    splits = ["--train-splits", train, "--eval-splits", evaluation]
    return ["--recipe", "audioset-full", "--data", data, *splits, "--output", str(run), *keys, *more]


def test_case_14_warning_about_a_split_for_training_and_evaluation(tone_data: str, tmp_path: Path):
    said = "\n".join(claim(argv(tone_data, tmp_path / "run", evaluation="train")).about)
    assert "warning: train is trained on and evaluated on: the figures say what the model remembers" in said
    assert "trained on and evaluated on" not in "\n".join(claim(argv(tone_data, tmp_path / "other")).about)


def test_case_14_copies_with_other_names_are_found_by_their_hash(tmp_path: Path):
    data = str(tmp_path / "data")
    fakes.write_data(data, splits=[("train", 21), ("eval", 4)])
    lines = overlap(data)
    assert lines == []
    shard = next((tmp_path / "data" / "train" / "shards").iterdir())
    rows = dataset.read_table(str(shard)).slice(0, 3)
    renamed = rows.set_column(0, rows.schema.field("clip_id"), pa.array([f"copy{i}" for i in range(3)]))
    target = next((tmp_path / "data" / "eval" / "shards").iterdir())
    dataset.write_table(str(target), pa.concat_tables([renamed, dataset.read_table(str(target)).slice(3)]))
    (line,) = overlap(data)
    assert line.startswith("warning: 3 of 4 evaluation clips are copies of training clips (equal fbank_hash), eval_")
    shutil.rmtree(target.parent)  # a shard that cannot be read: training will raise an error with its name
    assert overlap(data) == []


def overlap(data: str) -> list[str]:
    prepared = PreparedDataset.open(data)
    return data_checks.overlap_lines(prepared.clips(["train"]), prepared.clips(["eval"]), ["train"], ["eval"])


def test_with_too_many_shards_clips_are_compared_by_id(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data_checks, "MAX_HASHED_SHARDS", 0)
    train, evaluation = clips([[0]] * 5), clips([[0]] * 3)
    assert data_checks.overlap_lines(train, evaluation, ["a"], ["b"]) == [
        "warning: 3 of 3 evaluation clips have the clip_id of a training clip; if they are the same, the figures are "
        "too good"
    ]
    assert data_checks.overlap_lines(train, clips([[0]] * 3, "eval"), ["a"], ["b"]) == []
