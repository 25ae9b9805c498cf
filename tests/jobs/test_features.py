"""Features of other settings than kaldi128: prepared, trained, evaluated and exported, and what refuses them."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torchaudio

from ast_core.checkpoints import load_model
from ast_core.checkpoints.huggingface import to_configs
from ast_core.errors import ConfigError, DataError
from ast_core.features import FEATURES as NAMED
from ast_core.features import KALDI128, FeatureSettings
from ast_core.recipe import Recipe
from ast_core.tagging import tag
from jobs import evaluate, export, train
from jobs.prepare_audioset import main as prepare
from pipeline import dataset
from pipeline.dataset import PreparedDataset
from pipeline.inspect.checks import examine
from pipeline.prepare.audio.decode import decode_media
from tests import fakes

FEATURES = FeatureSettings(sample_rate_hz=32_000, num_mel_bins=64, frame_shift_ms=20.0)
OPTION = "{sample_rate_hz: 32000, num_mel_bins: 64, frame_shift_ms: 20}"
SPLITS = {"train": 8, "test": 4}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of clips of 0.7 s: tones of two pitches."""
    folder = tmp_path_factory.mktemp("tones")
    lines = ["path,labels,split"]
    for split, num_clips in SPLITS.items():
        for i in range(num_clips):
            pitch = ("low", "high")[i % 2]
            waveform = fakes.tone({"low": 400.0, "high": 3000.0}[pitch], 0.7) + fakes.noise(0.7, seed=i)
            name = fakes.write_media(folder / f"{split}{i}.m4a", 0.5 * waveform).name
            lines.append(f"{name},{pitch},{split}")
    (folder / "list.csv").write_text("\n".join(lines))
    return folder / "list.csv"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept") / "store"


