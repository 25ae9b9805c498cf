"""Keys in a command line or a list appear in no file, line or report (C9 of the review)."""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import botocore.session
import pytest
import torch

from ast_core.errors import ConfigError, DataError
from jobs import doctor, evaluate, prepare_audioset, train
from jobs.common import run_job
from pipeline import dataset, storage
from pipeline.redaction import KEYS_OF_URI, keys_of_uri, take_keys, without_secrets, without_secrets_of
from pipeline.train.worker_config import record_stop, stopped_json
from tests import fakes
from tests.ast_core import small
from tests.s3 import S3Server


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://me:hush@bucket/data", "s3://bucket/data"),
        ("s3://AKIA:hu/sh@bucket/data", "s3://bucket/data"),
        ("s3://AKIA:hu@sh@bucket/data", "s3://bucket/data"),
        ("s3://AKIA:hu@s/h@bucket/data", "s3://bucket/data"),
        ("s3://bucket/me@home/data", "s3://bucket/me@home/data"),
        ("s3://bucket/data?secret_key=hu/sh&region=x", "s3://bucket/data"),
        ("https://me:hu/sh@host/list.csv", "https://host/list.csv"),
        ("https://host/a.wav?X-Amz-Signature=hu/sh&x=1", "https://host/a.wav"),
        ("https://host/a.wav?se=1&sig=hush%2F", "https://host/a.wav"),
        ("https://host/get?id=1", "https://host/get?id=1"),
        ("https://www.youtube.com/watch?v=abcdefghijk&t=3", "https://www.youtube.com/watch?v=abcdefghijk&t=3"),
        ("http://127.0.0.1:80/@me/x", "http://127.0.0.1:80/@me/x"),
        (
            "cooling down: http://me:hush@proxy:3128 (429), s3://k:hush@b/x",
            "cooling down: http://proxy:3128 (429), s3://b/x",
        ),
        ("/data/me@home?token=/x", "/data/me@home?token=/x"),
    ],
)
def test_case_c9_uri_is_shown_without_secrets(text: str, shown: str):
    assert without_secrets(text) == shown


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://me:hush/sh@127.0.0.1:9/x.wav", "nonnumeric port: 'hush' in me:hush/sh@127.0.0.1:9"),
        ("http://127.0.0.1:9/y.wav?X-Amz-Signature=hush/2@%25", "y.wav?X-Amz-Signature=hush/2@%25 refused; hush/2@%"),
    ],
)
def test_case_c9_message_of_a_library_that_quotes_part_of_a_uri(uri: str, message: str):
    shown = without_secrets_of(uri, message)
    assert "hush" not in shown
    assert ("127.0.0.1:9" in shown) or "y.wav" in shown


def test_case_c9_keys_of_s3_uris_move_to_the_environment():
    environment = {"AWS_SESSION_TOKEN": "other"}
    words = ["--data", "s3://AKIA:a%2Fb%40c%25d+e@bucket/data", "--output=s3://AKIA:a/b%40c%25d+e@bucket?region=x/run"]
    assert take_keys(words, environment) == ["--data", "s3://bucket/data", "--output=s3://bucket?region=x/run"]
    keys = {"AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": "a/b@c%d+e"}
    assert environment == keys | {KEYS_OF_URI: "1"}
    assert keys_of_uri(environment) == keys | {"AWS_SESSION_TOKEN": ""}  # a node's own token belongs to other keys
    assert keys_of_uri(keys) == {}


@pytest.mark.parametrize(("token", "sent"), [("", None), ("temporary", "temporary")])
def test_an_empty_session_token_is_sent_to_s3_as_none(token: str, sent: str | None, monkeypatch: pytest.MonkeyPatch):
    """By both libraries that read S3: pyarrow, and botocore for locks."""
    tokens = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            tokens.append(self.headers.get("x-amz-security-token"))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    environment = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    for name, value in (environment | {"AWS_ENDPOINT_URL": endpoint, "AWS_SESSION_TOKEN": token}).items():
        monkeypatch.setenv(name, value)
    storage.exists("s3://bucket/x")
    botocore.session.Session().create_client("s3", endpoint_url=endpoint).head_object(Bucket="bucket", Key="x")
    server.shutdown()
    server.server_close()
    assert len(tokens) >= 2
    assert set(tokens) == {sent}


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (["s3://a:hush@bucket/x", "s3://b:hush@bucket/y"], {}),
        (["s3://a:hush@bucket/x", "s3://bucket/y"], {"AWS_ACCESS_KEY_ID": "b", "AWS_SECRET_ACCESS_KEY": "c"}),
        (["s3://a:hu@s/h@bucket/x"], {}),
    ],
)
def test_case_c9_ambiguous_keys_are_refused(words: list[str], environment: dict[str, str]):
    with pytest.raises(ConfigError, match="AWS_ACCESS_KEY_ID") as caught:
        take_keys(words, environment)
    assert "hu" not in str(caught.value)


