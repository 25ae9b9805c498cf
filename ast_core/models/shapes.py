"""Sizes and patch grids of the AST. Imports no PyTorch, so that recipes are checked in milliseconds."""

from ast_core.errors import ConfigError

PATCH_SIZE = 16

MODEL_SIZES: dict[str, tuple[str, dict[str, int]]] = {
    "tiny224": ("deit_tiny_distilled_patch16_224", {"embed_dim": 192, "depth": 12, "num_heads": 3}),
    "small224": ("deit_small_distilled_patch16_224", {"embed_dim": 384, "depth": 12, "num_heads": 6}),
    "base224": ("deit_base_distilled_patch16_224", {"embed_dim": 768, "depth": 12, "num_heads": 12}),
    "base384": ("deit_base_distilled_patch16_384", {"embed_dim": 768, "depth": 12, "num_heads": 12}),
}
"""Size → timm's name of the ImageNet weights, and the shape of the transformer."""

Grid = tuple[int, int]
"""Number of patches along frequency and along time."""


def patch_grid(input_fdim: int, input_tdim: int, fstride: int, tstride: int) -> Grid:
    """The patch grid of an input. Raises ConfigError if a stride is not allowed or not even one patch fits."""
    for key, value in {"fstride": fstride, "tstride": tstride}.items():
        if not 1 <= value <= PATCH_SIZE:
            raise ConfigError(f"{key} is {value}; use 1 to {PATCH_SIZE} (the patch size)")
    for key, value in {"input_fdim": input_fdim, "input_tdim": input_tdim}.items():
        if value < PATCH_SIZE:
            raise ConfigError(f"{key} is {value}; use {PATCH_SIZE} (the patch size) or more")
    return (input_fdim - PATCH_SIZE) // fstride + 1, (input_tdim - PATCH_SIZE) // tstride + 1


def check_pretraining(model_size: str, imagenet_pretrain: bool, audioset_pretrain: bool) -> None:
    """Raises ConfigError for AudioSet weights that were not published, as the reference implementation does."""
    if audioset_pretrain and model_size != "base384":
        raise ConfigError(
            f"audioset_pretrain is true but model_size is {model_size}; use base384, or audioset_pretrain false"
        )
    if audioset_pretrain and not imagenet_pretrain:
        raise ConfigError("audioset_pretrain is true but imagenet_pretrain is false; set imagenet_pretrain true")
