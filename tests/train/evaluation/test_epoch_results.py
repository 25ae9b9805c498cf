"""The best model and what is said of it belong together, whatever a kill came between."""

import json
import math
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ast_core.batch import Norm
from ast_core.checkpoints import ModelConfig
from ast_core.labels import LabelVocabulary
from ast_core.recipe import Recipe
from pipeline import storage
from pipeline.train.evaluation import epoch_results
from pipeline.train.evaluation.epoch_results import EpochResults
from tests.damage import flip_bit, refusal
from tests.train.made import clips_of

CONFIG = ModelConfig(Recipe(label_dim=2), Norm(0.0, 1.0), LabelVocabulary(("/m/a", "/m/b"), ("a", "b")))


def results_of(run: Path) -> EpochResults:
    clips = clips_of(["shard"] * 4, range(4))  # all of the first class
    return EpochResults(str(run), CONFIG, clips, clips)


def note(run: Path, epoch: int, figure: float, weights: float, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Note an epoch whose headline is given; whether it is the best."""
    monkeypatch.setattr(epoch_results, "selection_metric", lambda *_: figure)
    scores = np.full((4, 2), 0.5, np.float32)
    return results_of(run).record(epoch, 0.1, scores, {"weights": torch.tensor([weights])})["is_best"]


def best_of(run: Path) -> tuple[int, float, float]:
    """Epoch and headline as they are said, and the weights."""
    record = results_of(run).best()
    assert record is not None
    return record["epoch"], record["headline"], float(load_file(run / "best" / "model.safetensors")["weights"])


def test_the_best_of_equal_epochs_is_the_earliest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    figures = [0.5, 0.7, 0.7, 0.6]
    bests = [note(tmp_path, epoch, figure, epoch, monkeypatch) for epoch, figure in enumerate(figures, start=1)]
    assert bests == [True, True, False, False]
    assert best_of(tmp_path) == (2, 0.7, 2.0)


def test_case_1_of_perfect_epochs_the_later_is_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With two evaluation clips the mAP is 1 from the first epoch on, of a model that knows nothing yet."""
    figures = (1.0, 0.5, 1.0, 0.9)
    bests = [note(tmp_path, epoch, figure, epoch, monkeypatch) for epoch, figure in enumerate(figures, start=1)]
    assert bests == [True, False, True, False]
    assert best_of(tmp_path) == (3, 1.0, 3.0)


def test_the_best_model_stays_though_its_epoch_is_trained_again_and_is_not_as_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By rounding: the model that it displaced is gone."""
    note(tmp_path, 1, 0.70, 1.0, monkeypatch)
    assert note(tmp_path, 2, 0.71, 2.0, monkeypatch)
    assert not note(tmp_path, 2, 0.69, 3.0, monkeypatch)
    assert best_of(tmp_path) == (2, 0.71, 2.0)
    assert [record["headline"] for record in results_of(tmp_path).records(2)] == [0.70, 0.69]
    assert note(tmp_path, 3, 0.72, 4.0, monkeypatch)
    assert best_of(tmp_path) == (3, 0.72, 4.0)


def test_a_best_model_that_was_cut_off_gives_way_to_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    note(tmp_path, 1, 0.70, 1.0, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(epoch_results, "write_scores", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            note(tmp_path, 2, 0.71, 2.0, patch)
    assert note(tmp_path, 2, 0.69, 3.0, monkeypatch)
    assert best_of(tmp_path) == (2, 0.69, 3.0)


def test_a_run_that_began_before_it_said_so_has_the_best_of_its_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    note(tmp_path, 1, 0.70, 1.0, monkeypatch)
    (tmp_path / "best" / "epoch.json").unlink()
    assert not note(tmp_path, 2, 0.69, 2.0, monkeypatch)
    assert best_of(tmp_path) == (1, 0.70, 1.0)


def test_review_c14_an_epoch_evaluated_twice_writes_the_same_files_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By a kill between its evaluation and its checkpoint; the weights are those of the second training."""
    note(tmp_path, 1, 0.70, 1.0, monkeypatch)
    assert note(tmp_path, 2, 0.71, 2.0, monkeypatch)
    assert note(tmp_path, 2, 0.71, 3.0, monkeypatch)
    assert best_of(tmp_path) == (2, 0.71, 3.0)


def test_review_c21_each_epochs_record_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read = Mock(wraps=storage.read_checked_json)
    monkeypatch.setattr(storage, "read_checked_json", read)
    monkeypatch.setattr(epoch_results, "selection_metric", lambda *_: 0.5)
    noted = results_of(tmp_path)
    for epoch in range(1, 6):
        noted.record(epoch, 0.1, np.full((4, 2), 0.5, np.float32), {"weights": torch.tensor([1.0])})
        for _ in range(3):
            assert [record["epoch"] for record in noted.records(epoch)] == list(range(1, epoch + 1))
            assert noted.first_missing() == epoch + 1
    assert sum("evaluation" in call.args[0] for call in read.call_args_list) == 5


def test_a_record_that_another_process_writes_again_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    note(tmp_path, 1, 0.70, 1.0, monkeypatch)
    waiting = results_of(tmp_path)
    assert waiting.records(1)[0]["headline"] == 0.70
    note(tmp_path, 1, 0.65, 1.0, monkeypatch)
    note(tmp_path, 2, 0.60, 1.0, monkeypatch)
    assert [record["headline"] for record in waiting.records(2)] == [0.65, 0.60]


def test_review_c21_a_headline_that_is_no_number_is_valid_json_and_the_worst(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def not_json(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    assert note(tmp_path, 1, math.nan, 1.0, monkeypatch)  # better than no model
    for file in (tmp_path / "best" / "epoch.json", tmp_path / "evaluation" / "epoch-0001.json"):
        assert json.loads(file.read_text(), parse_constant=not_json)["headline"] is None
    assert not note(tmp_path, 2, math.nan, 2.0, monkeypatch)
    assert note(tmp_path, 3, 0.1, 3.0, monkeypatch)
    assert best_of(tmp_path) == (3, 0.1, 3.0)


@pytest.mark.parametrize("name", ["evaluation/epoch-0001.json", "evaluation/epoch-0001.npy", "best/epoch.json"])
def test_each_flipped_bit_of_what_a_run_goes_on_from_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    note(tmp_path, 1, 0.70, 1.0, monkeypatch)
    file, rng = tmp_path / name, np.random.default_rng(0)
    whole = file.read_bytes()
    for _ in range(40):
        file.write_bytes(whole)
        flip_bit(file, rng)
        line = refusal(lambda: note(tmp_path, 2, 0.60, 2.0, monkeypatch))
        assert "\n" not in line
        assert str(file) in line if line else json.loads(file.read_text()) == json.loads(whole)


def test_weights_kept_for_a_later_evaluation_are_passed_over_if_damaged(tmp_path: Path):
    file, rng = tmp_path / "evaluation" / "epoch-0002.pt", np.random.default_rng(0)
    epoch_results.defer(str(tmp_path), 2, 0.5, {"weights": torch.arange(4.0)})
    kept = epoch_results.read_deferred(str(tmp_path), 2)
    assert kept is not None
    assert (kept[0], kept[1]["weights"].tolist()) == (0.5, [0, 1, 2, 3])
    whole = file.read_bytes()
    for _ in range(40):
        file.write_bytes(whole)
        flip_bit(file, rng)
        assert epoch_results.read_deferred(str(tmp_path), 2) is None
