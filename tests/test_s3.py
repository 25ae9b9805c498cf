"""Object storage: files, and the jobs from end to end, on an S3 server that refuses one request in five."""

import os
import pickle
from pathlib import Path

import pyarrow.fs as pafs
import pytest
import torch

from ast_core.errors import DataError
from ast_core.labels import audioset_labels
from ast_core.recipe import Recipe
from jobs import doctor, evaluate, export, prepare_audioset, train
from jobs.common import run_job
from pipeline import storage
from pipeline.dataset import PreparedDataset
from pipeline.s3 import PatientS3
from pipeline.train import models
from tests import fakes
from tests.ast_core import small
from tests.fakes import LINEAR_RECIPE
from tests.s3 import S3Server

ONE_IN_FIVE = 0.2
RECIPE = LINEAR_RECIPE | {"norm_stats": "data", "batch_size": "12", "epochs": "2"}


def at_server(uri: str, server: S3Server) -> str:
    """`uri` with credentials and the server's endpoint."""
    host = server.endpoint.removeprefix("http://")
    return uri.replace("s3://", "s3://key:secret@") + f"?region=us-east-1&scheme=http&endpoint_override={host}"


def test_file_system_survives_a_burst_of_refusals_also_when_pickled(s3: S3Server):
    fs, path = storage.resolve(s3.uri("burst", "a"))
    for patient in (fs, pickle.loads(pickle.dumps(fs))):
        with s3.busy(following=5) as counts, patient.open_output_stream(path) as file:
            file.write(b"whole")
        assert counts["refused"] == 5
        with s3.busy(following=5) as counts, patient.open_input_file(path) as file:
            assert file.read() == b"whole"
        assert counts["refused"] == 5


def test_short_read_survives_a_refusal(s3: S3Server):
    storage.write_bytes(s3.uri("short", "a"), b"abc")
    fs, path = storage.resolve(s3.uri("short", "a"))
    with fs.open_input_file(path) as file, s3.busy(following=4) as counts:
        assert file.read(2) + file.read() == b"abc"
    assert counts["refused"] == 4


def test_refusals_do_not_accumulate(s3: S3Server):
    storage.write_bytes(s3.uri("often", "a"), b"")
    with s3.busy(share=0.25) as counts:
        assert all(storage.exists(s3.uri("often", "a")) for _ in range(420))
    assert counts["refused"] > 100  # more than the standard retry strategy of AWS's library allows


def test_large_file_is_read_in_few_requests_and_visible_only_when_whole(s3: S3Server, monkeypatch: pytest.MonkeyPatch):
    uri, data = s3.uri("large", "a"), os.urandom(25 << 20)
    monkeypatch.setattr("pipeline.s3.S3_RETRIES", 1)
    impatient = PatientS3(**storage.resolve(uri)[0].__reduce__()[1][0])
    with monkeypatch.context() as patch, s3.busy(share=0.7):
        patch.setattr(storage, "resolve", lambda _: (impatient, "bucket/large/a"))
        with pytest.raises(OSError, match=r"503|SLOW_DOWN"):
            storage.write_bytes(uri, data)
    assert not storage.exists(uri)
    with s3.busy(share=ONE_IN_FIVE):
        storage.write_bytes(uri, data)
    with s3.busy() as counts:
        assert storage.read_bytes(uri) == data
    assert counts["requests"] < 10


def test_more_files_than_a_page_are_listed_and_deleted(s3: S3Server):
    fs, path = storage.resolve(s3.uri("many"))
    for i in range(1002):  # a page has 1000 keys
        with fs.open_output_stream(f"{path}/{i:04}.txt"):
            pass
    storage.write_bytes(s3.uri("many", "deep", "b.txt"), b"")
    with s3.busy(share=ONE_IN_FIVE):
        assert len(storage.list_files(s3.uri("many"), suffix=".txt")) == 1002
        assert len(storage.list_files(s3.uri("many"), recursive=True)) == 1003
        storage.delete(s3.uri("many"))
        storage.delete(s3.uri("many"))
        assert storage.is_empty(s3.uri("many"))
        assert not storage.exists(s3.uri("many"))


def test_options_of_a_uri_apply_to_files_below_it(s3: S3Server, monkeypatch: pytest.MonkeyPatch):
    for name in s3.env:
        monkeypatch.delenv(name)
    folder = at_server(s3.uri("options", "of a"), s3)
    storage.write_bytes(storage.join(folder, "c.txt"), b"c")
    storage.write_bytes(storage.join(folder, "100%25 why%3F #1.txt"), b"odd")
    files = storage.list_files(folder)
    assert [storage.read_bytes(file) for file in files] == [b"odd", b"c"]
    assert [file.rsplit("/", 1)[1] for file in files] == ["100%25 why%3F #1.txt", "c.txt"]
    assert storage.options_first(folder) == storage.absolute(folder) == files[1].removesuffix("/c.txt")
    assert storage.resolve(folder)[1] == "bucket/options/of a"


