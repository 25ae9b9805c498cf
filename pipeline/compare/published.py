"""Published figures on AudioSet beside those of a comparison, and how AudioSet is recognised.

Sources: the AST authors' log and README (https://github.com/YuanGongND/ast), PSLA's poster and README
(https://github.com/YuanGongND/psla), the names of the run folders in the notebook of
https://github.com/lijuncheng16/AudioTaggingDoneRight ("the comparison"), and TALNet's paper.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ast_core.labels import LabelVocabulary, audioset_labels

PARTS = {"full": range(1_000_000, 2_100_000), "balanced": range(10_000, 22_161)}
"""Clips of AudioSet's training lists: the balanced one has 22,160 segments, both together 2,063,949. Fewer are those
that can still be had."""
EVALUATION = range(10_000, 20_372)
"""Clips of the evaluation list, of which there are 20,371."""


def audioset_part(labels: LabelVocabulary, num_train: int, num_eval: int) -> str | None:
    """`full` or `balanced` if a comparison is one on AudioSet, else None.

    It is one if its classes are AudioSet's 527 in their order, and the numbers of training and evaluation clips are
    those of AudioSet's lists (`PARTS`, `EVALUATION`).
    """
    if labels.mids != audioset_labels().mids or num_eval not in EVALUATION:
        return None
    return next((part for part, sizes in PARTS.items() if num_train in sizes), None)


@dataclass(frozen=True)
class Published:
    """mAP of a model on AudioSet's evaluation list: of the best single epoch, unless the note says otherwise."""

    part: str
    """Training clips: a key of `PARTS`."""
    keys: Mapping[str, Any]
    """Recipe keys, with resolved values, by which the model is recognised."""
    published: float | None
    """By those who published the model or its recipe."""
    comparison: float | None
    """By the authors of the comparison."""
    note: str = field(default="")


_AST = {
    "model": "ast",
    "model_size": "base384",
    "fstride": 10,
    "tstride": 10,
    "input_fdim": 128,
    "audioset_pretrain": False,
    "features": "kaldi128",
    "input_tdim": 1024,
}
_LARGE, _SMALL = {"features": "kaldi128", "input_tdim": 1024}, {"features": "small64", "input_tdim": 400}
_RESNET: dict[str, Any] = {"model": "resnet50", "features": "kaldi128", "input_tdim": 1024}
_PSLA: dict[str, Any] = {"imagenet_pretrain": True, "features": "kaldi128", "input_tdim": 1056}
_B2 = _PSLA | {"model": "efficientnet", "eff_b": 2}
_B0 = _PSLA | {"model": "efficientnet", "eff_b": 0, "att_head": 1}
_MOBILENET = _PSLA | {"model": "mobilenetv2"}
_AVERAGED = "published with averaged weights"
_ENHANCED = "published with enhanced labels and averaged weights"
_POSTER = "published with enhanced labels, where 4 heads have 0.3280: probably an ensemble of checkpoints"

PUBLISHED = (
    Published("full", _AST | {"imagenet_pretrain": True}, 0.4490, 0.430, "published, with averaged weights: 0.459"),
    Published("full", _AST | {"imagenet_pretrain": False}, 0.366, None, _AVERAGED),
    Published(
        "balanced",
        _AST | {"imagenet_pretrain": True},
        0.347,
        0.3315,
        "published with enhanced labels and averaged weights; in the authors' log: 0.350",
    ),
    Published("full", {"model": "talnet", "embedding_size": 2048} | _LARGE, None, 0.429),
    Published("full", {"model": "talnet", "embedding_size": 1024} | _SMALL, 0.362, 0.393, "theirs after epoch 4 of 10"),
    Published("full", {"model": "cnn_transformer", "embedding_size": 2048} | _LARGE, None, 0.437),
    Published("full", {"model": "cnn_transformer", "embedding_size": 1024} | _SMALL, None, 0.411),
    Published("full", _RESNET | {"imagenet_pretrain": True}, None, 0.410),
    Published(
        "full",
        _RESNET | {"imagenet_pretrain": False},
        0.4042,
        0.399,
        f"{_AVERAGED}, by PSLA, whose code does not load ImageNet's here",
    ),
    Published("full", _B2 | {"att_head": 4}, 0.4397, None, "published, with averaged weights: 0.4435"),
    Published("full", _B2 | {"att_head": 1}, 0.4414, None, _AVERAGED),
    Published("full", _B2 | {"att_head": 0}, 0.4382, None, _AVERAGED),
    Published("full", _B0, 0.4391, None, _AVERAGED),
    Published("full", _MOBILENET, 0.3940, None, _AVERAGED),
    Published("balanced", _B2 | {"att_head": 4}, 0.3192, None, _ENHANCED),
    Published("balanced", _B2 | {"att_head": 1}, 0.3406, None, _POSTER),
    Published("balanced", _B2 | {"att_head": 0}, 0.3317, None, _POSTER),
    Published("balanced", _B0, 0.3350, None, _POSTER),
    Published("balanced", _MOBILENET, 0.2650, None, _POSTER),
)

RESOLVED = {"efficientnet": {"att_head": 4}, "resnet50": {"att_head": 1}, "mobilenetv2": {"att_head": 0}}
"""Values of keys that are null in a recipe."""


def published_figures(part: str | None, recipe: Mapping[str, Any]) -> Published | None:
    """What is published of the model of a recipe on that part of AudioSet; None if nothing is known."""
    resolved = {key: value for key, value in recipe.items() if value is not None}
    if recipe["model"] in ("talnet", "cnn_transformer"):
        resolved.setdefault("embedding_size", 16 * recipe["input_fdim"])
    resolved = RESOLVED.get(recipe["model"], {}) | resolved
    for known in PUBLISHED:
        if known.part == part and all(resolved.get(key) == value for key, value in known.keys.items()):
            return known
    return None
