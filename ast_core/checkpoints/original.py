"""Read and write `.pth` files of each model's reference implementation."""

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from ast_core.errors import DataError
from ast_core.models.pretrained import to_original
from ast_core.models.tagger import Tagger
from ast_core.weight_files import check_weights, read_weights

PREFIX = "module."
"""What `DataParallel`, in which the references train, puts before each key."""


def save_original(file: str | os.PathLike[str], source: Tagger | Mapping[str, Tensor]) -> None:
    """Write a `.pth` that the reference implementation loads strictly into its `DataParallel` model.

    `source` is a model, or the state dict of an AST.
    """
    state = source.to_original(source.state_dict()) if isinstance(source, Tagger) else to_original(source)
    torch.save({f"{PREFIX}{key}": value.detach().cpu().contiguous() for key, value in state.items()}, file)


def load_original(
    model: Tagger, source: str | os.PathLike[str] | Mapping[str, Tensor], *, origin: object = None
) -> Tagger:
    """Fill `model` from a checkpoint of its reference implementation: a `.pth` path, or its state dict.

    The prefix `module.` and tensors that do not affect the output may be present. Of a tensor that the reference has
    under several names, one is enough. Errors name `origin`, by default the path.

    Raises:
        DataError: another key is missing, a key is surplus, a tensor has another shape, or tensors that are the same
            one in the reference differ. Nothing is loaded.
    """
    stored = source if isinstance(source, Mapping) else read_weights(source)
    origin = origin or ("the state dict" if isinstance(source, Mapping) else os.fspath(source))
    state = {key.removeprefix(PREFIX): value for key, value in stored.items()}
    if len(state) < len(stored):
        raise DataError(f"{origin} has keys with and without {PREFIX!r} that mean the same tensor; remove one of them")
    state = {key: value for key, value in state.items() if key not in model.original_constants}
    views = {
        key: view for key, view in model.to_original(model.state_dict()).items() if key not in model.original_constants
    }
    first_name: dict[tuple[int, torch.Size], str] = {}
    for key in sorted(state.keys() & views.keys()):
        first = first_name.setdefault((views[key].data_ptr(), views[key].shape), key)
        if not torch.equal(state[first], state[key]):
            raise DataError(f"{origin}: {first} and {key} are the same tensor in the reference, but differ here")
    for key in views.keys() - state.keys():
        known = first_name.get((views[key].data_ptr(), views[key].shape))
        if known is not None:
            state[key] = state[known]
    check_weights(views, state, origin)
    for key, view in views.items():
        view.copy_(state[key])
    return model
