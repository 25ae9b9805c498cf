"""The nearest vectors by cosine similarity: exact, by FAISS, over vectors that come part by part.

Q queries, N vectors, D dimensions, K neighbours.
"""

from importlib.util import find_spec

import numpy as np

from ast_core.errors import ConfigError

SMALLEST_NORM = 1e-12
"""Lower bound of a vector's length: one of zeros has the similarity 0 to all."""


def check_installed() -> None:
    """Raises ConfigError if FAISS is not installed."""
    if find_spec("faiss") is None:
        raise ConfigError(
            "finding near embeddings needs FAISS, which is not installed; in the project's folder, "
            "pip install -e '.[search]'"
        )


def unit_vectors(vectors_ND: np.ndarray, centre_D: np.ndarray | None = None) -> np.ndarray:
    """The directions of vectors from `centre_D`, float32, of length 1. Their inner products are cosines."""
    moved = vectors_ND if centre_D is None else vectors_ND - centre_D
    lengths = np.linalg.norm(moved, axis=1, keepdims=True)
    return np.ascontiguousarray(moved / np.maximum(lengths, SMALLEST_NORM), np.float32)


class Nearest:
    """Collects the K nearest of all vectors that are added, for each query.

    Memory grows with the queries, not with the vectors.
    """

    def __init__(self, queries_QD: np.ndarray, number: int) -> None:
        """`queries_QD` are unit vectors; `number` is K."""
        import faiss

        self._queries, self._number = np.ascontiguousarray(queries_QD, np.float32), number
        self._heap = faiss.ResultHeap(len(queries_QD), number, keep_max=True)

    def add(self, vectors_ND: np.ndarray, numbers_N: np.ndarray) -> None:
        """Add unit vectors with numbers of theirs."""
        import faiss

        if not len(vectors_ND):
            return
        vectors = np.ascontiguousarray(vectors_ND, np.float32)
        most = min(self._number, len(vectors))
        similarity, at = faiss.knn(self._queries, vectors, most, metric=faiss.METRIC_INNER_PRODUCT)
        self._heap.add_result(similarity, numbers_N[at].astype(np.int64))

    def found(self) -> tuple[np.ndarray, np.ndarray]:
        """Similarities and numbers, both `[Q, K]`, the nearest first. Where there are fewer, the number is -1."""
        self._heap.finalize()
        return self._heap.D, self._heap.I
