"""A checkpoint's files: the whole state of a run, and a digest by which a damaged one is known."""

import hashlib
import logging
import posixpath
from pathlib import Path
from typing import Any

import torch

from ast_core.errors import DataError
from pipeline import storage

logger = logging.getLogger(__name__)

STATE_FILE, DIGEST_FILE = "state.pt", "state.sha256"
RAYS_LIST = "checkpoint_manager_snapshot.json"
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
    """The folders there are, if Ray's list of them is no good; none if it is.

    A list that is cut off, or names a folder that is gone, is deleted, as Ray would end on it; without one it lets
    training begin. Where none was ever written, no upload is known to have ended, as when the first one met a full
    disk: folders that are whole are taken, and without any training begins again.
    """
    listed = storage.join(checkpoints, RAYS_LIST)
    if not storage.exists(listed):
        return [folder for folder in checkpoint_folders(checkpoints) if _is_whole(folder)]
    try:
        names = _listed_names(storage.read_json(listed))
    except (DataError, KeyError, TypeError, ValueError):
        names = []
    if names and all(storage.exists(storage.join(checkpoints, name)) for name in names):
        return []
    logger.warning(f"{listed} is damaged, or lists a checkpoint that is gone: taking the checkpoints that are there")
    storage.delete(listed)
    return checkpoint_folders(checkpoints)


def _is_whole(folder: str) -> bool:
    digest = storage.join(folder, DIGEST_FILE)
    state = storage.join(folder, STATE_FILE)
    return storage.exists(digest) and storage.read_bytes(digest) == storage.sha256(state).encode()


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
