"""Checks of a training command before training starts, and the claim of the run's folder."""

import json
import re
import shutil
from pathlib import Path
from unittest.mock import MagicMock, Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ast_core.errors import ConfigError, DataError
from ast_core.labels import LabelVocabulary
from ast_core.models.ast import ASTModel
from ast_core.recipe import Recipe
from jobs.train import claim, main, read_settings, session
from pipeline import dataset, storage
from pipeline.locks import exclusive
from pipeline.train import fit
from pipeline.train.metrics_files import has_records
from pipeline.train.metrics_log import RunLog
from pipeline.train.resources import worker_resources
from pipeline.train.settings import TrainSettings
from tests import fakes
from tests.damage import record_again
from tests.fakes import LINEAR_RECIPE
from tests.s3 import S3Server


def argv(data: str, run: str | Path, *more: str) -> list[str]:
    usual = {key: value for key, value in LINEAR_RECIPE.items() if f"--{key}" not in more}
    keys = [word for key, value in usual.items() for word in (f"--{key}", value)]
    splits = ["--train-splits", "train", "--eval-splits", "eval"]
    return ["--recipe", "audioset-full", "--data", data, *splits, "--output", str(run), *keys, *more]


def settings_of(text: str) -> TrainSettings:
    return read_settings(["--address", "local", *argv("data", Path("run"))[:10], *text.split()])


def forget_clip_order(run: Path) -> None:
    """Make config.json look like that of an earlier version, which did not record the clips' order and sound."""
    config = json.loads((run / "config.json").read_text())
    for key in ("sha256", "clip_order", "content"):
        del config[key]
    (run / "config.json").write_text(json.dumps(config))


def log_a_step(run: Path | str) -> None:
    """Log a step, as training does. From then on, no command with other settings can take over the folder."""
    log = RunLog(str(run), 0)
    log.step(epoch=1, step=1, values={"loss": 1.0})
    log.close()


@pytest.mark.parametrize("what", ["train", "eval"])
def test_splits_in_another_order_are_refused(what: str, tmp_path: Path):
    data, run = str(tmp_path / "data"), tmp_path / "run"
    fakes.write_data(data, splits=[("a", 12), ("b", 12), ("c", 20)])
    splits = {"train": ["c"], "eval": ["c"]} | {what: ["a", "b", "c"]}
    swapped = splits | {what: ["b", "a", "c"]}

    def command(splits: dict[str, list[str]]) -> list[str]:
        return argv(data, run, "--train-splits", *splits["train"], "--eval-splits", *splits["eval"])

    claim(command(splits))
    log_a_step(run)
    refusal = f"was begun with --{what}-splits a b c; give them in this order, or another --output"
    with pytest.raises(ConfigError, match=refusal):
        claim(command(swapped))
    forget_clip_order(run)
    with pytest.raises(ConfigError, match=refusal):
        claim(command(swapped))
    claim(command(splits))


@pytest.mark.parametrize("split", ["train", "eval"])
def test_data_prepared_again_in_another_order_are_refused(split: str, tone_data: str, tmp_path: Path):
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(tone_data, data)
    claim(argv(str(data), run))
    log_a_step(run)
    index = pq.read_table(data / split / "index.parquet")
    order = [1, 0, *range(2, len(index))]  # within a row group: their layout is the same
    dataset.write_table(dataset.index_file(str(data), split), index.take(order))
    record_again(str(data))
    with pytest.raises(ConfigError, match="was begun on these clips in another order: the data set was prepared again"):
        claim(argv(str(data), run))
    forget_clip_order(run)
    claim(argv(str(data), run))


