"""How a model is computed on a device: precision, attention, float8, compilation and CUDA graphs.

None of these changes the result by more than rounding, which is coarse for float8.
"""

import logging
import os
from dataclasses import replace
from functools import cache
from importlib import metadata
from typing import Any

import torch

from ast_core.errors import ConfigError
from ast_core.models.shapes import attention_scores
from ast_core.models.tagger import Tagger
from ast_core.recipe import Recipe

logger = logging.getLogger(__name__)
COMPILE_BACKEND = "inductor"


FLOAT8_CAPABILITY = (8, 9)
"""The first compute capability with float8 instructions: Ada."""
FA4_MAJOR_CAPABILITIES = (9, 10)
"""Hopper, and Blackwell's data-centre cards: what PyTorch's registration of FlashAttention 4 accepts."""

SCORES_AT_ONCE = 1 << 24
"""Attention scores of a layer that go through the AST at once on a CPU, if they are stored (plain attention). More are
slower, because memory moves, and a laptop has little. base384 with 1,024 frames trains in bf16 at 0.83 clips/s with one
clip at a time and at 0.51 with eight, tiny224 at 4.9 with four and at 3.8 with twelve."""

AUTOCAST_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_device(recipe: Recipe, device: torch.device) -> None:
    """Raise ConfigError if this kind of device, or the packages of this machine, cannot train as the recipe says.

    What a worker's GPU can do is only known there (`for_device`): the command's own machine may have none, or another.
    """
    on_gpu = device.type == "cuda"
    if recipe.precision == "fp16" and not on_gpu:
        raise ConfigError("precision fp16 needs a GPU; use bf16")
    if recipe.float8:
        if recipe.precision != "bf16":
            raise ConfigError(f"float8 needs precision bf16, but precision is {recipe.precision}")
        if not _is_installed("torchao"):
            raise ConfigError("float8 needs torchao: pip install 'ast-ray[float8]'")
    if recipe.attention == "fa4":
        if recipe.model != "ast":  # no attention, or one with dropout, which FlashAttention 4 does not have
            raise ConfigError(f"attention fa4 is for the model ast, but model is {recipe.model}; use auto")
        if not on_gpu:
            raise ConfigError("attention fa4 needs a GPU; use auto")
        if recipe.precision == "fp32":
            raise ConfigError("attention fa4 needs precision bf16 or fp16, but precision is fp32")
        if not _is_installed("flash-attn-4"):
            raise ConfigError("attention fa4 needs FlashAttention 4: pip install --pre flash-attn-4")


def _check_gpu(recipe: Recipe, device: torch.device) -> None:
    """Raise ConfigError if this GPU is too old for float8 or FlashAttention 4."""
    if device.type != "cuda" or not (recipe.float8 or recipe.attention == "fa4"):
        return
    capability = torch.cuda.get_device_capability(device)
    if recipe.float8 and capability < FLOAT8_CAPABILITY:
        raise ConfigError(_too_old("float8", "8.9 or more", capability))
    if recipe.attention == "fa4" and capability[0] not in FA4_MAJOR_CAPABILITIES:
        raise ConfigError(_too_old("attention fa4", "9 or 10", capability))


def _is_installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _too_old(what: str, needed: str, capability: tuple[int, int]) -> str:
    has = ".".join(map(str, capability))
    return f"{what} needs a GPU with compute capability {needed}; this one has {has}"


