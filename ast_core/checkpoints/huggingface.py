"""Convert the two JSON files of Hugging Face's `ASTForAudioClassification` to recipe, norm and labels, and back.

Hugging Face has one `layer_norm_eps` for all norms. The reference implementation has 1e-6 in the transformer, as timm
has, and 1e-5 in the classifier's norm. Our folders have 1e-6. Files on the hub have 1e-12 and are accepted. With drawn
weights (base384, 1,214 tokens), whose pooled tokens have a variance of 1, the logits of `transformers` differ from ours
by 1.5e-5 of their spread (2.1e-5 with 1e-12, 0 with the two epsilons). The difference grows as that variance falls.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ast_core.batch import Norm
from ast_core.checkpoints.published import foreign_recipe, vocabulary_of
from ast_core.errors import ConfigError, DataError
from ast_core.features import KALDI128, FeatureSettings
from ast_core.labels import LabelVocabulary
from ast_core.models.shapes import MODEL_SIZES, PATCH_SIZE
from ast_core.recipe import DATA, Recipe

MODEL_TYPE = "audio-spectrogram-transformer"
LAYER_NORM_EPS = 1e-6
LARGEST_EPS = 1e-5
MLP_RATIO = 4

_PROBLEM_OF_LOSS = {"BCE": "multi_label_classification", "CE": "single_label_classification"}
_LOSS_OF_PROBLEM = {problem: loss for loss, problem in _PROBLEM_OF_LOSS.items()} | {None: "BCE"}
"""The published checkpoints have no problem type; all of them were trained with BCE."""

# Values of keys that a file leaves out, as in `ASTConfig` and `ASTFeatureExtractor` of transformers.
_CONFIG_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "patch_size": 16,
    "qkv_bias": True,
    "frequency_stride": 10,
    "time_stride": 10,
    "max_length": 1024,
    "num_mel_bins": 128,
    "problem_type": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
}
_EXTRACTOR_DEFAULTS: dict[str, Any] = {
    "feature_extractor_type": "ASTFeatureExtractor",
    "sampling_rate": 16000,
    "num_mel_bins": 128,
    "max_length": 1024,
    "do_normalize": True,
    "mean": -4.2677393,
    "std": 4.5689974,
}


def to_configs(
    recipe: Recipe, norm: Norm, labels: LabelVocabulary, features: FeatureSettings = KALDI128
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of `config.json` and `preprocessor_config.json`.

    Raises:
        ConfigError: `ASTFeatureExtractor` cannot compute these features. Only its number of mel bins may be chosen: it
            has no settings of frames and frequencies, and counts a frame's samples for 16 kHz without torchaudio.
    """
    if other := features.differences(replace(KALDI128, num_mel_bins=features.num_mel_bins)):
        raise ConfigError(f"the feature extractor of Hugging Face cannot compute these features: {other}; use ours")
    names = distinct_names(labels)
    config = {
        "architectures": ["ASTForAudioClassification"],
        "model_type": MODEL_TYPE,
        **_shape_of(recipe.model_size),
        "hidden_act": "gelu",
        "layer_norm_eps": LAYER_NORM_EPS,
        "patch_size": PATCH_SIZE,
        "qkv_bias": True,
        "frequency_stride": recipe.fstride,
        "time_stride": recipe.tstride,
        "max_length": recipe.input_tdim,
        "num_mel_bins": recipe.input_fdim,
        "problem_type": _PROBLEM_OF_LOSS[recipe.loss],
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    extractor = {
        "feature_extractor_type": "ASTFeatureExtractor",
        "sampling_rate": features.sample_rate_hz,
        "num_mel_bins": recipe.input_fdim,
        "max_length": recipe.input_tdim,
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
        "do_normalize": True,
        "mean": norm.mean,
        "std": norm.std * norm.divisor / 2,  # its feature extractor divides by 2 std
    }
    return config, extractor


def from_configs(
    config: Mapping[str, Any], extractor: Mapping[str, Any], *, origin: object
) -> tuple[Recipe, Norm, LabelVocabulary, FeatureSettings]:
    """Recipe, norm, labels and features from the contents of both files.

    Raises:
        DataError: a setting that our model does not support. The message names it.
    """
    config, extractor = _CONFIG_DEFAULTS | dict(config), _EXTRACTOR_DEFAULTS | dict(extractor)

    def require(holds: bool, setting: str, value: Any, allowed: object) -> None:
        if not holds:
            raise DataError(f"{origin}: {setting} is {value!r}; only {allowed} can be read")

    fixed = {"model_type": MODEL_TYPE, "patch_size": PATCH_SIZE, "hidden_act": "gelu", "qkv_bias": True}
    for key, value in fixed.items():
        require(config.get(key) == value, key, config.get(key), repr(value))
    for key in ("feature_extractor_type", "sampling_rate", "do_normalize"):
        require(extractor[key] == _EXTRACTOR_DEFAULTS[key], key, extractor[key], repr(_EXTRACTOR_DEFAULTS[key]))
    for key, low, high in (
        ("frequency_stride", 1, PATCH_SIZE),
        ("time_stride", 1, PATCH_SIZE),
        ("num_mel_bins", PATCH_SIZE, math.inf),
        ("max_length", PATCH_SIZE, math.inf),
    ):
        require(
            type(config[key]) is int and low <= config[key] <= high,
            key,
            config[key],
            f"a whole number from {low} to {high}",
        )
    for key in ("num_mel_bins", "max_length"):
        require(
            extractor[key] == config[key], f"{key} of the preprocessor", extractor[key], f"the model's {config[key]}"
        )
    for key in ("mean", "std"):
        require(
            _is_number(extractor[key]) and (key == "mean" or extractor[key] > 0),
            key,
            extractor[key],
            "a number (std above 0)",
        )
    eps = config["layer_norm_eps"]
    require(
        _is_number(eps) and 0 < eps <= LARGEST_EPS, "layer_norm_eps", eps, f"a number above 0 and at most {LARGEST_EPS}"
    )
    problems = list(_LOSS_OF_PROBLEM)
    require(config["problem_type"] in problems, "problem_type", config["problem_type"], f"one of {problems}")
    labels = _labels(config["id2label"], origin)
    features = replace(KALDI128, num_mel_bins=config["num_mel_bins"])
    recipe = foreign_recipe(
        features="kaldi128" if features == KALDI128 else DATA,
        label_dim=len(labels),
        model_size=_model_size(config, origin),
        fstride=config["frequency_stride"],
        tstride=config["time_stride"],
        input_fdim=config["num_mel_bins"],
        input_tdim=config["max_length"],
        dataset_mean=float(extractor["mean"]),
        dataset_std=float(extractor["std"]),
        loss=_LOSS_OF_PROBLEM[config["problem_type"]],
    )
    return recipe, Norm(recipe.dataset_mean, recipe.dataset_std), labels, features


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _shape_of(model_size: str) -> dict[str, int]:
    shape = MODEL_SIZES[model_size][1]
    return {
        "hidden_size": shape["embed_dim"],
        "num_hidden_layers": shape["depth"],
        "num_attention_heads": shape["num_heads"],
        "intermediate_size": MLP_RATIO * shape["embed_dim"],
    }


def _model_size(config: Mapping[str, Any], origin: object) -> str:
    """The size of this shape. base224 and base384 have the same shape; the result is base384, which was published."""
    shape = {key: config[key] for key in _shape_of("base384")}
    for model_size in reversed(MODEL_SIZES):
        if shape == _shape_of(model_size):
            return model_size
    given = ", ".join(f"{key} {value!r}" for key, value in shape.items())
    raise DataError(f"{origin}: {given}; only the shapes of {', '.join(MODEL_SIZES)} can be read")


def _labels(id2label: Any, origin: object) -> LabelVocabulary:
    if not isinstance(id2label, dict) or set(id2label) != {str(i) for i in range(len(id2label))}:
        raise DataError(f"{origin}: the keys of id2label are not 0, 1, 2, …; give each class its index")
    names = tuple(id2label[str(i)] for i in range(len(id2label)))
    if not all(isinstance(name, str) for name in names):
        raise DataError(f"{origin}: a name in id2label is not text; give each class a name")
    return vocabulary_of(names)


def distinct_names(labels: LabelVocabulary) -> list[str]:
    """Display names. If several classes have the same name, the MID is appended, so that `label2id` has all classes."""
    times = Counter(labels.names)
    shown = [n if times[n] == 1 else f"{n} ({mid})" for mid, n in zip(labels.mids, labels.names, strict=True)]
    return shown if len(set(shown)) == len(shown) else list(labels.mids)
