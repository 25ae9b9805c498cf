"""The lines that register the toys. Ray's workers run them too, and they need no PyTorch."""

from ast_core.augment import AUGMENTATIONS, AugmentationKind
from ast_core.models import MODELS, ModelKind


def register() -> None:
    MODELS["mean_over_time"] = ModelKind("tests.extending.toy_model:MeanOverTime")


def register_augmentation() -> None:
    AUGMENTATIONS["random_gain"] = AugmentationKind("tests.extending.toy_augmentation:RandomGain", "raw")
