"""How whole jobs end when storage fails: S3 that is away or denies a request, a full disk, a read-only disk."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jobs import prepare_audioset, train
from jobs.common import run_job
from pipeline import storage
from pipeline.dataset import PreparedDataset
from pipeline.s3 import S3_RETRIES
from tests import fakes
from tests.s3 import S3Server

ROOT = Path(__file__).parents[2]
NUM_CLIPS = 24
S3_IS_AWAY = "S3 does not answer"
REMEDY = "see the network and AWS_ENDPOINT_URL, and run the same command again"

needs_mount = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="only root mounts a disk")


def run(job: str, *argv: str) -> "subprocess.CompletedProcess[str]":
    """Run a command as a user types it, with its own Ray."""
    command = [sys.executable, f"jobs/{job}.py", *argv, "--address", "local", "--num-cpus", "1"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def error_of(ended: "subprocess.CompletedProcess[str]") -> str:
    """The error line with which a command ended."""
    *before, line = ended.stderr.splitlines()
    assert (ended.returncode, line[:7]) == (2, "error: "), ended.stderr
    assert not any(line.startswith("error: ") or "Traceback" in line for line in before), ended.stderr
    return line


@contextmanager
def disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A disk of this size, mounted at a new folder, until the block ends."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], check=False)
    if made.returncode:
        pytest.skip("no disk can be mounted in this container")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path, *, leave_bytes: int) -> Path:
    """Fill a disk up to `leave_bytes`. Returns the file that fills it."""
    filler = folder / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free - leave_bytes)
    return filler


def preparation(folder: Path, output: str) -> list[str]:
    """Options that prepare NUM_CLIPS clips."""
    for i in range(NUM_CLIPS):
        fakes.write_media(folder / f"{i:02}.wav", fakes.noise(0.5, seed=i))
    rows = [f"{i:02}.wav,{'ab'[i % 2]}" for i in range(NUM_CLIPS)]
    (folder / "list.csv").write_text("\n".join(["path,labels", *rows]))
    return ["--manifest", str(folder / "list.csv"), "--split", "train", "--output", output]


def training(data: str, output: str) -> list[str]:
    """Options of two epochs of two steps on one worker."""
    recipe = fakes.LINEAR_RECIPE | {"norm_stats": "data", "batch_size": "24", "epochs": "2", "precision": "fp32"}
    recipe |= {"wa_start": "2", "wa_end": "2"}
    splits = ["--train-splits", "train", "--eval-splits", "eval", "--num-workers", "1", "--log-every-steps", "1"]
    keys = [word for key, value in recipe.items() for word in (f"--{key}", value)]
    return ["--recipe", "audioset-full", "--data", data, *splits, *keys, "--output", output]


def num_prepared(output: str) -> int:
    return len(PreparedDataset.open(output).clips(["train"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("request_of", "beginning"),
    [
        ("PUT .*/train/shards/", "the preparation stopped, all shards written so far are whole: "),
        ("PUT .*/dataset.json", "the preparation stopped, all shards written so far are whole: "),
        ("DELETE .*/unpublished", "the data set is whole, but cleaning up after it failed: "),
    ],
    ids=["shard", "dataset.json", "cleaning up"],
)
def test_part_3_4_preparation_ends_with_one_line_when_s3_is_away(
    s3: S3Server, tmp_path: Path, request_of: str, beginning: str
):
    output = s3.uri("away", request_of.rpartition("/")[0][-6:].strip("/*. "), "data")
    argv = preparation(tmp_path, output)
    with s3.away_from(request_of) as counts:
        line = error_of(run("prepare_audioset", *argv))
    assert counts["dropped"] > S3_RETRIES
    assert line.startswith(f"error: {beginning}{output}/"), line
    assert S3_IS_AWAY in line
    assert line.endswith(REMEDY)
    again = run("prepare_audioset", *argv)
    assert again.returncode == 0, again.stderr
    assert (f"{NUM_CLIPS} clips are done by an earlier run" in again.stdout) == ("shards" not in request_of)
    assert num_prepared(output) == NUM_CLIPS


@pytest.mark.slow
def test_part_3_4_training_ends_with_one_line_when_s3_is_away(s3: S3Server, tone_data: str):
    """S3 fails at the upload of the second epoch's checkpoint. The next command resumes from that of the first."""
    output = s3.uri("away", "run")
    argv = training(tone_data, output)
    with s3.away_from("PUT .*/checkpoints/epoch-0002"):
        line = error_of(run("train", *argv))
    # Ray Train tries for longer than the run may do without its lock.
    ends = (
        "training failed, its checkpoints are complete",
        rf"stopped training {output}: its lock could not be renewed .*",
    )
    assert re.match(rf"error: ({'|'.join(ends)}): {output}/", line), line
    assert S3_IS_AWAY in line
    assert line.endswith(REMEDY)
    again = run("train", *argv)
    assert again.returncode == 0, again.stderr
    assert "resuming after epoch 1" in again.stderr
    assert storage.exists(f"{output}/summary.json")


