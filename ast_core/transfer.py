"""Copying small arrays from the CPU to the device without a wait."""

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """`values` as a tensor of the same shape and type on `device`.

    A copy to a GPU from page-locked memory is asynchronous. A copy from other memory, however small, makes the CPU wait
    until the GPU has finished all earlier work. PyTorch keeps the page-locked memory until the copy is done, and then
    reuses it.
    """
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
