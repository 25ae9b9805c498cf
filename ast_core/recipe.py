"""A recipe: all settings that define a training run, typed and checked, named as in the reference implementation.

Values come from the defaults, then the recipe file, then the command line; a later one wins. An unknown key or a value
that is not allowed is a ConfigError before any worker starts.
"""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from ast_core.augment.registry import Entry, check_augmentations, parse_augmentations
from ast_core.errors import ConfigError
from ast_core.features import FEATURES, MAX_MEL_BINS
from ast_core.models.registry import model_kind, owners_of, without_other_model
from ast_core.recipe_yaml import read_yaml
from ast_core.settings import settings

MixupDomain = Literal["power", "log_mel"]

DATA = "data"
"""Value of the key `features` for those of the data set."""

MAX_SEED = 2**64 - 1
"""The largest seed that PyTorch accepts."""

# A number above the upper bound of a count is a typing error, or would overflow far from where it was typed.
NumClips = Annotated[int, Field(ge=1, le=1_000_000)]
NumEpochs = Annotated[int, Field(ge=1, le=100_000)]
Positive = Annotated[float, Field(gt=0)]
AtLeast0 = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Width = Annotated[int, Field(ge=0)]
NumLayers = Annotated[int, Field(ge=1, le=1_000)]
NumUnits = Annotated[int, Field(ge=1, le=65_536)]


@dataclass(frozen=True, kw_only=True)
class ModelKeys:
    """Model"""

    model: str = "ast"
    """The model's name: one of `ast_core.models.MODELS`. On the command line it replaces the model of the recipe file;
    keys of the file that it does not have do not count."""
    label_dim: Annotated[int, Field(ge=1, le=32_767)] | None = None  # shards store labels as int16
    """Number of classes. null: that of the data set."""
    model_size: str = "base384"
    """Size of the AST: tiny224, small224, base224 or base384, after DeiT's models of these names. Size of convnext:
    atto, femto, pico, nano, tiny (its default), small or base."""
    fstride: int = 10
    """Mel bins from one patch to the next, 1 to 16. Below 16, the size of a patch, neighbouring patches overlap."""
    tstride: int = 10
    """Frames from one patch to the next, 1 to 16."""
    input_fdim: Annotated[int, Field(ge=1, le=MAX_MEL_BINS)] = 128
    """Number of mel bins, as in the data set."""
    input_tdim: Annotated[int, Field(ge=1, le=30_000)] = 1024  # 300 s, the longest clip of a data set
    """Number of frames to which a clip is padded or cut. A frame of `kaldi128` is 10 ms."""
    imagenet_pretrain: bool = True
    """Start from ImageNet weights: DeiT's for the AST, timm's for the convolutional networks. false: from random
    weights."""
    audioset_pretrain: bool = False
    """Start from the published AudioSet weights, for model_size base384."""
    imagenet_weights: str | None = None
    """A local file, for machines without a network. null: fetched."""
    audioset_weights: str | None = None
    """A local file of a published AudioSet checkpoint. null: fetched."""
    embedding_size: NumUnits | None = None
    """Dimensions of a frame between the convolutions and the output. null: 16 for each mel bin, as published."""
    n_conv_layers: NumLayers = 10
    """Number of convolutions."""
    n_pool_layers: NumLayers = 5
    """Number of poolings, each after n_conv_layers / n_pool_layers convolutions. Each halves the mel bins."""
    pooling: Literal["att", "lin", "exp", "ave", "max"] = "att"
    """How frames become a clip: by attention, by weights that grow with the probability (linearly, exponentially), by
    the mean or by the maximum."""
    n_trans_layers: NumLayers = 2
    """How often the encoder layer is applied. Its weights are shared."""
    addpos: bool = True
    """Add sinusoidal positions of the frames to the input."""
    transformer_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Dropout in the encoder layer."""
    eff_b: Annotated[int, Field(ge=0, le=7)] = 2
    """Size of EfficientNet: b0 to b7."""
    att_head: Annotated[int, Field(ge=0, le=64)] | None = None
    """Number of attention heads that pool the frames. 0: the mean. null: 4 for efficientnet, 1 for resnet50, 0 for
    mobilenetv2."""
    att_activation: Literal["sigmoid", "softmax"] = "sigmoid"
    """What makes weights and probabilities of the attention heads' outputs. softmax: over the classes, only for weights
    that were trained so."""
    n_layers: NumLayers | None = None
    """Number of layers. null: 3 for linear, 50 for fnet."""
    hidden: NumUnits | None = None
    """Dimensions of a layer. null: 128 for linear, 256 for fnet."""
    patchout_f: int = 0
    """Patch rows (frequency bands) that each training step leaves out, as PaSST does. 0: none."""
    patchout_t: int = 0
    """Patch columns (time spans) that each training step leaves out. Evaluation uses all patches."""


@dataclass(frozen=True, kw_only=True)
class InputKeys:
    """Input"""

    features: str = "kaldi128"
    """The features that the recipe is for, by name. A data set with other features is refused. data: those of the data
    set, whatever they are; set input_fdim to its number of mel bins."""
    norm_stats: Literal["recipe", "data"] = "recipe"
    """recipe: normalise by dataset_mean and dataset_std, which published weights expect. data: by the norm of the
    training splits."""
    dataset_mean: float = -4.2677393
    """Mean of raw log-mel."""
    dataset_std: Positive = 4.5689974
    """Standard deviation of raw log-mel."""
    norm_divisor: Positive = 2
    """The network's input is (x - dataset_mean) / (norm_divisor * dataset_std). 1: as PSLA does."""
    sampling: Literal["weighted", "uniform"] = "weighted"
    """weighted: draw clips with replacement by sample weight. uniform: take each clip once an epoch."""


