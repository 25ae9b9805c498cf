"""Scores as a table for other programs: `clip_id` and one column a class, as CSV or Parquet by the file's suffix."""

import csv
import io

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from ast_core.checkpoints.huggingface import distinct_names
from ast_core.errors import ConfigError
from ast_core.labels import LabelVocabulary
from pipeline import storage

CLIP_ID = "clip_id"
SUFFIXES = (".csv", ".parquet")


def check_suffix(uri: str, option: str) -> None:
    """Raise ConfigError if the file's suffix is neither of a CSV nor of a Parquet file."""
    if not uri.partition("?")[0].lower().endswith(SUFFIXES):
        raise ConfigError(f"{option} {uri} is to be a table; give a name that ends in {' or '.join(SUFFIXES)}")


def write_score_table(uri: str, clip_id: pa.Array, labels: LabelVocabulary, scores: np.ndarray) -> None:
    """Write the scores `[clips, C]`, float32, in the order of `clip_id`.

    Columns are display names. A name of several classes, and the name `clip_id`, gets the class's MID as a suffix.
    """
    names = [
        f"{name} ({mid})" if name == CLIP_ID else name
        for name, mid in zip(distinct_names(labels), labels.mids, strict=True)
    ]
    columns = [pa.array(np.ascontiguousarray(column, dtype=np.float32)) for column in scores.T]
    table = pa.table([clip_id.cast(pa.string()), *columns], names=[CLIP_ID, *names])
    if uri.partition("?")[0].lower().endswith(".parquet"):
        storage.write_file(uri, lambda file: pq.write_table(table, file, compression="zstd"))
        return
    header, body = io.StringIO(), io.BytesIO()
    csv.writer(header, lineterminator="\n").writerow(table.column_names)  # pyarrow's header does not escape quotes
    pyarrow.csv.write_csv(table, body, pyarrow.csv.WriteOptions(include_header=False))
    storage.write_bytes(uri, header.getvalue().encode() + body.getvalue())
