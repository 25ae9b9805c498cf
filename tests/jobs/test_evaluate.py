"""Evaluation of any checkpoint or ensemble on the classes of a data set."""

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch

from ast_core import ASTModel
from ast_core.checkpoints import ModelConfig, save_huggingface, save_model
from ast_core.checkpoints.published import speechcommands_labels
from ast_core.errors import ConfigError, DataError, UserError
from ast_core.features import FeatureSettings
from ast_core.labels import LabelVocabulary, audioset_labels
from ast_core.metrics import bootstrap_map
from ast_core.models import create_model
from jobs import evaluate, ray_session
from jobs.common import run_job
from pipeline.dataset import PreparedDataset
from pipeline.train import models
from pipeline.train.evaluation import checkpoint_evaluation, ensemble
from pipeline.train.evaluation.checkpoint_evaluation import Place, uses_gpu
from pipeline.train.evaluation.scoring import evaluate as scores_of
from pipeline.train.evaluation.scoring import score_metrics
from tests.ast_core import small

NAMES = [f"tone {i}" for i in range(4)]
LABELS = LabelVocabulary.from_names(NAMES)
CONFIG = ModelConfig(small.recipe(label_dim=4), small.NORM, LABELS)


@pytest.fixture(scope="module")
def model() -> ASTModel:
    return small.model(seed=5, label_dim=4).eval()