@pytest.mark.parametrize("split", ["train", "eval"])
def test_data_prepared_again_from_other_sound_are_refused(split: str, tmp_path: Path):
    data, run = str(tmp_path / "data"), tmp_path / "run"
    fakes.write_data(data, splits=[("train", 12), ("eval", 12)])
    claim(argv(data, run))
    log_a_step(run)
    index = pq.read_table(dataset.index_file(data, split))
    place = index.column_names.index("fbank_hash")
    hashes = pa.array([1, *index["fbank_hash"].to_pylist()[1:]], pa.int64())
    dataset.write_table(dataset.index_file(data, split), index.set_column(place, index.schema.field(place), hashes))
    record_again(data)
    warning = f"warning: the data set was prepared again since {run} began, and its features are not equal to the bit"
    assert any(line.startswith(warning) for line in claim(argv(data, run)).about)

    info = dataset.read_info(data)
    assert info is not None
    info["splits"][split]["norm"]["mean"] += 0.01
    dataset.write_info(data, {key: value for key, value in info.items() if key != "sha256"})
    with pytest.raises(ConfigError, match="was begun on other sound of these clips: the data set was prepared again"):
        claim(argv(data, run))


def test_data_prepared_again_with_other_names_of_classes_are_refused(tmp_path: Path):
    data, run = str(tmp_path / "data"), tmp_path / "run"
    for names in ("abcd", "abdc"):
        shutil.rmtree(data, ignore_errors=True)
        fakes.write_data(data, splits=[("train", 12), ("eval", 12)], labels=LabelVocabulary.from_names(list(names)))
        if names == "abcd":
            claim(argv(data, run))
            log_a_step(run)
    with pytest.raises(ConfigError, match=r"was begun with other labels\.csv: the data set was prepared again; give"):
        claim(argv(data, run))


def test_trained_run_without_its_initial_model_keeps_what_it_has(tone_data: str, tmp_path: Path):
    """As when a run is copied to another machine and its files have not all arrived."""
    run = tmp_path / "run"
    claim(argv(tone_data, run))
    before = (run / "initial" / "model.safetensors").read_bytes()
    log_a_step(run)
    checkpoint = run / "checkpoints" / "checkpoint_1" / "state.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    (run / "initial" / "model.safetensors").unlink()
    claim(argv(tone_data, run))
    assert checkpoint.exists()
    assert (run / "metrics.jsonl").exists()
    assert (run / "initial" / "model.safetensors").read_bytes() == before


def test_run_on_s3_that_another_job_trained_meanwhile_is_not_replaced(tone_data: str, s3: S3Server):
    run = s3.uri("replaced", "run")
    claim(argv(tone_data, run))
    claimed = claim(argv(tone_data, run, "--lr", "1e-3"))
    log_a_step(run)
    assert claimed.take_over is not None
    with pytest.raises(ConfigError, match=r"holds another run \(recipe\.lr was 0\.0003, is 0\.001\)"):
        claimed.take_over()
    assert has_records(run)


