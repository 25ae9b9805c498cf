"""Search by example: the windows whose embeddings are nearest to those of a recording or of a class.

Q queries, D dimensions.
"""

import io

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from ast_core.errors import ConfigError, DataError
from pipeline import storage
from pipeline.embeddings.labels import Labelled, readable
from pipeline.embeddings.nearest import Nearest, unit_vectors
from pipeline.embeddings.stored import ROWS, StoredEmbeddings
from pipeline.text_table import text_table

SUFFIXES = (".csv", ".parquet")
"""Kinds of files to which `write_found` writes."""


def nearest_windows(
    embeddings: StoredEmbeddings, queries_QD: np.ndarray, *, most: int, without: pa.Array | None = None
) -> pa.Table:
    """The `most` rows of `embeddings` that are nearest to any of the queries, nearest first.

    Args:
        without: names of recordings that are left out, such as the example itself.

    Returns:
        similarity (float32, the cosine), recording, start_s, end_s.

    Raises:
        DataError: the embeddings have another number of dimensions than the queries, or are all left out.
    """
    nearest, first = Nearest(unit_vectors(queries_QD), most), 0
    for part in embeddings.parts():
        if part.vectors_WD.shape[1] != queries_QD.shape[1]:
            raise DataError(
                f"{embeddings.uri} has embeddings of {part.vectors_WD.shape[1]} dimensions, the example has "
                f"{queries_QD.shape[1]}: they are of different models"
            )
        wanted = np.ones(len(part.rows), bool)
        if without is not None:
            wanted = ~pc.is_in(part.rows["recording"], value_set=without).to_numpy()
        numbers = first + np.flatnonzero(wanted)
        nearest.add(unit_vectors(part.vectors_WD[wanted]), numbers)
        first += len(part.rows)
    similarity, number = (array.ravel() for array in nearest.found())
    order = np.argsort(-similarity, kind="stable")
    order = order[number[order] >= 0]
    _, firsts = np.unique(number[order], return_index=True)  # a window may be near to several queries
    best = order[np.sort(firsts)][:most]
    if not len(best):
        raise DataError(f"all recordings with embeddings in {embeddings.uri} are examples; there is none to find")
    rows = embeddings.rows().take(pa.array(number[best]))
    return rows.add_column(0, "similarity", pa.array(similarity[best], pa.float32())).select(["similarity", *ROWS])


def vectors_of(embeddings: StoredEmbeddings, recordings: pa.Array) -> np.ndarray:
    """All stored embeddings of these recordings, `[Q, D]`."""
    found = [
        part.vectors_WD[pc.is_in(part.rows["recording"], value_set=recordings).to_numpy()]
        for part in embeddings.parts()
    ]
    return np.concatenate(found)


def centre_of_class(embeddings: StoredEmbeddings, labelled: Labelled, index: int) -> tuple[np.ndarray, pa.Array]:
    """The mean direction `[1, D]` of the recordings with a class, and their names.

    Raises:
        DataError: no recording has the class, or one of them has no embedding.
    """
    examples = labelled.only(labelled.targets_NC[:, index] > 0.5)
    if not len(examples.recordings):
        raise DataError("no recording has this class in these splits; give others with --split")
    names = readable(examples, embeddings).recordings
    return unit_vectors(embeddings.means(names)).mean(axis=0, keepdims=True), names


def found_text(found: pa.Table) -> str:
    """The result of `nearest_windows` for a terminal."""
    rows = [
        (f"{row['similarity']:.3f}", f"{row['start_s']:.1f}", f"{row['end_s']:.1f}", row["recording"])
        for row in found.to_pylist()
    ]
    return text_table(["similarity", "from s", "to s", "recording"], rows, "rrrl")


def check_suffix(uri: str, option: str) -> None:
    """Raises ConfigError if `write_found` cannot write such a file."""
    if not uri.lower().endswith(SUFFIXES):
        raise ConfigError(f"{option} {uri} is to be a table; give a name that ends in {' or '.join(SUFFIXES)}")


def write_found(uri: str, found: pa.Table) -> None:
    """Write the result of `nearest_windows` as a table."""
    whole = io.BytesIO()
    if uri.lower().endswith(".csv"):
        pyarrow.csv.write_csv(found, whole)
    else:
        pq.write_table(found, whole)
    storage.write_bytes(uri, whole.getvalue())
