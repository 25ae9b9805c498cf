"""Reading and writing models in all formats that this project knows."""

from ast_core.checkpoints.folder import (
    CALIBRATION_FILE,
    CHECKPOINT_FILES,
    CONFIG_FILE,
    TORCH_WEIGHTS_FILE,
    WEIGHTS_FILE,
    ModelConfig,
    load_model,
    read_checkpoint,
    save_huggingface,
    save_model,
)
from ast_core.checkpoints.original import load_original, save_original

__all__ = [
    "CALIBRATION_FILE",
    "CHECKPOINT_FILES",
    "CONFIG_FILE",
    "TORCH_WEIGHTS_FILE",
    "WEIGHTS_FILE",
    "ModelConfig",
    "load_model",
    "load_original",
    "read_checkpoint",
    "save_huggingface",
    "save_model",
    "save_original",
]
