"""The export job converts any checkpoint to any format, local or remote, without Ray and without overwriting."""

import json
import re
from pathlib import Path

import fsspec
import onnxruntime
import pyarrow.fs as pafs
import pytest
import ray
import torch
import yaml
from torch import Tensor

from ast_core import ASTModel
from ast_core.calibration import CalibrationMap, ClassCalibration, ModelCalibration, Threshold
from ast_core.checkpoints import ModelConfig, read_checkpoint, save_huggingface, save_model, save_original
from ast_core.errors import ConfigError, DataError
from ast_core.labels import LabelVocabulary
from ast_core.models import create_model
from ast_core.recipe import Recipe
from ast_core.weight_files import read_weights
from jobs import export
from jobs.common import run_job
from pipeline import storage
from pipeline.dataset import PreparedDataset
from pipeline.train import models
from pipeline.train.evaluation.scoring import evaluate, score_metrics
from pipeline.train.onnx_export import OnnxForm
from tests.ast_core import small

LABELS = LabelVocabulary(tuple(f"/m/{c}" for c in "abcde"), ("Speech, man", "“Ping”", "Éclair", "犬", "dog"))
CONFIG = ModelConfig(recipe=small.recipe(lr=3e-5), norm=small.NORM, labels=LABELS)


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the job started Ray")

    monkeypatch.setattr(ray, "init", refuse)


@pytest.fixture(scope="module")
def model() -> ASTModel:
    return small.model(seed=3).eval()


@pytest.fixture
def run(tmp_path: Path, model: ASTModel) -> Path:
    """A run as after training: `best` is the model, `initial` is another one."""
    save_model(tmp_path / "run" / "best", model.state_dict(), CONFIG)
    save_model(tmp_path / "run" / "initial", small.model(seed=4).state_dict(), CONFIG)
    (tmp_path / "run" / "config.json").write_text('{"recipe": {}, "data": "data"}')
    return tmp_path / "run"


def same(state: dict[str, Tensor], model: ASTModel) -> bool:
    expected = model.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)


def job(checkpoint: object, output_format: str, output: object, *more: str) -> int:
    return export.main(["--checkpoint", str(checkpoint), "--format", output_format, "--output", str(output), *more])


@pytest.mark.parametrize("output_format", ["ours", "huggingface"])
def test_best_model_of_a_run_is_exported_as_a_folder(
    run: Path, tmp_path: Path, model: ASTModel, output_format: str, capsys: pytest.CaptureFixture[str]
):
    assert job(run, output_format, tmp_path / "out") == 0
    again, config = read_checkpoint(tmp_path / "out")
    assert same(again.state_dict(), model)
    assert config == CONFIG
    assert ("model_type" in json.loads((tmp_path / "out" / "config.json").read_text())) == (
        output_format == "huggingface"
    )
    printed = capsys.readouterr().out
    shape = "input_tdim 64, input_fdim 128, model_size tiny224, fstride 16, tstride 16"
    assert f"wrote {tmp_path / 'out'}: ast, 5 classes, {shape}" in printed
    use = {"ours": "load_model(", "huggingface": 'transformers.pipeline("audio-classification", model='}
    assert f'{use[output_format]}"{tmp_path / "out"}")' in printed


def test_best_model_of_a_run_is_exported_in_the_reference_format(run: Path, tmp_path: Path, model: ASTModel):
    assert job(run, "original", tmp_path / "new" / "out.pth") == 0
    written = read_weights(tmp_path / "new" / "out.pth")
    assert len(written) == len(model.state_dict()) + 4
    assert same({key[7:]: value for key, value in written.items() if ".head" not in key}, model)


def test_hugging_face_folder_is_exported_as_onnx(tmp_path: Path, model: ASTModel):
    save_huggingface(tmp_path / "hf", model.state_dict(), CONFIG)
    assert job(tmp_path / "hf", "onnx", tmp_path / "out.onnx") == 0
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = model(small.log_mel(2))
    (logits,) = session.run(["logits"], {"fbank": small.log_mel(2).numpy()})
    assert (torch.from_numpy(logits) - expected).abs().max() < 1e-4 * expected.std()


def test_reference_file_of_unusual_shape_takes_a_recipe_and_labels(tmp_path: Path, model: ASTModel):
    save_original(tmp_path / "mine.pth", model.state_dict())
    recipe = small.recipe(dataset_mean=-5.5, fstride=10).to_dict()
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "mine.csv").write_text(LABELS.to_csv())
    given = ["--recipe", str(tmp_path / "mine.yaml"), "--labels", str(tmp_path / "mine.csv")]
    with pytest.raises(DataError, match=r"mine\.pth .*v\.pos_embed is \(1, 34, 192\), not \(1, 50, 192\)"):
        job(tmp_path / "mine.pth", "ours", tmp_path / "out", *given)
    assert job(tmp_path / "mine.pth", "ours", tmp_path / "out", *given, "--fstride", "16", "--dataset_std=3") == 0
    again, config = read_checkpoint(tmp_path / "out")
    assert same(again.state_dict(), model)
    assert (config.labels, config.recipe.fstride, config.norm.mean, config.norm.std) == (LABELS, 16, -5.5, 3.0)
    with pytest.raises(DataError, match=r"mine\.pth .* give its recipe and its labels"):
        job(tmp_path / "mine.pth", "ours", tmp_path / "other")
    with pytest.raises(ConfigError, match="give them only for a weight file"):
        job(tmp_path / "out", "huggingface", tmp_path / "other", *given)
    assert not (tmp_path / "other").exists()


