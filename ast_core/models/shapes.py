"""Sizes, patch grids and layers of the models. Imports no PyTorch, so that recipes are checked in milliseconds."""

from dataclasses import dataclass
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


def attention_scores(recipe: Any) -> int:
    """Attention scores that one layer of the recipe's AST computes for a clip, over all heads."""
    rows, columns = patch_grid(recipe.input_fdim, recipe.input_tdim, recipe.fstride, recipe.tstride)
    num_heads = MODEL_SIZES[recipe.model_size][1]["num_heads"]
    return num_heads * (rows * columns + 2) ** 2  # two tokens for the class


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
    check_image_weights(recipe)
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


NUM_ATTENTION_HEADS = 8
"""Heads of the CNN+Transformer's encoder layer."""


@dataclass(frozen=True)
class Convolution:
    """A layer of TALNet's convolutional encoder."""

    num_channels: int
    pool: tuple[int, int] | None
    """Factors of time and frequency by which the output is max-pooled."""


def convolutions(
    input_tdim: int, input_fdim: int, embedding_size: int | None, n_conv_layers: int, n_pool_layers: int
) -> list[Convolution]:
    """The layers of TALNet's convolutional encoder for an input of `input_tdim` frames and `input_fdim` mel bins.

    Channels times mel bins are twice the embedding size before a pooling and once after it. The first two poolings
    also halve the time.

    Raises:
        ConfigError: numbers of layers, input and embedding size do not fit each other.
    """
    if n_pool_layers < 1 or n_conv_layers % n_pool_layers:
        raise ConfigError(
            f"n_conv_layers is {n_conv_layers} and n_pool_layers is {n_pool_layers}; use a multiple of n_pool_layers"
        )
    num_halvings = 2**n_pool_layers
    if input_fdim % num_halvings:
        raise ConfigError(f"input_fdim is {input_fdim}; use a multiple of {num_halvings} (2 to the n_pool_layers)")
    if input_tdim < (shortest := 2 ** min(2, n_pool_layers)):
        raise ConfigError(f"input_tdim is {input_tdim}; use {shortest} or more, for the poolings over time")
    size = 16 * input_fdim if embedding_size is None else embedding_size
    if size < 1 or size % input_fdim:
        raise ConfigError(f"embedding_size is {size}; use a multiple of input_fdim, {input_fdim}")
    layers_per_pool = n_conv_layers // n_pool_layers
    layers = []
    for i in range(n_pool_layers):
        num_channels = size * 2 ** (i + 1) // input_fdim
        layers += [Convolution(num_channels, None)] * (layers_per_pool - 1)
        layers.append(Convolution(num_channels, (2, 2) if i < 2 else (1, 2)))
    return layers


def check_attention(embedding_size: int) -> None:
    """Raises ConfigError if the attention heads of the CNN+Transformer cannot share the embedding."""
    if embedding_size % NUM_ATTENTION_HEADS:
        raise ConfigError(f"embedding_size is {embedding_size}; use a multiple of {NUM_ATTENTION_HEADS} (the heads)")


def check_convolutions(recipe: Any) -> None:
    """Raises ConfigError for a recipe whose keys of TALNet do not fit each other."""
    layers = (recipe.embedding_size, recipe.n_conv_layers, recipe.n_pool_layers)
    convolutions(recipe.input_tdim, recipe.input_fdim, *layers)


def check_cnn_transformer(recipe: Any) -> None:
    """Raises ConfigError for a recipe whose keys of the CNN+Transformer do not fit each other."""
    check_convolutions(recipe)
    if recipe.embedding_size is not None:
        check_attention(recipe.embedding_size)


CONVNEXT_SIZES = {
    "atto": "d2_in1k",
    "femto": "d1_in1k",
    "pico": "d1_in1k",
    "nano": "in12k_ft_in1k",
    "tiny": "in12k_ft_in1k",
    "small": "in12k_ft_in1k",
    "base": "fb_in22k_ft_in1k",
}
"""Size of ConvNeXt → timm's tag of its ImageNet weights."""


def check_convnext_size(model_size: str) -> None:
    """Raises ConfigError for a size that ConvNeXt does not have."""
    if model_size not in CONVNEXT_SIZES:
        raise ConfigError(f"model_size is {model_size!r}; use one of {', '.join(CONVNEXT_SIZES)} for convnext")


def check_image_weights(recipe: Any) -> None:
    """Raises ConfigError for a recipe that names a file of ImageNet weights and does not use it."""
    if recipe.imagenet_weights is not None and not recipe.imagenet_pretrain:
        raise ConfigError("imagenet_weights is set but imagenet_pretrain is false; change one of them")


def check_convnext(recipe: Any) -> None:
    """Raises ConfigError for a recipe whose keys of ConvNeXt do not fit each other."""
    check_convnext_size(recipe.model_size)
    check_image_weights(recipe)
