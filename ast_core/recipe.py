"""A recipe: every number that defines a training run, typed, checked, under the original's names.

Values come from the defaults, then the recipe file, then the command line; a later one wins. An unknown key or a value
of the wrong kind is a ConfigError before any worker starts. What the command line bounds (`NO_MORE_THAN`) gives way.
"""

import difflib
import logging
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from ast_core.errors import ConfigError
from ast_core.models.shapes import MODEL_SIZES, check_start, patch_grid
from ast_core.recipe_yaml import read_yaml

logger = logging.getLogger(__name__)

MixupDomain = Literal["power", "log_mel"]

MAX_SEED = 2**64 - 1
"""The largest seed that torch takes."""

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
"""Largest values of whole numbers; larger ones are typing errors, or would overflow far from where they were typed."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    # --- model
    label_dim: int | None = None
    """Number of classes; by default that of the data set."""
    model_size: str = "base384"
    fstride: int = 10
    tstride: int = 10
    input_fdim: int = 128
    input_tdim: int = 1024
    """Frames of 10 ms a clip is padded or cut to."""
    imagenet_pretrain: bool = True
    audioset_pretrain: bool = False
    imagenet_weights: str | None = None
    """A local file, for machines without a network; null fetches."""
    audioset_weights: str | None = None
    """The same, of a published AudioSet checkpoint."""

    # --- input
    norm_stats: Literal["recipe", "data"] = "recipe"
    """Normalise by dataset_mean and dataset_std, which published weights expect, or by the training splits' own."""
    dataset_mean: float = -4.2677393
    """Of raw log-mel."""
    dataset_std: float = 4.5689974
    freqm: int = 48
    """Widest frequency mask of SpecAugment, in mel bins; 0 is off."""
    timem: int = 192
    """Widest time mask, in frames."""
    mixup: float = 0.5
    """Share of the clips that are mixed with another; 0 is off."""
    mixup_domain: MixupDomain = "power"
    """Add powers, close to the original's mixing of waveforms, or mix log-mel values as they are."""
    noise: bool = False
    """Noise and time roll."""
    patchout_f: int = 0
    """Rows of patches (one along frequency) left out of each training step, as PaSST does; 0 is off."""
    patchout_t: int = 0
    """The same, columns along time. Evaluation sees every patch."""
    sampling: Literal["weighted", "uniform"] = "weighted"
    """Weighted draws with replacement by sample weight; uniform takes each clip once an epoch."""

    # --- optimisation
    loss: Literal["BCE", "CE"] = "BCE"
    metrics: Literal["mAP", "acc"] = "mAP"
    """What picks the best epoch."""
    patience: int | None = None
    """End after so many epochs without a better one; null trains them all."""
    lr: float = 1e-5
    batch_size: int = 12
    """Of all workers together."""
    epochs: int = 5
    lrscheduler_start: int = 2
    lrscheduler_step: int = 1
    lrscheduler_decay: float = 0.5
    warmup: bool = True
    """Raise the rate from 0 to lr over the first `warmup_steps`."""
    warmup_steps: int | None = None
    """null: the original's 1,000, or a tenth of the run's steps where the run has fewer than 10,000."""
    adam_beta1: float = 0.95
    adam_beta2: float = 0.999
    weight_decay: float = 5e-7
    grad_clip: float | None = None
    """Longest gradient, as the norm over all parameters; a longer one is scaled down to it. null does not clip."""
    wa_start: int | None = None
    """First and last epoch, counted from 1, whose weights are averaged; null does not average."""
    wa_end: int | None = None

    # --- execution
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """bf16 and fp16 are autocast: weights and optimiser stay in float32. fp16 scales the loss, and takes a GPU. fp32
    stands in for bf16 on devices without instructions for it."""
    micro_batch_size: int | None = None
    """Clips that a worker takes through the network at once, gradients adding up over the batch; null takes all."""
    activation_checkpointing: bool = False
    """Less memory, more time."""
    compile: bool | None = None
    """torch.compile on the transformer's blocks; where that fails, a warning, and training without. null: on a GPU."""
    cuda_graphs: bool = False
    """With compile, on a GPU and without activation_checkpointing: the compiled blocks are replayed as CUDA graphs, so
    that a small batch does not wait for the CPU to ask for one kernel after the other."""
    attention: Literal["auto", "fused", "plain"] = "auto"
    """Fused is PyTorch's scaled_dot_product_attention; auto takes what is fastest on the device."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.model_size not in MODEL_SIZES:
            raise ConfigError(f"model_size is {self.model_size!r}; use one of {', '.join(MODEL_SIZES)}")
        if self.imagenet_weights is not None and not self.imagenet_pretrain:
            raise ConfigError("imagenet_weights is given and imagenet_pretrain is false; set one of them otherwise")
        if self.audioset_weights is not None and not self.audioset_pretrain:
            raise ConfigError("audioset_weights is given and audioset_pretrain is false; set one of them otherwise")
        check_start(self.model_size, self.imagenet_pretrain, self.audioset_pretrain)
        for key, most in UPPER_BOUNDS.items():
            value = getattr(self, key)
            self._require(value is None or value <= most, key, f"{most} or less")
        num_rows, num_columns = patch_grid(self.input_fdim, self.input_tdim, self.fstride, self.tstride)
        for key, num, which in (("patchout_f", num_rows, "rows"), ("patchout_t", num_columns, "columns")):
            self._require(0 <= getattr(self, key) < num, key, f"0 to {num - 1} (of {num} {which} of patches)")
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
        self._require(0 <= self.freqm <= self.input_fdim, "freqm", f"0 to {self.input_fdim} (input_fdim)")
        self._require(0 <= self.timem <= self.input_tdim, "timem", f"0 to {self.input_tdim} (input_tdim)")
        self._require(self.warmup_steps is None or self.warmup_steps >= 0, "warmup_steps", "0 or more, or null")
        self._require(self.patience is None or self.patience >= 1, "patience", "1 or more")
        self._require(self.label_dim is None or self.label_dim >= 1, "label_dim", "1 or more")
        self._require(math.isfinite(self.dataset_mean), "dataset_mean", "a finite number")
        self._require(0 < self.dataset_std < math.inf, "dataset_std", "more than 0")
        self._require(self.micro_batch_size is None or self.micro_batch_size >= 1, "micro_batch_size", "1 or more")
        for key, other in (("wa_start", "wa_end"), ("wa_end", "wa_start")):
            if getattr(self, key) is not None and getattr(self, other) is None:
                raise ConfigError(f"{key} is {getattr(self, key)} but {other} is not set; set both or neither")
        if self.wa_start is not None and self.wa_end is not None:
            self._require(1 <= self.wa_start <= self.epochs, "wa_start", f"1 to {self.epochs} (epochs)")
            self._require(
                self.wa_start <= self.wa_end <= self.epochs,
                "wa_end",
                f"{self.wa_start} (wa_start) to {self.epochs} (epochs)",
            )

    def _require(self, holds: bool, key: str, allowed: str) -> None:
        if not holds:
            raise ConfigError(f"{key} is {getattr(self, key)}; use {allowed}")

    def model_args(self) -> dict[str, Any]:
        """What `ASTModel` takes, but for the weights to start from."""
        keys = ("label_dim", "fstride", "tstride", "input_fdim", "input_tdim", "model_size")
        return {key: getattr(self, key) for key in keys}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


EXECUTION_KEYS = ("micro_batch_size", "activation_checkpointing", "compile", "cuda_graphs", "attention")
"""Of a recipe: they change speed and memory, and the result by rounding alone, so that a run may go on with others."""


NO_MORE_THAN = {"wa_start": "epochs", "wa_end": "epochs", "freqm": "input_fdim", "timem": "input_tdim"}
"""Keys that give way where another one is overridden: fewer epochs or frames need no second change."""


def load_recipe(text: str, overrides: Mapping[str, str], *, origin: str) -> Recipe:
    """A recipe from the YAML `text`, with `overrides` (key → YAML scalar) on top; what gives way is announced."""
    values = read_yaml(text, origin=origin)
    given = {key: read_yaml(value, origin=f"--{key}") for key, value in overrides.items()}
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{origin}: a recipe is a mapping from keys to values, not {type(values).__name__}")
    typed = {key: _typed(key, value) for key, value in (values | given).items()}
    for key, bound in NO_MORE_THAN.items():
        value = typed.get(key, getattr(Recipe, key))
        if bound in given and key not in given and value is not None and value > typed[bound] > 0:
            logger.warning(f"{key} is {typed[bound]} in place of {value}: no more than {bound}")
            typed[key] = typed[bound]
    return Recipe(**typed)


SYNONYMS = {
    "learning_rate": "lr",
    "num_epochs": "epochs",
    "max_epochs": "epochs",
    "bs": "batch_size",
    "model": "model_size",
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
"""Names that other programs have for a key, where spelling alone does not lead to it."""


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
