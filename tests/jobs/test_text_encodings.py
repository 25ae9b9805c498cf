"""Recipes, label files and a data set's labels.csv in usual text encodings."""

import codecs
from pathlib import Path

import pytest

from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary
from jobs.prepare_audioset import main as prepare
from jobs.recipe_option import read_recipe
from pipeline import storage
from pipeline.dataset import PreparedDataset
from pipeline.train.export import read_labels

LABELS = LabelVocabulary(("/m/1", "/m/2"), ("Mål", "Dog"))
RECIPE = "# für später\nlr: 1.0e-4\n"


def saved(folder: Path, text: str, encoding: str) -> str:
    marks = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}
    (folder / "file").write_bytes(marks.get(encoding, b"") + text.encode(encoding))
    return str(folder / "file")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16-le", "utf-16-be"])
def test_part_2_case_8_usual_encodings_are_read(tmp_path: Path, encoding: str):
    assert read_recipe(saved(tmp_path, RECIPE, encoding), []).lr == 1e-4
    assert read_labels(saved(tmp_path, LABELS.to_csv(), encoding)) == LABELS


@pytest.mark.parametrize("encoding", ["latin-1", "utf-32"])
def test_part_2_case_8_other_encodings_are_refused_with_file_and_line(tmp_path: Path, encoding: str):
    with pytest.raises(DataError, match=r"file (is not UTF-8: line 1, byte 3|is not a text file)"):
        read_recipe(saved(tmp_path, RECIPE, encoding), [])
    with pytest.raises(DataError, match=r"file (is not UTF-8: line 2, byte 31|is not a text file)"):
        read_labels(saved(tmp_path, LABELS.to_csv(), encoding))


def test_part_2_case_8_prepare_reads_labels_with_bom_and_refuses_latin_1(tmp_path: Path):
    (tmp_path / "list.csv").write_text("path,labels\nx.wav,Mål\n", encoding="utf-8")
    argv = ["--manifest", str(tmp_path / "list.csv"), "--output", str(tmp_path / "out"), "--dry-run", "--labels"]
    assert prepare([*argv, saved(tmp_path, LABELS.to_csv(), "utf-8-sig")]) == 0
    with pytest.raises(DataError, match=r"file is not UTF-8: line 2, byte 31"):
        prepare([*argv, saved(tmp_path, LABELS.to_csv(), "cp1252")])


def test_labels_csv_of_a_data_set_saved_by_excel_is_read(tone_data: str, tmp_path: Path):
    data = PreparedDataset.open(tone_data)
    for name in ("dataset.json", "labels.csv"):
        storage.write_bytes(tmp_path / name, storage.read_bytes(f"{tone_data}/{name}"))
    (tmp_path / "labels.csv").write_bytes(codecs.BOM_UTF8 + data.labels.to_csv().replace("\n", "\r\n").encode())
    assert PreparedDataset.open(str(tmp_path)).labels.sha256 == data.labels.sha256
