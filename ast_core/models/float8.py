"""Linear layers whose matrix products are in float8, by torchao. Only training uses them."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

MULTIPLE = 16
"""The dimensions of a float8 product are multiples of this."""


def float8_twin(part: nn.Module, *, emulate: bool) -> nn.Module:
    """A copy of `part` that has the same parameters, and computes its linear layers in float8.

    Each tensor is scaled by its largest value, in every step: torchao's `tensorwise`, its fastest way, with kernels for
    all GPUs that have float8. Inputs and weights become e4m3 (3 bits of mantissa), gradients e5m2 (2 bits). The
    gradient of a weight is a product over tokens, which are padded: 12 clips of 1,214 tokens are no multiple of 16.

    Args:
        emulate: multiply the rounded numbers in float32, for a CPU.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    twin = copy.deepcopy(part, {id(parameter): parameter for parameter in part.parameters()})
    config = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)
    twin = convert_to_float8_training(twin, module_filter_fn=_has_multiples, config=config)
    if emulate:
        for module in twin.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(_autocast_on_cpu)
    return twin.train()


def _has_multiples(module: nn.Linear, _name: str) -> bool:
    return module.in_features % MULTIPLE == 0 and module.out_features % MULTIPLE == 0


def _autocast_on_cpu(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Do for a CPU what a layer of torchao does under autocast of a GPU."""
    return (inputs[0].to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else inputs[0],)
