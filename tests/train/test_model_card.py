"""The model card says what the run recorded, and nothing that it does not know or should not tell."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

from ast_core.calibration import calibrate
from ast_core.checkpoints import ModelConfig, save_model
from ast_core.labels import LabelVocabulary
from ast_core.metrics import bootstrap_map, tagging_metrics
from ast_core.models import create_model
from ast_core.recipe import Recipe
from pipeline import storage
from pipeline.train import models
from pipeline.train.evaluation.scores import read_scores, write_scores
from pipeline.train.metrics_log import finite_or_null, per_class_csv, write_summary
from pipeline.train.model_card import model_card, plain, read_trained
from tests.ast_core import small
from tests.train.evaluation.test_scores import clips_of

HOSTILE = "a|b <script>x</script>\n[link](http://x)"
LABELS = LabelVocabulary(("/m/1", "/m/2", "/m/3"), ("dog", HOSTILE, "never heard"))
RECIPE = Recipe(
    model="linear", hidden=8, n_layers=1, input_tdim=48, label_dim=3, timem=8, freqm=16, audioset_pretrain=False
)
CONFIG = ModelConfig(RECIPE, small.NORM, LABELS)
MODEL = create_model(**RECIPE.model_args())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The files of a run that a card is made from."""
    run = tmp_path_factory.mktemp("secret-place") / "run"
    rng = np.random.default_rng(0)
    labels = [[0], [1], [0, 1]] * 30
    scores = rng.random((90, 3)).astype(np.float32)
    for row, clip in zip(scores, labels, strict=True):
        row[clip] += 0.5
    scores /= 1.5
    save_model(run / "best", MODEL.state_dict(), CONFIG)
    save_model(run / "averaged", MODEL.state_dict(), CONFIG)
    write_scores(str(run), scores, clips_of(labels))
    kept = read_scores(str(run))
    assert kept is not None
    metrics = tagging_metrics(scores, kept.targets())
    figures = finite_or_null(metrics.scalars())
    averaged = figures | {"map": 0.1234}
    write_summary(str(run), {"best_epoch": 3, **figures, "averaged": averaged, "running_ensemble": None})
    (run / "per_class.csv").write_text(per_class_csv(LABELS, metrics, [5, 1234, 7], [60, 60, 0]))
    about = {"data": f"{run.parent}/tones", "tool_versions": {"ast-ray": "1", "torch": "2"}}
    splits = {"train_splits": {"train": "f" * 64}, "eval_splits": {"eval": "e" * 64}}
    storage.write_checked_json(run / "config.json", {"recipe": RECIPE.to_dict(), **splits, **about})
    return str(run)


def card_of(uri: str, **others: object) -> str:
    given = {"use": "use(it)", "library": "ast-ray", "calibrated_by": ""} | others
    calibration = given.pop("calibration", None)
    return model_card("me/tagger", MODEL, CONFIG, read_trained(uri), calibration, **given)


def test_the_card_has_the_runs_data_metrics_and_classes(run: str):
    text = card_of(models.find(run))
    card = ModelCard(text)
    (result,) = [one for one in card.data.eval_results if one.metric_type == "map"]
    kept = read_scores(run)
    assert kept is not None
    low, high = bootstrap_map(kept.scores.astype(np.float32), kept.targets())
    summary = storage.read_json(Path(run, "summary.json"))
    assert result.metric_value == pytest.approx(summary["map"], abs=1e-6)
    assert (result.dataset_name, result.dataset_split) == ("tones", "eval")
    assert card.data.pipeline_tag == "audio-classification"
    assert f"| mAP | {summary['map']:.4f} | {low:.4f} to {min(high, 1):.4f} |" in text
    assert f"| training | train | `{'f' * 64}` |" in text
    assert f"| evaluation | eval | `{'e' * 64}` |" in text
    assert "of epoch 3, the best one" in text
    assert "The epoch was selected by its result on the same clips" in text
    assert "1 classes have fewer than 10 evaluation clips" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| dog |")]
    cells = [cell.strip() for cell in row.strip("| ").split("|")]
    (of_csv,) = [
        line for line in csv.DictReader(io.StringIO(Path(run, "per_class.csv").read_text())) if line["mid"] == "/m/1"
    ]
    assert cells == ["dog", f"{float(of_csv['ap']):.3f}", f"{float(of_csv['auc']):.3f}", "5", "60"]
    recipe = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert recipe == yaml.safe_load(yaml.safe_dump(RECIPE.to_dict()))


def test_thresholds_come_from_the_calibration(run: str):
    kept = read_scores(run)
    assert kept is not None
    made = calibrate(
        kept.scores, kept.targets(), goal="precision", value=0.8, facts={"goal": "precision", "value": 0.8, "clips": 90}
    )
    text = card_of(models.find(run), calibration=made, calibrated_by="`calibration.json` has them.")
    threshold = made.classes[0].threshold
    (row,) = [line for line in text.splitlines() if line.startswith("| dog |")]
    assert row.endswith(f"| {threshold.value:.3f} | {threshold.precision:.3f} | {threshold.recall:.3f} |")
    assert "a precision of 0.8, on 90 clips" in text.replace("\n", " ")
    assert f"{made.error_before:.4f} for raw scores" in text.replace("\n", " ")
    assert "`calibration.json` has them." in text
    assert "No thresholds were chosen" in card_of(models.find(run))


def test_names_have_no_meaning_to_markdown_and_places_are_not_told(run: str):
    text = card_of(models.find(run))
    assert "<script>" not in text
    (row,) = [line for line in text.splitlines() if line.startswith("| a&")]
    assert row.count("|") == 6
    assert "secret-place" not in text
    assert plain("a|b\n*c*") == "a&#124;b &#42;c&#42;"


def test_averaged_weights_have_their_own_metrics(run: str):
    text = card_of(f"{run}/averaged")
    assert "| mAP | 0.1234 |  |" in text
    assert "averaged over epochs" in text
    assert "| dog |" not in text  # per_class.csv is of another epoch
    assert "selected by its result" not in text


def test_a_model_without_a_run_says_what_is_unknown(tmp_path: Path):
    save_model(tmp_path / "model", MODEL.state_dict(), CONFIG)
    text = card_of(str(tmp_path / "model"))
    card = ModelCard(text)
    assert card.data.eval_results is None
    assert "does not say on which data it was trained" in text
    assert "No evaluation is recorded for these weights." in text
    assert str(tmp_path) not in text
