"""Measure exact search of stored embeddings: FAISS, as jobs/search.py and the doctor use it, and DuckDB.

    python -m benchmarks.embedding_search [--vectors 50000] [--dimensions 768] [--queries 1 100]

Random embeddings are written as tagging writes them (float16, parts of 2,048). Both programs find the 20 nearest by
cosine for each query, and both read the files. All queries are asked together, on all CPUs of the machine, and the
time is that of one run. The answers are compared.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import parquet, storage
from pipeline.embeddings.nearest import Nearest, unit_vectors
from pipeline.embeddings.stored import EMBEDDING, EMBEDDING_VALUE, EMBEDDINGS, StoredEmbeddings, tags_json

PART_VECTORS = 2048
NEAREST = 20

SQL = """
    SELECT q.number, e.recording
    FROM queries q, read_parquet('{files}') e
    QUALIFY row_number() OVER (
        PARTITION BY q.number
        ORDER BY array_cosine_similarity(q.vector::FLOAT[{dimensions}], e.embedding::FLOAT[{dimensions}]) DESC
    ) <= {nearest}
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=50_000)
    parser.add_argument("--dimensions", type=int, default=768)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 100])
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="ast-bench-") as folder:
        embeddings = write(Path(folder), args.vectors, args.dimensions)
        rng = np.random.default_rng(1)
        print(f"| queries, {args.vectors:,} vectors of {args.dimensions} | FAISS, s | DuckDB, s | same answers |")
        print("|---|---|---|---|")
        for number in args.queries:
            queries = rng.normal(size=(number, args.dimensions)).astype(np.float32)
            faiss_s, by_faiss = timed(by_faiss_of, embeddings, queries)
            duckdb_s, by_duckdb = timed(by_duckdb_of, embeddings, queries)
            same = np.mean([len(a & b) / NEAREST for a, b in zip(by_faiss, by_duckdb, strict=True)])
            print(f"| {number:,} | {faiss_s:.1f} | {duckdb_s:.1f} | {same:.1%} |", flush=True)
    return 0


def write(folder: Path, num_vectors: int, num_dimensions: int) -> StoredEmbeddings:
    rng = np.random.default_rng(0)
    kind = pa.list_(pa.field(*EMBEDDING_VALUE, nullable=False), num_dimensions)
    for begin in range(0, num_vectors, PART_VECTORS):
        number = min(PART_VECTORS, num_vectors - begin)
        values = pa.array(rng.normal(size=number * num_dimensions).astype(np.float16))
        start_s = np.arange(float(number))
        columns = {
            "recording": pa.array([str(begin + i) for i in range(number)]),
            "start_s": start_s,
            "end_s": start_s + 1,
            EMBEDDING: pa.FixedSizeListArray.from_arrays(values, type=kind),
        }
        file = folder / EMBEDDINGS / f"{begin:09d}.parquet"
        file.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), file, compression="zstd", **parquet.CHECKSUMS)
    storage.write_checked_json(
        tags_json(str(folder)), {"settings": {"embeddings": "window", "models": ["random"]}, "checkpoints": ["none"]}
    )
    return StoredEmbeddings.open(str(folder))


def timed(answer: object, embeddings: StoredEmbeddings, queries: np.ndarray) -> tuple[float, list[set[str]]]:
    began_s = time.monotonic()
    found = answer(embeddings, queries)  # type: ignore[operator]
    return time.monotonic() - began_s, found


def by_faiss_of(embeddings: StoredEmbeddings, queries: np.ndarray) -> list[set[str]]:
    nearest, first = Nearest(unit_vectors(queries), NEAREST), 0
    for part in embeddings.parts():
        nearest.add(unit_vectors(part.vectors_WD), np.arange(first, first + len(part.rows)))
        first += len(part.rows)
    return [set(map(str, row)) for row in nearest.found()[1].tolist()]


def by_duckdb_of(embeddings: StoredEmbeddings, queries: np.ndarray) -> list[set[str]]:
    table = pa.table({"number": np.arange(len(queries)), "vector": list(queries)})
    with duckdb.connect() as connection:
        connection.register("queries", table)
        files = f"{embeddings.uri}/{EMBEDDINGS}/*.parquet"
        sql = SQL.format(files=files, dimensions=queries.shape[1], nearest=NEAREST)
        rows = connection.execute(sql).fetchall()
    found: list[set[str]] = [set() for _ in queries]
    for number, recording in rows:
        found[number].add(recording)
    return found


if __name__ == "__main__":
    sys.exit(main())
