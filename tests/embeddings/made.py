"""Folders of tags with given embeddings, written by the code of tagging."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ast_core.labels import LabelVocabulary
from pipeline import storage
from pipeline.embeddings.stored import EmbeddingsOf, tags_json
from pipeline.tag.collect import Tagged
from pipeline.tag.events import Runs
from pipeline.tag.output import WriteParts

NO_EVENTS = Runs(np.empty(0, np.int64), *(np.empty(0) for _ in range(5)))


def write_embeddings(
    folder: Path,
    vectors: Mapping[str, np.ndarray],
    *,
    of: EmbeddingsOf | None = "window",
    model: str = "model",
    num_parts: int = 2,
) -> str:
    """Write tags of recordings with these embeddings `[W, D]`, one window a second. The model is a name."""
    write = WriteParts(str(folder), LabelVocabulary.from_names(["a"]), embeddings=of)
    names = list(vectors)
    for number in range(num_parts):
        part = [(name, _tagged(vectors[name])) for name in names[number::num_parts]]
        write.write("chunk", number, part, 0)
    settings = {"models": [model], "embeddings": of, "window_s": 1.0, "hop_s": 1.0}
    storage.write_checked_json(tags_json(str(folder)), {"settings": settings, "checkpoints": ["runs/1/best"]})
    return str(folder)


def _tagged(vectors_WD: np.ndarray) -> Tagged:
    start_s = np.arange(float(len(vectors_WD)))
    return Tagged(0, start_s, start_s + 1, np.zeros((len(start_s), 1), np.float32), vectors_WD, NO_EVENTS, ())
