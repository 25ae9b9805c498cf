"""Excludes the outputs of preparations from a folder that is read as a source.

A data set and an audio store are recognised by their structure: `labels.csv` next to `dataset.json` or to the folders
of splits. An audio store is a source if the folder contains no other source, because then the user means it.
"""

import re
from collections.abc import Sequence

from pipeline import storage

_OF_DATASET = re.compile(r"dataset\.json|_work/.+|_report/samples-[^/]+\.parquet|[^/]+/shards/[^/]+\.parquet")
_OF_STORE = re.compile(r"[^/]+/audio/[^/]+\.parquet")


def without_outputs(files: Sequence[str], candidates: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the `candidates` that no preparation wrote, and notes on the others.

    Args:
        files: all files of the folder that is read.
        candidates: those of them that may be sources.
    """
    of_dataset: dict[str, str] = {}  # file → the folder that it belongs to
    of_store: dict[str, str] = {}
    for folder in (file.removesuffix("labels.csv") for file in files if file.endswith("/labels.csv")):
        names = (file.removeprefix(folder) for file in files if file.startswith(folder))
        is_dataset = any(map(_OF_DATASET.fullmatch, names))
        for file in (file for file in candidates if file.startswith(folder)):
            if _OF_STORE.fullmatch(file.removeprefix(folder)):
                of_store[file] = folder
            elif is_dataset and file.lower().endswith(".parquet"):
                of_dataset[file] = folder
    outputs = of_dataset | of_store
    left_out = outputs if any(file not in outputs for file in candidates) else of_dataset
    notes = [
        f"{folder.rstrip('/')} was written by a preparation and is not read; to read kept audio, name its folder"
        for folder in sorted(set(left_out.values()))
    ]
    return [file for file in candidates if file not in left_out], notes


def has_clips(folder: str) -> bool:
    """Whether a data set (finished or not) or an audio store has a clip, and so depends on its labels."""
    files = storage.list_files(folder, suffix=".parquet", recursive=True)
    return any(re.search(r"/(shards|audio)/[^/]+$", file) for file in files)
