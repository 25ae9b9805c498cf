"""Sizes and patch grids of the AST. Imports no PyTorch, so that recipes are checked in milliseconds."""

from typing import Any

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


def check_ast(recipe: Any) -> None:
    """Raises ConfigError for a recipe whose AST keys do not fit each other."""
    if recipe.model_size not in MODEL_SIZES:
        raise ConfigError(f"model_size is {recipe.model_size!r}; use one of {', '.join(MODEL_SIZES)}")
    if recipe.imagenet_weights is not None and not recipe.imagenet_pretrain:
        raise ConfigError("imagenet_weights is set but imagenet_pretrain is false; change one of them")
    if recipe.audioset_weights is not None and not recipe.audioset_pretrain:
        raise ConfigError("audioset_weights is set but audioset_pretrain is false; change one of them")
    check_pretraining(recipe.model_size, recipe.imagenet_pretrain, recipe.audioset_pretrain)
    num_rows, num_columns = patch_grid(recipe.input_fdim, recipe.input_tdim, recipe.fstride, recipe.tstride)
    for key, num, which in (("patchout_f", num_rows, "rows"), ("patchout_t", num_columns, "columns")):
        value = getattr(recipe, key)
        if not 0 <= value < num:
            raise ConfigError(f"{key} is {value}; use 0 to {num - 1} (of {num} {which} of patches)")


def why_no_start_from(theirs: Any, ours: Any) -> str:
    """Why an AST of one recipe cannot start from an AST of another; empty if it can."""
    if MODEL_SIZES[theirs.model_size][1] == MODEL_SIZES[ours.model_size][1]:
        return ""
    size, ours_is = theirs.model_size, ours.model_size
    return f"is of model_size {size}, this run is of {ours_is}; give --model_size {size}"
