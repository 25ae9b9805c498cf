"""Errors that say that memory is too small are told apart from others."""

import pytest
import torch

from pipeline.memory_errors import out_of_memory, too_small_memory


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "GPU"),
        (torch.cuda.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be …"), "GPU"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "GPU"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "GPU"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "GPU"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 12 bytes."), "machine"),
        (MemoryError(), "machine"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
        (OSError("CUDA error: out of memory"), None),
    ],
)
def test_the_memory_that_is_too_small_is_known_by_the_error(error: Exception, where: str | None):
    assert too_small_memory(error) == where
    line = out_of_memory(error)
    assert line is None if where is None else line is not None and line.startswith(f"the {where} has too little memory")