@pytest.fixture(scope="module")
def data(local_ray: None, manifest: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    output = tmp_path_factory.mktemp("features") / "data"
    argv = ["--manifest", str(manifest), "--output", str(output), "--features", OPTION, "--keep-audio", str(store)]
    assert prepare(argv) == 0
    return str(output)


def training(data: str, run: Path, *more: str, recipe: Mapping[str, str] = fakes.LINEAR_RECIPE) -> list[str]:
    keys = [word for key, value in recipe.items() for word in (f"--{key}", value)]
    splits = ["--train-splits", "train", "--eval-splits", "test"]
    of_run = ["--output", str(run), "--num-workers", "0", "--epochs", "1"]
    return ["--recipe", "esc50", "--loss", "BCE", "--data", data, *splits, *of_run, *keys, *more]


@pytest.fixture(scope="module")
def run(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("features") / "run"
    keys = ["--features", "data", "--input_fdim", "64"]
    assert train.main(training(data, run, *keys, recipe=fakes.SMALL_RECIPE)) == 0
    return run


def test_a_data_set_records_its_features_and_holds_them(data: str, manifest: Path):
    opened = PreparedDataset.open(data)
    assert (opened.features, opened.splits) == (FEATURES, ["train", "test"])
    waveform, _ = decode_media(str(manifest.parent / "train0.m4a"), None, 0.0, None, features=FEATURES)
    assert len(waveform) == pytest.approx(0.7 * 32_000, abs=2100)  # the codec adds up to three of its frames
    rounded = np.rint(waveform * 32768) / 32768  # as kept audio
    kaldi = torchaudio.compliance.kaldi.fbank(
        torch.from_numpy(rounded - rounded.mean()).float().unsqueeze(0),
        **{"sample_frequency": 32_000, "num_mel_bins": 64, "frame_shift": 20.0},
        **{"htk_compat": True, "window_type": "hanning", "dither": 0.0},
    )
    stored = np.array(fakes.shard_rows(data)["train0"]["fbank"])
    assert stored.shape == kaldi.shape
    assert np.abs(stored - kaldi.numpy()).max() < 0.01  # float16


def test_the_doctor_takes_the_data_sets_own_features(data: str):
    findings = {(found.check, found.split): found for found in examine(PreparedDataset.open(data))}
    assert findings["features", ""].severity == "note"
    assert findings["features", ""].what.startswith("sample_rate_hz is 32000, not 16000, num_mel_bins is 64, not 128")
    assert findings["index", "train"].severity == findings["values", "train"].severity == "ok"


def test_a_run_records_the_features_and_its_model_tags_with_them(run: Path, data: str, tmp_path: Path):
    model, config = load_model(run / "best")
    assert config.features == FEATURES
    assert tag(model, config, fakes.tone(440.0, 0.7, 32_000)).shape == (2,)
    figures = tmp_path / "figures.json"
    of_split = ["--data", data, "--split", "test", "--bootstrap", "0", "--json", str(figures)]
    assert evaluate.main(["--checkpoint", str(run), *of_split]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert json.loads(figures.read_text())["map"] == pytest.approx(summary["map"], abs=1e-6)


def test_a_recipe_of_other_features_is_refused(data: str, tmp_path: Path):
    with pytest.raises(
        ConfigError,
        match=r"for the features kaldi128, .* has others: .*; prepare the data again with --features kaldi128, or set "
        "features data and input_fdim 64$",
    ):
        train.main(training(data, tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"input_fdim is 128, and .* has 64 mel bins; set input_fdim 64$"):
        train.main(training(data, tmp_path / "run", "--features", "data"))


def test_evaluation_on_other_features_is_refused(run: Path, tone_data: str, local_ray: None):
    with pytest.raises(
        DataError, match=r"trained on other features than .*: .*; prepare the data again with --feature"
    ):
        evaluate.main(["--checkpoint", str(run), "--data", tone_data, "--split", "eval"])


def test_starting_from_a_model_of_other_features_is_refused(run: Path, tone_data: str, tmp_path: Path):
    argv = training(tone_data, tmp_path / "run", "--init-from", str(run), recipe=fakes.SMALL_RECIPE)
    argv[argv.index("test")] = "eval"
    with pytest.raises(ConfigError, match=r"trained on other features than those of this data set: sample_rate_hz"):
        train.main(argv)


def test_exports_have_the_features_or_refuse_them(run: Path, tmp_path: Path):
    assert export.main(["--checkpoint", str(run), "--format", "ours", "--output", str(tmp_path / "ours")]) == 0
    assert load_model(tmp_path / "ours")[1].features == FEATURES
    with pytest.raises(ConfigError, match="feature extractor of Hugging Face cannot compute these features"):
        export.main(["--checkpoint", str(run), "--format", "huggingface", "--output", str(tmp_path / "hf")])


def test_a_second_preparation_with_other_features_is_refused(data: str, manifest: Path):
    argv = ["--manifest", str(manifest), "--output", data]
    with pytest.raises(
        DataError,
        match=r"contains other features than these: sample_rate_hz is 16000, not 32000, .*; give another --output, or "
        """--features '{"sample_rate_hz": 32000, "num_mel_bins": 64, "frame_shift_ms": 20.0}'$""",
    ):
        prepare([*argv, "--dry-run"])
    (Path(data) / "dataset.json").rename(Path(data) / "moved")  # as if the run had been interrupted
    try:
        with pytest.raises(DataError, match="contains other features than these"):
            prepare([*argv, "--dry-run"])
    finally:
        (Path(data) / "moved").rename(Path(data) / "dataset.json")


def test_kept_audio_gives_other_features_of_its_rate_or_a_lower_one(data: str, store: Path, tmp_path: Path):
    again = ["--manifest", str(store), "--output", str(tmp_path / "same"), "--features", OPTION]
    assert prepare(again) == 0
    assert fakes.shard_rows(tmp_path / "same") == fakes.shard_rows(data)
    lower = ["--manifest", str(store), "--output", str(tmp_path / "lower"), "--keep-audio", str(tmp_path / "kept")]
    assert prepare(lower) == 0
    assert PreparedDataset.open(str(tmp_path / "lower")).features == KALDI128
    with pytest.raises(
        DataError, match=r"kept keeps audio at 16000 Hz, and these features need 32000 Hz; prepare from"
    ):
        prepare(["--manifest", str(tmp_path / "kept"), "--output", str(tmp_path / "up"), "--features", OPTION])
    with pytest.raises(DataError, match=r"keeps audio at 32000 Hz, this run has 16000 Hz; give another --keep-audio"):
        prepare(["--manifest", str(store), "--output", str(tmp_path / "mixed"), "--keep-audio", str(store)])


@pytest.fixture(scope="module")
def by_name(data: str, store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Data sets of both named settings, from the same kept audio."""
    folder = tmp_path_factory.mktemp("named")
    for name in NAMED:
        assert prepare(["--manifest", str(store), "--output", str(folder / name), "--features", name]) == 0
    return {name: str(folder / name) for name in NAMED}


@pytest.mark.parametrize(("name", "other"), [("small64", "kaldi128"), ("kaldi128", "small64")])
def test_one_kept_audio_trains_both_features_and_each_refuses_the_others_recipe(
    name: str, other: str, by_name: dict[str, str], tmp_path: Path
):
    keys = ["--features", name, "--input_fdim", str(NAMED[name].num_mel_bins)]
    assert train.main(training(by_name[name], tmp_path / "run", *keys)) == 0
    assert load_model(tmp_path / "run" / "best")[1].features == NAMED[name]
    with pytest.raises(ConfigError, match=rf"^the recipe is for the features {name}, .* again with --features {name},"):
        train.main(training(by_name[other], tmp_path / "other", *keys))


def test_report_doctor_and_exports_know_that_small64_is_in_decibels(by_name: dict[str, str], tmp_path: Path):
    opened = PreparedDataset.open(by_name["small64"])
    assert opened.info["features"]["log_scale"] == "decibels"
    report = (Path(opened.uri) / "report.html").read_text()
    assert "log-mel in dB, from −100 (digital silence, dark) to 26 (bright)" in report
    findings = {(found.check, found.split): found for found in examine(opened)}
    assert findings["features", ""].what.startswith("kind is mel_db, not kaldi_fbank, num_mel_bins is 64, not 128")
    assert findings["values", "train"].severity == "ok"
    with pytest.raises(ConfigError, match="cannot compute these features: kind is mel_db, not kaldi_fbank"):
        to_configs(Recipe(label_dim=2, input_fdim=64), opened.norm(["train"]), opened.labels, opened.features)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("kaldi64", "no features 'kaldi64'; use kaldi128 or small64, the path of a YAML file, or a mapping in braces"),
        ("{num_mel_bins: 2}", "--features: num_mel_bins is 2; use 4 to 1024"),
        ("{mel_bins: 64}", "--features: no feature setting 'mel_bins'; use num_mel_bins"),
    ],
)
def test_features_that_are_not_settings_are_refused(option: str, message: str, manifest: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=f"^{message}"):
        prepare(["--manifest", str(manifest), "--output", str(tmp_path / "data"), "--features", option])


def test_features_may_be_a_file_such_as_the_features_of_a_dataset_json(manifest: Path, tmp_path: Path):
    (tmp_path / "features.yaml").write_text(json.dumps(FeatureSettings(num_mel_bins=40).to_dict()))
    argv = ["--manifest", str(manifest), "--output", str(tmp_path / "data"), "--dry-run"]
    assert prepare([*argv, "--features", str(tmp_path / "features.yaml")]) == 0


def test_a_data_set_of_an_earlier_version_is_read_and_extended(tmp_path: Path):
    """Its dataset.json lacks the upper frequency and the log scale, and its shards have no settings."""
    output = str(tmp_path / "data")
    fakes.write_data(output, splits=[("train", 4)])
    info = dataset.read_info(output)
    assert info is not None
    info["features"] = {
        key: value for key, value in info["features"].items() if key not in ("high_freq_hz", "log_scale")
    }
    info["features"]["kind"] = "kaldi log-mel fbank"
    dataset.write_info(output, info)
    for shard in Path(output).glob("train/shards/*"):
        dataset.write_table(str(shard), pq.read_table(shard).replace_schema_metadata(None), row_group_size=16)
    opened = PreparedDataset.open(output)
    assert opened.features == KALDI128
    before = fakes.shard_rows(output)
    fakes.write_data(output, splits=[("eval", 4)])  # publishing records the new name
    assert fakes.shard_rows(output).items() > before.items()
    assert PreparedDataset.open(output).splits == ["train", "eval"]
