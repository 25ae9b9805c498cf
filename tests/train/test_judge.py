"""The best model and what is said of it belong together, whatever a kill came between."""

from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ast_core.checkpoints import ModelConfig
from ast_core.labels import LabelVocabulary
from ast_core.recipe import Recipe
from ast_core.step import Norm
from pipeline.train import judge
from pipeline.train.judge import Judge
from tests.train.made import clips_of

CONFIG = ModelConfig(Recipe(label_dim=2), Norm(0.0, 1.0), LabelVocabulary(("/m/a", "/m/b"), ("a", "b")))


def judge_of(run: Path) -> Judge:
    clips = clips_of(["shard"] * 4, range(4))  # all of the first class
    return Judge(str(run), CONFIG, clips, clips)


def note(run: Path, epoch: int, figure: float, weights: float, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Note an epoch whose headline is given; whether it is the best."""
    monkeypatch.setattr(judge, "headline", lambda *_: figure)
    scores = np.full((4, 2), 0.5, np.float32)
    return judge_of(run).note(epoch, 0.1, scores, {"weights": torch.tensor([weights])})["is_best"]


def best_of(run: Path) -> tuple[int, float, float]:
    """Epoch and headline as they are said, and the weights."""
    record = judge_of(run).best()
    assert record is not None
    return record["epoch"], record["headline"], float(load_file(run / "best" / "model.safetensors")["weights"])


def test_the_best_of_equal_epochs_is_the_earliest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    figures = [0.5, 0.7, 0.7, 0.6]
    bests = [note(tmp_path, epoch, figure, epoch, monkeypatch) for epoch, figure in enumerate(figures, start=1)]
    assert bests == [True, True, False, False]
    assert best_of(tmp_path) == (2, 0.7, 2.0)


def test_the_best_model_stays_though_its_epoch_is_trained_again_and_is_not_as_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By rounding: the model that it displaced is gone."""
    note(tmp_path, 1, 0.70, 1.0, monkeypatch)
    assert note(tmp_path, 2, 0.71, 2.0, monkeypatch)
    assert not note(tmp_path, 2, 0.69, 3.0, monkeypatch)
    assert best_of(tmp_path) == (2, 0.71, 2.0)
    assert [record["headline"] for record in judge_of(tmp_path).records(2)] == [0.70, 0.69]
    assert note(tmp_path, 3, 0.72, 4.0, monkeypatch)
    assert best_of(tmp_path) == (3, 0.72, 4.0)


def test_a_best_model_that_was_cut_off_gives_way_to_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    note(tmp_path, 1, 0.70, 1.0, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(judge, "write_scores", Mock(side_effect=KeyboardInterrupt))
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
