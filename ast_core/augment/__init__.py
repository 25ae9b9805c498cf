"""Augmentation of whole batches, on the device of the batch, in the order in which a recipe lists it.

`registry.py` has them by name. Importing this package imports no PyTorch, because a recipe is checked against the
registry; `mixup_power` is imported on first use.
"""

from typing import TYPE_CHECKING, Any

from ast_core.augment.registry import AUGMENTATIONS, AugmentationKind

if TYPE_CHECKING:
    from ast_core.augment.mixup import mixup_power

__all__ = ["AUGMENTATIONS", "AugmentationKind", "mixup_power"]


def __getattr__(name: str) -> Any:
    if name != "mixup_power":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ast_core.augment.mixup import mixup_power

    return mixup_power
