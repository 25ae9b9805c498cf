"""A metric that is added to METRICS is computed, logged, shown, and may select the best epoch."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ast_core.batch import Norm
from ast_core.checkpoints import ModelConfig
from ast_core.errors import ConfigError
from ast_core.labels import LabelVocabulary
from ast_core.metrics import METRICS, Metric, PerClass
from ast_core.recipe import Recipe
from pipeline.train.evaluation.epoch_results import EpochResults
from pipeline.train.evaluation.run_report import write_run_report
from pipeline.train.metrics_log import RunLog, per_class_table
from tests.pages import Page
from tests.train.made import clips_of

LABELS = LabelVocabulary(("/m/a", "/m/b"), ("a", "b"))


@pytest.fixture
def brier(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Brier score, the mean squared error of the scores: lower is better."""
    by_class = PerClass("brier_class", "Brier score", lambda clips: ((clips.score - clips.target) ** 2).mean(axis=0))
    metric = Metric(
        name="brier",
        title="mean Brier score",
        compute=lambda clips: float(by_class.compute(clips).mean()),
        higher_is_better=False,
        per_class=by_class,
        selected_as="brier",
    )
    monkeypatch.setitem(METRICS, metric.name, metric)


def test_only_metrics_of_the_table_may_select_the_best_epoch(brier: None, monkeypatch: pytest.MonkeyPatch):
    assert Recipe(metrics="brier").metrics == "brier"
    monkeypatch.delitem(METRICS, "brier")
    with pytest.raises(ConfigError, match=r"^metrics is brier; use mAP or acc$"):
        Recipe(metrics="brier")


def test_an_added_metric_selects_the_best_epoch_and_is_shown(brier: None, tmp_path: Path):
    config = ModelConfig(Recipe(label_dim=2, metrics="brier"), Norm(0.0, 1.0), LABELS)
    clips = clips_of(["shard"] * 4, range(4))  # all have the first class
    results = EpochResults(str(tmp_path), config, clips, clips)
    log = RunLog(str(tmp_path), 0)
    is_best = []
    for epoch, score in enumerate((0.5, 0.9, 0.8), start=1):
        scores = np.tile(np.array([score, 0.0], np.float32), (4, 1))
        record = results.record(epoch, 0.1, scores, {"weights": torch.zeros(1)})
        is_best.append(record["is_best"])
        log.epoch(epoch=epoch, step=epoch, values={name: record[name] for name in METRICS})
    log.close()
    assert is_best == [True, True, False]
    assert results.epochs_since_best(3) == 1
    assert results.records(2)[1]["brier"] == pytest.approx(0.005)
    text = (tmp_path / "per_class.csv").read_text()
    assert text.splitlines()[:2] == [
        "index,mid,display_name,ap,auc,brier_class,train_clips,eval_clips",
        "0,/m/a,a,1.000000,,0.010000,4,4",
    ]
    assert "Brier score" in per_class_table(text)
    page = Page(Path(write_run_report(str(tmp_path))).read_text())
    assert page.tables["Each class, best first"][0][3] == "Brier score"
    assert [row[-1] for row in page.tables["Each epoch"]] == ["mean Brier score", "0.1250", "0.0050", "0.0200"]
