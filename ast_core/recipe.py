"""A recipe: all numbers that define a training run, typed and checked, named as in the reference implementation.

Values come from the defaults, then the recipe file, then the command line; a later one wins. An unknown key or a value
of the wrong type is a ConfigError before any worker starts.
"""

import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from ast_core.errors import ConfigError
from ast_core.metrics import selection_metrics
from ast_core.models.registry import model_kind, owner_of
from ast_core.recipe_yaml import read_yaml

MixupDomain = Literal["power", "log_mel"]

MAX_SEED = 2**64 - 1
"""The largest seed that PyTorch accepts."""

UPPER_BOUNDS = {
    "label_dim": 32_767,  # shards store labels as int16
    "input_fdim": 1024,
    "input_tdim": 30_000,  # 300 s, the longest clip of a data set
    "batch_size": 1_000_000,
    "micro_batch_size": 1_000_000,
    "epochs": 100_000,
    "patience": 100_000,
    "lrscheduler_start": 100_000,
    "lrscheduler_step": 100_000,
    "warmup_steps": 1_000_000_000,
    "seed": MAX_SEED,
}
"""Largest allowed integers. A larger one is a typing error, or would overflow far from where it was typed."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    # --- model
    model: str = "ast"
    """The model's name: one of `ast_core.models.MODELS`."""
    label_dim: int | None = None
    """Number of classes. null: that of the data set."""
    model_size: str = "base384"
    fstride: int = 10
    tstride: int = 10
    input_fdim: int = 128
    input_tdim: int = 1024
    """Number of 10 ms frames to which a clip is padded or cut."""
    imagenet_pretrain: bool = True
    audioset_pretrain: bool = False
    imagenet_weights: str | None = None
    """A local file, for machines without a network. null: fetched."""
    audioset_weights: str | None = None
    """A local file of a published AudioSet checkpoint. null: fetched."""

    # --- input
    norm_stats: Literal["recipe", "data"] = "recipe"
    """recipe: normalise by dataset_mean and dataset_std, which published weights expect. data: by the norm of the
    training splits."""
    dataset_mean: float = -4.2677393
    """Mean of raw log-mel."""
    dataset_std: float = 4.5689974
    """Standard deviation of raw log-mel."""
    freqm: int = 48
    """Largest width of SpecAugment's frequency mask, in mel bins. 0: no mask."""
    timem: int = 192
    """Largest width of SpecAugment's time mask, in frames. 0: no mask."""
    mixup: float = 0.5
    """Share of the clips that are mixed with another clip. 0: no mixup."""
    mixup_domain: MixupDomain = "power"
    """power: add powers, which is close to mixing waveforms as the reference implementation does. log_mel: mix the
    log-mel values themselves."""
    noise: bool = False
    """Add noise and roll the clip in time."""
    patchout_f: int = 0
    """Patch rows (frequency bands) that each training step leaves out, as PaSST does. 0: none."""
    patchout_t: int = 0
    """Patch columns (time spans) that each training step leaves out. Evaluation uses all patches."""
    sampling: Literal["weighted", "uniform"] = "weighted"
    """weighted: draw clips with replacement by sample weight. uniform: take each clip once an epoch."""

    # --- optimisation
    loss: Literal["BCE", "CE"] = "BCE"
    metrics: str = "mAP"
    """The selection metric, which picks the best epoch: mAP or acc."""
    patience: int | None = None
    """End the run after this number of epochs without a better one. null: train all epochs."""
    lr: float = 1e-5
    batch_size: int = 12
    """Clips a step, of all workers together."""
    epochs: int = 5
    lrscheduler_start: int = 2
    lrscheduler_step: int = 1
    lrscheduler_decay: float = 0.5
    warmup: bool = True
    """Raise the learning rate from 0 to lr over the first `warmup_steps` steps."""
    warmup_steps: int | None = None
    """null: 1,000 as in the reference implementation, or a tenth of the run's steps if it has fewer than 10,000."""
    adam_beta1: float = 0.95
    adam_beta2: float = 0.999
    weight_decay: float = 5e-7
    grad_clip: float | None = None
    """Largest norm of the gradient over all parameters; a larger gradient is scaled down. null: no clipping."""
    wa_start: int | None = None
    """First epoch, counted from 1, whose weights are averaged. null: no averaging."""
    wa_end: int | None = None
    """Last epoch whose weights are averaged."""

    # --- execution
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """bf16 and fp16 use autocast: weights and optimiser stay in float32. fp16 scales the loss and needs a GPU. A device
    without bf16 instructions computes in fp32 instead."""
    micro_batch_size: int | None = None
    """Clips that a worker sends through the network at once; gradients accumulate over the batch. null: all clips."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool | None = None
    """Use torch.compile for the transformer's blocks. If it fails, a warning says why and training goes on without it.
    null: only on a GPU."""
    cuda_graphs: bool = False
    """Replay the compiled blocks as CUDA graphs, so that a small batch does not wait for the CPU to launch each kernel.
    Takes effect on a GPU, with compile and without activation_checkpointing."""
    attention: Literal["auto", "fused", "plain"] = "auto"
    """fused: PyTorch's scaled_dot_product_attention. plain: matrix products. auto: the faster one on the device."""
    seed: int = 0

    def __post_init__(self) -> None:
        kind = model_kind(self.model)
        for key, default in ((field.name, field.default) for field in fields(self)):
            owner = owner_of(key)
            if owner is not None and key not in kind.keys and getattr(self, key) != default:
                raise ConfigError(f"{key} is a key of the model {owner}, but model is {self.model}; leave it out")
        self._require(self.metrics in selection_metrics(), "metrics", " or ".join(selection_metrics()))
        for key, most in UPPER_BOUNDS.items():
            value = getattr(self, key)
            self._require(value is None or value <= most, key, f"{most} or less")
        kind.check(self)
        for key in ("batch_size", "epochs", "lrscheduler_start", "lrscheduler_step"):
            self._require(getattr(self, key) >= 1, key, "1 or more")
        for key in ("lr", "lrscheduler_decay"):
            self._require(0 < getattr(self, key) < math.inf, key, "more than 0")
        for key in ("adam_beta1", "adam_beta2"):
            self._require(0 <= getattr(self, key) < 1, key, "0 or more, and less than 1")
        for key in ("weight_decay", "seed"):
            self._require(0 <= getattr(self, key) < math.inf, key, "0 or more")
        if self.grad_clip is not None:
            self._require(0 < self.grad_clip < math.inf, "grad_clip", "more than 0, or null")
        self._require(0 <= self.mixup <= 1, "mixup", "0 to 1")
        for key, size in (("freqm", "input_fdim"), ("timem", "input_tdim")):
            self._require(getattr(self, key) >= 0, key, "0 or more")
            if getattr(self, key) > getattr(self, size):
                problem = f"{key} is {getattr(self, key)}, but {size} is {getattr(self, size)}"
                raise ConfigError(f"{problem}; set {key} and {size} together, with {key} at most {size}")
        self._require(self.warmup_steps is None or self.warmup_steps >= 0, "warmup_steps", "0 or more, or null")
        self._require(self.patience is None or self.patience >= 1, "patience", "1 or more")
        self._require(self.label_dim is None or self.label_dim >= 1, "label_dim", "1 or more")
        self._require(math.isfinite(self.dataset_mean), "dataset_mean", "a finite number")
        self._require(0 < self.dataset_std < math.inf, "dataset_std", "more than 0")
        self._require(self.micro_batch_size is None or self.micro_batch_size >= 1, "micro_batch_size", "1 or more")
        for key, other in (("wa_start", "wa_end"), ("wa_end", "wa_start")):
            if getattr(self, key) is not None and getattr(self, other) is None:
                raise ConfigError(f"{key} is {getattr(self, key)} but {other} is not set; set both or neither")
        first, last = self.wa_start, self.wa_end
        if first is not None and last is not None and not 1 <= first <= last <= self.epochs:
            problem = f"wa_start is {first} and wa_end is {last}, but epochs is {self.epochs}"
            allowed = "with 1 <= wa_start <= wa_end <= epochs, or both wa_start and wa_end null"
            raise ConfigError(f"{problem}; set the three together, {allowed}")

    def _require(self, holds: bool, key: str, allowed: str) -> None:
        if not holds:
            raise ConfigError(f"{key} is {getattr(self, key)}; use {allowed}")

    def model_args(self) -> dict[str, Any]:
        """The arguments of `create_model` for this model's shape, without those that name initial weights."""
        keys = ("label_dim", "input_tdim", "input_fdim", *model_kind(self.model).settings)
        return {"name": self.model} | {key: getattr(self, key) for key in keys}

    def initial_weights(self) -> dict[str, Any]:
        """The arguments of `create_model` that name the weights to start from."""
        return {key: getattr(self, key) for key in model_kind(self.model).initial_weights}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