def test_credentials_and_endpoint_of_a_profile_are_used(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text("[mine]\naws_access_key_id = key\naws_secret_access_key = secret\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    storage.write_bytes(s3.uri("profile", "a"), b"a")
    assert storage.read_bytes(s3.uri("profile", "a")) == b"a"


def test_missing_bucket_is_one_line(s3: S3Server, capsys: pytest.CaptureFixture[str]):
    for uri in ("s3://misspelt/data", at_server("s3://misspelt/data", s3)):
        assert run_job(doctor.main, ["--data", uri]) == 2
        assert capsys.readouterr().err.startswith("error: there is no bucket s3://misspelt;")
    assert storage.exists("s3://made?allow_bucket_creation=true")
    with pytest.raises(DataError, match="there is no file s3://made/a"):
        storage.read_bytes("s3://made/a")


def test_other_schemes_use_fsspec(s3: S3Server):
    storage.write_bytes("memory://folder/a", b"a")
    assert storage.list_files("memory://folder") == ["memory://folder/a"]
    assert storage.read_bytes("memory://folder/a") == b"a"
    assert isinstance(storage.resolve("memory://folder/a")[0], pafs.PyFileSystem)


def test_training_starts_from_weights_on_s3(s3: S3Server, tmp_path: Path):
    recipe = Recipe(label_dim=4, model_size="tiny224", imagenet_pretrain=False, input_tdim=48, timem=8)
    state = small.deit_state(models.initial_model(recipe))
    torch.save({"model": state}, tmp_path / "deit.pth")
    uri = fakes.upload(tmp_path / "deit.pth", s3.uri("weights", "deit.pth"))
    given = Recipe(**(recipe.to_dict() | {"imagenet_pretrain": True, "imagenet_weights": uri, "seed": 9}))
    model = models.initial_model(given)
    assert torch.equal(model.v.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])
    missing = Recipe(**(given.to_dict() | {"imagenet_weights": s3.uri("weights", "none.pth")}))
    with pytest.raises(DataError, match=r"there is no weight file s3://bucket/weights/none\.pth"):
        models.initial_model(missing)


@pytest.mark.parametrize("in_uri", [False, True], ids=["environment", "uri"])
def test_audio_and_list_on_s3_are_prepared_to_s3(
    s3: S3Server, local_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], in_uri: bool
):
    base = f"prepare-{in_uri}"

    def place(*parts: str) -> str:
        uri = s3.uri(base, *parts)
        return at_server(uri, s3) if in_uri else uri

    lines = ["path,labels"]
    for i in range(24):
        name = f"{i:02} a.flac"
        fakes.upload(fakes.write_media(tmp_path / name, fakes.noise(0.5, seed=i)), s3.uri(base, "audio", name))
        lines.append(f"audio/{name},{'cat' if i % 2 else 'dog'}")
    storage.write_bytes(s3.uri(base, "mine.csv"), "\n".join(lines[:21]).encode())
    argv = ["--manifest", place("mine.csv"), "--output", place("data"), "--split", "train"]
    with s3.busy(share=ONE_IN_FIVE) as counts:
        assert prepare_audioset.main(argv) == 0
    assert counts["refused"] > 3
    assert len(PreparedDataset.open(place("data")).clips(["train"])) == 20

    storage.write_bytes(s3.uri(base, "mine.csv"), "\n".join(lines).encode())
    capsys.readouterr()
    with s3.busy(share=ONE_IN_FIVE) as counts:
        assert prepare_audioset.main(argv) == 0
    assert counts["refused"] > 3
    assert "20 clips are done by an earlier run, 4 to do" in capsys.readouterr().out
    clips = PreparedDataset.open(place("data")).clips(["train"])
    assert sorted(clips.clip_id.to_pylist()) == [f"{i:02} a" for i in range(24)]


