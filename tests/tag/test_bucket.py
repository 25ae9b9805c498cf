"""Tagging from and to a bucket."""

from pathlib import Path

from pipeline import storage
from pipeline.tag.output import read_done
from tests import fakes
from tests.s3 import S3Server
from tests.tag import stub
from tests.tag.test_plan import run


def test_recordings_of_a_bucket_are_tagged_into_it_once(s3: S3Server, tmp_path: Path):
    folder = fakes.upload(stub.write_recordings(tmp_path / "in", 3)[0].parent, s3.uri("tag-in"))
    output = s3.uri("tag-out")
    assert run([folder], output).counts()["recordings"] == 3
    files = storage.list_files(output, recursive=True)
    assert {name.removeprefix(f"{output}/").partition("/")[0] for name in files} == {
        "events",
        "failures.parquet",
        "report.html",
        "scores",
        "tags.json",
    }
    assert run([folder], output).counts()["windows"] > 3
    assert set(read_done(output).tagged) == {
        f"{folder}/r{i}.{suffix}" for i, suffix in enumerate(("wav", "flac", "ogg"))
    }
    assert storage.list_files(output, recursive=True) == files
