"""The ONNX file computes the same as PyTorch and describes its use; otherwise it is not written."""

import json
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from ast_core import ASTModel
from ast_core.checkpoints import ModelConfig, load_original
from ast_core.checkpoints.onnx import save_onnx
from ast_core.errors import ConfigError, DataError
from ast_core.labels import LabelVocabulary
from tests import reference
from tests.ast_core import small

TOLERANCE = 1e-5
"""Relative to the logits' spread. Measured: 2e-6."""
LABELS = LabelVocabulary(tuple("abcde"), ("Speech, man", "“Ping”", "Éclair", "犬", "Tab\there"))
CONFIG = ModelConfig(recipe=small.recipe(), norm=small.NORM, labels=LABELS)


@pytest.fixture(scope="module")
def model() -> ASTModel:
    model = small.model()
    del model.v.blocks[2:]  # tracing takes a second for every two blocks
    return load_original(model, reference.draw_all(reference.original_shapes(model), "onnx")).eval()


@pytest.fixture(scope="module")
def exported(model: ASTModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.onnx.ONNXProgram]:
    """The file and its program. Both are made once, because tracing takes seconds."""
    file, programs = tmp_path_factory.mktemp("onnx") / "tagger.onnx", []

    def recorded(*args: object, **kwargs: object) -> torch.onnx.ONNXProgram:
        programs.append(export(*args, **kwargs))
        return programs[0]

    export = torch.onnx.export
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", recorded)
        assert save_onnx(file, model, CONFIG) < TOLERANCE
    return file, programs[0]


@pytest.fixture
def file(exported: tuple[Path, torch.onnx.ONNXProgram]) -> Path:
    return exported[0]


@pytest.mark.parametrize("num_clips", [1, 2, 5])
def test_onnx_runtime_gives_the_models_logits_for_any_batch_size(file: Path, model: ASTModel, num_clips: int):
    fbank = small.log_mel(num_clips, seed=num_clips) / 9
    with torch.no_grad():
        expected = model(fbank)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"fbank": fbank.numpy()})
    assert logits.shape == (num_clips, small.NUM_CLASSES)
    assert (torch.from_numpy(logits) - expected).abs().max() < TOLERANCE * expected.std()


def test_the_file_contains_weights_norm_labels_and_shape(file: Path, model: ASTModel):
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert file.stat().st_size > 4 * sum(parameter.numel() for parameter in model.parameters())
    exported = onnx.load(file)
    onnx.checker.check_model(exported)
    metadata = {entry.key: json.loads(entry.value) for entry in exported.metadata_props}
    assert metadata["norm"] == {"mean": small.NORM.mean, "std": small.NORM.std, "divisor": 2.0}
    assert [(label["mid"], label["display_name"]) for label in metadata["labels"]] == list(
        zip(LABELS.mids, LABELS.names, strict=True)
    )
    assert metadata["recipe"] == {"model": "ast", "label_dim": 5, "input_fdim": 128} | small.SHAPE


@pytest.mark.parametrize("wrong_by", [1e-2, float("nan")])
def test_a_file_with_other_logits_is_not_kept(
    tmp_path: Path, exported: tuple[Path, torch.onnx.ONNXProgram], monkeypatch: pytest.MonkeyPatch, wrong_by: float
):
    (tmp_path / "old.onnx").write_text("an older file")
    other = load_original(small.model(), reference.draw_all(reference.original_shapes(small.model()), "onnx")).eval()
    with torch.no_grad():
        other.v.blocks[3].norm1.bias[7] += wrong_by
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: exported[1])
    with pytest.raises(DataError, match=r"off by .* of their spread"):
        save_onnx(tmp_path / "old.onnx", other, CONFIG)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old.onnx", "an older file")]


@pytest.mark.parametrize("name", ["onnx", "onnxruntime", "onnxscript"])
def test_missing_onnx_packages_are_refused_with_what_to_install(
    tmp_path: Path, model: ASTModel, monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"\({name}\).*pip install -e '\.\[export\]'"):
        save_onnx(tmp_path / "new.onnx", model, CONFIG)
    assert list(tmp_path.iterdir()) == []
