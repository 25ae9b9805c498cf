"""Stored embeddings are read part by part, and what is missing or damaged is refused."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ast_core.errors import DataError
from pipeline.embeddings.stored import StoredEmbeddings
from tests.embeddings.made import write_embeddings

RNG = np.random.default_rng(0)
VECTORS = {f"/in/r{i}.wav": RNG.normal(0, 1, (1 + i, 6)) for i in range(5)}


def test_vectors_come_with_their_recordings_and_times(tmp_path: Path):
    stored = StoredEmbeddings.open(write_embeddings(tmp_path / "tags", VECTORS))
    parts = list(stored.parts())
    assert len(parts) == 2
    rows = pa.concat_tables(part.rows for part in parts)
    assert rows == stored.rows()
    vectors = np.concatenate([part.vectors_WD for part in parts])
    assert vectors.dtype == np.float32
    for row, vector in zip(rows.to_pylist(), vectors, strict=True):
        expected = VECTORS[row["recording"]][int(row["start_s"])].astype(np.float16)
        np.testing.assert_array_equal(vector, expected)
    assert (stored.model_sha256, stored.checkpoint) == ("model", "runs/1/best")


def test_the_mean_of_a_recording_is_that_of_all_its_windows(tmp_path: Path):
    stored = StoredEmbeddings.open(write_embeddings(tmp_path / "tags", VECTORS))
    wanted = ["/in/r3.wav", "/in/r0.wav"]
    expected = [VECTORS[name].astype(np.float16).astype(np.float64).mean(axis=0) for name in wanted]
    np.testing.assert_allclose(stored.means(pa.array(wanted)), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match=r"no embedding of 1 of 2 recordings, first of /in/gone.wav; tag them into it"):
        stored.means(pa.array(["/in/r3.wav", "/in/gone.wav"]))


def test_tags_without_embeddings_or_unfinished_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"nothing has no finished tags \(no tags.json\); run jobs/tag.py with"):
        StoredEmbeddings.open(str(tmp_path / "nothing"))
    with pytest.raises(DataError, match=r"has tags without embeddings; run jobs/tag.py .* into another folder$"):
        StoredEmbeddings.open(write_embeddings(tmp_path / "plain", VECTORS, of=None))
    with pytest.raises(DataError, match=r"has no embedding: no recording could be read"):
        StoredEmbeddings.open(write_embeddings(tmp_path / "empty", {}))


def test_damage_and_values_beyond_float16_are_refused(tmp_path: Path):
    with np.errstate(over="ignore"):
        uri = write_embeddings(tmp_path / "tags", {"a": np.array([[1.0, 2.0]]), "b": np.array([[1e6, 0.0]])})
    with pytest.raises(DataError, match=r"the embedding of b is not finite; the model is damaged, or its embeddings"):
        list(StoredEmbeddings.open(uri).parts())
    file = Path(StoredEmbeddings.open(uri).files[0])
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"is damaged \(.*\); delete the files of its name below scores and embeddings"):
        list(StoredEmbeddings.open(uri).parts())
