"""Scores as a table for other programs: `clip_id` and one column a class, as CSV or Parquet by the file's suffix."""

import csv
import io

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from ast_core.checkpoints.huggingface import distinct_names
from ast_core.errors import ConfigError, DataError
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
    names = _column_names(labels)
    columns = [pa.array(np.ascontiguousarray(column, dtype=np.float32)) for column in scores.T]
    table = pa.table([clip_id.cast(pa.string()), *columns], names=[CLIP_ID, *names])
    if uri.partition("?")[0].lower().endswith(".parquet"):
        storage.write_file(uri, lambda file: pq.write_table(table, file, compression="zstd"))
        return
    header, body = io.StringIO(), io.BytesIO()
    csv.writer(header, lineterminator="\n").writerow(table.column_names)  # pyarrow's header does not escape quotes
    pyarrow.csv.write_csv(table, body, pyarrow.csv.WriteOptions(include_header=False))
    storage.write_bytes(uri, header.getvalue().encode() + body.getvalue())


def read_score_table(uri: str, clip_ids: pa.ChunkedArray, labels: LabelVocabulary) -> np.ndarray:
    """The scores float32 `[clips, C]` of these clips from a table that `write_score_table` wrote.

    Raises:
        DataError: it is no such table, or lacks a class or a clip, or has a clip twice.
    """
    file = io.BytesIO(storage.read_bytes(uri))
    try:
        if uri.partition("?")[0].lower().endswith(".parquet"):
            table = pq.read_table(file)
        else:
            ids_as_text = pyarrow.csv.ConvertOptions(column_types={CLIP_ID: pa.string()})  # 007 is no number
            table = pyarrow.csv.read_csv(file, convert_options=ids_as_text)
    except pa.ArrowException as err:
        raise DataError(f"{uri} cannot be read as a table of scores: {err}") from err
    names = _column_names(labels)
    if missing := next((name for name in (CLIP_ID, *names) if name not in table.column_names), None):
        raise DataError(f"{uri} has no column {missing!r}; give a table that evaluate.py --scores wrote for these data")
    scored = table[CLIP_ID].combine_chunks()
    if pc.count_distinct(scored).as_py() < len(scored):
        raise DataError(f"{uri} has a clip twice; score one split")
    row = pc.index_in(clip_ids, value_set=scored)
    if row.null_count:
        first = clip_ids.filter(pc.is_null(row))[0]
        raise DataError(f"{uri} has no scores of {row.null_count:,} clips ({first} first); score this split again")
    return np.stack([table[name].take(row).to_numpy().astype(np.float32) for name in names], axis=1)


def _column_names(labels: LabelVocabulary) -> list[str]:
    return [
        f"{name} ({mid})" if name == CLIP_ID else name
        for name, mid in zip(distinct_names(labels), labels.mids, strict=True)
    ]