@pytest.fixture(scope="module")
def folder(model: ASTModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, model.state_dict(), CONFIG)
    return str(folder)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Hugging Face folder with a different input length and strides."""
    folder = tmp_path_factory.mktemp("other")
    recipe = small.recipe(label_dim=4, input_tdim=48, tstride=12, timem=0)
    torch.manual_seed(6)
    model = create_model(**recipe.model_args())
    save_huggingface(folder, model.state_dict(), ModelConfig(recipe, small.NORM, LABELS))
    return str(folder)


def figures(data: str, tmp_path: Path, *checkpoints: str, more: Sequence[str] = ()) -> dict:
    arguments = ["--checkpoint", *checkpoints, "--data", data, "--split", "eval", "--json", str(tmp_path / "f.json")]
    assert evaluate.main([*arguments, *more]) == 0
    return json.loads((tmp_path / "f.json").read_text())


def scored(data: str, checkpoint: str) -> np.ndarray:
    model, config = models.read(checkpoint)
    clips = PreparedDataset.open(data).clips(["eval"])
    device = torch.device("cpu")
    scores = scores_of(model, clips, recipe=config.recipe, norm=config.norm, num_classes=4, device=device)
    assert scores is not None
    return scores


def test_ensemble_averages_scores_and_reports_each_member(
    local_ray: None, tone_data: str, tmp_path: Path, folder: str, other: str, capsys: pytest.CaptureFixture[str]
):
    result = figures(tone_data, tmp_path, folder, other, more=["--bootstrap", "200"])
    clips = PreparedDataset.open(tone_data).clips(["eval"])
    members = [scored(tone_data, checkpoint) for checkpoint in (folder, other)]
    mean = (members[0] + members[1]) / 2
    assert result["map"] == pytest.approx(score_metrics(mean, clips).map)
    assert [member["checkpoint"] for member in result["members"]] == result["checkpoints"] == [folder, other]
    maps = [member["map"] for member in result["members"]]
    assert maps == pytest.approx([score_metrics(scores, clips).map for scores in members])
    assert len({result["map"], *maps}) == 3
    target = np.zeros((21, 4))
    target[np.arange(21), clips.labels.flatten().to_numpy()] = 1
    assert result["map_interval"] == pytest.approx(bootstrap_map(mean, target, num_resamples=200))
    low, high = result["map_interval"]
    assert low < result["map"] < high
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"map {maps[0]:.4f}  mauc ")
    assert lines[0].endswith(folder)
    assert lines[1].endswith(other)
    assert lines[2].startswith(f"map {result['map']:.4f} [{low:.4f}, {high:.4f}]  mauc ")
    assert lines[2].endswith("ensemble of 2  on 21 clips of eval")


def test_one_checkpoint_without_bootstrap_has_one_line_and_no_interval(
    local_ray: None, tone_data: str, tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]
):
    result = figures(tone_data, tmp_path, folder, more=["--bootstrap", "0"])
    assert result["map_interval"] is None
    assert result["members"] == [
        {"checkpoint": folder} | {key: result[key] for key in ("map", "mauc", "d_prime", "accuracy")}
    ]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"map {result['map']:.4f}  mauc ")


def test_model_with_classes_in_another_order_gets_the_same_figures(
    local_ray: None, tone_data: str, tmp_path: Path, model: ASTModel, folder: str
):
    order = [2, 0, 3, 1]
    state = model.state_dict()
    for key in ("mlp_head.1.weight", "mlp_head.1.bias"):
        state[key] = state[key][order]
    labels = LabelVocabulary(tuple("abcd"), tuple(NAMES[i] for i in order))
    save_huggingface(tmp_path / "hf", state, replace(CONFIG, labels=labels))
    ours, theirs = (figures(tone_data, tmp_path, uri, more=["--bootstrap", "50"]) for uri in (folder, f"{tmp_path}/hf"))
    for key in ("map", "mauc", "accuracy", "map_interval"):
        assert ours[key] == pytest.approx(theirs[key], abs=1e-6)


def vocabulary(mids: str, names: str) -> LabelVocabulary:
    return LabelVocabulary(tuple(mids.split()), tuple(names.split()))


@pytest.mark.parametrize(
    ("of_model", "of_data", "order"),
    [
        (vocabulary("1 2 3", "dog cat owl"), vocabulary("1 2 3", "dog cat owl"), [0, 1, 2]),
        (vocabulary("1 2 3", "dog cat owl"), vocabulary("3 1 2", "eule hund katze"), [2, 0, 1]),
        (vocabulary("dog cat owl", "dog cat owl"), vocabulary("1 2 3", "owl dog cat"), [2, 0, 1]),
        (vocabulary("1 2 3", "dog cat owl"), vocabulary("1 2 3", "owl dog cat"), [2, 0, 1]),  # MIDs are rows
        (vocabulary("a b c", "dog dog owl"), vocabulary("1 2 3", "dog dog owl"), [0, 1, 2]),
        (vocabulary("a b c", "dog dog owl"), vocabulary("b a c", "dog dog owl"), [1, 0, 2]),
        (vocabulary("a b c", "dog dog owl"), vocabulary("1 2 3", "dog owl dog"), None),  # which dog?
        (vocabulary("a b c", "dog cat owl"), vocabulary("1 2 3", "dog cat cow"), None),
        (vocabulary("a b", "dog cat"), vocabulary("1 2 3", "dog cat owl"), None),
    ],
)
def test_classes_are_matched_by_name_or_else_by_mid(
    of_model: LabelVocabulary, of_data: LabelVocabulary, order: list[int] | None
):
    assert models.class_order(of_model, of_data) == order


def test_published_models_fit_the_vocabularies_of_their_data_sets():
    words = LabelVocabulary.from_names(sorted(speechcommands_labels().names))  # as prepare_audioset makes it
    order = models.class_order(speechcommands_labels(), words)
    assert order is not None
    assert [speechcommands_labels().names[i] for i in order] == list(words.names)
    names_alone = LabelVocabulary.from_names(audioset_labels().names)
    assert models.class_order(names_alone, audioset_labels()) == list(range(527))


def test_case_34_refusal_names_the_classes_that_differ():
    two, seven = (LabelVocabulary.from_names(names) for names in (["dog", "cat"], "abcdefg"))
    assert models.differing(two, LabelVocabulary.from_names(["dog"])) == "only the model has 'cat'"
    assert models.differing(two, seven) == (
        "only the model has 'dog', 'cat'; only the data has 'a', 'b', 'c', 'd', 'e' and 2 more"
    )


def test_checkpoint_that_does_not_fit_the_data_is_refused_by_name(tone_data: str, tmp_path: Path, model: ASTModel):
    save_model(tmp_path / "cats", model.state_dict(), replace(CONFIG, labels=LabelVocabulary.from_names("abcd")))
    refusal = r"cats was trained for other labels \(4 classes\) than .* \(4\): only the model has 'a', 'b', 'c', 'd'"
    with pytest.raises(DataError, match=refusal):
        figures(tone_data, tmp_path, str(tmp_path / "cats"))
    recipe = small.recipe(label_dim=4, input_fdim=64)
    coarse = create_model(**recipe.model_args())
    config = ModelConfig(recipe, small.NORM, LABELS, FeatureSettings(num_mel_bins=64))
    save_model(tmp_path / "coarse", coarse.state_dict(), config)
    refusal = "coarse was trained on other features than .* has: num_mel_bins is 128, not 64; prepare the data again"
    with pytest.raises(DataError, match=refusal):
        figures(tone_data, tmp_path, str(tmp_path / "coarse"))


@pytest.mark.parametrize("value", [-1, 100_001, 10**30])
def test_case_c7_bootstrap_out_of_bounds_is_refused(tmp_path: Path, value: int):
    argv = ["--checkpoint", "none", "--data", str(tmp_path), "--split", "eval", f"--bootstrap={value}"]
    with pytest.raises(ConfigError, match=rf"^--bootstrap is {value}; use 0 \(off\) to 100,000$"):
        evaluate.main(argv)


def test_cuda_without_gpu_is_refused_locally_and_announced_on_a_cluster(
    local_ray: None,
    tone_data: str,
    tmp_path: Path,
    folder: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})  # this machine may have a GPU
    with pytest.raises(ConfigError, match=r"^--device cuda needs a GPU, this machine has none; use cpu$"):
        figures(tone_data, tmp_path, folder, more=["--device", "cuda"])
    assert [uses_gpu(Place(name, "auto", nullcontext)) for name in ("cuda", "cpu")] == [True, False]
    assert capsys.readouterr().out == (
        "--device cuda needs a GPU, the cluster has none now; scoring begins when it has one\n"
    )


def test_damaged_shard_is_named_in_one_line(
    local_ray: None, tone_data: str, tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]
):
    damaged = shutil.copytree(tone_data, tmp_path / "data")
    for shard in PreparedDataset.open(str(damaged)).clips(["eval"]).shards:
        Path(shard).write_bytes(b"x" * 1000)
    argv = ["--checkpoint", folder, "--data", str(damaged), "--split", "eval"]
    assert run_job(evaluate.main, argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: the shard {damaged}/")
    assert line.endswith("restore it, or prepare the data again")


@pytest.fixture
def faked_ray(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], SimpleNamespace]:
    """Fake Ray's resources and a GPU for torch. The result has the arguments of Ray, of the scoring and of torch."""

    def with_resources(cpus: float, gpus: float) -> SimpleNamespace:
        monkeypatch.setattr(ray_session, "ray_session", lambda *_: nullcontext())
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus, "GPU": gpus})
        monkeypatch.setattr(ray, "get", list)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(ASTModel, "to", lambda self, _: self)
        asked = SimpleNamespace(
            ray=Mock(side_effect=lambda **_: lambda score: SimpleNamespace(remote=score)),
            scores=Mock(side_effect=lambda _, clips, **__: np.zeros((len(clips), 4))),
            threads=Mock(),
        )
        monkeypatch.setattr(ray, "remote", asked.ray)
        monkeypatch.setattr(ensemble, "evaluate", asked.scores)
        monkeypatch.setattr(torch, "set_num_threads", asked.threads)
        return asked

    return with_resources


