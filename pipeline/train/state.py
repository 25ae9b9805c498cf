"""A checkpoint's files: the whole state of a run, and a digest by which a damaged one is known."""

import hashlib
import posixpath
from pathlib import Path
from typing import Any

import torch

from ast_core.errors import DataError
from pipeline import storage

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
    """The folders there are, if Ray's list of them is no good, or was never written; none if it is.

    A list that is cut off, or names a folder that is gone, is deleted, as Ray would end on it; without one it lets
    training begin.
    """
    listed = storage.join(checkpoints, RAYS_LIST)
    if storage.exists(listed):
        try:
            names = [result["checkpoint_dir_name"] for result in storage.read_json(listed)["checkpoint_results"]]
        except (DataError, KeyError, TypeError):
            names = []
        if names and all(storage.exists(storage.join(checkpoints, name)) for name in names):
            return []
        storage.delete(listed)
    return checkpoint_folders(checkpoints)


def _digest(folder: str) -> str:
    with Path(folder, STATE_FILE).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
