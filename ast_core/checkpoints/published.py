"""Classes, norms and shapes of the checkpoints that the authors of AST and PSLA published. The files lack them.

Source: README, recipes and label files of https://github.com/YuanGongND/ast and https://github.com/YuanGongND/psla.
"""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor

from ast_core.errors import DataError
from ast_core.features import KALDI128
from ast_core.labels import LabelVocabulary, audioset_labels, fsd50k_labels
from ast_core.models.pretrained import NUM_PREFIX_TOKENS
from ast_core.models.shapes import patch_grid
from ast_core.published_inputs import AUDIOSET, SPEECH_COMMANDS
from ast_core.recipe import Recipe

BASE_DIM = 768


SPEECHCOMMANDS_WORDS = (
    "backward follow five bed zero on learn two house tree dog stop seven eight down six forward cat right visual four "
    "wow no nine off three left marvin yes up sheila happy bird go one"
)


@cache
def speechcommands_labels() -> LabelVocabulary:
    """The 35 words of Speech Commands V2 in the order of the published checkpoint, which is not alphabetical."""
    names = tuple(SPEECHCOMMANDS_WORDS.split())
    return LabelVocabulary(tuple(f"/m/spcmd{i:02d}" for i in range(len(names))), names)


def vocabulary_of(names: tuple[str, ...]) -> LabelVocabulary:
    """The vocabulary, with MIDs, of a data set that has these names in this order; else the names."""
    for known in (audioset_labels(), speechcommands_labels(), fsd50k_labels()):
        if names == known.names:
            return known
    return LabelVocabulary.from_names(names)


def foreign_recipe(**known: Any) -> Recipe:
    """A recipe for weights that were trained elsewhere: the `known` keys, no augmentation, float32."""
    unknown: dict[str, Any] = {"imagenet_pretrain": False, "freqm": 0, "timem": 0, "mixup": 0.0, "precision": "fp32"}
    return Recipe(**unknown | known)


def recognise_published(state: Mapping[str, Tensor], *, origin: object) -> tuple[Recipe, LabelVocabulary] | None:
    """Recipe and labels of a published checkpoint, recognised by the shapes of its tensors. None for any other.

    Eight ASTs were published: seven for AudioSet, with strides 10 (four of them), 12, 14 and 16, and one for Speech
    Commands V2. PSLA's are EfficientNets for AudioSet and FSD50K. `state` has an AST's keys with our names.

    Raises:
        DataError: these are the weights of neither.
    """
    if PSLA_STEM in state:
        return _recognise_psla(state)
    missing = sorted({"v.pos_embed", "mlp_head.1.weight"} - state.keys())
    if missing:
        raise DataError(
            f"{origin} does not contain the weights of an AST: {missing[0]} is missing; for another model, give its "
            "recipe and labels"
        )
    shapes = tuple(state["v.pos_embed"].shape), tuple(state["mlp_head.1.weight"].shape)
    for labels, known, strides in (
        (audioset_labels(), AUDIOSET, (10, 12, 14, 16)),
        (speechcommands_labels(), SPEECH_COMMANDS, (10,)),
    ):
        for stride in strides:
            rows, columns = patch_grid(KALDI128.num_mel_bins, known.num_frames, stride, stride)
            if shapes == ((1, NUM_PREFIX_TOKENS + rows * columns, BASE_DIM), (len(labels), BASE_DIM)):
                recipe = foreign_recipe(
                    label_dim=len(labels),
                    fstride=stride,
                    tstride=stride,
                    input_tdim=known.num_frames,
                    dataset_mean=known.mean,
                    dataset_std=known.std,
                )
                return recipe, labels
    return None


PSLA_STEM = "effnet._conv_stem.weight"
PSLA_MEAN, PSLA_STD, PSLA_DIVISOR = -4.6476, 4.5699, 1.0
PSLA_CLASSES = ((audioset_labels, 1056), (fsd50k_labels, 3000))
"""The classes of PSLA's data sets, and the frames of the input. The norm is that of AudioSet for both."""
PSLA_SIZES = {
    (1280, 16): 0,
    (1280, 23): 1,
    (1408, 23): 2,
    (1536, 26): 3,
    (1792, 32): 4,
    (2048, 39): 5,
    (2304, 45): 6,
    (2560, 55): 7,
}
"""Channels and blocks of EfficientNet b0 to b7."""


def _recognise_psla(state: Mapping[str, Tensor]) -> tuple[Recipe, LabelVocabulary] | None:
    num_heads = sum(re.fullmatch(r"attention\.att\.(\d+\.)?weight", key) is not None for key in state)
    classifier = state.get("attention.cla.0.weight", state.get("attention.cla.weight"))
    blocks = {key.split(".")[2] for key in state if key.startswith("effnet._blocks.")}
    size = None if classifier is None else PSLA_SIZES.get((classifier.shape[1], len(blocks)))
    if classifier is None or size is None:
        return None
    for labels_of, num_frames in PSLA_CLASSES:
        labels = labels_of()
        if len(classifier) == len(labels):
            recipe = foreign_recipe(
                model="efficientnet",
                eff_b=size,
                att_head=num_heads,
                label_dim=len(labels),
                input_tdim=num_frames,
                dataset_mean=PSLA_MEAN,
                dataset_std=PSLA_STD,
                norm_divisor=PSLA_DIVISOR,
            )
            return recipe, labels
    return None
