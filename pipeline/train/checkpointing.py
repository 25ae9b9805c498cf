"""A run's checkpoints in Ray Train's hands: made here, found again, and deleted when nobody needs them."""

import logging
import posixpath
import shutil
import tempfile
import uuid
from collections.abc import Sequence
from typing import Any

import ray.train
from ray.train import Checkpoint, CheckpointConsistencyMode
from torch import Tensor

from pipeline import storage
from pipeline.train.metrics_log import temporary_prefix
from pipeline.train.state import DamagedStateError, checkpoint_folders, load_state, save_state

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""Ray Train's folder in that of the run."""


def upload_prefix(run: str) -> str:
    """Of the temporary folders in which a node holds a run's checkpoints until they are uploaded."""
    return temporary_prefix("checkpoint", run)


def new_name(epochs_done: int, steps_done: int) -> str:
    """After a damaged checkpoint the same step is reached a second time, and a name must never come again."""
    return _name_prefix(epochs_done, steps_done) + uuid.uuid4().hex[:6]


def _name_prefix(epochs_done: int, steps_done: int) -> str:
    return f"epoch-{epochs_done:04d}-step-{steps_done:06d}-"


def make(run: str, state: dict[str, Any]) -> Checkpoint:
    """On this node's disk, for Ray to upload and delete."""
    folder = tempfile.mkdtemp(prefix=upload_prefix(run))
    try:
        save_state(folder, state)
    except BaseException:
        shutil.rmtree(folder)
        raise
    return Checkpoint.from_directory(folder)


def known(unlisted: Sequence[str]) -> list[Checkpoint]:
    """Those to go on from, the earliest first; the unlisted are of a run of which Ray knows none."""
    if ray.train.get_checkpoint() is not None:
        return _listed()
    return [Checkpoint(path, filesystem) for filesystem, path in map(storage.resolve, unlisted)]


def _listed() -> list[Checkpoint]:
    """Those that Ray knows, the earliest first, without waiting for the evaluations that are under way."""
    listed = ray.train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED)
    return [reported.checkpoint for reported in listed]


def latest_whole(checkpoints: Sequence[Checkpoint]) -> dict[str, Any] | None:
    """The state of the last one that is not damaged."""
    for checkpoint in reversed(checkpoints):
        try:
            with checkpoint.as_directory() as folder:
                return load_state(folder)
        except DamagedStateError as err:
            if ray.train.get_context().get_world_rank() == 0:
                logger.warning(f"passing over the checkpoint {checkpoint.path}: {err}")
    return None


def at_end_of(run: str, epoch: int) -> tuple[float | None, dict[str, Tensor]] | None:
    """Loss and weights of an epoch, while there is a whole checkpoint of its end."""
    for uri in checkpoint_folders(storage.join(run, CHECKPOINTS)):
        if not posixpath.basename(uri).startswith(_name_prefix(epoch, 0)):
            continue
        filesystem, path = storage.resolve(uri)
        try:
            with Checkpoint(path, filesystem).as_directory() as folder:
                state = load_state(folder)
        except DamagedStateError:
            continue
        return state["progress"].get("epoch_loss"), state["model"]
    return None


def delete_unlisted(run: str) -> None:
    """Those that a kill left, or that Ray's list had lost. Where none is listed, as in one process, all stay."""
    kept = {checkpoint.path for checkpoint in _listed()}
    if not kept:
        return
    for uri in checkpoint_folders(storage.join(run, CHECKPOINTS)):
        if storage.resolve(uri)[1] not in kept:
            storage.delete(uri)
