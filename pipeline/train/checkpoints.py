"""A run's checkpoints: their files and digests, and how they are reported to Ray Train, found and deleted."""

import hashlib
import logging
import posixpath
import re
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
"""Ray Train's folder in RUN."""
STATE_FILE, DIGEST_FILE = "state.pt", "state.sha256"
RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's list of its checkpoints. Ray overwrites it in place, so a crash can leave it incomplete."""


class DamagedStateError(Exception):
    """A checkpoint is incomplete or does not match its digest."""


def save_state(folder: str, state: dict[str, Any]) -> None:
    torch.save(state, Path(folder, STATE_FILE))
    Path(folder, DIGEST_FILE).write_text(_digest(folder))


def load_state(folder: str) -> dict[str, Any]:
    """Load a checkpoint's state to the CPU.

    Raises:
        DamagedStateError: a file is missing or does not match its digest.
    """
    try:
        if Path(folder, DIGEST_FILE).read_bytes() != _digest(folder).encode():
            raise DamagedStateError(f"{STATE_FILE} does not match {DIGEST_FILE}")
    except FileNotFoundError as err:
        raise DamagedStateError(f"{Path(err.filename).name} is missing") from err
    state: dict[str, Any] = torch.load(Path(folder, STATE_FILE), map_location="cpu", weights_only=True)
    return state


def checkpoint_folders(checkpoints: str) -> list[str]:
    """URIs of all folders with a state file, damaged or not, earliest first."""
    folders = [posixpath.dirname(uri) for uri in storage.list_files(checkpoints, suffix=STATE_FILE, recursive=True)]
    return sorted(folders, key=_epoch_and_step)


def _epoch_and_step(folder: str) -> tuple[int, ...]:
    match = re.match(r"epoch-(\d+)-step-(\d+)-", posixpath.basename(folder))
    return tuple(map(int, match.groups())) if match else ()


def oldest_epoch(run: str) -> int | None:
    """The number of whole epochs before the oldest checkpoint that a run may resume from; None if there is none yet."""
    names = (posixpath.basename(folder) for folder in checkpoint_folders(storage.join(run, CHECKPOINTS)))
    return min((int(name.split("-")[1]) for name in names if name.startswith("epoch-")), default=None)


def unlisted_checkpoints(checkpoints: str) -> list[str]:
    """The checkpoint folders, if Ray's list of them cannot be used; an empty list if it can.

    A list that is cut off, or names a folder that does not exist, is deleted, because Ray would fail on it. Without a
    list, Ray lets training begin. If no list was ever written, no upload is known to have ended, as when the first one
    met a full disk. Then only complete checkpoints are used, and without any training begins again.
    """
    snapshot = storage.join(checkpoints, RAY_SNAPSHOT)
    if not storage.exists(snapshot):
        return [folder for folder in checkpoint_folders(checkpoints) if _is_complete(folder)]
    try:
        names = _listed_names(storage.read_json(snapshot))
    except (DataError, KeyError, TypeError, ValueError):
        names = []
    if names and all(storage.exists(storage.join(checkpoints, name)) for name in names):
        return []
    logger.warning(f"{snapshot} is damaged, or lists a checkpoint that is gone: using the checkpoints that exist")
    storage.delete(snapshot)
    return checkpoint_folders(checkpoints)


def _is_complete(folder: str) -> bool:
    digest, state = storage.join(folder, DIGEST_FILE), storage.join(folder, STATE_FILE)
    return storage.exists(digest) and storage.read_bytes(digest) == storage.sha256(state).encode()


def _listed_names(snapshot: dict[str, Any]) -> list[str]:
    """The folders in Ray's list.

    Raises:
        KeyError, TypeError, ValueError: Ray would not accept the list.
    """
    results, pending = snapshot["checkpoint_results"], snapshot["pending_training_results"]
    names = [result["checkpoint_dir_name"] for result in results]
    latest = [] if snapshot["latest_checkpoint_result"] is None else [snapshot["latest_checkpoint_result"]]
    for result in (*results, *pending, *latest):
        if result["checkpoint_dir_name"] not in names or not isinstance(result["metrics"], dict):
            raise ValueError("a result is not listed, or has no metrics")
    for some, key in ((results, "checkpoint_report_indices"), (pending, "pending_validation_specs")):
        if len(some) != len(snapshot[key]):
            raise ValueError(f"{key} has another length")
    if not isinstance(snapshot["current_report_index"], int):
        raise ValueError("current_report_index is not a number")
    return names


def _digest(folder: str) -> str:
    with Path(folder, STATE_FILE).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def upload_prefix(run: str) -> str:
    """Name prefix of a node's temporary folders for checkpoints that are not uploaded yet."""
    return temporary_prefix("checkpoint", run)


def new_name(epochs_done: int, steps_done: int) -> str:
    """A unique folder name. After a damaged checkpoint a run reaches the same step again, and needs another name."""
    return _name_prefix(epochs_done, steps_done) + uuid.uuid4().hex[:6]


def _name_prefix(epochs_done: int, steps_done: int) -> str:
    return f"epoch-{epochs_done:04d}-step-{steps_done:06d}-"


def make(run: str, state: dict[str, Any]) -> Checkpoint:
    """Write a checkpoint to this node's disk. Ray uploads it and then deletes it here."""
    folder = tempfile.mkdtemp(prefix=upload_prefix(run))
    try:
        save_state(folder, state)
    except BaseException:
        shutil.rmtree(folder)
        raise
    return Checkpoint.from_directory(folder)


def known(unlisted: Sequence[str]) -> list[Checkpoint]:
    """The checkpoints that a run can resume from, earliest first: Ray's, or `unlisted` if Ray has none."""
    if ray.train.get_checkpoint() is not None:
        return _listed()
    return [Checkpoint(path, filesystem) for filesystem, path in map(storage.resolve, unlisted)]


def _listed() -> list[Checkpoint]:
    """The checkpoints in Ray's list, earliest first, without waiting for validations in progress."""
    listed = ray.train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED)
    return [reported.checkpoint for reported in listed]


def load_latest(checkpoints: Sequence[Checkpoint]) -> dict[str, Any] | None:
    """The state of the last checkpoint that is not damaged; None if all are, or there is none."""
    for checkpoint in reversed(checkpoints):
        try:
            with checkpoint.as_directory() as folder:
                return load_state(folder)
        except DamagedStateError as err:
            if ray.train.get_context().get_world_rank() == 0:
                logger.warning(f"skipping the damaged checkpoint {checkpoint.path}: {err}")
    return None


def load_end_of_epoch(run: str, epoch: int) -> tuple[float | None, dict[str, Tensor]] | None:
    """Loss and weights after an epoch; None if there is no undamaged checkpoint from its end."""
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
    """Delete checkpoints that are not in Ray's list, as a crash leaves them. If Ray lists none, keep all."""
    kept = {checkpoint.path for checkpoint in _listed()}
    if not kept:
        return
    for uri in checkpoint_folders(storage.join(run, CHECKPOINTS)):
        if storage.resolve(uri)[1] not in kept:
            storage.delete(uri)
