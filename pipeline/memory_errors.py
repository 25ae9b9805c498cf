"""Errors that say that the memory of a GPU, or of the machine, is too small."""

from typing import Literal

import torch

OF_A_GPU = ("CUDA error: out of memory", "[CUDA]: out of memory", "STATUS_ALLOC_FAILED")
"""Texts of CUDA, of Triton, and of cuBLAS and cuDNN. They allocate memory apart from PyTorch's OutOfMemoryError."""

OF_THE_MACHINE = "can't allocate memory"
"""The text of PyTorch's allocator for CPUs."""


def too_small_memory(error: Exception) -> Literal["GPU", "machine"] | None:
    """Whose memory is too small, if an error says so; None for other errors."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "GPU"
    if isinstance(error, RuntimeError) and any(of_a_gpu in text for of_a_gpu in OF_A_GPU):
        return "GPU"
    if isinstance(error, MemoryError) or OF_THE_MACHINE in text:
        return "machine"
    return None


def out_of_memory(error: Exception) -> str | None:
    """What to do if an error says that memory is too small for a training; None for other errors."""
    where = too_small_memory(error)
    if where is None:
        return None
    return f"the {where} has too little memory for this model and batch: lower batch_size, or set micro_batch_size"
