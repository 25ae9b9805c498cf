"""A run's checkpoints: their files, which of them are whole, and how Ray Train receives, finds and deletes them."""

import hashlib
import logging
import posixpath
import shutil
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint, CheckpointConsistencyMode
from torch import Tensor

from ast_core.errors import DataError
from pipeline import storage
from pipeline.train.metrics_log import temporary_prefix

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""Ray Train's folder in that of the run."""
STATE_FILE, DIGEST_FILE = "state.pt", "state.sha256"
RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Of the checkpoints that Ray Train knows, which it writes in place."""


class DamagedStateError(Exception):
    """A checkpoint that is not what was written."""


def save_state(folder: str, state: dict[str, Any]) -> None:
    torch.save(state, Path(folder, STATE_FILE))
    Path(folder, DIGEST_FILE).write_text(_digest(folder))


def load_state(folder: str) -> dict[str, Any]:
    """On the CPU. Raises DamagedStateError."""
    try:
        if Path(folder, DIGEST_FILE).read_bytes() != _digest(folder).encode():
            raise DamagedStateError(f"{STATE_FILE} is not as it was written")
    except FileNotFoundError as err:
        raise DamagedStateError(f"{Path(err.filename).name} is missing") from err
    state: dict[str, Any] = torch.load(Path(folder, STATE_FILE), map_location="cpu", weights_only=True)
    return state


def checkpoint_folders(checkpoints: str) -> list[str]:
    """URIs of all that hold a state, whole or not, the earliest first: their names sort by epoch and step."""
    return [posixpath.dirname(uri) for uri in storage.list_files(checkpoints, suffix=STATE_FILE, recursive=True)]


def unlisted_checkpoints(checkpoints: str) -> list[str]:
    """The folders there are, if Ray's list of them is no good, or was never written; none if it is.

    A list that is cut off, or names a folder that is gone, is deleted, as Ray would end on it; without one it lets
    training begin.
    """
    listed = storage.join(checkpoints, RAY_SNAPSHOT)
    if storage.exists(listed):
        try:
            names = _listed_names(storage.read_json(listed))
        except (DataError, KeyError, TypeError, ValueError):
            names = []
        if names and all(storage.exists(storage.join(checkpoints, name)) for name in names):
            return []
        logger.warning(
            f"{listed} is damaged, or lists a checkpoint that is gone: taking the checkpoints that are there"
        )
        storage.delete(listed)
    return checkpoint_folders(checkpoints)


def _listed_names(listed: dict[str, Any]) -> list[str]:
    """The folders in Ray's list. KeyError, TypeError or ValueError where Ray would not accept the list."""
    results, pending = listed["checkpoint_results"], listed["pending_training_results"]
    names = [result["checkpoint_dir_name"] for result in results]
    latest = [] if listed["latest_checkpoint_result"] is None else [listed["latest_checkpoint_result"]]
    for result in (*results, *pending, *latest):
        if result["checkpoint_dir_name"] not in names or not isinstance(result["metrics"], dict):
            raise ValueError("a result that is not listed, or has no metrics")
    for some, others in ((results, "checkpoint_report_indices"), (pending, "pending_validation_specs")):
        if len(some) != len(listed[others]):
            raise ValueError(f"{others} of another length")
    if not isinstance(listed["current_report_index"], int):
        raise ValueError("current_report_index is no number")
    return names


def _digest(folder: str) -> str:
    with Path(folder, STATE_FILE).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def load_latest(checkpoints: Sequence[Checkpoint]) -> dict[str, Any] | None:
    """The state of the last one that is not damaged."""
    for checkpoint in reversed(checkpoints):
        try:
            with checkpoint.as_directory() as folder:
                return load_state(folder)
        except DamagedStateError as err:
            if ray.train.get_context().get_world_rank() == 0:
                logger.warning(f"passing over the checkpoint {checkpoint.path}: {err}")
    return None


def load_end_of_epoch(run: str, epoch: int) -> tuple[float | None, dict[str, Tensor]] | None:
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
