"""The commands tag.py and calibrate.py: on Ray, in the terminal, and one after the other."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from ast_core.checkpoints import ModelConfig, save_model
from ast_core.errors import ConfigError, DataError
from ast_core.labels import LabelVocabulary
from ast_core.models import create_model
from ast_core.recipe import Recipe
from jobs import calibrate, tag
from pipeline import storage
from pipeline.tag.predictor import Predicted, Predictor
from tests import fakes
from tests.ast_core import small

LABELS = LabelVocabulary.from_names([f"tone {i}" for i in range(4)])
RECIPE = Recipe(model="linear", hidden=64, input_tdim=64, label_dim=4, timem=0, freqm=0, precision="fp32")
CONFIG = ModelConfig(RECIPE, small.NORM, LABELS)


def weights(seed: int) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create_model(**RECIPE.model_args()).state_dict()


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    save_model(tmp_path / "model", weights(5), CONFIG)
    return str(tmp_path / "model")


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for i, suffix in enumerate(("wav", "flac", "ogg", "webm", "mp3")):
        fakes.write_media(folder / f"r{i}.{suffix}", fakes.tone(300.0 * 2**i, 1.0 + i) + fakes.noise(1.0 + i, i))
    (folder / "bad.wav").write_text("not audio")
    return folder


def test_recordings_are_tagged_on_ray_as_in_this_process(
    local_ray: None, checkpoint: str, recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The readers are tasks, as they are for a GPU."""
    usual = ["--checkpoint", checkpoint, "--input", str(recordings), "--threshold", "0.6", "--hop-s", "0.32"]
    assert tag.main([*usual, "--output", str(tmp_path / "here"), "--num-workers", "0"]) == 0
    more = ["--num-workers", "1", "--cpus-per-worker", "1"]
    assert tag.main([*usual, "--output", str(tmp_path / "ray"), *more]) == 0
    shown = capsys.readouterr().out
    assert "5 recordings, 0.00 h" in shown
    assert "failed: 1 not_audio" in shown
    for kind in ("scores", "events"):
        here, there = (pq.read_table(tmp_path / place / kind) for place in ("here", "ray"))
        order = [("recording", "ascending"), ("start_s", "ascending")]
        here, there = here.sort_by(order), there.sort_by(order)
        assert here["recording"].to_pylist() == there["recording"].to_pylist()
        assert here["start_s"].to_pylist() == there["start_s"].to_pylist()
    np.testing.assert_allclose(
        np.array(pq.read_table(tmp_path / "here" / "scores").sort_by(order)["scores"].to_pylist()),
        np.array(pq.read_table(tmp_path / "ray" / "scores").sort_by(order)["scores"].to_pylist()),
        atol=2e-3,
    )


def test_a_handful_of_recordings_is_printed(checkpoint: str, recordings: Path, capsys: pytest.CaptureFixture[str]):
    one = ["--checkpoint", checkpoint, "--threshold", "0.3", "--input"]
    assert tag.main([*one, str(recordings / "r3.webm"), str(recordings / "bad.wav")]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if "r3.webm" in line)
    assert lines[first].endswith("r3.webm  0:00:00.0 to 0:00:04.0")
    assert sum("tone" in line for line in lines) >= 4
    assert any(line.split() == ["from", "to", "score", "class"] for line in lines)
    assert any("bad.wav  not_audio: FFmpeg: Invalid data found" in line for line in lines)
    for i in range(12):
        (recordings / f"more{i}.wav").write_text("")
    with pytest.raises(ConfigError, match=r"^--input has 18 recordings, and up to 16 recordings are printed; give"):
        tag.main([*one, str(recordings)])


