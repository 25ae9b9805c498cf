"""The commands probe.py and search.py, on what tag.py has stored."""

import json
from pathlib import Path

import pyarrow.csv
import pytest
import torch

from ast_core.checkpoints import ModelConfig, save_model
from ast_core.errors import ConfigError, DataError
from ast_core.labels import LabelVocabulary
from ast_core.models import create_model
from ast_core.recipe import Recipe
from jobs import probe, search, tag
from pipeline.embeddings.labels import Labels
from tests import fakes
from tests.ast_core import small

CONFIG = ModelConfig(
    Recipe(model="linear", hidden=64, n_layers=1, input_tdim=48, label_dim=4, timem=8, freqm=16, precision="fp32"),
    small.NORM,
    LabelVocabulary.from_names(["a", "b", "c", "d"]),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with random weights: its embeddings are a projection of the spectrum, which tells tones apart."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    save_model(folder, create_model(**CONFIG.recipe.model_args()).state_dict(), CONFIG)
    return str(folder)


@pytest.fixture(scope="module")
def tags(checkpoint: str, tone_data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embeddings of the tones' clips."""
    output = str(tmp_path_factory.mktemp("tags") / "tags")
    given = ["--checkpoint", checkpoint, "--input", tone_data, "--num-workers", "0", "--embeddings", "clip"]
    assert tag.main([*given, "--output", output]) == 0
    return output


@pytest.fixture(scope="module")
def label_of(tone_data: str) -> dict[str, int]:
    """The class of each clip, by its name in tags."""
    labels = Labels.open(tone_data)
    found = labels.of(labels.splits)
    return dict(zip(found.recordings.to_pylist(), found.targets_NC.argmax(axis=1).tolist(), strict=True))


def test_probes_learn_the_classes_of_a_data_set(
    tags: str, tone_data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    given = ["--embeddings", tags, "--labels", tone_data, "--train-splits", "train", "--eval-splits", "eval"]
    assert probe.main([*given, "--json", str(tmp_path / "probe.json"), "--per-class", "--bootstrap", "50"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "48 training and 21 evaluation recordings, 64 dimensions"
    assert sum(line.startswith(("linear probe (C ", "nearest neighbours (K 20): mAP ")) for line in lines) == 2
    assert sum(line.split()[:2] == ["tone", "0"] for line in lines) == 2
    written = json.loads((tmp_path / "probe.json").read_text())
    assert [one["map"] > 0.9 for one in written["probes"]] == [True, True]
    assert written["eval_recordings"] == 21
    with pytest.raises(ConfigError, match=r"^eval is in --train-splits and in --eval-splits; a probe is scored on"):
        probe.main(["--embeddings", tags, "--labels", tone_data, "--train-splits", "eval", "--eval-splits", "eval"])


def test_recordings_that_tagging_could_not_read_are_left_out_by_name(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    lines = ["path,labels,split"]
    for i in range(8):
        fakes.write_media(tmp_path / f"{i}.wav", fakes.tone(300.0 + 600 * (i % 2), 0.5) + fakes.noise(0.5, i))
        lines.append(f"{i}.wav,{'ab'[i % 2]},{'train' if i < 5 else 'test'}")
    (tmp_path / "0.wav").write_text("no audio")
    (tmp_path / "5.wav").write_text("no audio")
    listed = tmp_path / "list.csv"
    listed.write_text("\n".join(lines))
    output = str(tmp_path / "tags")
    given = ["--checkpoint", checkpoint, "--input", str(listed), "--num-workers", "0", "--embeddings", "clip"]
    assert tag.main([*given, "--output", output]) == 0
    given = ["--embeddings", output, "--labels", str(listed), "--train-splits", "train", "--eval-splits", "test"]
    assert probe.main([*given, "--bootstrap", "0"]) == 0
    printed = capsys.readouterr().out
    left_out = (
        f"recordings are left out, because tagging could not read them ({{}} for one): see {output}/failures.parq"
    )
    assert f"1 of 5 {left_out.format(tmp_path / '0.wav')}" in printed
    assert f"1 of 3 {left_out.format(tmp_path / '5.wav')}" in printed
    assert "4 training and 2 evaluation recordings" in printed
    assert search.main(["--embeddings", output, "--like-class", "a", "--labels", str(listed), "--split", "train"]) == 0
    assert f"1 of 3 {left_out.format(tmp_path / '0.wav')}" in capsys.readouterr().out
    readable = [str(tmp_path / f"{i}.wav") for i in range(8) if i not in (0, 5)]
    with pytest.raises(DataError, match=r"^all recordings with embeddings in .*tags are examples; there is none to fi"):
        search.main(["--embeddings", output, "--like", *readable])
    shared = tmp_path / "shared.csv"
    shared.write_text(
        "path,labels,split,start_s,end_s\n1.wav,a,train,0,0.3\n1.wav,a,test,0.1,0.4\n2.wav,b,train,0,0.3\n"
    )
    sections = str(tmp_path / "sections")
    command = ["--checkpoint", checkpoint, "--input", str(shared), "--num-workers", "0", "--embeddings", "clip"]
    assert tag.main([*command, "--output", sections]) == 0
    splits = ["--train-splits", "train", "--eval-splits", "test", "--bootstrap", "0"]
    assert probe.main(["--embeddings", sections, "--labels", str(shared), *splits]) == 0
    assert "warning: 1 of the sections to score are of recordings that have sections to tr" in capsys.readouterr().out
    listed.write_text("\n".join([*lines, "7.wav,a,train"]))
    with pytest.raises(
        DataError, match=r"^1 recordings are in a split to train on and in one to score, .*7.wav for on"
    ):
        probe.main([*given, "--bootstrap", "0"])


def test_a_recording_finds_clips_of_its_tone(
    tags: str, label_of: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = fakes.write_media(tmp_path / "tone.flac", fakes.tone(1200.0, 0.5) + fakes.noise(0.5, 99))
    given = ["--embeddings", tags, "--like", str(path), "--most", "5", "--output", str(tmp_path / "found.csv")]
    assert search.main(given) == 0
    found = pyarrow.csv.read_csv(tmp_path / "found.csv").to_pylist()
    assert len(found) == 5
    assert f"wrote {tmp_path / 'found.csv'}" in capsys.readouterr().out
    assert [label_of[row["recording"]] for row in found] == [2] * 5


def test_a_stored_recording_and_a_class_find_their_like_without_themselves(
    tags: str, tone_data: str, label_of: dict[str, int], tmp_path: Path
):
    example = f"{tone_data}/eval/eval_000"
    output = str(tmp_path / "found.csv")
    assert search.main(["--embeddings", tags, "--like", example, "--most", "3", "--output", output]) == 0
    found = pyarrow.csv.read_csv(output)["recording"].to_pylist()
    assert example not in found
    assert [label_of[name] for name in found] == [label_of[example]] * 3
    given = ["--embeddings", tags, "--like-class", "tone 1", "--labels", tone_data, "--split", "eval", "--most", "4"]
    assert search.main([*given, "--output", output]) == 0
    found = pyarrow.csv.read_csv(output)["recording"].to_pylist()
    assert all("/train/" in name and label_of[name] == 1 for name in found)


def test_a_split_that_is_given_twice_is_refused(tone_data: str):
    with pytest.raises(DataError, match=r"^split 'train' is given twice$"):
        Labels.open(tone_data).of(["train", "eval", "train"])


def test_another_model_or_class_is_refused(tags: str, tone_data: str, tmp_path: Path):
    path = fakes.write_media(tmp_path / "a.flac", fakes.noise(0.5))
    save_model(tmp_path / "other", create_model(**CONFIG.recipe.model_args()).state_dict(), CONFIG)
    with pytest.raises(DataError, match=r"other is not the model with which .* was tagged; give that one as --checkpo"):
        search.main(["--embeddings", tags, "--like", str(path), "--checkpoint", str(tmp_path / "other")])
    with pytest.raises(ConfigError, match=r"^--like-class dog is not a class of "):
        search.main(["--embeddings", tags, "--like-class", "dog", "--labels", tone_data])
    with pytest.raises(ConfigError, match=r"^give --like-class and --labels together, or neither of them$"):
        search.main(["--embeddings", tags, "--like-class", "dog"])
    (tmp_path / "bad.wav").write_text("no audio")
    with pytest.raises(DataError, match=r"bad.wav cannot be read \(not_audio: .*\); give another example$"):
        search.main(["--embeddings", tags, "--like", str(tmp_path / "bad.wav")])
