"""A checkpoint's files: the whole state of a run, and a digest by which a damaged one is known."""

import hashlib
from pathlib import Path
from typing import Any

import torch

STATE_FILE, DIGEST_FILE = "state.pt", "state.sha256"


class DamagedStateError(Exception):
    """A checkpoint that is not what was written."""


def save_state(folder: str, state: dict[str, Any]) -> None:
    torch.save(state, Path(folder, STATE_FILE))
    Path(folder, DIGEST_FILE).write_text(_digest(folder))


def load_state(folder: str) -> dict[str, Any]:
    """On the CPU. Raises DamagedStateError."""
    try:
        if Path(folder, DIGEST_FILE).read_text() != _digest(folder):
            raise DamagedStateError(f"{STATE_FILE} is not as it was written")
    except FileNotFoundError as err:
        raise DamagedStateError(f"{Path(err.filename).name} is missing") from err
    state: dict[str, Any] = torch.load(Path(folder, STATE_FILE), map_location="cpu", weights_only=True)
    return state


def _digest(folder: str) -> str:
    with Path(folder, STATE_FILE).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