def test_run_in_use_is_refused_before_ray_starts(tone_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jobs.ray_session.ray_session", ray_session := MagicMock())
    command = argv(tone_data, tmp_path / "run")
    refusal = r"^another job is training .*run; wait for its end, or stop it$"
    with session(claim([*command, "--num-workers", "0"])), pytest.raises(DataError, match=refusal):
        main(command)
    ray_session.assert_not_called()
    with session(claim(command)):  # the other one is over
        pass


def test_run_on_s3_in_use_by_another_job_of_the_cluster_is_refused(tone_data: str, s3: S3Server, local_ray: None):
    run = s3.uri("held", "run")
    command = argv(tone_data, run)
    with session(claim(command)), pytest.raises(DataError, match=rf"^another job is training {run} \(on .*\); wait"):
        main(command)
    with session(claim(command)):  # the other one is over
        pass


def test_two_jobs_that_start_the_same_run_do_not_mix_their_files(
    tone_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Fetching the initial model may take minutes. The job that has it first starts the run."""
    run, initial_model = tmp_path / "run", fit.models.initial_model

    def slowly(recipe: Recipe, *more: object) -> ASTModel:
        monkeypatch.undo()
        claim(argv(tone_data, run, "--lr", "1e-3"))
        return initial_model(recipe, *more)

    monkeypatch.setattr(fit.models, "initial_model", slowly)
    with pytest.raises(ConfigError, match=r"holds another run \(recipe\.lr was 0\.001, is 0\.0003\)"):
        claim(argv(tone_data, run))
    assert json.loads((run / "config.json").read_text())["recipe"]["lr"] == 1e-3


def test_session_locks_all_runs_of_a_command(tone_data: str, tmp_path: Path):
    commands = [argv(tone_data, tmp_path / fold, "--num-workers", "0") for fold in ("red", "green")]
    runs = [claim(command) for command in commands]
    with session(*runs):
        for run in runs:
            with pytest.raises(DataError, match="another job is training"), exclusive("train", run.uri):
                pass


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ("--float8 true --precision fp32", "float8 needs precision bf16, but precision is fp32"),
        ("--attention fa4", "attention fa4 needs a GPU; use auto"),
    ],
)
def test_float8_and_fa4_are_refused_before_the_folder_is_claimed(
    keys: str, reason: str, tone_data: str, tmp_path: Path
):
    command = ["--recipe", "audioset-full", "--data", tone_data, "--train-splits", "train", "--eval-splits", "eval"]
    command += ["--output", str(tmp_path / "run"), "--imagenet_pretrain", "false", "--device", "cpu", *keys.split()]
    with pytest.raises(ConfigError) as refused:
        claim(command)
    assert str(refused.value) == reason
    assert not (tmp_path / "run").exists()


def test_case_17_folder_of_a_refused_command_can_be_claimed_again(tone_data: str, tmp_path: Path):
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"^precision fp16 needs a GPU"):
        main(argv(tone_data, run, "--num-workers", "0", "--device", "cpu", "--precision", "fp16"))
    assert not run.exists()
    claim(argv(tone_data, run, "--precision", "bf16", "--epochs", "2", "--wa_end", "2"))  # no step is trained
    claimed = claim(argv(tone_data, run, "--precision", "fp32", "--epochs", "3", "--wa_end", "3"))
    assert (claimed.recipe.precision, claimed.recipe.epochs) == ("fp32", 3)
    there = json.loads((run / "config.json").read_text())["recipe"]
    assert (there["precision"], there["epochs"]) == ("fp32", 3)
    log_a_step(run)
    with pytest.raises(ConfigError, match=r"holds another run \(recipe\.epochs was 3, is 5"):
        claim(argv(tone_data, run, "--precision", "fp32", "--epochs", "5"))


def test_c6_command_without_enough_resources_leaves_the_folder_free(tone_data: str, tmp_path: Path):
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"^100000 workers take 100000 CPUs, this machine has \d+$"):
        main(argv(tone_data, run, "--num-workers", "100000"))
    with pytest.raises(ConfigError, match=r"^--device cuda takes a GPU, this machine has none"):
        main(argv(tone_data, run, "--num-workers", "0", "--device", "cuda"))
    assert not run.exists()


def test_command_does_not_train_in_a_folder_that_another_took_over(tone_data: str, tmp_path: Path):
    run = tmp_path / "run"
    first = claim(argv(tone_data, run, "--num-workers", "0", "--lr", "1e-3"))
    claim(argv(tone_data, run, "--num-workers", "0"))
    with (
        session(first) as held,
        pytest.raises(ConfigError, match=r"holds another run \(recipe\.lr was 0\.0003, is 0\.001\)"),
    ):
        fit.train_run(first, held)


def test_folder_on_s3_is_taken_over_when_training_starts(tone_data: str, s3: S3Server):
    """Only the cluster knows whether another command trains there."""
    run = s3.uri("claims", "run")
    claim(argv(tone_data, run, "--num-workers", "0", "--lr", "1e-3"))
    second = claim(argv(tone_data, run, "--num-workers", "0"))
    assert storage.read_json(f"{run}/config.json")["recipe"]["lr"] == 1e-3
    assert second.take_over is not None
    second.take_over()
    assert storage.read_json(f"{run}/config.json")["recipe"]["lr"] == 3e-4
    assert claim(argv(tone_data, run, "--num-workers", "0")).take_over is None


def test_run_of_a_version_without_warmup_steps_resumes(tone_data: str, tmp_path: Path):
    """Such a run warmed up over 1,000 steps, whatever its length."""
    run = tmp_path / "run"
    claim(argv(tone_data, run, "--warmup", "true", "--warmup_steps", "1000"))
    log_a_step(run)
    there = storage.read_checked_json(run / "config.json")
    del there["recipe"]["warmup_steps"]
    storage.write_json(run / "config.json", there)
    claim(argv(tone_data, run, "--warmup", "true", "--warmup_steps", "1000"))
    with pytest.raises(ConfigError, match=r"recipe\.warmup_steps was 1000, is 2"):
        claim(argv(tone_data, run, "--warmup", "true"))


@pytest.mark.parametrize(
    ("option", "given", "message"),
    [
        ("--num-workers", "-1", "--num-workers is -1; use 1 or more, MIN:MAX, or 0 for this process"),
        ("--num-workers", "3:2", "--num-workers is 3:2; use 1 or more"),
        ("--num-workers", "0:2", "--num-workers is 0:2; use 1 or more"),
        ("--cpus-per-worker", "0", "--cpus-per-worker is 0; use 1 or more"),
        ("--max-failures", "-5", "--max-failures is -5; use 0 or more, or -1 for no limit"),
        ("--checkpoint-every-s", "nan", "--checkpoint-every-s is nan; use 0 to 2,592,000"),
        ("--resize-every-s", "-1", "--resize-every-s is -1.0; use 0 to 2,592,000"),
        ("--log-every-steps", "0", "--log-every-steps is 0; use 1 or more"),
        ("--cache-gb", "-1", "--cache-gb is -1.0; use a size, 0 or more"),
        ("--cache-gb", "inf", "--cache-gb is inf; use a size"),
        ("--cache-gb", "nan", "--cache-gb is nan; use a size"),
        ("--cache-dir", "s3://bucket/cache", "--cache-dir is s3://bucket/cache; use a folder on the disk of each node"),
    ],
)
def test_invalid_option_is_refused_before_a_run_is_created(
    tone_data: str, tmp_path: Path, option: str, given: str, message: str
):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        claim(argv(tone_data, tmp_path / "run", f"{option}={given}"))
    assert not (tmp_path / "run").exists()


def test_relative_cache_dir_is_absolute_and_refused_in_a_submitted_job(
    tone_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Ray deletes the current folder of a submitted job, and workers may have a different one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fit, "TrainJob", job := Mock(side_effect=InterruptedError))
    command = argv(tone_data, tmp_path / "run", "--num-workers", "0", "--cache-dir", "cache")
    with pytest.raises(InterruptedError):
        main(command)
    assert job.call_args.kwargs["cache_dir"] == str(tmp_path / "cache")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ConfigError, match="--cache-dir cache would be lost with the submitted job; give an absolute"):
        main(command)


@pytest.mark.parametrize(
    ("cpus", "gpus", "options", "expected"),
    [
        (2, 1, "", (True, 2)),  # Colab
        (1, 1, "", (True, 1)),
        (64, 8, "--num-workers 8", (True, 4)),
        (8, 4, "--num-workers 4", (True, 2)),
        (8, 4, "--num-workers 3 --async-validation", (True, 2)),
        (2, 1, "--num-workers 1:4", (True, 2)),
        (8, 0, "--num-workers 2", (False, 4)),
        (2, 1, "--num-workers 8 --device cuda --address auto", (True, 2)),  # seven more machines may join
        (0, 0, "--num-workers 2 --device cuda --address auto", (True, 4)),  # a cluster that has not scaled up yet
        (16, 8, "--num-workers 8 --address auto", (True, 2)),
    ],
)
def test_worker_takes_four_cpus_with_a_gpu_or_its_share_of_the_cpus(
    cpus: float, gpus: float, options: str, expected: tuple[bool, int]
):
    wanted = worker_resources(settings_of(options), [{"CPU": cpus, "GPU": gpus}])
    assert (wanted.use_gpu, wanted.cpus) == expected


def test_refusal_of_too_many_cpus_names_the_option_that_asks_for_them():
    with pytest.raises(ConfigError, match=r"^1 worker takes 3 CPUs \(--cpus-per-worker 3\), this machine has 2$"):
        worker_resources(settings_of("--cpus-per-worker 3"), [{"CPU": 2.0}])
    with pytest.raises(ConfigError, match=r"^3 workers take 3 CPUs, this machine has 2$"):
        worker_resources(settings_of("--num-workers 3"), [{"CPU": 2.0}])