@dataclass(frozen=True, kw_only=True)
class AugmentationKeys:
    """Augmentation"""

    augmentations: tuple[Entry, ...] = ("mixup", "spec_augment", "noise_roll")
    """The augmentations in the order in which they act, each as NAME, or as NAME: {SETTING: VALUE} if its settings are
    not recipe keys. Keys of mixup: mixup, mixup_domain; of spec_augment: freqm, timem; of noise_roll: noise."""
    freqm: Width = 48
    """Largest width of SpecAugment's frequency mask, in mel bins. 0: no mask."""
    timem: Width = 192
    """Largest width of SpecAugment's time mask, in frames. 0: no mask."""
    mixup: Share = 0.5
    """Share of the clips that are mixed with another clip. 0: no mixup."""
    mixup_domain: MixupDomain = "power"
    """power: add powers, which is close to mixing waveforms as the reference implementation does. log_mel: mix the
    log-mel values themselves."""
    noise: bool = False
    """Add noise and roll the clip in time."""


@dataclass(frozen=True, kw_only=True)
class OptimisationKeys:
    """Optimisation"""

    loss: Literal["BCE", "CE"] = "BCE"
    """BCE: binary cross-entropy of each class, for clips with any number of labels. CE: cross-entropy, for clips with
    one label each."""
    metrics: str = "mAP"
    """The selection metric, which picks the best epoch: mAP or acc."""
    patience: NumEpochs | None = None
    """End the run after this number of epochs without a better one. null: train all epochs."""
    lr: Positive = 1e-5
    """The learning rate after warm-up and before the first decay."""
    batch_size: NumClips = 12
    """Clips a step, of all workers together."""
    epochs: NumEpochs = 5
    """Number of epochs. An epoch has as many samples as the training splits have clips."""
    lrscheduler_start: NumEpochs = 2
    """The learning rate decays for the first time after this epoch, counted from 1."""
    lrscheduler_step: NumEpochs = 1
    """Epochs from one decay of the learning rate to the next."""
    lrscheduler_decay: Positive = 0.5
    """Factor by which a decay multiplies the learning rate."""
    warmup: bool = True
    """Raise the learning rate from 0 to lr over the first `warmup_steps` steps."""
    warmup_steps: Annotated[int, Field(ge=0, le=1_000_000_000)] | None = None
    """null: 1,000 as in the reference implementation, or a tenth of the run's steps if it has fewer than 10,000."""
    adam_beta1: Beta = 0.95
    """Decay of Adam's running mean of gradients."""
    adam_beta2: Beta = 0.999
    """Decay of Adam's running mean of squared gradients."""
    weight_decay: AtLeast0 = 5e-7
    """Weight decay as Adam's L2 term in the gradient."""
    grad_clip: Positive | None = None
    """Largest norm of the gradient over all parameters; a larger gradient is scaled down. null: no clipping."""
    wa_start: int | None = None
    """First epoch, counted from 1, whose weights are averaged. null: no averaging."""
    wa_end: int | None = None
    """Last epoch whose weights are averaged."""


