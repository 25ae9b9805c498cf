"""A Hugging Face folder and our model compute the same, in both directions, compared with `transformers`."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification, pipeline

from ast_core import ASTModel
from ast_core.batch import Norm, normalise
from ast_core.checkpoints import (
    ModelConfig,
    load_model,
    load_original,
    read_checkpoint,
    save_huggingface,
    save_model,
    save_original,
)
from ast_core.checkpoints.huggingface import from_configs, to_configs
from ast_core.checkpoints.published import speechcommands_labels
from ast_core.errors import ConfigError, DataError
from ast_core.fbank import fbank
from ast_core.features import KALDI128, FeatureSettings
from ast_core.labels import LabelVocabulary, audioset_labels, fsd50k_labels
from ast_core.models import create_model
from ast_core.weight_files import read_weights
from tests import reference
from tests.ast_core import hostile, small

EPS_TOLERANCE = 1e-4
"""Relative to the logits' spread. Measured: 1e-5, as the classifier's epsilon is 1e-6 or 1e-12, not 1e-5."""
SCORE_TOLERANCE = 1e-5
"""Difference of scores between 0 and 1. It includes the difference of two fbank implementations."""
LABELS = LabelVocabulary(tuple("/m/" + c for c in "abcde"), ("Speech, man", "“Ping”", "Éclair", "犬", "Tab\there"))
CONFIG = ModelConfig(recipe=small.recipe(lr=3e-5, dataset_mean=-4.0, dataset_std=4.5), norm=small.NORM, labels=LABELS)


@pytest.fixture(scope="module")
def original() -> dict[str, Tensor]:
    """A checkpoint as the reference implementation writes it."""
    weights = reference.draw_all(reference.original_shapes(small.model()), "hugging")
    return {f"module.{key}": value for key, value in weights.items()}


@pytest.fixture(scope="module")
def model(original: dict[str, Tensor]) -> ASTModel:
    return load_original(small.model(), original).eval()


@pytest.fixture
def folder(tmp_path: Path, model: ASTModel) -> Path:
    save_huggingface(tmp_path / "hf", model.state_dict(), CONFIG)
    return tmp_path / "hf"


def logits(model: Callable[[Tensor], Any]) -> Tensor:
    with torch.no_grad():
        out = model(normalise(small.log_mel(4), small.NORM.mean, small.NORM.std))
    return out if isinstance(out, Tensor) else out.logits


def in_transformers(folder: Path) -> ASTForAudioClassification:
    model, loaded = ASTForAudioClassification.from_pretrained(folder, output_loading_info=True)
    assert [
        key for key, problems in loaded.items() if problems
    ] == []  # no key is missing or surplus, and all shapes match
    return model


def edit(folder: Path, name: str, **changes: Any) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewrite_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def test_a_round_trip_through_all_formats_changes_no_bit(tmp_path: Path, original: dict[str, Tensor]):
    torch.save(original, tmp_path / "a.pth")
    first, config = read_checkpoint(tmp_path / "a.pth", recipe=CONFIG.recipe, labels=LABELS, norm=small.NORM)
    save_model(tmp_path / "ours", first.state_dict(), config)
    second, config = load_model(tmp_path / "ours")
    save_huggingface(tmp_path / "hf", second.state_dict(), config)
    third, config = read_checkpoint(tmp_path / "hf")
    save_model(tmp_path / "again", third.state_dict(), config)
    fourth, config = read_checkpoint(tmp_path / "again")
    save_original(tmp_path / "z.pth", fourth.state_dict())
    assert config == CONFIG
    back = read_weights(tmp_path / "z.pth")
    assert back.keys() == original.keys()
    assert [k for k in original if "v.head" not in k and not torch.equal(back[k], original[k])] == []
    expected = logits(load_original(small.model(), original).eval())
    assert all(torch.equal(logits(stop), expected) for stop in (first, second, third, fourth))


def test_transformers_loads_our_folder_strictly_and_gives_our_logits(tmp_path: Path):
    recipe = small.recipe(fstride=10, tstride=14)
    model = create_model(**recipe.model_args()).eval()
    load_original(model, reference.draw_all(reference.original_shapes(model), "strides"))
    save_huggingface(tmp_path, model.state_dict(), replace(CONFIG, recipe=recipe))
    theirs, expected = in_transformers(tmp_path), logits(model)
    assert (logits(theirs) - expected).abs().max() < EPS_TOLERANCE * expected.std()
    theirs.classifier.layernorm.eps = 1e-5  # a folder has only one epsilon
    assert (logits(theirs) - expected).abs().max() < 5e-6 * expected.std()


@pytest.mark.parametrize(("eps", "weights_file"), [(1e-12, "model.safetensors"), (1e-6, "pytorch_model.bin")])
def test_a_model_of_transformers_gives_the_same_logits_in_ours(tmp_path: Path, eps: float, weights_file: str):
    torch.manual_seed(1)
    settings = ASTConfig(
        hidden_size=192,
        num_attention_heads=3,
        intermediate_size=768,
        frequency_stride=16,
        time_stride=12,
        max_length=64,
        layer_norm_eps=eps,
        id2label={0: "dog", 1: "cat", 2: "犬"},
    )
    theirs = ASTForAudioClassification(settings).eval()
    for parameter in theirs.parameters():
        fan_in = parameter[0].numel() if parameter.ndim in (2, 4) else 100
        parameter.data.add_(torch.randn_like(parameter) / fan_in**0.5)  # layer norm weights stay about 1
    theirs.save_pretrained(tmp_path)
    ASTFeatureExtractor(max_length=64, mean=small.NORM.mean, std=small.NORM.std).save_pretrained(tmp_path)
    if weights_file != "model.safetensors":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / weights_file)
        (tmp_path / "model.safetensors").unlink()
    ours, config = read_checkpoint(tmp_path)
    expected = logits(theirs)
    assert (logits(ours) - expected).abs().max() < EPS_TOLERANCE * expected.std()
    assert (config.labels.names, config.norm) == (("dog", "cat", "犬"), small.NORM)
    recipe = config.recipe
    assert (recipe.model_size, recipe.fstride, recipe.tstride, recipe.input_tdim) == ("tiny224", 16, 12, 64)
    assert not ours.training


def test_the_weight_file_has_the_metadata_that_transformers_4_needs(folder: Path):
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_query_key_and_value_are_not_swapped(folder: Path, model: ASTModel):
    written = load_file(folder / "model.safetensors")
    for i, part in enumerate(("query", "key", "value")):
        theirs = written[f"audio_spectrogram_transformer.encoder.layer.7.attention.attention.{part}.weight"]
        assert torch.equal(theirs, model.v.blocks[7].attn.qkv.weight[192 * i : 192 * (i + 1)])


def test_a_folder_saved_again_by_transformers_keeps_mids_norm_and_recipe(folder: Path, tmp_path: Path):
    in_transformers(folder).save_pretrained(tmp_path / "again")
    ASTFeatureExtractor.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert read_checkpoint(tmp_path / "again")[1] == CONFIG


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("config.json", {"id2label": {str(i): name for i, name in enumerate("vwxyz")}}),
        ("config.json", {"problem_type": "single_label_classification"}),
        ("preprocessor_config.json", {"mean": -5.0}),
        ("config.json", {"ast_ray": {"recipe": {"no": "such key"}}}),
        ("config.json", {"ast_ray": None}),
    ],
)
def test_our_config_is_ignored_if_the_folder_was_changed(folder: Path, name: str, changes: dict[str, Any]):
    edit(folder, name, **changes)
    config = read_checkpoint(folder)[1]
    assert config.recipe.lr != CONFIG.recipe.lr
    names = tuple("vwxyz") if "id2label" in changes else LABELS.names
    assert config.labels == LabelVocabulary.from_names(names)
    assert config.norm.mean == changes.get("mean", -4.0)
    assert config.recipe.loss == ("CE" if "problem_type" in changes else "BCE")


@pytest.mark.parametrize("vocabulary", [audioset_labels(), speechcommands_labels(), fsd50k_labels()])
def test_published_names_in_their_order_get_their_mids(vocabulary: LabelVocabulary):
    config, extractor = to_configs(small.recipe(label_dim=len(vocabulary)), small.NORM, vocabulary)
    assert from_configs(config, extractor, origin="here")[2] == vocabulary
    swapped = config["id2label"] | {"0": config["id2label"]["1"], "1": config["id2label"]["0"]}
    other = from_configs(config | {"id2label": swapped}, extractor, origin="here")[2]
    assert other.mids == other.names == (vocabulary.names[1], vocabulary.names[0], *vocabulary.names[2:])


def test_missing_keys_of_a_hub_config_have_the_defaults_of_transformers():
    names = {str(i): name for i, name in enumerate(audioset_labels().names)}
    config = {"model_type": "audio-spectrogram-transformer", "id2label": names}
    recipe, norm, labels, features = from_configs(config, {}, origin="hub")
    assert features == KALDI128
    expected = ASTConfig(), ASTFeatureExtractor()
    assert (recipe.fstride, recipe.tstride) == (expected[0].frequency_stride, expected[0].time_stride)
    assert (recipe.input_tdim, recipe.input_fdim) == (expected[0].max_length, expected[0].num_mel_bins)
    assert (recipe.model_size, recipe.loss, recipe.precision) == ("base384", "BCE", "fp32")
    assert norm == Norm(expected[1].mean, expected[1].std) == Norm(-4.2677393, 4.5689974)
    assert labels == audioset_labels()


def test_repeated_display_names_are_made_distinct_and_restored(tmp_path: Path, model: ASTModel):
    labels = LabelVocabulary(tuple("abcde"), ("dog", "cat", "dog", "bird", "dog"))
    save_huggingface(tmp_path, model.state_dict(), replace(CONFIG, labels=labels))
    theirs = in_transformers(tmp_path).config
    assert len(theirs.label2id) == len(set(theirs.id2label.values())) == theirs.num_labels == 5
    assert all(theirs.label2id[name] == i for i, name in theirs.id2label.items())
    assert (theirs.id2label[1], theirs.id2label[2]) == ("cat", "dog (c)")
    assert read_checkpoint(tmp_path)[1].labels == labels


def test_colliding_names_are_replaced_by_the_mids():
    labels = LabelVocabulary(("a", "b", "c"), ("dog", "dog", "dog (a)"))
    config, extractor = to_configs(small.recipe(label_dim=3), replace(small.NORM, divisor=1.0), labels)
    assert extractor["std"] == small.NORM.std / 2  # its feature extractor divides by 2 std
    assert config["label2id"] == {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize("loss", ["BCE", "CE"])
def test_the_pipeline_of_transformers_gives_our_scores(tmp_path: Path, model: ASTModel, loss: str):
    config = replace(CONFIG, recipe=replace(CONFIG.recipe, loss=loss))
    save_huggingface(tmp_path, model.state_dict(), config)
    classify = pipeline("audio-classification", model=str(tmp_path))
    for num_samples in (8_000, 16_000):  # padded with 20 frames, and cut
        waveform = np.random.default_rng(3).normal(0, 0.1, num_samples).astype(np.float32)
        scores = {row["label"]: row["score"] for row in classify(waveform, top_k=5)}
        log_mel = fbank(torch.from_numpy(waveform - waveform.mean()))[:64]
        padded = torch.nn.functional.pad(log_mel, (0, 0, 0, 64 - len(log_mel)))
        with torch.no_grad():
            out = model(normalise(padded, small.NORM.mean, small.NORM.std)[None])[0]
        expected = out.sigmoid() if loss == "BCE" else out.softmax(dim=0)
        assert expected.std() > 0.05  # the scores differ between classes
        assert [scores[name] for name in LABELS.names] == pytest.approx(expected.tolist(), abs=SCORE_TOLERANCE)
    assert classify.feature_extractor.sampling_rate == KALDI128.sample_rate_hz
    assert read_checkpoint(tmp_path)[1] == config


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("config.json", "patch_size", 8),
        ("config.json", "hidden_act", "relu"),
        ("config.json", "qkv_bias", False),
        ("config.json", "layer_norm_eps", 1e-3),
        ("config.json", "hidden_size", 256),
        ("config.json", "num_hidden_layers", 6),
        ("config.json", "num_attention_heads", 6),
        ("config.json", "intermediate_size", 100),
        ("config.json", "frequency_stride", 20),
        ("config.json", "time_stride", "16"),
        ("config.json", "max_length", 128),  # the preprocessor has 64
        ("config.json", "num_mel_bins", 8),
        ("config.json", "problem_type", "regression"),
        ("config.json", "problem_type", ["regression"]),
        ("config.json", "id2label", {"0": "a", "2": "b"}),
        ("config.json", "id2label", ["a", "b"]),
        ("config.json", "id2label", {"0": 7}),
        ("config.json", "model_type", "wav2vec2"),
        ("preprocessor_config.json", "do_normalize", False),
        ("preprocessor_config.json", "sampling_rate", 44100),
        ("preprocessor_config.json", "feature_extractor_type", "Wav2Vec2FeatureExtractor"),
        ("preprocessor_config.json", "num_mel_bins", 64),
        ("preprocessor_config.json", "max_length", 32),
        ("preprocessor_config.json", "mean", "low"),
        ("preprocessor_config.json", "std", 0),
    ],
)
def test_an_unsupported_hugging_face_setting_is_named(folder: Path, name: str, setting: str, value: Any):
    edit(folder, name, **{setting: value})
    with pytest.raises(DataError, match=rf"hf.*{setting}"):
        read_checkpoint(folder)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "model.safetensors"])
def test_a_folder_without_one_of_its_files_names_it(folder: Path, name: str):
    (folder / name).unlink()
    with pytest.raises(DataError, match=rf"hf .*{name}"):
        read_checkpoint(folder)


def test_a_missing_surplus_or_misshapen_tensor_is_refused(folder: Path):
    query = "audio_spectrogram_transformer.encoder.layer.3.attention.attention.query.bias"
    piece = load_file(folder / "model.safetensors")[query]
    rewrite_weights(folder, lambda state: state.pop(query))
    with pytest.raises(DataError, match=r"missing \['v\.blocks\.3\.attn\.qkv\.bias'\]"):
        read_checkpoint(folder)
    rewrite_weights(folder, lambda state: state.update({query: piece, "extra.weight": piece.clone()}))
    with pytest.raises(DataError, match=r"missing \[\], surplus \['extra\.weight'\]"):
        read_checkpoint(folder)
    rewrite_weights(folder, lambda state: (state.pop("extra.weight"), state.update({query: piece[:-1]})))
    with pytest.raises(DataError, match=r"v\.blocks\.3\.attn\.qkv\.bias is \(575,\), not \(576,\)"):
        read_checkpoint(folder)


def test_a_pickle_in_a_hugging_face_folder_is_not_executed(folder: Path, tmp_path: Path):
    (folder / "model.safetensors").unlink()
    evil = {"classifier.dense.bias": hostile.MakesFolder(tmp_path / "broken-in")}
    hostile.as_torch_archive(evil, folder / "pytorch_model.bin")
    with pytest.raises(DataError, match="has no weights that can be read safely"):
        read_checkpoint(folder)
    assert not (tmp_path / "broken-in").exists()


def test_features_that_the_extractor_cannot_compute_are_refused(tmp_path: Path):
    features = FeatureSettings(sample_rate_hz=8000, num_mel_bins=64)
    config = replace(CONFIG, recipe=replace(CONFIG.recipe, input_fdim=64), features=features)
    with pytest.raises(ConfigError, match=r"sample_rate_hz is 8000, not 16000; use ours$"):
        save_huggingface(tmp_path, {}, config)


def test_another_number_of_mel_bins_survives_the_round_trip():
    features = FeatureSettings(num_mel_bins=64)
    written = to_configs(replace(CONFIG.recipe, input_fdim=64), CONFIG.norm, CONFIG.labels, features)
    recipe, *_, read = from_configs(*written, origin="test")
    assert (read, recipe.features, recipe.input_fdim) == (features, "data", 64)