def test_case_part_3_preparation_completes_in_a_bucket_that_forbids_deleting(
    s3: S3Server, local_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A second run with a clip in two shards, as after a kill, completes too. Other files in `_work` are ignored."""
    clips = {f"{i}.flac": fakes.write_media(tmp_path / f"{i}.flac", fakes.noise(0.5, seed=i)) for i in range(4)}
    for name, file in clips.items():
        fakes.upload(file, s3.uri("kept", "audio", name))
    rows = [f"audio/{name},{'cat' if i % 2 else 'dog'}" for i, name in enumerate(clips)]
    output = s3.uri("kept", "data")
    argv = ["--manifest", s3.uri("kept", "mine.csv"), "--output", output, "--split", "train"]
    warning = f"warning: the data set is whole, but {output}/_work could not be removed: give this key s3:DeleteObject"
    with s3.without_deleting():
        for number in (3, 4):
            storage.write_bytes(s3.uri("kept", "mine.csv"), "\n".join(["path,labels", *rows[:number]]).encode())
            assert run_job(prepare_audioset.main, argv) == 0
            out, err = capsys.readouterr()
            assert err == ""
            assert [line for line in out.splitlines() if "DeleteObject" in line] == [f"{warning} there"]
            data = PreparedDataset.open(output)
            assert sorted(data.clips(["train"]).clip_id.to_pylist()) == [str(i) for i in range(number)]
            assert storage.exists(f"{output}/report.html")
            shards = storage.list_files(f"{output}/train/shards", suffix=".parquet")
            storage.write_bytes(f"{output}/train/shards/copy{number}.parquet", storage.read_bytes(shards[0]))
    storage.write_bytes(f"{output}/_work/todo/another/alive", b"")
    assert run_job(prepare_audioset.main, argv) == 0
    assert "DeleteObject" not in "".join(capsys.readouterr())


def test_files_with_audioset_names_below_a_folder_on_s3(s3: S3Server, local_ray: None, tmp_path: Path):
    mid = audioset_labels().mids[0]
    fakes.upload(
        fakes.write_media(tmp_path / "a.ogg", fakes.noise(4)), s3.uri("named", "audio", "deep", "abcdefghijk.ogg")
    )
    storage.write_bytes(s3.uri("named", "few_segments.csv"), f'abcdefghijk, 1.000, 2.000, "{mid}"'.encode())
    argv = ["--segments", s3.uri("named", "few_segments.csv"), "--audio-dir", s3.uri("named", "audio")]
    with s3.busy(share=ONE_IN_FIVE):
        assert prepare_audioset.main([*argv, "--output", s3.uri("named", "data")]) == 0
    assert PreparedDataset.open(s3.uri("named", "data")).clips(["few"]).clip_id.to_pylist() == ["abcdefghijk_1.000"]


@pytest.mark.slow
def test_model_is_trained_and_used_on_s3(
    s3: S3Server, local_ray: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    data, run = s3.uri("train", "data"), s3.uri("train", "run")
    storage.write_bytes(s3.uri("train", "mine.yaml"), "".join(f"{k}: {v}\n" for k, v in RECIPE.items()).encode())
    splits = ["--train-splits", "train", "--eval-splits", "eval"]
    argv = ["--recipe", s3.uri("train", "mine.yaml"), "--data", data, *splits, "--output", run]
    cache = tmp_path / "cache"
    argv += ["--num-workers", "1", "--cpus-per-worker", "1", "--cache-dir", str(cache)]
    with s3.busy(share=ONE_IN_FIVE) as counts:
        fakes.write_data(data)
        assert train.main(argv) == 0
    assert counts["refused"] > 20
    summary = storage.read_json(f"{run}/summary.json")
    assert any(file.endswith("state.pt") for file in storage.list_files(f"{run}/checkpoints", recursive=True))
    assert len(list(cache.iterdir())) == len(storage.list_files(data, suffix=".parquet", recursive=True)) - 4
    assert any("tfevents" in file for file in storage.list_files(f"{run}/tensorboard"))

    # The same command resumes from the last checkpoint. Nothing is left to train, and the result is the same.
    storage.delete(f"{run}/summary.json")
    with s3.busy(share=ONE_IN_FIVE) as counts:
        assert train.main(argv) == 0
    assert counts["refused"] > 5
    assert storage.read_json(f"{run}/summary.json") == summary

    with s3.busy(share=ONE_IN_FIVE) as counts:
        figures = s3.uri("train", "figures.json")
        assert evaluate.main(["--checkpoint", run, "--data", data, "--split", "eval", "--json", figures]) == 0
        assert storage.read_json(figures)["map"] == pytest.approx(summary["map"], abs=1e-6)
        for kind, output in {"ours": "exported", "original": "exported.pth"}.items():
            assert export.main(["--checkpoint", run, "--format", kind, "--output", s3.uri("train", output)]) == 0
        found = s3.uri("train", "findings.json")
        assert doctor.main(["--data", data, "--json", found]) == 0
        assert storage.read_json(found)["findings"]
        assert models.exists(s3.uri("train", "exported"))
    assert counts["refused"] > 10
    assert f"mAP {summary['map']:.4f}".lower() in capsys.readouterr().out.lower()
