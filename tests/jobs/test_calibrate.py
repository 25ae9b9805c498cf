"""`calibrate.py` on the scores that a run has kept, whose miscalibration is known."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ast_core.calibration import EventTuning, ModelCalibration, reliability
from ast_core.checkpoints import ModelConfig, save_model
from ast_core.errors import ConfigError, DataError
from ast_core.labels import LabelVocabulary
from jobs import calibrate, tag
from pipeline.tag.predictor import read_members, thresholds_of, tuning_of
from pipeline.train import models
from pipeline.train.evaluation.scores import read_scores, write_scores
from tests import fakes
from tests.ast_core import small
from tests.ast_core.test_calibration import distorted
from tests.train.evaluation.test_scores import clips_of

SHARES = [0.3, 0.15, 1e-4]
"""About the shares of clips with each class. Too few have the last one for a threshold of its own."""
LABELS = LabelVocabulary.from_names(["dog", "cat", "owl"])
CONFIG = ModelConfig(small.recipe(label_dim=3), small.NORM, LABELS)
BEFORE, AFTER = 0.05, 0.015
"""Bounds of the expected calibration error: scores are the sigmoid of three times the true logit."""


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A run with the scores of 3,000 clips, and a model that calibrations belong to."""
    scores, targets = distorted(3000, SHARES)
    labels = [np.flatnonzero(row).tolist() for row in targets]
    save_model(tmp_path / "best", small.model(label_dim=3).state_dict(), CONFIG)
    write_scores(str(tmp_path), scores, clips_of(labels))
    return str(tmp_path)


def made(run: str) -> ModelCalibration:
    uri = models.find(run)
    found = models.read_calibration(uri, *models.read(uri))
    assert found is not None
    return found


def test_a_known_distortion_of_kept_scores_is_undone_on_other_clips(run: str, capsys: pytest.CaptureFixture[str]):
    assert calibrate.main(["--checkpoint", run]) == 0
    found = made(run)
    assert found.error_before > BEFORE
    assert found.error_after < AFTER
    unseen, of_unseen = distorted(20_000, SHARES, seed=1)
    assert reliability(unseen, of_unseen).expected_error > BEFORE
    assert reliability(found(unseen), of_unseen).expected_error < AFTER
    shown = capsys.readouterr().out
    assert f"expected calibration error: {found.error_before:.4f} before, {found.error_after:.4f} after" in shown
    assert "1 classes have too few clips, or scores that do not tell them apart, and take the calibration" in shown
    assert json.loads(Path(run, "best", "calibration.json").read_text())["made_from"]["scores"] == "best/scores.parquet"


def test_asked_precision_is_reached_on_other_clips_within_its_interval(run: str):
    assert calibrate.main(["--checkpoint", run, "--precision", "0.8"]) == 0
    found = made(run)
    kept = read_scores(run)
    assert kept is not None
    unseen, of_unseen = distorted(20_000, SHARES, seed=2)
    for c in range(2):
        reached = {}
        for name, scores, targets in (("seen", kept.scores, kept.targets()), ("unseen", unseen, of_unseen)):
            taken = found(scores)[:, c] >= found.thresholds()[c]
            reached[name] = targets[taken, c].mean(), taken.sum()
        precision, taken = reached["seen"]
        assert precision >= 0.8
        # The threshold comes from `taken` clips, so its precision elsewhere varies as that of as many. 99 % are within.
        error = np.sqrt(0.8 * 0.2 * (1 / taken + 1 / reached["unseen"][1]))
        assert abs(reached["unseen"][0] - precision) < 2.58 * error


