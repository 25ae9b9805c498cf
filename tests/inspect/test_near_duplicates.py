"""The doctor finds clips of two splits that sound nearly the same, from embeddings."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary
from jobs import doctor
from pipeline import dataset
from pipeline.dataset import PreparedDataset
from pipeline.embeddings.stored import StoredEmbeddings
from pipeline.inspect.checks import examine
from pipeline.inspect.findings import Finding
from tests import fakes
from tests.embeddings.made import write_embeddings

LABELS = LabelVocabulary.from_names(["dog", "cat"])
NUM_CLIPS = {"train": 200, "eval": 60}
RNG = np.random.default_rng(4)


def stored_clips(split: str) -> pa.Table:
    rows = [{"clip_id": f"{split}{i}", "split": split, "media": "m", "end_s": 10.0} for i in range(NUM_CLIPS[split])]
    return fakes.stored_clips(fakes.clips(*rows))


def with_values(rows: pa.Table, column: str, values: dict[int, object]) -> pa.Table:
    changed = [values.get(i, value) for i, value in enumerate(rows[column].to_pylist())]
    at = rows.schema.get_field_index(column)
    return rows.set_column(at, rows.schema.field(at), pa.array(changed, rows.schema.field(at).type))


def write(folder: Path, changes: dict[str, tuple[str, dict[int, object]]] | None = None) -> PreparedDataset:
    splits = {split: stored_clips(split) for split in NUM_CLIPS}
    for split, (column, values) in (changes or {}).items():
        splits[split] = with_values(splits[split], column, values)
    fakes.write_stored(str(folder / "data"), LABELS, splits)
    return PreparedDataset.open(str(folder / "data"))


def vectors(data: PreparedDataset) -> dict[str, np.ndarray]:
    """Different embeddings around a mean far from 0, so that cosines from 0 would all be near 1."""
    return {
        f"{data.uri}/{split}/{split}{i}": 10 + RNG.normal(0, 1, (1, 32))
        for split, number in NUM_CLIPS.items()
        for i in range(number)
    }


def near(data: PreparedDataset, made: dict[str, np.ndarray], folder: Path) -> list[Finding]:
    embeddings = StoredEmbeddings.open(write_embeddings(folder / "tags", made))
    return [found for found in examine(data, embeddings=embeddings) if found.check == "near duplicates"]


def copy(made: dict[str, np.ndarray], data: PreparedDataset, clip: str, of: str) -> None:
    """Give a clip nearly the embedding of another one."""
    made[f"{data.uri}/{clip}"] = made[f"{data.uri}/{of}"] + RNG.normal(0, 0.02, (1, 32))


def test_planted_copies_are_found_and_nothing_else(tmp_path: Path):
    data = write(tmp_path)
    made = vectors(data)
    copy(made, data, "eval/eval3", "train/train7")
    copy(made, data, "eval/eval5", "train/train150")
    (found,) = near(data, made, tmp_path)
    assert {(a, b) for a, b, _ in found.figures["pairs"]} == {("eval3", "train7"), ("eval5", "train150")}
    assert (found.split, found.severity) == ("train + eval", "warning")
    assert found.what.startswith("2 clips of eval sound nearly like one of train: eval")
    assert "Listen to these pairs." in found.cost


def test_without_copies_and_without_embeddings(tmp_path: Path):
    data = write(tmp_path)
    (found,) = near(data, vectors(data), tmp_path)
    assert (found.severity, found.what) == ("ok", "no clip of eval sounds nearly like one of train")
    assert not [found for found in examine(data) if found.check == "near duplicates"]


@pytest.mark.parametrize(
    ("column", "values"),
    [("fbank_hash", {3: None}), ("video_id", {3: "same"}), ("num_silent_frames", {3: 998})],
    ids=["equal-audio", "one-video", "silent"],
)
def test_pairs_that_another_check_reports_are_left_out(column: str, values: dict[int, object], tmp_path: Path):
    if column == "fbank_hash":
        values = {3: stored_clips("train")["fbank_hash"][7].as_py()}
    changes = {"eval": (column, values)}
    if column == "video_id":
        changes["train"] = (column, {7: "same"})
    data = write(tmp_path, changes)
    made = vectors(data)
    copy(made, data, "eval/eval3", "train/train7")
    (found,) = near(data, made, tmp_path)
    assert (found.severity, found.figures["near"]) == ("ok", 0)


def test_a_clip_without_embedding_is_an_error(tmp_path: Path):
    data = write(tmp_path)
    made = vectors(data)
    del made[f"{data.uri}/eval/eval9"]
    with pytest.raises(
        DataError, match=r"has no embedding of 1 of 60 recordings, first of .*/data/eval/eval9; tag them"
    ):
        near(data, made, tmp_path)


def test_the_doctors_job_takes_embeddings(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = write(tmp_path)
    made = vectors(data)
    copy(made, data, "eval/eval3", "train/train7")
    tags = write_embeddings(tmp_path / "tags", made)
    assert doctor.main(["--data", data.uri, "--embeddings", tags]) == 0
    assert "eval3 ≈ train7" in capsys.readouterr().out
    assert dataset.read_info(data.uri) is not None
