"""Weight files with hostile code: reading a pickle can run any function."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch


class MakesFolder:
    """Makes a folder when it is unpickled without protection."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def as_torch_archive(value: object, file: Path) -> None:
    torch.save(value, file)


def as_plain_pickle(value: object, file: Path) -> None:
    file.write_bytes(pickle.dumps(value, protocol=2))