def for_device(recipe: Recipe, device: torch.device, *, trains: bool = True) -> Recipe:
    """The recipe with `compile` and `micro_batch_size` decided and a precision for which the device has instructions.

    If the device has no bf16 instructions, the result has fp32 and a warning says so: PyTorch would emulate bf16, which
    is several times slower than fp32 (seven times on AVX2). If the model is only evaluated (`trains=False`), fp16 on a
    CPU also becomes fp32, and float8 and FlashAttention 4 are off, because whoever evaluates a model did not choose how
    it was trained. The attention is fused then, which is slow only in the backward pass.

    Raises:
        ConfigError: the device cannot train so (`check_device`), for example in fp16 on a CPU, which has instructions
            for bf16, if any.
    """
    if trains:
        check_device(recipe, device)
        _check_gpu(recipe, device)
    else:
        attention = "fused" if recipe.attention in ("auto", "fa4") else recipe.attention
        recipe = replace(recipe, float8=False, attention=attention)
    if recipe.compile is None:
        recipe = replace(recipe, compile=device.type == "cuda")
    if recipe.precision == "fp16" and device.type == "cpu":
        _warn_once("precision fp16 needs a GPU: computing in fp32")
        recipe = replace(recipe, precision="fp32")
    elif recipe.precision == "bf16" and not _has_bf16(device):
        hint = "; precision fp16 is faster on it" if device.type == "cuda" else ""
        name = {"cpu": "CPU", "cuda": "GPU"}[device.type]
        _warn_once(f"this {name} has no instructions for bf16: computing in fp32{hint}")
        recipe = replace(recipe, precision="fp32")
    return replace(recipe, micro_batch_size=_micro_batch_size(recipe, device))


def _micro_batch_size(recipe: Recipe, device: torch.device) -> int | None:
    """The recipe's; without one, what an AST with plain attention needs on a CPU to stay below SCORES_AT_ONCE."""
    is_free = recipe.micro_batch_size is None and recipe.model == "ast" and device.type == "cpu"
    if not is_free or attention_of(recipe, device) != "plain":
        return recipe.micro_batch_size
    num_clips = max(1, SCORES_AT_ONCE // attention_scores(recipe))
    return num_clips if num_clips < recipe.batch_size else None


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # avx512_bf16 and amx_bf16 of x86, bf16 and sve_bf16 of ARM
    return any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


@cache
def _warn_once(text: str) -> None:
    """Log a warning once in each process, for any number of models."""
    logger.warning(text)


def attention_of(recipe: Recipe, device: torch.device) -> str:
    """fused, plain or fa4.

    `auto` is fused, except for training in bf16 on a CPU, where the backward pass of PyTorch 2.11's fused attention is
    slower than matrix products. `python -m benchmarks.attention` measures both.
    """
    if recipe.attention != "auto":
        return recipe.attention
    return "plain" if device.type == "cpu" and recipe.precision == "bf16" else "fused"


def set_attention(model: Tagger, device: torch.device, recipe: Recipe) -> str:
    """Set the model's attention, and return which it is."""
    attention = attention_of(recipe, device)
    model.set_fused_attention(attention != "plain")
    _use_fa4(attention == "fa4")
    return attention


def _use_fa4(active: bool) -> None:
    """Switch this process's `scaled_dot_product_attention` to FlashAttention 4 on GPUs, or back.

    FlashAttention 4 takes the place of PyTorch's own FlashAttention. cuDNN's attention, which PyTorch would prefer on
    the same GPUs, is off meanwhile.
    """
    from torch.nn import attention

    if active == (attention.current_flash_attention_impl() == "FA4"):
        return
    if active:
        attention.activate_flash_attention_impl("FA4")
    else:
        attention.restore_flash_attention_impl()
    torch.backends.cuda.enable_cudnn_sdp(not active)


def set_execution(model: Tagger, device: torch.device, recipe: Recipe) -> dict[str, Any]:
    """Apply the recipe's execution keys to the model.

    `recipe` is the result of `for_device`. The model may still be on another device than `device`, where it will train.

    Returns what is in effect: `device`, `precision`, `compile`, `cuda_graphs`, `attention` (fused, plain or fa4),
    `float8` (on, emulated or off) and `micro_batch_size`.
    """
    attention, compiled, float8 = set_attention(model, device, recipe), False, "off"
    model.set_activation_checkpointing(recipe.activation_checkpointing)
    if recipe.float8:
        emulate = device.type == "cpu"
        float8 = "emulated" if emulate else "on"
        if emulate:
            _warn_once("float8 is emulated on a CPU, which is slower than bf16: for tests only")
        model.use_float8(emulate=emulate)  # after the attention, which it copies, and before compilation
    if recipe.compile:
        reason = _why_not_compiled(model, device, recipe)
        if reason is None:
            model.compile_parts(**_how_to_compile(device, recipe))
            compiled = True
        else:
            logger.warning(f"training goes on without torch.compile, which fails on this machine: {reason}")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": recipe.precision,
        "compile": compiled,
        "cuda_graphs": compiled and uses_cuda_graphs(device, recipe),
        "attention": attention,
        "float8": float8,
        "micro_batch_size": recipe.micro_batch_size,
    }