@dataclass(frozen=True, kw_only=True)
class ExecutionKeys:
    """Execution"""

    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """bf16 and fp16 use autocast: weights and optimiser stay in float32. fp16 scales the loss and needs a GPU. A device
    without bf16 instructions computes in fp32 instead."""
    micro_batch_size: NumClips | None = None
    """Clips that a worker sends through the network at once; gradients accumulate over the batch. null: all clips,
    or on a CPU, for an AST in bf16, as many as are fastest."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool | None = None
    """Use torch.compile for the AST's blocks, or another model's encoder. If it fails, a warning says why and training
    goes on without it. null: only on a GPU."""
    cuda_graphs: bool = False
    """Replay the compiled blocks as CUDA graphs, so that a small batch does not wait for the CPU to launch each kernel.
    Takes effect on a GPU, with compile and without activation_checkpointing."""
    attention: Literal["auto", "fused", "plain", "fa4"] = "auto"
    """fused: PyTorch's scaled_dot_product_attention. plain: matrix products. auto: plain for training in bf16 on a CPU,
    else fused. fa4: fused, in training by FlashAttention 4, for GPUs with compute capability 9 or 10 and the package
    flash-attn-4."""
    float8: bool = False
    """Train with the products of the blocks' linear layers in float8, by torchao (`ast-ray[float8]`), with precision
    bf16 and best with compile. Needs a GPU with compute capability 8.9 or more; a CPU emulates it slowly, for tests.
    Weights, checkpoints and evaluation are as without it."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    """Seed of the order of the clips and of all random numbers."""


GROUPS = (ModelKeys, InputKeys, AugmentationKeys, OptimisationKeys, ExecutionKeys)
"""The groups of recipe keys. The docstring of a group is its title, and the string after a key is its description."""


@settings
class Recipe(ExecutionKeys, OptimisationKeys, AugmentationKeys, InputKeys, ModelKeys):
    """All keys. Creating a recipe raises ConfigError for a value that is not allowed or keys that do not fit."""

    @field_validator("metrics", mode="before")
    @classmethod
    def _is_selection_metric(cls, value: Any) -> Any:
        from ast_core.metrics import selection_metrics  # with NumPy, which takes longer than all else here

        if value not in list(selection_metrics()):
            raise ConfigError(f"metrics is {value}; use {' or '.join(selection_metrics())}")
        return value

    @field_validator("augmentations", mode="before")
    @classmethod
    def _are_augmentations(cls, value: Any) -> tuple[Entry, ...]:
        return parse_augmentations(value)

    def __post_init__(self) -> None:
        kind = model_kind(self.model)
        changed = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        for key in changed:
            owners = owners_of(key)
            if owners and self.model not in owners:
                belongs = f"model {owners[0]}" if len(owners) == 1 else f"models {', '.join(owners)}"
                raise ConfigError(f"{key} is a key of the {belongs}, but model is {self.model}; leave it out")
        kind.check(self)
        if self.features not in (names := (*FEATURES, DATA)):
            raise ConfigError(f"features is {self.features}; use {' or '.join(names)}")
        check_augmentations(self, changed)
        for key, other in (("wa_start", "wa_end"), ("wa_end", "wa_start")):
            if getattr(self, key) is not None and getattr(self, other) is None:
                raise ConfigError(f"{key} is {getattr(self, key)} but {other} is not set; set both or neither")
        first, last = self.wa_start, self.wa_end
        if first is not None and last is not None and not 1 <= first <= last <= self.epochs:
            problem = f"wa_start is {first} and wa_end is {last}, but epochs is {self.epochs}"
            allowed = "with 1 <= wa_start <= wa_end <= epochs, or both wa_start and wa_end null"
            raise ConfigError(f"{problem}; set the three together, {allowed}")

    def model_args(self) -> dict[str, Any]:
        """The arguments of `create_model` for this model's shape, without those that name initial weights."""
        keys = ("label_dim", "input_tdim", "input_fdim", *model_kind(self.model).settings)
        return {"name": self.model} | {key: getattr(self, key) for key in keys}

    def initial_weights(self) -> dict[str, Any]:
        """The arguments of `create_model` that name the weights to start from."""
        return {key: getattr(self, key) for key in model_kind(self.model).initial_weights}

    def to_dict(self) -> dict[str, Any]:
        """The keys and values as JSON has them."""
        return asdict(self) | {"augmentations": list(self.augmentations)}


EXECUTION_KEYS = ("micro_batch_size", "activation_checkpointing", "compile", "cuda_graphs", "attention", "float8")
"""Recipe keys that change speed and memory. They change the result only by rounding, coarsely with `float8`, apart from
`micro_batch_size` in models with BatchNorm or dropout. A resumed run may change them."""


def load_recipe(text: str, overrides: Mapping[str, str], *, origin: str) -> Recipe:
    """A recipe from the YAML `text`, with `overrides` (key → YAML scalar) on top.

    If the overrides name another model, those keys of the text do not count that it does not have.

    Raises:
        ConfigError: a key is unknown, or a value is not allowed or does not fit the others.
    """
    values = read_yaml(text, origin=origin)
    given = {key: read_yaml(value, origin=f"--{key}") for key, value in overrides.items()}
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{origin}: a recipe is a mapping from keys to values, not {type(values).__name__}")
    for key in (*values, *given):
        _check_key(key)
    before = values.get("model", Recipe.model)
    model = given.get("model", before)
    if isinstance(before, str) and isinstance(model, str):  # else creating the recipe says that it is no text
        values = {**model_kind(model).defaults, **without_other_model(values, before, model)}
    return Recipe(**values | given)


SYNONYMS = {
    "learning_rate": "lr",
    "num_epochs": "epochs",
    "max_epochs": "epochs",
    "bs": "batch_size",
    "num_classes": "label_dim",
    "optimizer_lr": "lr",
    "mean": "dataset_mean",
    "std": "dataset_std",
    "early_stopping": "patience",
    "gradient_clip": "grad_clip",
    "max_grad_norm": "grad_clip",
    "gradient_checkpointing": "activation_checkpointing",
    "num_frames": "input_tdim",
    "num_mel_bins": "input_fdim",
}
"""What other programs call a key, for names that are not similar to ours."""


def _check_key(key: Any) -> None:
    known = [field.name for field in fields(Recipe)]
    if key in known:
        return
    near = SYNONYMS.get(str(key)) or next(iter(difflib.get_close_matches(str(key), known, n=1)), None)
    hint = f"did you mean {near}?" if near else "`jobs/train.py --help` lists the keys"
    raise ConfigError(f"no recipe key {key!r}; {hint}")