EXECUTION_KEYS = ("micro_batch_size", "activation_checkpointing", "compile", "cuda_graphs", "attention")
"""Recipe keys that change speed and memory, and the result only by rounding. A resumed run may change them."""


def load_recipe(text: str, overrides: Mapping[str, str], *, origin: str) -> Recipe:
    """A recipe from the YAML `text`, with `overrides` (key → YAML scalar) on top."""
    values = read_yaml(text, origin=origin)
    given = {key: read_yaml(value, origin=f"--{key}") for key, value in overrides.items()}
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{origin}: a recipe is a mapping from keys to values, not {type(values).__name__}")
    typed = {key: _typed(key, value) for key, value in (values | given).items()}
    return Recipe(**typed)


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


def _typed(key: Any, value: Any) -> Any:
    types_of = {field.name: field.type for field in fields(Recipe)}
    if key not in types_of:
        near = SYNONYMS.get(str(key)) or next(iter(difflib.get_close_matches(str(key), types_of, n=1)), None)
        hint = f"did you mean {near}?" if near else "`jobs/train.py --help` lists the keys"
        raise ConfigError(f"no recipe key {key!r}; {hint}")
    wanted = types_of[key]
    allowed = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    for kind in allowed:
        if typing.get_origin(kind) is Literal and value in typing.get_args(kind):
            return value
        if kind is float and type(value) is int:
            try:
                return float(value)
            except OverflowError:
                continue
        if isinstance(kind, type) and type(value) is kind:
            return value
    raise ConfigError(f"{key} is {value!r}; use {_describe(wanted)}")


def _describe(wanted: Any) -> str:
    if typing.get_origin(wanted) is Literal:
        return " or ".join(str(choice) for choice in typing.get_args(wanted))
    if isinstance(wanted, types.UnionType):
        return " or ".join(_describe(kind) for kind in typing.get_args(wanted))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
    return names[wanted]
