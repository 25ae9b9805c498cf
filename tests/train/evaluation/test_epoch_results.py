"""RUN/best and its record are consistent, also after a crash at any point."""

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
from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary
from ast_core.recipe import Recipe
from pipeline import storage
from pipeline.train.checkpoints import oldest_epoch
from pipeline.train.evaluation import epoch_results
from pipeline.train.evaluation.epoch_results import EpochResults
from tests.damage import flip_bit, refusal
from tests.train.made import clips_of

CONFIG = ModelConfig(Recipe(label_dim=2), Norm(0.0, 1.0), LabelVocabulary(("/m/a", "/m/b"), ("a", "b")))


def results_of(run: Path) -> EpochResults:
    clips = clips_of(["shard"] * 4, range(4))  # all have the first class
    return EpochResults(str(run), CONFIG, clips, clips)


def record_epoch(run: Path, epoch: int, figure: float, weights: float, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Record an epoch with the selection metric `figure`. Returns whether it is the best."""
    monkeypatch.setattr(epoch_results, "selection_metric", lambda *_: figure)
    scores = np.full((4, 2), 0.5, np.float32)
    return results_of(run).record(epoch, 0.1, scores, {"weights": torch.tensor([weights])})["is_best"]


def best_of(run: Path) -> tuple[int, float, float]:
    """Epoch and selection metric in the record of the best model, and its weights."""
    record = results_of(run).best()
    assert record is not None
    return record["epoch"], record["headline"], float(load_file(run / "best" / "model.safetensors")["weights"])


def test_the_best_of_equal_epochs_is_the_earliest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    figures = [0.5, 0.7, 0.7, 0.6]
    bests = [record_epoch(tmp_path, epoch, figure, epoch, monkeypatch) for epoch, figure in enumerate(figures, start=1)]
    assert bests == [True, True, False, False]
    assert best_of(tmp_path) == (2, 0.7, 2.0)


def test_case_1_the_latest_of_perfect_epochs_is_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With two evaluation clips the mAP can be 1 from the first epoch on, before the model has learnt anything."""
    figures = (1.0, 0.5, 1.0, 0.9)
    bests = [record_epoch(tmp_path, epoch, figure, epoch, monkeypatch) for epoch, figure in enumerate(figures, start=1)]
    assert bests == [True, False, True, False]
    assert best_of(tmp_path) == (3, 1.0, 3.0)


def test_a_perfect_epoch_after_a_perfect_one_is_not_better_for_patience(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for epoch, figure in enumerate((0.5, 1.0, 1.0, 0.9, 1.0), start=1):
        record_epoch(tmp_path, epoch, figure, epoch, monkeypatch)
    assert [results_of(tmp_path).epochs_since_best(last) for last in (0, 1, 2, 3, 5)] == [0, 0, 0, 1, 3]


def test_scores_that_are_not_numbers_are_refused_in_a_line(tmp_path: Path):
    with pytest.raises(DataError, match=r"^the model gives scores that are not numbers: its weights "):
        results_of(tmp_path).record(1, 0.1, np.full((4, 2), np.nan, np.float32), {"weights": torch.zeros(1)})


def test_the_best_model_is_kept_if_its_epoch_is_repeated_with_a_worse_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Rounding can make the repeated result worse, and the model that was replaced is gone."""
    record_epoch(tmp_path, 1, 0.70, 1.0, monkeypatch)
    assert record_epoch(tmp_path, 2, 0.71, 2.0, monkeypatch)
    assert not record_epoch(tmp_path, 2, 0.69, 3.0, monkeypatch)
    assert best_of(tmp_path) == (2, 0.71, 2.0)
    assert [record["headline"] for record in results_of(tmp_path).records(2)] == [0.70, 0.69]
    assert record_epoch(tmp_path, 3, 0.72, 4.0, monkeypatch)
    assert best_of(tmp_path) == (3, 0.72, 4.0)


def test_an_incomplete_best_model_is_replaced_by_any_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    record_epoch(tmp_path, 1, 0.70, 1.0, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(epoch_results, "write_scores", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            record_epoch(tmp_path, 2, 0.71, 2.0, patch)
    assert record_epoch(tmp_path, 2, 0.69, 3.0, monkeypatch)
    assert best_of(tmp_path) == (2, 0.69, 3.0)


def test_a_run_of_an_earlier_version_has_the_best_of_its_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    record_epoch(tmp_path, 1, 0.70, 1.0, monkeypatch)
    (tmp_path / "best" / "epoch.json").unlink()
    assert not record_epoch(tmp_path, 2, 0.69, 2.0, monkeypatch)
    assert best_of(tmp_path) == (1, 0.70, 1.0)


def test_review_c14_an_epoch_evaluated_twice_writes_the_same_files_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """This happens after a crash between evaluation and checkpoint. The weights are those of the second training."""
    record_epoch(tmp_path, 1, 0.70, 1.0, monkeypatch)
    assert record_epoch(tmp_path, 2, 0.71, 2.0, monkeypatch)
    assert record_epoch(tmp_path, 2, 0.71, 3.0, monkeypatch)
    assert best_of(tmp_path) == (2, 0.71, 3.0)


def test_review_c21_each_epochs_record_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read = Mock(wraps=storage.read_checked_json)
    monkeypatch.setattr(storage, "read_checked_json", read)
    monkeypatch.setattr(epoch_results, "selection_metric", lambda *_: 0.5)
    results = results_of(tmp_path)
    for epoch in range(1, 6):
        results.record(epoch, 0.1, np.full((4, 2), 0.5, np.float32), {"weights": torch.tensor([1.0])})
        for _ in range(3):
            assert [record["epoch"] for record in results.records(epoch)] == list(range(1, epoch + 1))
            assert results.first_missing() == epoch + 1
    assert sum("evaluation" in call.args[0] for call in read.call_args_list) == 5


def test_a_record_rewritten_by_another_process_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    record_epoch(tmp_path, 1, 0.70, 1.0, monkeypatch)
    reader = results_of(tmp_path)
    assert reader.records(1)[0]["headline"] == 0.70
    record_epoch(tmp_path, 1, 0.65, 1.0, monkeypatch)
    record_epoch(tmp_path, 2, 0.60, 1.0, monkeypatch)
    assert [record["headline"] for record in reader.records(2)] == [0.65, 0.60]


def test_review_c21_an_undefined_selection_metric_is_null_and_the_worst(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def not_json(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    assert record_epoch(tmp_path, 1, math.nan, 1.0, monkeypatch)  # better than no model
    for file in (tmp_path / "best" / "epoch.json", tmp_path / "evaluation" / "epoch-0001.json"):
        assert json.loads(file.read_text(), parse_constant=not_json)["headline"] is None
    assert not record_epoch(tmp_path, 2, math.nan, 2.0, monkeypatch)
    assert record_epoch(tmp_path, 3, 0.1, 3.0, monkeypatch)
    assert best_of(tmp_path) == (3, 0.1, 3.0)


@pytest.mark.parametrize("name", ["evaluation/epoch-0001.json", "evaluation/epoch-0001.npy", "best/epoch.json"])
def test_each_flipped_bit_in_files_for_resuming_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    record_epoch(tmp_path, 1, 0.70, 1.0, monkeypatch)
    file, rng = tmp_path / name, np.random.default_rng(0)
    whole = file.read_bytes()
    for _ in range(40):
        file.write_bytes(whole)
        flip_bit(file, rng)
        line = refusal(lambda: record_epoch(tmp_path, 2, 0.60, 2.0, monkeypatch))
        assert "\n" not in line
        assert str(file) in line if line else json.loads(file.read_text()) == json.loads(whole)


def test_a_run_ahead_of_its_uploads_resumes_from_an_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Training goes on while checkpoints are uploaded, so that the last one may be many short epochs old."""
    for epoch in range(1, 8):
        record_epoch(tmp_path, epoch, 0.5, epoch, monkeypatch)
    assert oldest_epoch(str(tmp_path)) is None
    for name in ("epoch-0002-step-000000-a", "epoch-0003-step-000001-b"):
        checkpoint = tmp_path / "checkpoints" / name / "state.pt"
        checkpoint.parent.mkdir(parents=True)
        checkpoint.touch()
    results_of(tmp_path).delete_sums(oldest_epoch(str(tmp_path)))
    sums = sorted(path.name for path in (tmp_path / "evaluation").glob("*.npy"))
    assert sums == [f"epoch-{epoch:04d}.npy" for epoch in range(2, 8)]
    record_epoch(tmp_path, 3, 0.5, 3.0, monkeypatch)  # as a run does that resumes after epoch 2
    results_of(tmp_path).delete_sums(100)
    assert (tmp_path / "evaluation" / "epoch-0007.npy").exists()  # an asynchronous evaluation of epoch 8 needs it


def test_damaged_deferred_weights_are_skipped(tmp_path: Path):
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


def test_results_without_a_skipped_epoch_are_those_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scores, deferred = np.random.default_rng(0).random((3, 4, 2)), tmp_path / "evaluation" / "epoch-0002.pt"
    monkeypatch.setattr(epoch_results, "score_metrics", Mock(wraps=epoch_results.score_metrics))
    results = results_of(tmp_path)
    results.record(1, 0.1, scores[0], {"weights": torch.zeros(1)})
    deferred.write_bytes(b"damaged")
    results.skip(2)
    assert results.first_missing() == 3
    results.delete_sums(2)
    results.record(3, 0.1, scores[2], {"weights": torch.zeros(1)})
    ensemble = epoch_results.score_metrics.call_args.args[0]
    np.testing.assert_allclose(ensemble, (scores[0] + scores[2]) / 2)
    for records in (results.records(3), epoch_results.read_records(str(tmp_path))):
        assert [record["epoch"] for record in records] == [1, 3]
    assert results.first_missing() == 4
    assert deferred.exists()  # perhaps it was not read well
    results.record(2, 0.1, scores[1], {"weights": torch.zeros(1)})  # trained again, from an earlier checkpoint
    assert [record["epoch"] for record in results.records(3)] == [1, 2, 3]
