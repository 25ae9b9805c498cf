"""The nearest vectors are those of a search by hand, whatever the parts in which vectors come."""

import numpy as np
import pytest

from ast_core.errors import ConfigError
from pipeline.embeddings import nearest
from pipeline.embeddings.nearest import Nearest, unit_vectors


def test_the_nearest_of_all_parts_are_found():
    rng = np.random.default_rng(1)
    queries, vectors, centre = rng.normal(2, 1, (4, 9)), rng.normal(2, 1, (50, 9)), np.full(9, 2.0)
    search = Nearest(unit_vectors(queries, centre), 7)
    numbers = np.arange(100, 150)
    for begin, end in ((0, 3), (3, 3), (3, 41), (41, 50)):  # fewer than seven, none, and more
        search.add(unit_vectors(vectors[begin:end], centre), numbers[begin:end])
    similarity, found = search.found()
    a, b = (x - 2.0 for x in (queries, vectors))
    cosine = a @ b.T / np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
    order = np.argsort(-cosine, axis=1)[:, :7]
    np.testing.assert_array_equal(found, 100 + order)
    np.testing.assert_allclose(similarity, np.take_along_axis(cosine, order, axis=1), atol=1e-5)


def test_fewer_vectors_than_asked_for_leave_places_empty():
    search = Nearest(unit_vectors(np.eye(2)), 3)
    search.add(unit_vectors(np.array([[0.0, 0.0], [3.0, 0.0]])), np.array([4, 5]))
    similarity, found = search.found()
    assert found.tolist() == [[5, 4, -1], [5, 4, -1]] or found.tolist() == [[5, 4, -1], [4, 5, -1]]
    assert similarity[0, :2].tolist() == [1, 0]  # a vector of zeros is near to nothing


def test_without_faiss_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    nearest.check_installed()
    monkeypatch.setattr(nearest, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"needs FAISS, which is not installed; .* pip install -e '\.\[search\]'$"):
        nearest.check_installed()
