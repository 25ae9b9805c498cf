"""Checks of a data set against a recipe before training starts.

A combination that cannot train raises a ConfigError; one that trains but is probably a mistake gives a warning line.
No check reads fbanks.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ast_core.batch import Norm
from ast_core.errors import ConfigError
from ast_core.features import KALDI128, FeatureSettings
from ast_core.labels import LabelVocabulary
from ast_core.recipe import Recipe
from ast_core.schedule import WARMUP_STEPS, warmup_steps_of
from pipeline import storage
from pipeline.dataset import Clips
from pipeline.train.data.sampling import num_steps
from pipeline.weights import flatten_labels

FEW_STEPS = 100
"""A run with fewer steps gets a warning."""

MUCH_PADDING = 0.5
"""Share of padding in the model's input, over all clips, above which there is a warning."""

SMALLEST_STD = 1e-3
"""Smallest std of raw log-mel. Below it all values are equal apart from rounding; real recordings have more than 1."""

MAX_HASHED_SHARDS = 400
"""With more shards, copies of clips are not searched here, as that takes over some seconds; jobs/doctor.py does it."""

NAMES_SHOWN = 3

LONGEST_ADVISED_S = 30.0
"""The longest input that a line advises. Beyond it, attention over a whole clip takes too much memory and time."""


def fit_warmup(recipe: Recipe, num_clips: int) -> tuple[Recipe, list[str]]:
    """The recipe with `warmup_steps` set for a run over `num_clips`, and a line for the user if it changed."""
    if not recipe.warmup:
        return recipe, []
    steps = recipe.epochs * num_steps(num_clips, recipe.batch_size)
    warmup_steps = warmup_steps_of(recipe, steps)
    lines = []
    if recipe.warmup_steps is None and warmup_steps < WARMUP_STEPS:
        lines.append(
            f"warm-up takes {WARMUP_STEPS:,} steps, this run has {steps:,}; warmup_steps is now {warmup_steps:,} "
            f"(--warmup_steps {WARMUP_STEPS} is the reference implementation's value)"
        )
    elif warmup_steps >= steps:
        lines.append(
            f"warning: warm-up takes {warmup_steps:,} steps, this run has {steps:,}: the learning rate never reaches "
            "lr; lower warmup_steps, or leave it out"
        )
    return replace(recipe, warmup_steps=warmup_steps), lines


def check_norm(norm: Norm, splits: Sequence[str]) -> None:
    """Raise ConfigError if the splits' own mean and std cannot be used to normalise."""
    if not (np.isfinite(norm.mean) and np.isfinite(norm.std)):
        raise ConfigError(f"norm_stats data: mean and std of {', '.join(splits)} are {norm.mean} and {norm.std}")
    if norm.std < SMALLEST_STD:
        raise ConfigError(
            f"norm_stats data: the std of {', '.join(splits)} is 0, all clips are the same sound or silence; "
            "look at the clips, or use norm_stats recipe"
        )


def silence_lines(norm: Norm, what: str) -> list[str]:
    """A warning where clips whose own mean and std are these do not vary."""
    if norm.std >= SMALLEST_STD:
        return []
    return [f"warning: the std of the {what} clips is 0, all are the same sound or silence: there is nothing to hear"]


def check_classes(recipe: Recipe, labels: LabelVocabulary, train: Clips, evaluation: Clips) -> list[str]:
    """Warnings about classes that cannot be learnt or measured.

    Raises:
        ConfigError: the loss is not defined for these labels.
    """
    num_classes = len(labels)
    if recipe.loss == "CE" and num_classes < 2:
        raise ConfigError("loss CE takes two classes or more, its loss of one class is 0; use loss BCE, or add classes")
    in_train, in_evaluation = (clips_by_class(clips, num_classes) for clips in (train, evaluation))
    lines = []
    if (in_train == len(train)).all():
        lines.append(
            f"every training clip has every class ({num_classes}): there is nothing to tell apart, and any model "
            "scores 1; add clips without them"
        )
    elif (always := in_train == len(train)).any():
        lines.append(f"every training clip has {_names(labels, always)}: nothing teaches what its absence sounds like")
    if (never := in_train == 0).any():
        lines.append(f"no training clip has {_names(labels, never)}: nothing teaches what it sounds like")
    if not in_evaluation.any():
        lines.append("no evaluation clip has a label: mAP and AUC are undefined")
    elif (never := in_evaluation == 0).any():
        lines.append(
            f"no evaluation clip has {_names(labels, never)}: its AP and AUC are undefined and left out of the means"
        )
    if (always := in_evaluation == len(evaluation)).any():
        lines.append(f"every evaluation clip has {_names(labels, always)}: its AP is 1 whatever the scores")
    return [f"warning: {line}" for line in lines]


def clips_by_class(clips: Clips, num_classes: int) -> np.ndarray:
    """`[C]`: the number of clips that have each class."""
    return np.bincount(flatten_labels(clips.labels)[0], minlength=num_classes)


