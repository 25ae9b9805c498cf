"""How a model is computed on a device: precision, attention, compilation and CUDA graphs.

None of these changes the result beyond rounding.
"""

import copy
import logging
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from ast_core.errors import ConfigError
from ast_core.models.ast import ASTModel
from ast_core.recipe import Recipe

logger = logging.getLogger(__name__)
COMPILE_BACKEND = "inductor"


AUTOCAST_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16}


def for_device(recipe: Recipe, device: torch.device, *, trains: bool = True) -> Recipe:
    """The recipe with `compile` decided, in a precision that the device has instructions for.

    In place of bf16 that is fp32, and it is announced: PyTorch would emulate bf16, several times slower than fp32 (on
    AVX2 seven times). Raises ConfigError for fp16 on a CPU: what CPUs have instructions for, if any, is bf16, which
    needs no scale. A model that is no longer trained is computed in fp32 there: who scores it did not choose its
    precision.
    """
    if recipe.compile is None:
        recipe = replace(recipe, compile=device.type == "cuda")
    if recipe.precision == "fp16" and device.type == "cpu":
        if trains:
            raise ConfigError("precision fp16 takes a GPU; use bf16")
        _announce("precision fp16 takes a GPU: computing in fp32")
    elif recipe.precision == "bf16" and not _has_bf16(device):
        hint = "; precision fp16 is faster on it" if device.type == "cuda" else ""
        name = {"cpu": "CPU", "cuda": "GPU"}[device.type]
        _announce(f"this {name} has no instructions for bf16: computing in fp32{hint}")
    else:
        return recipe
    return replace(recipe, precision="fp32")


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # avx512_bf16 and amx_bf16 of x86, bf16 and sve_bf16 of ARM
    return any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


@cache
def _announce(text: str) -> None:
    """Once a process, however many models it computes."""
    logger.warning(text)


def set_attention(model: ASTModel, device: torch.device, recipe: Recipe) -> bool:
    """Set fused or plain attention, and return whether it is fused.

    By default it is, except in bf16 on a CPU, where PyTorch 2.11's is slower than plain products.

    `python -m benchmarks.attention` measures by how much.
    """
    slow_when_fused = device.type == "cpu" and recipe.precision == "bf16"
    fused = not slow_when_fused if recipe.attention == "auto" else recipe.attention == "fused"
    model.set_fused_attention(fused)
    return fused


def set_execution(model: ASTModel, device: torch.device, recipe: Recipe) -> dict[str, Any]:
    """The recipe's switches of how training computes; none changes what is computed beyond rounding.

    `recipe` is that of `for_device`. The model may still be on another device than the one it will train on.

    Returns what was decided: `device`, `precision`, `compile`, `cuda_graphs` and `attention` (fused or plain).
    """
    fused, compiled = set_attention(model, device, recipe), False
    model.set_activation_checkpointing(recipe.activation_checkpointing)
    if recipe.compile:
        reason = _why_not_compiled(model, device, recipe)
        if reason is None:
            model.compile_blocks(**_how_to_compile(device, recipe))
            compiled = True
        else:
            logger.warning(f"training goes on without torch.compile, which fails here: {reason}")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": recipe.precision,
        "compile": compiled,
        "cuda_graphs": compiled and has_graphs(device, recipe),
        "attention": "fused" if fused else "plain",
    }


def _how_to_compile(device: torch.device, recipe: Recipe) -> dict[str, Any]:
    """Each shape for itself: kernels for sizes that change, once there, would serve those that do not as well."""
    options = {"options": {"triton.cudagraphs": True}} if has_graphs(device, recipe) else {}
    return {"backend": COMPILE_BACKEND, "dynamic": False} | options


def has_graphs(device: torch.device, recipe: Recipe) -> bool:
    """Whether the compiled blocks, where they compile, are CUDA graphs. Checkpointed ones run again on the way back."""
    is_asked_for = bool(recipe.compile) and recipe.cuda_graphs
    return device.type == "cuda" and is_asked_for and not recipe.activation_checkpointing


def _why_not_compiled(model: ASTModel, device: torch.device, recipe: Recipe) -> str | None:
    """None where a block compiles and runs on the device, forward and back; else the reason, in one line.

    `torch.compile` does nothing before the first call, and its errors (no C++ compiler, no Triton, a kernel that the
    card refuses) then come out of the middle of a training step, on the way back too, where they cannot be told from
    those of training. So a copy of one block is tried on a few tokens, for some seconds; the model itself stays as it
    is. What fails with the full batch alone is still an error, and not swallowed.
    """
    block = copy.deepcopy(model.v.blocks[0]).to(device).train()
    tokens_BND = torch.zeros(2, 8, model.v.embed_dim, device=device, requires_grad=True)
    try:
        compiled = torch.compile(block, **_how_to_compile(device, recipe))
        for _ in range(3 if has_graphs(device, recipe) else 1):  # a graph is recorded second, and then replayed
            begin_graphs(device, recipe)
            block.zero_grad()
            tokens_BND.grad = None
            with autocast(device, recipe):
                total = compiled(tokens_BND).float().sum()
            total.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # kernels report late
    except Exception as err:  # whatever a backend, a compiler or a driver raises
        said = " ".join(str(err).strip().split("\n\n")[0].split())  # advice on debugging PyTorch follows
        return f"{type(err).__name__}: {said}"[:250]
    finally:
        # Otherwise the trial's shape counts as a first one, and the batch is compiled for shapes that change.
        torch.compiler.reset()
    return None


def autocast(device: torch.device, recipe: Recipe) -> torch.autocast:
    dtype = AUTOCAST_DTYPE.get(recipe.precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def begin_graphs(device: torch.device, recipe: Recipe) -> None:
    """What the graphs gave before may be written over from here on."""
    if has_graphs(device, recipe):
        torch.compiler.cudagraph_mark_step_begin()