def test_key_without_recipe_and_unknown_key_are_refused(run: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="--fstride is not an option; recipe keys need --recipe"):
        job(run, "ours", tmp_path / "out", "--fstride", "16")
    with pytest.raises(ConfigError, match="did you mean fstride"):
        job(run, "ours", tmp_path / "out", "--recipe", "speechcommands", "--fstrid", "16")


def test_force_replaces_a_model_folder_that_a_kill_left_incomplete(run: Path, tmp_path: Path, model: ASTModel):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ConfigError, match="--force to replace a model folder"):
        job(run, "huggingface", tmp_path / "out")
    assert job(run, "huggingface", tmp_path / "out", "--force") == 0
    assert same(read_checkpoint(tmp_path / "out")[0].state_dict(), model)


def test_paths_of_initial_weights_are_not_exported(tmp_path: Path, model: ASTModel):
    recipe = small.recipe(imagenet_pretrain=True, imagenet_weights="mine/deit.pth")
    save_model(tmp_path / "model", model.state_dict(), ModelConfig(recipe, small.NORM, LABELS))
    for output_format in ("ours", "huggingface"):
        assert job(tmp_path / "model", output_format, tmp_path / output_format) == 0
        assert "mine/deit.pth" not in (tmp_path / output_format / "config.json").read_text()


def test_existing_output_is_not_overwritten(run: Path, tmp_path: Path):
    folder, file = tmp_path / "folder", tmp_path / "out.pth"
    folder.mkdir()
    (folder / "precious.txt").write_text("mine")
    file.write_text("mine")
    for output_format in ("ours", "huggingface"):
        for output in (folder, file):
            for more in ([], ["--force"]):
                with pytest.raises(ConfigError, match="exists and is not empty; give a new folder"):
                    job(run, output_format, output, *more)
    with pytest.raises(ConfigError, match="--force to replace"):
        job(run, "original", file)
    assert (file.read_text(), [path.name for path in folder.iterdir()]) == ("mine", ["precious.txt"])


def test_empty_folder_is_filled_and_force_replaces_a_file(run: Path, tmp_path: Path, model: ASTModel):
    (tmp_path / "empty").mkdir()
    assert job(run, "ours", tmp_path / "empty") == 0
    assert same(read_checkpoint(tmp_path / "empty")[0].state_dict(), model)
    (tmp_path / "out.pth").write_text("older")
    assert job(run, "original", tmp_path / "out.pth", "--force") == 0
    assert "module.v.cls_token" in read_weights(tmp_path / "out.pth")
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(ConfigError, match="exists; give another --output"):
        job(run, "original", tmp_path / "folder.pth", "--force")


@pytest.mark.parametrize(
    ("output_format", "suffix"), [("original", ".pth"), ("onnx", ".onnx"), ("onnx-waveform", ".onnx")]
)
def test_format_that_is_one_file_requires_its_suffix(run: Path, tmp_path: Path, output_format: str, suffix: str):
    with pytest.raises(ConfigError, match=rf"a name that ends in \{suffix}"):
        job(run, output_format, tmp_path / "out.safetensors")


def test_run_without_a_best_model_is_no_checkpoint(run: Path, tmp_path: Path):
    (run / "best" / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"neither a file of weights, nor a folder .* nor a run with a best model"):
        job(run, "ours", tmp_path / "out")