@pytest.mark.parametrize(
    ("loss", "options"), [("BCE", []), ("CE", []), ("CE", ["--threshold", "0.3"]), ("CE", ["--raw-scores"])]
)
def test_scores_without_a_calibration_are_announced(
    loss: str, options: list[str], recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    save_model(tmp_path / "model", weights(5), replace(CONFIG, recipe=replace(RECIPE, loss=loss)))
    usual = ["--checkpoint", str(tmp_path / "model"), "--input", str(recordings / "r0.wav")]
    assert tag.main([*usual, *options]) == 0
    printed = capsys.readouterr().out
    assert ("the threshold of every class is 0.5, because" in printed) == (not options)
    assert ("was trained with --loss CE" in printed) == (loss == "CE")


def test_printed_recordings_are_scored_in_batches_of_the_given_size(
    checkpoint: str, recordings: Path, monkeypatch: pytest.MonkeyPatch
):
    sizes: list[int] = []
    predicted = Predictor._predicted

    def recorded(self: Predictor, fbank_NTM: np.ndarray) -> Predicted:
        sizes.append(len(fbank_NTM))
        return predicted(self, fbank_NTM)

    monkeypatch.setattr(Predictor, "_predicted", recorded)
    assert tag.main(["--checkpoint", checkpoint, "--input", str(recordings / "r0.wav"), "--batch-windows", "1"]) == 0
    assert len(sizes) > 1
    assert set(sizes) == {1}


def test_a_command_that_tags_nothing_is_no_success(
    checkpoint: str, recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    one = ["--checkpoint", checkpoint, "--input", str(recordings / "bad.wav")]
    with pytest.raises(DataError, match=r"^no recording could be tagged; the reasons are above$"):
        tag.main(one)
    assert "bad.wav  not_audio: FFmpeg: Invalid data found" in capsys.readouterr().out
    for _ in range(2):  # the second run has nothing to do
        with pytest.raises(DataError, match=r"^no recording could be tagged; the reasons are in .*/failures\.parquet$"):
            tag.main([*one, "--output", str(tmp_path / "tags")])
    assert (tmp_path / "tags" / "failures.parquet").exists()


def test_a_handful_of_recordings_is_tagged_without_ray(
    checkpoint: str, recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("jobs.ray_session.ray_session", None)
    command = ["--checkpoint", checkpoint, "--input", str(recordings / "r0.wav"), "--output", str(tmp_path / "tags")]
    assert tag.main(command) == 0
    assert (tmp_path / "tags" / "report.html").exists()
    with pytest.raises(TypeError):  # the replaced session
        tag.main([*command, "--num-workers", "1", "--output", str(tmp_path / "others")])


def test_a_calibration_is_used_until_the_weights_change(
    local_ray: None,
    checkpoint: str,
    tone_data: str,
    recordings: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    assert calibrate.main(["--checkpoint", checkpoint, "--data", tone_data, "--split", "train"]) == 0
    shown = capsys.readouterr().out
    assert "expected calibration error: " in shown
    made = json.loads(Path(checkpoint, "calibration.json").read_text())
    assert made["made_from"]["clips"] == 48
    assert [item["display_name"] for item in made["classes"]] == list(LABELS.names)
    usual = ["--checkpoint", checkpoint, "--input", str(recordings / "r0.wav"), "--num-workers", "0", "--output"]
    assert tag.main([*usual, str(tmp_path / "calibrated")]) == 0
    assert tag.main([*usual, str(tmp_path / "raw"), "--raw-scores"]) == 0
    info = [storage.read_checked_json(tmp_path / name / "tags.json") for name in ("calibrated", "raw")]
    assert [one["settings"]["calibrated"] for one in info] == [True, False]
    assert info[0]["settings"]["thresholds"] == [round(item["threshold"], 6) for item in made["classes"]]
    assert info[1]["settings"]["thresholds"] == [0.5] * 4
    save_model(checkpoint, weights(6), CONFIG)
    with pytest.raises(DataError, match=r"calibration.json was made for other weights than those beside it; run jobs"):
        tag.main([*usual, str(tmp_path / "other")])


def test_without_kept_scores_a_calibration_needs_data(checkpoint: str):
    with pytest.raises(ConfigError, match=r"has no best/scores.parquet; give --data and --split to score clips$"):
        calibrate.main(["--checkpoint", checkpoint])
    with pytest.raises(ConfigError, match=r"^give --data and --split together, or neither of them$"):
        calibrate.main(["--checkpoint", checkpoint, "--data", "d"])
