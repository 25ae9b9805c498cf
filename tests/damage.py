"""Functions that damage files on disk, and that make changed files consistent again."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ast_core.errors import DataError
from pipeline import dataset, storage


def flip_bit(file: Path, rng: np.random.Generator) -> tuple[int, int]:
    """Flip one random bit. Returns its byte and its position in the byte."""
    whole = bytearray(file.read_bytes())
    at, bit = int(rng.integers(len(whole))), int(rng.integers(8))
    whole[at] ^= 1 << bit
    file.write_bytes(whole)
    return at, bit


def refusal(read: Callable[[], object]) -> str:
    """The line of the DataError that `read` raises; empty if it raises none."""
    try:
        read()
    except DataError as err:
        return str(err)
    return ""


def record_again(output: str) -> None:
    """Write checksums of the present index and failures table to dataset.json, as if they were published like this."""
    info = storage.read_checked_json(dataset.dataset_json(output))
    for split, entry in info["splits"].items():
        index, failures = dataset.index_file(output, split), dataset.failures_file(output, split)
        entry["sha256"] = {"index.parquet": storage.sha256(index), "failures.parquet": storage.sha256(failures)}
        entry["clips"] = len(dataset.read_table(index))
    dataset.write_info(output, info)
