"""FSD50K's folder: splits, labels by MID, and rows and files that are damaged, contradictory or missing."""

import csv
from pathlib import Path

import pytest

from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary
from jobs.prepare_audioset import main as prepare
from pipeline.dataset import PreparedDataset
from pipeline.prepare.sources.fsd50k import read_fsd50k
from tests import fakes
from tests.prepare.sources.test_sources import reasons, touch

VOCABULARY = [(0, "Bark", "/m/05tny_"), (1, "Dog", "/m/0bt9lr"), (2, "Male speech, man speaking", "/m/05zppz")]
DEV = [
    ("64760", "Bark,Dog", "/m/05tny_,/m/0bt9lr", "train"),
    ("16399", "Dog", "/m/0bt9lr", "val"),
    ("21914", "Male speech, man speaking,Dog", "/m/05zppz,/m/0bt9lr", "train"),
]
EVAL = [("37199", "Dog", "/m/0bt9lr")]


def write_csv(file: Path, *rows: tuple, encoding: str = "utf-8") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding=encoding, newline="") as opened:
        csv.writer(opened).writerows(rows)


def fsd50k(folder: Path, *, dev: list[tuple] = DEV, evaluation: list[tuple] = EVAL, encoding: str = "utf-8") -> str:
    lists = folder / "FSD50K.ground_truth"
    write_csv(lists / "vocabulary.csv", *VOCABULARY, encoding=encoding)
    write_csv(lists / "dev.csv", ("fname", "labels", "mids", "split"), *dev, encoding=encoding)
    write_csv(lists / "eval.csv", ("fname", "labels", "mids"), *evaluation, encoding=encoding)
    touch(folder, *(f"FSD50K.dev_audio/{row[0]}.wav" for row in dev))
    return touch(folder, *(f"FSD50K.eval_audio/{row[0]}.wav" for row in evaluation))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_fsd50k_has_its_splits_and_classes_by_mid(encoding: str, tmp_path: Path):
    out = read_fsd50k(fsd50k(tmp_path, encoding=encoding))
    _, names, mids = zip(*VOCABULARY, strict=True)
    assert out.vocabulary == LabelVocabulary(mids, names)
    read = out.clips.select(["clip_id", "split", "labels"]).to_pylist()
    assert [tuple(clip.values()) for clip in read] == [
        ("64760", "train", [0, 1]),
        ("16399", "val", [1]),
        ("21914", "train", [1, 2]),
        ("37199", "eval", [1]),
    ]
    assert out.clips["media"][3].as_py() == f"{tmp_path}/FSD50K.eval_audio/37199.wav"
    assert (len(out.refused), out.notes) == (0, ())


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (("1", "Dog", "/m/0bt9lr", "test"), "bad_id"),
        (("1", "Dog", "/m/0bt9lr", ""), "bad_id"),
        (("1.2E+05", "Dog", "/m/0bt9lr", "train"), "bad_id"),
        (("1", "", "", "train"), "no_label"),
        (("1", "Cat", "/m/01yrx", "train"), "unknown_label"),
        (("1", "Bark", "/m/0bt9lr", "train"), "unknown_label"),  # labels and mids contradict each other
        (("64760", "Dog", "/m/0bt9lr", "train"), "duplicate"),
        (("../FSD50K.eval_audio/37199", "Dog", "/m/0bt9lr", "train"), "missing_file"),
    ],
)
def test_a_row_that_cannot_be_a_clip_is_refused_alone(row: tuple, reason: str, tmp_path: Path):
    out = read_fsd50k(fsd50k(tmp_path, dev=[*DEV, row]))
    assert (reasons(out), len(out.clips)) == ([reason], 4)


def test_missing_audio_keeps_its_rows_and_a_line_says_what_to_unpack(tmp_path: Path):
    folder = fsd50k(tmp_path)
    (tmp_path / "FSD50K.eval_audio/37199.wav").unlink()
    (tmp_path / "FSD50K.dev_audio/16399.wav").unlink()
    out = read_fsd50k(folder)
    assert out.refused.select(["clip_id", "split", "reason", "labels"]).to_pylist() == [
        {"clip_id": "16399", "split": "val", "reason": "missing_file", "labels": [1]},
        {"clip_id": "37199", "split": "eval", "reason": "missing_file", "labels": [1]},
    ]
    assert out.notes == (f"{tmp_path}/FSD50K.eval_audio has no file that eval.csv names; unpack FSD50K.eval_audio.zip",)


def test_a_folder_or_list_of_another_kind_is_refused_as_a_whole(tmp_path: Path):
    with pytest.raises(DataError, match=r"has no FSD50K.ground_truth/vocabulary.csv; give the folder of FSD50K"):
        read_fsd50k(str(tmp_path))
    folder = fsd50k(tmp_path)
    write_csv(tmp_path / "FSD50K.ground_truth/dev.csv", ("fname", "labels"), ("1", "Dog"))
    with pytest.raises(DataError, match=r"dev\.csv needs the columns fname, labels, mids, split; .*has: fname, labels"):
        read_fsd50k(folder)
    write_csv(tmp_path / "FSD50K.ground_truth/vocabulary.csv", (0, "Dog", "/m/0bt9lr"), (2, "Bark", "/m/05tny_"))
    with pytest.raises(DataError, match=r"vocabulary\.csv .*: the index is 2, not 1"):
        read_fsd50k(folder)


def test_a_second_run_prepares_the_clips_whose_files_came_later(local_ray: None, tmp_path: Path):
    folder, output = fsd50k(tmp_path / "FSD50K"), str(tmp_path / "data")
    media = {row[0]: next(Path(folder).glob(f"*/{row[0]}.wav")) for row in [*DEV, *EVAL]}
    for seed, (name, file) in enumerate(media.items()):
        file.unlink()
        if name != "21914":
            fakes.write_media(file, fakes.noise(0.5, seed=seed))
    assert prepare(["--fsd50k", folder, "--output", output]) == 0
    assert PreparedDataset.open(output).splits == ["train", "val", "eval"]
    fakes.write_media(media["21914"], fakes.noise(0.5, seed=9))
    assert prepare(["--fsd50k", folder, "--output", output]) == 0
    clips = PreparedDataset.open(output).clips(["train"])
    assert dict(zip(clips.clip_id.to_pylist(), clips.labels.to_pylist(), strict=True)) == {
        "64760": [0, 1],
        "21914": [1, 2],
    }
