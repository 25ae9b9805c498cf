"""The cases of `comparison_reference`: models of the comparison with the weights and inputs of the reference's outputs.

`tests/fixtures/README.md` says where they come from.
"""

import json
import math
import zlib
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ast_core.models import create_model
from ast_core.models.tagger import Tagger
from tests import reference

OUR_NAMES = {
    "talnet": "talnet",
    "taltrans": "cnn_transformer",
    "efficientnet_attention": "efficientnet",
    "resnet50_attention": "resnet50",
    "mobilenetv2": "mobilenetv2",
    "linear": "linear",
    "fnet": "fnet",
}
OUR_SETTINGS = {
    "embedding_size": "embedding_size",
    "pooling": "pooling",
    "n_trans_layers": "n_trans_layers",
    "addpos": "addpos",
    "b": "eff_b",
    "heads": "att_head",
    "att_activation": "att_activation",
    "layers": "n_layers",
    "n_layers": "n_layers",
    "hidden": "hidden",
}
NORMS_LIKE_BIASES = ("talnet", "taltrans")
"""Models whose BatchNorm weights were drawn as biases."""


@cache
def cases() -> dict[int, dict[str, Any]]:
    listed = json.loads((reference.EXCERPT / "comparison_reference.json").read_text(encoding="utf-8"))
    return {case["i"]: case for case in listed}


def model_of(case: dict[str, Any]) -> Tagger:
    settings = {ours: case[theirs] for theirs, ours in OUR_SETTINGS.items() if theirs in case}
    if case["model"] == "resnet50_attention":
        del settings["att_activation"]  # ours has the sigmoid only
    return create_model(OUR_NAMES[case["model"]], 527, case["frames"], case["n_mels"], **settings).eval()


def input_of(case: dict[str, Any]) -> Tensor:
    rng = np.random.Generator(np.random.PCG64(case["input_seed"]))
    return torch.from_numpy(rng.standard_normal((2, case["frames"], case["n_mels"]), dtype=np.float32) * 0.5)


def weights_of(case: dict[str, Any], model: Tagger) -> dict[str, Tensor]:
    """The reference's state dict, drawn by names and shapes: of two names of a convolution, `conv1` and the like."""
    state = {}
    for name, like in model.to_original(model.state_dict()).items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros_like(like)
        elif not name.startswith("conv.") and name not in model.original_constants:
            state[name] = _draw(name, tuple(like.shape), case)
    return state


def kind_of(name: str, num_dimensions: int, model: str) -> str:
    """How a tensor of the reference is drawn: the `kind` in `comparison_reference.json`."""
    if name.endswith(("running_mean", "running_var")):
        return "running"
    if name.endswith("head_weight"):
        return "head weight"
    if num_dimensions > 1:
        return "conv" if num_dimensions == 4 else "matrix"
    is_norm = name.endswith(".weight") and not (model in NORMS_LIKE_BIASES and ".bn." in name)
    return "norm weight" if is_norm else "bias"


def _draw(name: str, shape: tuple[int, ...], case: dict[str, Any]) -> Tensor:
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(f"public/{name}".encode())))
    normal = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    match kind_of(name, len(shape), case["model"]):
        case "norm weight":
            return normal.mul_(0.1).add_(1)
        case "running":
            return normal.abs_().mul_(0.1).add_(1) if name.endswith("var") else normal.mul_(0.1)
        case "head weight":
            return normal.mul_(0.05).add_(0.25)
        case "matrix":
            return normal.div_(math.sqrt(math.prod(shape[1:])))
        case "conv":
            return normal.mul_(math.sqrt(case["conv_gain"] / math.prod(shape[1:])))
        case _:
            return normal.mul_(0.1)
