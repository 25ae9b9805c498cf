"""Small arrays that the CPU has drawn, on their way to the device."""

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """`values` as a tensor of the same shape and type on `device`.

    A GPU fetches it from page-locked memory while the CPU goes on; a copy from other memory, however small, keeps the
    CPU waiting until the GPU has done all that it was asked before. PyTorch holds on to such memory until the copy is
    made, though nobody here does, and has it ready for the next.
    """
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