def test_case_c9_keys_are_not_in_the_command_line_of_the_process(tmp_path: Path):
    job = tmp_path / "job.py"
    job.write_text(
        "from jobs import entry; entry.begin()\nimport os, sys\n"
        "words = open('/proc/self/cmdline').read().split('\\0')[1:-1]\n"
        "print(sys.argv[1:], words, os.environ['AWS_SECRET_ACCESS_KEY'])\n"
        "print('an error at s3://k:hush@bucket/x', file=sys.stderr)"
    )
    command = [sys.executable, str(job), "--data", "s3://k:hu%2Fsh@bucket/x"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    words = ["--data", "s3://bucket/x"]
    assert ended.stdout == f"{words} {[str(job), *words]} hu/sh\n"
    assert ended.stderr == "an error at s3://bucket/x\n"


@pytest.mark.slow
def test_case_c9_output_of_jobs_contains_no_key(
    local_ray: None, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """Keys with `/`, `@` and `%` are in URIs of all jobs, in a list's rows, and in commands that fail."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", KEYS_OF_URI):
        monkeypatch.setenv(name, "")  # so that monkeypatch removes what the job sets
        monkeypatch.delenv(name)
    for i in range(6):
        fakes.write_media(tmp_path / f"clip{i}.wav", fakes.noise(1, seed=i))
    rows = [f"{tmp_path}/clip{i}.wav,,{'ab'[i % 2]},{'test' if i > 3 else 'train'}" for i in range(6)]
    rows += [
        ",http://me:PLANTED/1@127.0.0.1:9/x.wav,a,train",
        ",http://127.0.0.1:9/y.wav?X-Amz-Signature=PLANTED/2@%25,b,train",
        ",ftp://me:PLANTED@127.0.0.1/z.wav,b,train",
    ]
    (tmp_path / "list.csv").write_text("\n".join(["path,url,labels,split", *rows]))
    base = f"s3://AKIAPLANTED:PLANTED%2F%40%25+x@{s3.bucket}/secret"
    data, run = f"{base}/data", f"{base}/run"
    argv = ["--manifest", str(tmp_path / "list.csv"), "--output", data, "--download-workers", "2"]
    fit = ["--recipe", "audioset-balanced", "--data", data, "--train-splits", "train", "--eval-splits", "test"]
    fit += ["--num-workers", "1", "--epochs", "1", "--wa_start", "1", "--wa_end", "1"]
    fit += [*(f"--{k}={v}" for k, v in fakes.LINEAR_RECIPE.items())]
    with s3.without_deleting():  # so that `_work` is not removed
        assert run_job(prepare_audioset.main, argv) == 0
    assert run_job(train.main, [*fit, "--output", run]) == 0
    assert (
        run_job(evaluate.main, ["--checkpoint", run, "--data", data, "--split", "test", "--json", f"{base}/e.json"])
        == 0
    )
    assert run_job(doctor.main, ["--data", data, "--json", f"{base}/d.json"]) == 0
    assert run_job(train.main, [*fit, "--output", data]) == 2
    assert run_job(doctor.main, ["--data", f"s3://AKIA:PLANTED/x@{s3.bucket}/none"]) == 2
    output = capfd.readouterr()
    assert output.err.count("error: ") == 2
    assert "PLANTED" not in output.out + output.err

    files = storage.list_files(s3.uri("secret"), recursive=True)
    assert any("/_work/todo/" in file and file.endswith(".parquet") for file in files)
    assert {"failures.parquet", "report.html", "config.json", "metrics.jsonl", "e.json", "d.json"} <= {
        file.rsplit("/", 1)[-1] for file in files
    }
    for file in files:
        held = storage.read_bytes(file)
        assert b"PLANTED" not in held, file
        if file.endswith(".parquet"):
            table = dataset.read_table(file)
            assert "PLANTED" not in str(table.drop_columns([n for n in table.column_names if n == "fbank"]).to_pylist())


def test_case_c9_files_of_a_run_contain_no_key_of_data_or_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """fsspec storage, whose passwords stay in the URIs. Recipe and --init-from name weights with passwords."""
    place = "memory://me:PLANTED@host"
    fakes.write_data(f"{place}/data", splits=(("train", 4), ("eval", 4)))
    keys = fakes.SMALL_RECIPE | {"epochs": "1", "imagenet_pretrain": "true", "imagenet_weights": f"{place}/deit.pth"}
    (tmp_path / "own.yaml").write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))
    torch.save({"model": small.deit_state(small.model())}, tmp_path / "deit.pth")
    fakes.upload(tmp_path / "deit.pth", keys["imagenet_weights"])
    fit = ["--recipe", str(tmp_path / "own.yaml"), "--data", f"{place}/data", "--num-workers", "0"]
    fit += ["--train-splits", "train", "--eval-splits", "eval"]
    assert run_job(train.main, [*fit, "--output", str(tmp_path / "a")]) == 0
    fsspec_copy = fakes.upload(tmp_path / "a" / "best", f"{place}/best")
    more = ["--imagenet_pretrain", "false", "--imagenet_weights", "null", "--init-from", fsspec_copy]
    for _ in range(2):  # the same command resumes: the model is the same, whatever its key
        assert run_job(train.main, [*fit, *more, "--output", str(tmp_path / "b")]) == 0
    assert "this run is finished" in capsys.readouterr().out
    configs = [json.loads((tmp_path / run / "config.json").read_text()) for run in "ab"]
    assert [config["data"] for config in configs] == ["memory://host/data"] * 2
    assert configs[0]["recipe"]["imagenet_weights"] == "memory://host/deit.pth"
    assert configs[1]["init_from"]["model"] == "memory://host/best"
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or file == tmp_path / "own.yaml" or b"PLANTED" not in file.read_bytes(), file


def test_case_c9_stopped_json_contains_no_key(tmp_path: Path):
    record_stop(str(tmp_path), DataError("cannot read ftp://me:PLANTED@host/data/shards/0.parquet"))
    assert json.loads(Path(stopped_json(str(tmp_path))).read_text())["error"] == (
        "cannot read ftp://host/data/shards/0.parquet"
    )