@pytest.mark.parametrize(("wanted", "gpus", "device"), [("cpu", 1, "cpu"), ("auto", 0, "cpu"), ("auto", 1, "cuda")])
def test_scores_are_computed_on_the_given_device_even_if_torch_has_a_gpu(
    tone_data: str,
    tmp_path: Path,
    folder: str,
    faked_ray: Callable[[float, float], SimpleNamespace],
    wanted: str,
    gpus: int,
    device: str,
):
    asked = faked_ray(2, gpus)
    figures(tone_data, tmp_path, folder, more=["--bootstrap", "0", "--device", wanted])
    assert asked.scores.call_args.kwargs["device"] == torch.device(device)
    assert asked.ray.call_args.kwargs["num_gpus"] == int(device == "cuda")


@pytest.mark.parametrize(
    ("address", "num_checkpoints", "threads"), [("local", 1, 7), ("local", 2, 3), ("local", 8, 1), ("auto", 1, 1)]
)
def test_checkpoints_share_this_machine_and_take_one_cpu_on_a_cluster(
    tone_data: str,
    tmp_path: Path,
    folder: str,
    faked_ray: Callable[[float, float], SimpleNamespace],
    address: str,
    num_checkpoints: int,
    threads: int,
):
    asked = faked_ray(7, 0)
    figures(tone_data, tmp_path, *[folder] * num_checkpoints, more=["--bootstrap", "0", "--address", address])
    assert asked.ray.call_args.kwargs["num_cpus"] == threads
    assert [call.args for call in asked.threads.call_args_list] == [(threads,)] * num_checkpoints


