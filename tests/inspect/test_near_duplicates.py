"""The doctor finds copies of a recording in two splits: candidates by embeddings, which the log-mel confirms."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary
from jobs import doctor
from pipeline.dataset import PreparedDataset
from pipeline.embeddings.stored import StoredEmbeddings
from pipeline.inspect.checks import examine, near_duplicates
from pipeline.inspect.findings import Finding
from tests import fakes
from tests.embeddings.made import write_embeddings

NUM_CLIPS = {"train": 30, "eval": 12}
NUM_DIMENSIONS = 32


class Patient:
    """A data set of noises with embeddings around a mean far from 0, so that all cosines from 0 are near 1."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rng = folder, np.random.default_rng(4)
        self.sounds = {
            split: [fakes.noise(0.5, seed=1000 * n + i) for i in range(number)]
            for n, (split, number) in enumerate(NUM_CLIPS.items())
        }
        self.vectors = {split: 10 + self.rng.normal(0, 1, (n, NUM_DIMENSIONS)) for split, n in NUM_CLIPS.items()}

    def look_alike(self, eval_clip: int, train_clip: int) -> None:
        """Give two clips nearly the same embedding."""
        near = self.vectors["train"][train_clip] + self.rng.normal(0, 0.05, NUM_DIMENSIONS)
        self.vectors["eval"][eval_clip] = near

    def copy(self, eval_clip: int, train_clip: int) -> None:
        """Make a clip a quieter copy of another one, that begins 0.1 s later."""
        later = np.roll(self.sounds["train"][train_clip], -1600)
        self.sounds["eval"][eval_clip] = later / 2
        self.look_alike(eval_clip, train_clip)

    def write(self) -> PreparedDataset:
        splits = {split: [(0, sound) for sound in sounds] for split, sounds in self.sounds.items()}
        fakes.write_waveforms(str(self.folder / "data"), LabelVocabulary.from_names(["dog"]), splits)
        return PreparedDataset.open(str(self.folder / "data"))

    def tags(self, data: PreparedDataset, *, without: str = "") -> str:
        vectors = {
            f"{data.uri}/{split}/{split}_{i:03d}": vectors[i][None]
            for split, vectors in self.vectors.items()
            for i in range(len(vectors))
        }
        vectors.pop(f"{data.uri}/{without}", None)
        return write_embeddings(self.folder / "tags", vectors)

    def finding(self) -> Finding:
        data = self.write()
        found = examine(data, embeddings=StoredEmbeddings.open(self.tags(data)))
        (only,) = [one for one in found if one.check == "near_duplicates"]
        return only


def test_copies_are_found_and_other_sounds_with_near_embeddings_are_not(tmp_path: Path):
    patient = Patient(tmp_path)
    patient.copy(3, 7)
    patient.copy(5, 20)
    patient.look_alike(8, 11)
    found = patient.finding()
    assert {(a, b) for a, b, _ in found.figures["pairs"]} == {("eval_003", "train_007"), ("eval_005", "train_020")}
    assert found.figures["candidates"] == 3
    assert (found.split, found.severity) == ("train + eval", "warning")
    assert found.what.startswith("2 clips of eval are copies of one of train: eval_00")
    assert "Listen to these pairs." in found.cost


def test_without_copies_and_without_embeddings(tmp_path: Path):
    found = Patient(tmp_path).finding()
    assert (found.severity, found.what) == ("ok", "no clip of eval is a copy of one of train")
    assert found.figures["candidates"] == 0
    without = examine(PreparedDataset.open(str(tmp_path / "data")))
    assert not [one for one in without if one.check == "near_duplicates"]


def test_the_nearest_candidates_are_compared_and_a_line_says_if_there_are_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(near_duplicates, "MAX_COMPARED", 1)
    patient = Patient(tmp_path)
    patient.copy(3, 7)
    patient.copy(5, 20)
    found = patient.finding()
    assert found.figures["near"] == 1
    assert found.what.endswith("; only the nearest 1 of 2 candidates were compared")


def test_pairs_that_another_check_reports_are_left_out():
    clips = pa.table(
        {
            "clip_id": ["a", "b", "c", "d", "e", "001"],
            "video_id": pa.array([None, "v", "w", None, "x", None], pa.string()),
            "fbank_hash": [1, 2, 3, 4, 5, 6],
            "num_frames": [9] * 6,
            "num_silent_frames": [0, 0, 0, 9, 8, 0],
        }
    )
    others = pa.table(
        {
            "clip_id": ["a2", "b", "c2", "d2", "e2", "001"],
            "video_id": pa.array([None, None, "w", None, "y", None], pa.string()),
            "fbank_hash": [1, 12, 13, 14, 15, 16],
        }
    )
    assert near_duplicates._is_other_sound(clips, others).tolist() == [False, False, False, False, True, True]


@pytest.mark.parametrize(("clip", "of"), [("eval/eval_009", "1 of 12"), ("train/train_017", "1 of 30")])
def test_a_clip_without_embedding_is_an_error(clip: str, of: str, tmp_path: Path):
    patient = Patient(tmp_path)
    data = patient.write()
    embeddings = StoredEmbeddings.open(patient.tags(data, without=clip))
    with pytest.raises(DataError, match=rf"has no embedding of {of} recordings, first of .*{clip}; tag them"):
        examine(data, embeddings=embeddings)


def test_a_split_without_any_embedding_is_an_error(tmp_path: Path):
    patient = Patient(tmp_path)
    data = patient.write()
    del patient.vectors["train"]
    embeddings = StoredEmbeddings.open(patient.tags(data))
    with pytest.raises(DataError, match=r"has no embedding of 30 of 30 recordings"):
        examine(data, embeddings=embeddings)


def test_the_doctors_job_takes_embeddings(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    patient = Patient(tmp_path)
    patient.copy(3, 7)
    data = patient.write()
    assert doctor.main(["--data", data.uri, "--embeddings", patient.tags(data)]) == 0
    assert "eval_003 ≈ train_007" in capsys.readouterr().out