def _names(labels: LabelVocabulary, classes: np.ndarray) -> str:
    """`the class 'dog'`, or `5 of the classes ('dog', 'cat', 'rain', …)`."""
    names = [repr(labels.names[i]) for i in np.flatnonzero(classes)[:NAMES_SHOWN]]
    num_classes = int(classes.sum())
    if num_classes == 1:
        return f"the class {names[0]}"
    return f"{num_classes:,} of the classes ({', '.join(names)}{', …' if num_classes > NAMES_SHOWN else ''})"


def length_lines(
    num_frames: np.ndarray, input_tdim: int, what: str, features: FeatureSettings = KALDI128, *, timem: int = 0
) -> list[str]:
    """Warnings if clips of `num_frames` are cut to the model's input, or if most of the input is padding.

    `timem` is that of the recipe in training: the advice then keeps the share of the input that a mask may hide.
    """
    num_frames = num_frames.astype(np.int64)
    longer = num_frames[num_frames > input_tdim + 1]  # the last of centred frames is after the end of the sound
    lines = []
    model_s = f"input_tdim {input_tdim}, {features.seconds(input_tdim):.2f} s"
    if len(longer):
        unheard = (longer - input_tdim).sum() / longer.sum()
        longest = int(longer.max())
        fits = features.seconds(longest) <= LONGEST_ADVISED_S
        remedy = f"train with --input_tdim {longest}, which holds the longest, or " if fits else ""
        remedy += "cut the clips into sections by start_s and end_s in the list"
        lines.append(
            f"warning: {len(longer):,} of {len(num_frames):,} {what} clips are longer than the model's input "
            f"({model_s}): {_percent(unheard)} of their sound is not used; {remedy}"
        )
    padding = 1 - np.minimum(num_frames, input_tdim).sum() / (len(num_frames) * input_tdim)
    if padding > MUCH_PADDING:
        fitting = max(16, int(num_frames.max()))
        with_mask = f" --timem {timem * fitting // input_tdim}" if timem > fitting else ""
        lines.append(
            f"warning: {_percent(padding)} of the model's input ({model_s}) is padding, as the {what} clips are "
            f"shorter; --input_tdim {fitting}{with_mask} holds the longest and takes less time"
        )
    return lines


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.2g} %"


def step_lines(recipe: Recipe, num_clips: int) -> list[str]:
    """Warnings about runs with few steps."""
    lines = []
    if recipe.batch_size > num_clips:
        lines.append(
            f"warning: batch_size {recipe.batch_size} is larger than the {num_clips:,} training clips: "
            "an epoch is one step; lower batch_size, or raise epochs"
        )
    steps = recipe.epochs * num_steps(num_clips, recipe.batch_size)
    if steps < FEW_STEPS:
        lines.append(
            f"warning: this run has {steps:,} steps ({recipe.epochs:,} epochs of {num_clips:,} clips), which are few; "
            "if its loss is still high at the end, raise epochs, or lower batch_size"
        )
    return lines


def overlap_lines(
    train: Clips, evaluation: Clips, train_splits: Sequence[str], eval_splits: Sequence[str]
) -> list[str]:
    """Warnings about evaluation clips that are also training clips: by split, by sound and by clip_id."""
    if shared := [split for split in eval_splits if split in train_splits]:
        return [
            f"warning: {', '.join(shared)} is trained on and evaluated on: the figures say what the model remembers, "
            "not what it knows of other clips"
        ]
    lines = []
    hashes = _hashes(train, evaluation)
    if hashes is not None:
        in_train = np.isin(hashes[1], hashes[0])
        if in_train.any():
            example = evaluation.clip_id[int(np.argmax(in_train))]
            lines.append(
                f"warning: {in_train.sum():,} of {len(evaluation):,} evaluation clips are copies of training clips "
                f"(equal fbank_hash), {example} first: the figures are too good"
            )
            return lines
    same_id = pc.sum(pc.is_in(evaluation.clip_id, train.clip_id)).as_py() or 0
    if same_id:
        lines.append(
            f"warning: {same_id:,} of {len(evaluation):,} evaluation clips have the clip_id of a training clip; if "
            "they are the same, the figures are too good"
        )
    return lines


def _hashes(*groups: Clips) -> list[np.ndarray] | None:
    """The `fbank_hash` of each group's clips, `[clips]`; None if there are too many shards or one cannot be read.

    Training will raise an error that names the shard.
    """
    shards = {shard for clips in groups for shard in clips.shards}
    if len(shards) > MAX_HASHED_SHARDS:
        return None

    def read(shard: str) -> np.ndarray:
        filesystem, path = storage.resolve(shard)
        return pq.read_table(path, filesystem=filesystem, columns=["fbank_hash"])["fbank_hash"].to_numpy()

    try:
        with ThreadPoolExecutor(8) as threads:
            by_shard = dict(zip(shards, threads.map(read, shards), strict=True))
        return [_of_clips(clips, by_shard) for clips in groups]
    except (OSError, ValueError, LookupError):  # Arrow's errors are among them
        return None


def _of_clips(clips: Clips, by_shard: Mapping[str, np.ndarray]) -> np.ndarray:
    hashes = np.zeros(len(clips), np.int64)
    for number, shard in enumerate(clips.shards):
        here = clips.shard_of == number
        hashes[here] = by_shard[shard][clips.row[here]]
    return hashes