def _how_to_compile(device: torch.device, recipe: Recipe) -> dict[str, Any]:
    """Arguments of `torch.compile`. Shapes are static: slower dynamic kernels would be used for all shapes."""
    options = {"options": {"triton.cudagraphs": True}} if uses_cuda_graphs(device, recipe) else {}
    return {"backend": COMPILE_BACKEND, "dynamic": False} | options


def uses_cuda_graphs(device: torch.device, recipe: Recipe) -> bool:
    """Whether compiled blocks run as CUDA graphs. Blocks with activation checkpointing run again, so they do not."""
    is_asked_for = bool(recipe.compile) and recipe.cuda_graphs
    return device.type == "cuda" and is_asked_for and not recipe.activation_checkpointing


def _why_not_compiled(model: Tagger, device: torch.device, recipe: Recipe) -> str | None:
    """Why the model does not compile or run on the device, in one line. None if it runs forward and backward.

    `torch.compile` does nothing until the first call. Its errors (no C++ compiler, no Triton, a kernel that the card
    refuses) would appear inside a training step and could not be told from errors of training. Therefore a copy of one
    part is tried on a small input, which takes some seconds. A failure that needs the full batch still raises.
    """
    trial = model.part_to_compile()
    if trial is None:
        return "this model has nothing to compile"
    part, small_input = trial[0].to(device).train(), trial[1].to(device).requires_grad_()
    try:
        compiled = torch.compile(part, **_how_to_compile(device, recipe))
        for _ in range(3 if uses_cuda_graphs(device, recipe) else 1):  # the second call records, the third replays
            begin_graph_step(device, recipe)
            part.zero_grad()
            small_input.grad = None
            with autocast(device, recipe):
                total = compiled(small_input).float().sum()
            total.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # kernels report errors asynchronously
    except Exception as err:  # whatever a backend, a compiler or a driver raises
        message = " ".join(str(err).strip().split("\n\n")[0].split())  # advice on debugging PyTorch follows
        return f"{type(err).__name__}: {message}"[:250]
    finally:
        # Otherwise the batch counts as a second shape, and PyTorch compiles it for dynamic shapes.
        torch.compiler.reset()
    return None


def _keep_to_thread_limit() -> None:
    """Use no more threads than `OMP_THREAD_LIMIT` allows. oneDNN's products in bf16 would be wrong, without an error.

    The variable is set in some containers and on some clusters. PyTorch 2.11 ignores it: a product for two threads of
    which only one starts is half computed.
    """
    limit = os.environ.get("OMP_THREAD_LIMIT", "")
    if limit.isdecimal() and 0 < int(limit) < torch.get_num_threads():
        torch.set_num_threads(int(limit))


def autocast(device: torch.device, recipe: Recipe) -> torch.autocast:
    dtype = AUTOCAST_DTYPE.get(recipe.precision)
    if device.type == "cpu" and dtype is not None:
        _keep_to_thread_limit()
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def begin_graph_step(device: torch.device, recipe: Recipe) -> None:
    """Tell CUDA graphs that they may overwrite the outputs of earlier replays."""
    if uses_cuda_graphs(device, recipe):
        torch.compiler.cudagraph_mark_step_begin()
