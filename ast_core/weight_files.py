"""Weight files, read without executing anything, and loaded with every key and shape accounted for."""

import os
from collections.abc import Mapping

import torch
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
