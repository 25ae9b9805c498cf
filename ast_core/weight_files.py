"""Read weight files without executing code from them, and load them with a check of all keys and shapes."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor, nn

from ast_core.errors import DataError

NESTED = ("model", "state_dict", "model_state_dict")
"""Where files have their state dict: DeiT's, those of Lightning, and of many scripts."""


def read_weights(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a `.safetensors`, or in a `.pth` with only tensors, which may have it under one of `NESTED`."""
    path = os.fspath(file)
    if not os.path.isfile(path):
        raise DataError(f"there is no weight file {path}")
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # both raise undocumented errors of their archive formats
        raise DataError(f"{path} has no weights that can be read safely ({type(err).__name__})") from err
    if isinstance(state, dict):
        state = next((state[key] for key in NESTED if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(f"{path} contains no state dict, which is a mapping from names to tensors")
    return state


@dataclass(frozen=True)
class HubFile:
    """A file on the Hugging Face hub, pinned by revision and hash."""

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
"""The published AudioSet AST with averaged weights, from its authors' organisation on the hub.

The same weights are published as `audioset_10_10_0.4593.pth`, but only through links without a checksum."""


def fetch_audioset_weights(file: HubFile = AUDIOSET_WEIGHTS) -> str:
    """The path of `file` in the hub's cache (`$HF_HOME`). It is fetched if it is missing.

    Raises:
        DataError: the file cannot be fetched, or is not the pinned one.
    """
    for again in (False, True):  # a damaged copy in the cache is fetched again
        try:
            path = hf_hub_download(file.repo_id, file.filename, revision=file.revision, force_download=again)
        except Exception as err:  # the hub's client raises its own errors and those of its HTTP library
            raise DataError(
                f"could not fetch {file.filename} of {file.repo_id} ({type(err).__name__}: {str(err)[:120]!r}); "
                f"on a machine with a network, run `hf download {file.repo_id} {file.filename} --revision "
                f"{file.revision} --local-dir .`, and give that file as audioset_weights"
            ) from err
        with open(path, "rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if digest == file.sha256:
            return path
    raise DataError(f"{path}, from the hub, is not the published checkpoint: sha256 is {digest}, not {file.sha256}")


def load_weights(
    module: nn.Module, state: Mapping[str, Tensor], origin: object, *, optional_prefix: str | None = None
) -> None:
    """Load `state` into `module`. Keys that begin with `optional_prefix` may be missing; their values do not change.

    Raises:
        DataError: another key is missing, a key is surplus, or a tensor has another shape. Nothing is loaded.
    """
    check_weights(module.state_dict(), state, origin, optional_prefix=optional_prefix)
    module.load_state_dict(dict(state), strict=False)


def check_weights(
    expected: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    origin: object,
    *,
    optional_prefix: str | None = None,
) -> None:
    """Raises DataError unless `state` has the keys and shapes of `expected`."""
    absent = expected.keys() - state.keys()
    missing = sorted(key for key in absent if optional_prefix is None or not key.startswith(optional_prefix))
    surplus = sorted(state.keys() - expected.keys())
    if missing or surplus:
        raise DataError(f"{origin} does not fit the model: missing {missing[:3]}, surplus {surplus[:3]}")
    for key in sorted(state):
        if state[key].shape != expected[key].shape:
            shapes = f"{key} is {tuple(state[key].shape)}, not {tuple(expected[key].shape)}"
            raise DataError(f"{origin} does not fit the model: {shapes}")