def test_known_events_of_recordings_decide_the_settings_of_events(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    fakes.write_media(tmp_path / "known.wav", fakes.noise(6.0))
    (tmp_path / "events.csv").write_text("path,start_s,end_s,label\nknown.wav,0,6,dog\nknown.wav,0,6,cat\n")
    assert calibrate.main(["--checkpoint", run, "--events", str(tmp_path / "events.csv"), "--hop-s", "0.3"]) == 0
    tuned = made(run).events
    assert tuned is not None
    assert (tuned.facts["events"], tuned.facts["hop_s"], tuned.facts["classes_with_few"]) == (2, 0.3, 2)
    assert tuned.thresholds[2] == made(run).thresholds()[2]  # nothing is known of owls
    assert f"events: F1 {tuned.facts['f1']:.3f} on the 2 events of 1 recordings" in capsys.readouterr().out
    members = read_members([run])
    np.testing.assert_array_equal(thresholds_of(members, None, 0.5), tuned.thresholds)
    assert tuning_of(members) == tuned
    assert tuning_of(read_members([run], calibrated=False)) is None
    tags = tmp_path / "tags"
    given = ["--checkpoint", run, "--input", str(tmp_path / "known.wav"), "--num-workers", "0", "--merge-s", "7"]
    assert tag.main([*given, "--output", str(tags)]) == 0
    assert tag.main([*given, "--output", str(tags)]) == 0  # JSON has lists in place of the tuning's tuples
    printed = capsys.readouterr().out
    assert "1 recordings are done by an earlier run" in printed
    assert "warning: the settings of events were chosen with windows of" in printed
    settings = json.loads((tags / "tags.json").read_text())["settings"]
    assert settings["events"] == {
        "release": tuned.release,
        "median_s": tuned.median_s,
        "merge_s": 7.0,
        "min_s": tuned.min_s,
        "from": "windows",
    }
    assert settings["thresholds"] == pytest.approx(tuned.thresholds, abs=1e-6)


def test_a_runs_best_model_can_be_named_by_its_folder(run: str, capsys: pytest.CaptureFixture[str]):
    assert calibrate.main(["--checkpoint", f"{run}/best"]) == 0
    assert f"wrote {run}/best/calibration.json" in capsys.readouterr().out


def test_an_event_behind_the_end_of_its_recording_is_refused(run: str, tmp_path: Path):
    fakes.write_media(tmp_path / "known.wav", fakes.noise(1.0))
    (tmp_path / "events.csv").write_text("path,start_s,end_s,label\nknown.wav,0,1,dog\nknown.wav,500,900,cat\n")
    with pytest.raises(DataError, match=r"an event of .*known\.wav begins at 500 s, and the recording ends at 1\.0 s"):
        calibrate.main(["--checkpoint", run, "--events", str(tmp_path / "events.csv")])


@pytest.mark.parametrize("path", [".", "some.tar", "list.csv"])
def test_a_path_of_several_recordings_has_no_known_events(run: str, tmp_path: Path, path: str):
    folder = tmp_path / "known"
    folder.mkdir()
    for name in ("a.wav", "b.wav"):
        fakes.write_media(folder / name, fakes.noise(1.0))
    fakes.write_tar(folder / "some.tar", {"a.wav": (folder / "a.wav").read_bytes()})
    (folder / "list.csv").write_text("path\na.wav\n")
    (folder / "events.csv").write_text(f"path,start_s,end_s,label\na.wav,0,1,dog\n{path},0,1,cat\n")
    with pytest.raises(DataError, match=r"events\.csv: \S*known\S* is not one recording, but a folder, an archive, "):
        calibrate.main(["--checkpoint", run, "--events", str(folder / "events.csv")])


def test_a_gpu_for_events_is_asked_for_before_clips_are_scored(run: str, monkeypatch: pytest.MonkeyPatch):
    """Events are tagged in this process, on a cluster often on a head without a GPU, and clips on its GPU nodes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(calibrate, "_scored_again", lambda *_: pytest.fail("clips were scored first"))
    given = ["--checkpoint", run, "--data", "data", "--split", "eval", "--events", "events.csv", "--device", "cuda"]
    with pytest.raises(ConfigError, match="--device cuda needs a GPU, this machine has none"):
        calibrate.main(given)


def test_a_relative_model_of_a_submitted_job_is_refused(run: str, monkeypatch: pytest.MonkeyPatch):
    """The calibration would be written into the job's working folder, which Ray deletes."""
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.chdir(Path(run).parent)
    with pytest.raises(ConfigError, match=r"--checkpoint .* would be lost with the submitted job; give an absolute"):
        calibrate.main(["--checkpoint", Path(run).name])
    assert not list(Path(run).rglob("calibration.json"))
    assert calibrate.main(["--checkpoint", run]) == 0


def test_damaged_settings_of_events_are_refused(run: str):
    assert calibrate.main(["--checkpoint", run]) == 0
    uri = models.find(run)
    model, config = models.read(uri)
    tuned = EventTuning(0.5, 0.0, 0.0, 0.0, (0.5, 0.5))
    models.write_calibration(uri, replace(made(run), events=tuned), model, config)
    with pytest.raises(DataError, match="2 thresholds of events for 3 classes"):
        made(run)
