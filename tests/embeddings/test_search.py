"""Search by example: the nearest windows of all, each once, without the example itself."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from ast_core.errors import ConfigError, DataError
from pipeline.embeddings import search
from pipeline.embeddings.labels import Labelled
from pipeline.embeddings.search import centre_of_class, nearest_windows
from pipeline.embeddings.stored import StoredEmbeddings
from tests.embeddings.made import write_embeddings

VECTORS = {
    "owl": np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
    "field": np.array([[0.0, 0.1, 3.0], [5.0, 0.5, 0.0], [-1.0, 0.0, 0.0]]),
    "wood": np.array([[0.2, 2.0, 0.1]]),
}


@pytest.fixture
def stored(tmp_path: Path) -> StoredEmbeddings:
    return StoredEmbeddings.open(write_embeddings(tmp_path / "tags", VECTORS))


def test_windows_near_to_any_part_of_the_example_come_first(stored: StoredEmbeddings):
    queries = search.vectors_of(stored, pa.array(["owl"]))
    np.testing.assert_array_equal(queries, VECTORS["owl"])
    found = nearest_windows(stored, queries, most=3, without=pa.array(["owl"])).to_pylist()
    assert [(row["recording"], row["start_s"], row["end_s"]) for row in found] == [
        ("field", 1.0, 2.0),
        ("wood", 0.0, 1.0),
        ("field", 0.0, 1.0),
    ]
    cosine = 5 / np.hypot(5, 0.5)
    assert found[0]["similarity"] == pytest.approx(cosine, abs=1e-3)
    everything = nearest_windows(stored, queries, most=50)
    assert len(everything) == 6  # each window once, though it is near to two queries
    assert everything["recording"][0].as_py() == "owl"


def test_a_class_is_the_mean_direction_of_its_recordings(stored: StoredEmbeddings):
    labelled = Labelled(pa.array(["field", "wood", "owl"]), np.array([[0, 1], [1, 1], [1, 0]], np.float32))
    centre, examples = centre_of_class(stored, labelled, 0)
    assert examples.to_pylist() == ["wood", "owl"]
    directions = [VECTORS[name].mean(axis=0) for name in ("wood", "owl")]
    expected = np.mean([direction / np.linalg.norm(direction) for direction in directions], axis=0)
    np.testing.assert_allclose(centre, [expected], atol=1e-3)
    with pytest.raises(DataError, match=r"^no recording has this class in these splits; give others with --split$"):
        centre_of_class(stored, Labelled(pa.array(["owl"]), np.zeros((1, 2), np.float32)), 1)


def test_embeddings_of_another_size_are_of_another_model(stored: StoredEmbeddings):
    with pytest.raises(DataError, match=r"has embeddings of 3 dimensions, the example has 2: they are of different"):
        nearest_windows(stored, np.ones((1, 2)), most=1)


def test_the_result_is_shown_and_written(stored: StoredEmbeddings, tmp_path: Path):
    found = nearest_windows(stored, np.array([[1.0, 0.0, 0.0]]), most=2)
    assert search.found_text(found).splitlines()[1].split() == ["1.000", "0.0", "1.0", "owl"]
    for name in ("found.csv", "found.parquet"):
        search.write_found(str(tmp_path / name), found)
    assert pa.csv.read_csv(tmp_path / "found.csv")["recording"].to_pylist() == ["owl", "field"]
    assert pq.read_table(tmp_path / "found.parquet").equals(found)
    with pytest.raises(ConfigError, match=r"^--output found.txt is to be a table; give a name that ends in .csv or"):
        search.check_suffix("found.txt", "--output")
