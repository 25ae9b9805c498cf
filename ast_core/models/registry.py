"""The models by name, and which recipe keys belong to each. Imports no PyTorch: a recipe is checked in milliseconds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ast_core.errors import ConfigError
from ast_core.models.shapes import (
    check_ast,
    check_cnn_transformer,
    check_convnext,
    check_convolutions,
    check_image_weights,
    why_no_start_from,
)

if TYPE_CHECKING:
    from ast_core.models.tagger import Tagger


def _accept(recipe: Any) -> None:
    """Every recipe fits."""


def _can_start(theirs: Any, ours: Any) -> str:
    """Any model can start from any other of its kind."""
    return ""


def _needs_same(*keys: str) -> Callable[[Any, Any], str]:
    """A `why_no_start_from` for a model whose encoder has other layers if one of these keys differs."""

    def why_not(theirs: Any, ours: Any) -> str:
        for key in keys:
            size, ours_is = getattr(theirs, key), getattr(ours, key)
            if size != ours_is and None not in (size, ours_is):  # None is the model's own default
                return f"is of {key} {size}, this run is of {ours_is}; give --{key} {size}"
        return ""

    return why_not


@dataclass(frozen=True)
class ModelKind:
    """A model that recipes can name. `docs/extending.md` shows how to add one."""

    builder: str
    """`module:class` of a `Tagger`. It takes `label_dim`, `input_tdim`, `input_fdim` and the keys below by name."""
    settings: tuple[str, ...] = ()
    """Recipe keys that determine the model's shape."""
    initial_weights: tuple[str, ...] = ()
    """Recipe keys that name pretrained weights; those that end in `_weights` are files."""
    random_weights: Mapping[str, Any] = field(default_factory=dict)
    """Values of `initial_weights` keys for which nothing is loaded."""
    training: tuple[str, ...] = ()
    """Recipe keys of the training that only this model understands."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of keys that a recipe does not set, where the key's own default is another model's."""
    check: Callable[[Any], None] = _accept
    """Raises ConfigError for a recipe whose keys do not fit the model or each other."""
    why_no_start_from: Callable[[Any, Any], str] = _can_start
    """Why a run of the second recipe cannot start from a model of the first, and what to do; empty if it can."""

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.settings, *self.initial_weights, *self.training)


def _image_model(
    name: str, *settings: str, check: Callable[[Any], None] = check_image_weights, **defaults: Any
) -> ModelKind:
    """A network of timm, which may start from ImageNet weights."""
    return ModelKind(
        f"ast_core.models.cnn_attention:{name}",
        settings=settings,
        initial_weights=("imagenet_pretrain", "imagenet_weights"),
        random_weights={"imagenet_pretrain": False},
        defaults=defaults,
        check=check,
        why_no_start_from=_needs_same(*(key for key in settings if key in ("eff_b", "model_size"))),
    )


CONVOLUTIONS = ("embedding_size", "n_conv_layers", "n_pool_layers")
"""Settings of TALNet's convolutions."""
FRAME_LAYERS = ("n_layers", "hidden")
"""Settings of the models whose layers see a frame at a time."""

MODELS: dict[str, ModelKind] = {
    "ast": ModelKind(
        "ast_core.models.ast:ASTModel",
        settings=("model_size", "fstride", "tstride"),
        initial_weights=("imagenet_pretrain", "audioset_pretrain", "imagenet_weights", "audioset_weights"),
        random_weights={"imagenet_pretrain": False},
        training=("patchout_f", "patchout_t", "float8"),
        check=check_ast,
        why_no_start_from=why_no_start_from,
    ),
    "talnet": ModelKind(
        "ast_core.models.crnn:TALNet",
        settings=(*CONVOLUTIONS, "pooling"),
        check=check_convolutions,
        why_no_start_from=_needs_same(*CONVOLUTIONS),
    ),
    "cnn_transformer": ModelKind(
        "ast_core.models.cnn_transformer:CNNTransformer",
        settings=(*CONVOLUTIONS, "pooling", "n_trans_layers", "addpos", "transformer_dropout"),
        check=check_cnn_transformer,
        why_no_start_from=_needs_same(*CONVOLUTIONS, "n_trans_layers", "addpos"),  # these two have no weights of theirs
    ),
    "efficientnet": _image_model("EfficientNetTagger", "eff_b", "att_head", "att_activation"),
    "resnet50": _image_model("ResNet50Tagger", "att_head"),
    "mobilenetv2": _image_model("MobileNetV2Tagger", "att_head"),
    "convnext": _image_model("ConvNeXtTagger", "model_size", check=check_convnext, model_size="tiny"),
    "linear": ModelKind(
        "ast_core.models.simple:LinearTagger", settings=FRAME_LAYERS, why_no_start_from=_needs_same(*FRAME_LAYERS)
    ),
    "fnet": ModelKind(
        "ast_core.models.simple:FNetTagger", settings=FRAME_LAYERS, why_no_start_from=_needs_same(*FRAME_LAYERS)
    ),
}


def model_kind(name: str) -> ModelKind:
    """Raises ConfigError for a name that is not in `MODELS`."""
    if name not in MODELS:
        raise ConfigError(f"model is {name!r}; use one of {', '.join(MODELS)}")
    return MODELS[name]


def owners_of(key: str) -> list[str]:
    """The models that a recipe key belongs to; none for a key that all models share."""
    return [name for name, kind in MODELS.items() if key in kind.keys]


def without_other_model(keys: Mapping[str, Any], before: str, model: str) -> dict[str, Any]:
    """The recipe keys of a file for the model `before`, as far as they count if it is replaced by `model`.

    Keys that the other model does not have are left out, and so is `model_size`, whose values are each model's own.
    """
    if model == before:
        return dict(keys)
    owners = {key: owners_of(key) for key in keys}
    return {
        key: value for key, value in keys.items() if key != "model_size" and (not owners[key] or model in owners[key])
    }


def create_model(
    name: str, label_dim: int = 527, input_tdim: int = 1024, input_fdim: int = 128, **settings: Any
) -> "Tagger":
    """A model by its name. Its weights are random unless `settings` ask for pretrained ones.

    Args:
        label_dim: number of classes.
        input_tdim: frames of the input.
        input_fdim: mel bins of the input.
        settings: keys of the model (`ModelKind.keys`), by name. None: the model's own default.

    Raises:
        ConfigError: there is no such model, or a setting is not allowed.
        DataError: pretrained weights are missing or do not fit.
    """
    kind = model_kind(name)
    module, _, builder = kind.builder.partition(":")
    build: Callable[..., Tagger] = getattr(import_module(module), builder)
    shape = {"label_dim": label_dim, "input_tdim": input_tdim, "input_fdim": input_fdim}
    given = {key: value for key, value in settings.items() if value is not None}
    return build(**shape, **{**kind.random_weights, **given})
