"""Other programs read the right scores from a table, whatever the names of the classes."""

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ast_core.errors import ConfigError
from ast_core.labels import LabelVocabulary
from pipeline.train.evaluation.score_table import check_suffix, write_score_table

NAMES = ("Male speech, man speaking", 'a "quoted" <b>name</b>', "it's {{7*7}}", "🐕", "clip_id", "twin", "twin")
LABELS = LabelVocabulary(tuple(f"/m/{i}" for i in range(7)), NAMES)
COLUMNS = ["clip_id", *NAMES[:4], "clip_id (/m/4)", "twin (/m/5)", "twin (/m/6)"]
IDS = ["plain", 'with, comma and "quote"', "línea"]
SCORES = np.random.default_rng(0).random((3, 7)).astype(np.float32)


def test_case_11_and_25_csv_reads_back_in_pythons_reader(tmp_path: Path):
    write_score_table(str(tmp_path / "scores.CSV"), pa.array(IDS), LABELS, SCORES)
    with (tmp_path / "scores.CSV").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == COLUMNS
    assert [row[0] for row in rows] == IDS
    np.testing.assert_allclose(np.array([row[1:] for row in rows], float), SCORES, rtol=1e-6)


def test_case_11_parquet_reads_back(tmp_path: Path):
    write_score_table(str(tmp_path / "scores.parquet"), pa.array(IDS), LABELS, SCORES)
    table = pq.read_table(tmp_path / "scores.parquet")
    assert table.column_names == COLUMNS
    assert table["clip_id"].to_pylist() == IDS
    np.testing.assert_array_equal(np.array([table[i].to_numpy() for i in range(1, 8)]).T, SCORES)


def test_other_suffixes_are_refused():
    with pytest.raises(ConfigError, match=r"^--scores scores\.txt is to be a table; give a name that ends in \.csv or"):
        check_suffix("scores.txt", "--scores")