def test_checkpoint_trained_in_fp16_is_scored_on_a_cpu(tone_data: str, model: ASTModel, folder: str):
    half = replace(CONFIG, recipe=replace(CONFIG.recipe, precision="fp16"))
    dataset = PreparedDataset.open(tone_data)
    scores = ensemble._score(model, half, dataset, dataset.clips(["eval"]), "cpu", threads=1)
    assert np.array_equal(scores, scored(tone_data, folder))


def test_case_4_flipped_bit_of_a_shard_is_reported_and_not_scored(
    local_ray: None, tone_data: str, tmp_path: Path, folder: str
):
    shutil.copytree(tone_data, tmp_path / "data")
    shard = max((tmp_path / "data" / "eval" / "shards").iterdir(), key=lambda file: file.stat().st_size)
    about = pq.ParquetFile(shard).metadata.row_group(0)
    whole = bytearray(shard.read_bytes())
    whole[about.column(about.num_columns - 1).data_page_offset + 5000] ^= 1
    shard.write_bytes(whole)
    with pytest.raises(UserError, match=f"the shard {shard} is damaged .*; restore it, or prepare the data again"):
        figures(str(tmp_path / "data"), tmp_path, folder)
    assert not (tmp_path / "f.json").exists()


def test_model_whose_scores_are_not_numbers_is_named(
    tone_data: str, tmp_path: Path, folder: str, other: str, monkeypatch: pytest.MonkeyPatch
):
    """With the bootstrap, which needs numbers too."""
    monkeypatch.setattr(
        checkpoint_evaluation,
        "score_clips",
        lambda members, _, clips, place: [np.full((len(clips), 4), value) for value in (0.5, np.nan)],
    )
    with pytest.raises(DataError, match=rf"^{other} gives scores that are not numbers: its weights are damaged, or "):
        figures(tone_data, tmp_path, folder, other, more=["--bootstrap", "50"])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "the GPU has too little memory for this model: use --device"),
        (MemoryError(), "the machine has too little memory for this model: use a machine with more memory"),
    ],
)
def test_too_little_memory_to_evaluate_is_a_line(
    tone_data: str, model: ASTModel, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
):
    monkeypatch.setattr(ensemble, "evaluate", Mock(side_effect=error))
    dataset = PreparedDataset.open(tone_data)
    with pytest.raises(UserError, match=f"^{line}"):
        ensemble._score(model, CONFIG, dataset, dataset.clips(["eval"]), "cpu", threads=1)