def test_error_is_one_line_and_exit_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--checkpoint", str(tmp_path / "nothing"), "--format", "ours", "--output", str(tmp_path / "out")]
    assert run_job(export.main, arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {tmp_path / 'nothing'} is neither")
    assert printed.count("\n") == 1


def test_help_names_the_formats_and_the_recipes():
    help_text = export.parser().format_help()
    assert all(word in help_text for word in ("ours", "original", "huggingface", "onnx", "audioset-full", "--force"))


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Fake object storage that gives no local paths."""
    memory = pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem("memory", skip_instance_cache=True)))
    local = storage.resolve
    monkeypatch.setattr(
        storage, "resolve", lambda uri: (memory, str(uri)[5:]) if str(uri).startswith("s3://") else local(uri)
    )
    return f"s3://{tmp_path.name}"


def test_checkpoint_and_output_can_be_on_object_storage(
    run: Path, bucket: str, model: ASTModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert job(run, "huggingface", f"{bucket}/run/best") == 0
    assert job(f"{bucket}/run", "original", f"{bucket}/out.pth") == 0
    assert 'torch.load("out.pth")' in capsys.readouterr().out
    given = {"recipe": CONFIG.recipe, "labels": LABELS, "norm": small.NORM}
    again, config = models.read(f"{bucket}/out.pth", **given)
    assert same(again.state_dict(), model)
    assert config == CONFIG
    assert job(f"{bucket}/run", "ours", tmp_path / "back") == 0
    assert read_checkpoint(tmp_path / "back")[1] == CONFIG
    with pytest.raises(ConfigError, match="exists; give another --output"):
        job(run, "original", f"{bucket}/out.pth")
    with pytest.raises(ConfigError, match="give a new folder"):
        job(run, "ours", f"{bucket}/run/best")


def test_error_about_a_remote_checkpoint_names_its_uri_and_not_the_copy(run: Path, bucket: str):
    storage.write_bytes(f"{bucket}/hf/config.json", b'{"model_type": "wav2vec2"}')
    storage.write_bytes(f"{bucket}/hf/preprocessor_config.json", b"{}")
    storage.write_bytes(f"{bucket}/hf/model.safetensors", b"")
    with pytest.raises(DataError, match=f"^{bucket}/hf: model_type is 'wav2vec2'"):
        models.read(f"{bucket}/hf")
    storage.write_bytes(f"{bucket}/broken.pth", b"<html>")
    with pytest.raises(DataError, match=f"^{bucket}/broken.pth has no weights"):
        models.read(f"{bucket}/broken.pth")


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder for `tone_data`, with a calibration."""
    recipe = Recipe(model="linear", hidden=64, input_tdim=48, label_dim=4, timem=0, freqm=0, precision="fp32")
    config = ModelConfig(recipe, small.NORM, LabelVocabulary.from_names([f"tone {i}" for i in range(4)]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = create_model(**recipe.model_args()).eval()
    folder = tmp_path_factory.mktemp("linear") / "model"
    save_model(folder, model.state_dict(), config)
    temperature = ClassCalibration(CalibrationMap("temperature", (3.0,)), Threshold(0.25, 1.0, 1.0), 20, True)
    models.write_calibration(str(folder), ModelCalibration((temperature,) * 4), *read_checkpoint(folder))
    return folder


def metadata_of(file: Path) -> dict[str, object]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}


def test_model_folder_has_the_calibration_and_force_removes_an_old_one(linear: Path, tmp_path: Path):
    out = tmp_path / "out"
    assert job(linear, "ours", out) == 0
    expected = models.read_calibration(str(linear), *read_checkpoint(linear))
    assert models.read_calibration(str(out), *read_checkpoint(out)) == expected
    assert job(linear, "ours", out, "--force", "--raw-scores") == 0
    assert models.read_calibration(str(out), *read_checkpoint(out)) is None


def test_waveform_file_with_int8_weights_says_what_they_cost(
    linear: Path, tone_data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    given = ["--quantize", "int8", "--data", tone_data, "--split", "eval"]
    assert job(linear, "onnx-waveform", tmp_path / "out.onnx", *given) == 0
    printed = capsys.readouterr().out
    found = re.search(r"int8: mAP ([\d.]+), with float32 ([\d.]+) \(([+-][\d.]+)\), on 21 clips of eval", printed)
    assert found, printed
    dataset = PreparedDataset.open(tone_data)
    clips = dataset.clips(["eval"])
    model, config = read_checkpoint(linear)
    scores = evaluate(model, clips, recipe=config.recipe, norm=config.norm, num_classes=4, device=torch.device("cpu"))
    assert float(found[2]) == pytest.approx(score_metrics(scores, clips).scalars()["map"], abs=1e-4)
    assert float(found[3]) == pytest.approx(float(found[1]) - float(found[2]), abs=2e-4)
    metadata = metadata_of(tmp_path / "out.onnx")
    assert (metadata["thresholds"], metadata["is_calibrated"]) == ([0.25] * 4, True)


@pytest.mark.parametrize(("given", "is_calibrated"), [([], True), (["--raw-scores"], False)])
def test_raw_scores_leave_the_calibration_out(
    linear: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], is_calibrated: bool
):
    def record(file: Path, checkpoint: str, model: object, config: object, form: OnnxForm) -> list[str]:
        file.write_text(str(form.calibration is not None))
        return []

    monkeypatch.setattr("pipeline.train.export.write_onnx", record)
    assert job(linear, "onnx-waveform", tmp_path / "out.onnx", *given) == 0
    assert (tmp_path / "out.onnx").read_text() == str(is_calibrated)


@pytest.mark.parametrize(
    ("output_format", "given", "said"),
    [
        ("ours", ["--quantize", "int8"], "--quantize is for --format onnx and onnx-waveform, not ours"),
        ("onnx", ["--raw-scores"], "--raw-scores is for --format ours and onnx-waveform, not onnx"),
        ("onnx", ["--quantize", "int8", "--data", "d"], "give --data and --split together, and only with --quantize"),
        ("onnx", ["--data", "d", "--split", "s"], "give --data and --split together, and only with --quantize"),
    ],
)
def test_options_that_do_not_fit_the_format_are_refused(
    linear: Path, tmp_path: Path, output_format: str, given: list[str], said: str
):
    with pytest.raises(ConfigError, match=said):
        job(linear, output_format, tmp_path / "out.onnx", *given)
