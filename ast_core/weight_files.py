"""Weight files, read without executing anything, and loaded with every key and shape accounted for."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor, nn

from ast_core.errors import DataError


def read_weights(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a `.safetensors`, or in a `.pth` of tensors alone (in DeiT's own files, under `model`)."""
    path = os.fspath(file)
    if not os.path.isfile(path):
        raise DataError(f"there is no weight file {path}")
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # both raise whatever their archive's layers raise
        raise DataError(f"{path} holds no weights that can be read safely ({type(err).__name__})") from err
    state = state.get("model", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(f"{path} holds no state dict, a mapping from names to tensors")
    return state


@dataclass(frozen=True)
class HubFile:
    """A file on the Hugging Face hub, pinned."""

    repo_id: str
    revision: str
    filename: str
    sha256: str


AUDIOSET_WEIGHTS = HubFile(
    repo_id="MIT/ast-finetuned-audioset-10-10-0.4593",
    revision="f826b80d28226b62986cc218e5cec390b1096902",
    filename="model.safetensors",
    sha256="ae0c1e2ad4e1381d851fa9bf298ba13ebc9c5a914cdee2dbe427a6583869924d",
)
"""The published full-AudioSet AST, weights averaged, as its authors' organisation keeps it on the hub.

The original `audioset_10_10_0.4593.pth` lies behind links whose content nobody has published a checksum of."""


def fetch_audioset_weights(file: HubFile = AUDIOSET_WEIGHTS) -> str:
    """The path of `file` in the hub's own cache (`$HF_HOME`), fetched if it is not there.

    Raises:
        DataError: it cannot be fetched, or is not the file that was pinned.
    """
    for again in (False, True):  # a damaged copy in the cache is fetched anew
        try:
            path = hf_hub_download(file.repo_id, file.filename, revision=file.revision, force_download=again)
        except Exception as err:  # the hub's client lets through its own errors and those of its HTTP library
            raise DataError(
                f"could not fetch {file.filename} of {file.repo_id} ({type(err).__name__}: {str(err)[:120]!r}); "
                "give the published checkpoint's file as audioset_weights"
            ) from err
        with open(path, "rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if digest == file.sha256:
            return path
    raise DataError(f"what the hub sent as {path} is not the published checkpoint: sha256 {digest}, not {file.sha256}")


def load_weights(
    module: nn.Module, state: Mapping[str, Tensor], origin: object, *, may_lack: str | None = None
) -> None:
    """Fill `module`; keys that begin with `may_lack` may be missing, and stay as they are.

    Raises:
        DataError: any other missing key, a surplus one, or a tensor of another shape. Nothing is loaded then.
    """
    expected = module.state_dict()
    missing = sorted(key for key in expected.keys() - state.keys() if may_lack is None or not key.startswith(may_lack))
    surplus = sorted(state.keys() - expected.keys())
    if missing or surplus:
        raise DataError(f"{origin} does not fit the model: missing {missing[:3]}, surplus {surplus[:3]}")
    for key in sorted(state):
        if state[key].shape != expected[key].shape:
            shapes = f"{key} is {tuple(state[key].shape)}, not {tuple(expected[key].shape)}"
            raise DataError(f"{origin} does not fit the model: {shapes}")
    module.load_state_dict(dict(state), strict=False)