def test_part_3_4_training_is_refused_if_deleting_is_forbidden(
    s3: S3Server, tone_data: str, capsys: pytest.CaptureFixture[str]
):
    """A run must delete old checkpoints and old parts of its records, so that its records are unambiguous."""
    output = s3.uri("undeletable", "run")
    with s3.without_deleting():
        assert run_job(train.main, training(tone_data, output)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {output}/probe: "), line
    assert line.endswith("S3 denies DeleteObject (Access Denied); give this key s3:DeleteObject there")
    assert not storage.exists(f"{output}/metrics.jsonl")


@needs_mount
@pytest.mark.slow
def test_part_3_6_read_only_output_is_refused_before_any_work(
    local_ray: None, tone_data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The output is a new folder, or one with the files of an earlier command."""
    with disk(tmp_path / "disk", 200) as mounted:
        prepare = preparation(tmp_path, str(mounted / "data"))
        fit = training(tone_data, str(mounted / "run"))
        assert run_job(prepare_audioset.main, prepare) == 0
        train.claim(fit)
        subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
        fakes.write_media(tmp_path / "more.wav", fakes.noise(0.5, seed=99))
        with (tmp_path / "list.csv").open("a") as listed:
            listed.write("\nmore.wav,a")
        for job, argv in ((prepare_audioset, prepare), (train, fit)):
            for output in (argv[-1], f"{argv[-1]}-new"):
                capsys.readouterr()
                assert run_job(job.main, [*argv[:-1], output]) == 2
                printed = capsys.readouterr()
                *_, line = printed.err.splitlines()
                assert line.startswith(f"error: Read-only file system: {output}"), printed.err
                assert line.endswith("it is mounted read-only: give another folder, and run the same command again")
                assert "done: " not in printed.out


@needs_mount
@pytest.mark.slow
def test_part_3_5_disk_that_is_full_when_a_shard_is_written(tmp_path: Path):
    with disk(tmp_path / "disk", 16) as mounted:
        output = mounted / "data"
        argv = preparation(tmp_path, str(output))
        filler = fill(mounted, leave_bytes=200_000)
        line = error_of(run("prepare_audioset", *argv))
        expected = (
            f"error: the preparation stopped, all shards written so far are whole: No space left on device: {output}/"
        )
        assert line.startswith(expected), line
        assert line.endswith("make room there, and run the same command again")
        filler.unlink()
        again = run("prepare_audioset", *argv)
        assert again.returncode == 0, again.stderr
        assert num_prepared(str(output)) == NUM_CLIPS


@needs_mount
@pytest.mark.slow
def test_part_3_6_disk_that_is_full_when_a_checkpoint_is_uploaded(tone_data: str, tmp_path: Path):
    with disk(tmp_path / "disk", 600) as mounted:
        output = mounted / "run"
        argv = training(tone_data, str(output))
        filler = fill(mounted, leave_bytes=220_000)  # room for two models, but not for a state of the optimiser
        line = error_of(run("train", *argv, "--max-failures", "0"))
        expected = f"error: training failed, its checkpoints are complete: No space left on device: {output}"
        assert line == f"{expected}; make room there, and run the same command again"
        filler.unlink()
        again = run("train", *argv)
        assert again.returncode == 0, again.stderr
        assert (output / "summary.json").exists()
