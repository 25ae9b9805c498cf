"""The embeddings of recordings that serve as examples for a search: stored ones, or computed by the same model.

Q vectors, D dimensions.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ast_core.errors import DataError
from pipeline import storage
from pipeline.embeddings.search import vectors_of
from pipeline.embeddings.stored import StoredEmbeddings
from pipeline.tag.inputs import find_inputs
from pipeline.tag.predictor import read_members, thresholds_of
from pipeline.tag.tables import failure_rows
from pipeline.tag.work import local_device, settings_for, tag_here


def embedded(
    uris: Sequence[str], embeddings: StoredEmbeddings, checkpoint: str | None, device: str
) -> tuple[np.ndarray, pa.Array]:
    """The embeddings `[Q, D]` of recordings, and the names of the recordings.

    Args:
        uris: names of recordings in `embeddings`, or inputs of tagging, which are embedded in this process.
        checkpoint: the model; None: where it was when the others were tagged.

    Raises:
        DataError: a recording cannot be read, or the checkpoint is another model.
    """
    known = pc.unique(embeddings.rows()["recording"])
    stored, others = list[str](), list[str]()
    for uri in uris:
        name = next((name for name in (uri, storage.absolute(uri)) if pc.is_in(name, value_set=known).as_py()), None)
        stored += [name] if name is not None else []
        others += [uri] if name is None else []
    vectors = [vectors_of(embeddings, pa.array(stored))] if stored else []
    names = list(stored)
    if others:
        for name, vectors_QD in _computed(others, embeddings, checkpoint, device):
            names.append(name)
            vectors.append(vectors_QD)
    return np.concatenate(vectors), pa.array(names, pa.string())


def _computed(
    uris: Sequence[str], embeddings: StoredEmbeddings, checkpoint: str | None, device: str
) -> list[tuple[str, np.ndarray]]:
    inputs = find_inputs(uris)
    if refused := inputs.refused.to_pylist():
        raise DataError(f"{refused[0]['recording']}: {refused[0]['message']}")
    members = read_members([checkpoint or embeddings.checkpoint], calibrated=False)
    (member,) = members
    if member.sha256 != embeddings.model_sha256:
        raise DataError(
            f"{member.uri} is not the model with which {embeddings.uri} was tagged; give that one as --checkpoint, or "
            "tag again"
        )
    windows = embeddings.info["settings"]
    settings = settings_for(
        members,
        thresholds_of(members, 1.0, 1.0),
        window_s=windows["window_s"],
        hop_s=windows["hop_s"],
        embeddings="window",
    )
    found = []
    for name, tagged in tag_here(inputs, members, settings, local_device(device)):
        if tagged.embeddings_WD is None:
            (failure,) = failure_rows([(name, tagged)]).to_pylist()
            raise DataError(f"{name} cannot be read ({failure['reason']}: {failure['message']}); give another example")
        vectors = tagged.embeddings_WD.astype(np.float32)
        found.append((name, vectors.mean(axis=0, keepdims=True) if windows["embeddings"] == "clip" else vectors))
    return found
