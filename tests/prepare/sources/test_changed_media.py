"""A failed file that has changed since counts as another file."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline import dataset, storage
from pipeline.prepare.clip import FAILURES, MEDIA_STATE, in_progress
from pipeline.prepare.output import failures_table
from pipeline.prepare.output.failures_table import record_media_state
from pipeline.prepare.sources.archives import bytes_member
from tests import fakes
from tests.s3 import S3Server

WHY = {"stage": "decode", "reason": "not_audio", "message": "", "attempts": 1}


def failed(*rows: dict[str, object]) -> pa.Table:
    """Rows in progress that the decoder has just refused."""
    clips = in_progress(fakes.clips(*rows))
    for name, value in WHY.items():
        column = clips.schema.get_field_index(name)
        clips = clips.set_column(column, clips.schema.field(name), pa.array([value] * len(clips), clips[name].type))
    return record_media_state(clips)


def has_changed(output: str, rows: pa.Table) -> list[bool]:
    """Whether each clip has changed after its failure was recorded."""
    failures = failures_table.collect(output, "train", pa.chunked_array([[]], pa.string()))
    changed = failures_table.has_changed(failures, rows)
    return [bool(changed[failures["clip_id"].to_pylist().index(clip_id)]) for clip_id in rows["clip_id"].to_pylist()]


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str]:
    """The URI of a file by its name, on a disk and on an object store."""
    if request.param == "local":
        return lambda name: str(tmp_path / name)
    s3: S3Server = request.getfixturevalue("s3")
    return lambda name: s3.uri("changed-media", name)


def test_case_19_a_file_of_another_size_has_changed(place: Callable[[str], str], tmp_path: Path):
    for name in ("empty.wav", "same.wav", "shard.tar", "gone.wav"):
        storage.write_bytes(place(name), b"")
    rows = failed(
        {"clip_id": "empty", "media": place("empty.wav")},
        {"clip_id": "same", "media": place("same.wav")},
        {"clip_id": "member", "media": place("shard.tar"), "member": bytes_member(512, 10)},
        {"clip_id": "gone", "media": place("gone.wav")},
        {"clip_id": "fetched", "media": "http://127.0.0.1:9/x.webm"},
    )
    failures_table.write_part(str(tmp_path / "out"), "train", rows)
    assert has_changed(str(tmp_path / "out"), rows) == [False] * 5
    storage.write_bytes(place("empty.wav"), bytes(100))
    storage.write_bytes(place("shard.tar"), bytes(100))
    storage.delete(place("gone.wav"))
    assert has_changed(str(tmp_path / "out"), rows) == [True, False, True, True, False]


def test_a_truncated_file_is_tried_again_only_after_a_change_but_a_fetch_always(
    place: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(WHY, "reason", "truncated")
    for name in ("short.wav", "shard.tar"):
        storage.write_bytes(place(name), b"12345")
    rows = failed(
        {"clip_id": "file", "media": place("short.wav")},
        {"clip_id": "member", "media": place("shard.tar"), "member": bytes_member(512, 10)},
        {"clip_id": "fetched", "media": "http://127.0.0.1:9/x.webm"},
    )
    failures_table.write_part(str(tmp_path), "train", rows)
    failures = failures_table.collect(str(tmp_path), "train", pa.chunked_array([[]], pa.string()))
    assert dict(zip(failures["clip_id"].to_pylist(), failures["retry"].to_pylist(), strict=True)) == {
        "file": False,
        "member": False,
        "fetched": True,
    }
    storage.write_bytes(place("short.wav"), b"123456")
    assert has_changed(str(tmp_path), rows) == [True, False, False]
    storage.write_bytes(place("shard.tar"), b"123456")
    assert has_changed(str(tmp_path), rows) == [True, True, False]


def test_a_clip_with_another_file_in_the_list_has_changed(tmp_path: Path):
    (tmp_path / "one.wav").write_bytes(b"")
    (tmp_path / "two.wav").write_bytes(b"12345")
    rows = failed({"clip_id": "a", "media": str(tmp_path / "one.wav")})
    failures_table.write_part(str(tmp_path), "train", rows)
    assert has_changed(str(tmp_path), fakes.clips({"clip_id": "a", "media": str(tmp_path / "two.wav")})) == [True]


def test_failures_of_an_old_version_are_read_and_stay_final(tmp_path: Path):
    row = WHY | {"clip_id": "a", "split": "train", "retry": False, "tool_versions": "", "labels": [0]}
    earlier = pa.schema([field for field in FAILURES if field.name not in MEDIA_STATE.names])
    dataset.write_table(dataset.failures_file(str(tmp_path), "train"), pa.Table.from_pylist([row], schema=earlier))
    assert has_changed(str(tmp_path), fakes.clips({"clip_id": "a", "media": str(tmp_path / "none.wav")})) == [False]
    failures = failures_table.collect(str(tmp_path), "train", pa.chunked_array([[]], pa.string()))
    assert len(failures_table.final(failures, frozenset())) == 1
    assert np.array_equal(failures["media_bytes"].to_pylist(), [None])
