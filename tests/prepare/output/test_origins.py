"""Hashes of where clips came from: equal for one recording however it is spelled and signed."""

import hashlib

import pyarrow as pa
import pytest

from pipeline.prepare.clip import FAILURES
from pipeline.prepare.output.failures_table import FAILURE_ROWS, has_changed
from pipeline.prepare.output.origins import read_otherwise, section_hashes
from tests import fakes


def hash_of(media: str, *, with_place: bool = True, **columns: object) -> int:
    rows = fakes.clips({"clip_id": "a", "media": media} | columns)
    (section_hash,) = section_hashes(rows, with_place=with_place).to_pylist()
    return int(section_hash)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("/data/a b.wav", "file:///data/a%20b.wav"),
        ("/data/a.wav", "/data/x/../a.wav"),
        ("https://h/a.wav?id=3&token=abcdefghi", "https://h/a.wav?id=3&token=jklmnopqr"),
        ("https://h/a.wav?X-Amz-Date=1&X-Amz-Signature=2", "https://h/a.wav?X-Amz-Date=3&X-Amz-Signature=4"),
        ("https://h/a.wav?sig=1&se=2", "https://h/a.wav"),
        ("https://h/a.wav?token=value:ts:sig", "https://h/a.wav?token=other:ts:sig"),
        ("https://h/a.wav?md5=AbCdEf&id=1#access_token=xyz", "https://h/a.wav?id=1&md5=Gh"),
    ],
)
def test_spellings_and_signatures_of_one_recording_have_one_hash(one: str, other: str):
    assert hash_of(one) == hash_of(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("/data/a.wav", "/data/b.wav"),
        ("https://h/get?key=audio/dog.wav", "https://h/get?key=audio/cat.wav"),
        ("https://h/get?code=0123456789", "https://h/get?code=9876543210"),
        ("https://h/get?session=1", "https://h/get?session=2"),
        ("https://h/get?id=1&st=3.5&token=abcdefghi", "https://h/get?id=1&st=4.5&token=abcdefghi"),
    ],
)
def test_other_recordings_have_other_hashes(one: str, other: str):
    assert hash_of(one) != hash_of(other)


def test_a_file_that_is_read_in_another_way_has_another_hash():
    section: dict[str, object] = {"start_s": 30.0, "end_s": 40.0}
    assert hash_of("/a.wav", **section, media_start_s=0.0) != hash_of("/a.wav", **section, media_start_s=None)


def test_hashes_of_earlier_versions_can_still_be_made():
    of_earlier_version = int.from_bytes(
        hashlib.blake2b(b"file /a.wav\n\n30.0\n40.0").digest()[:8], "little", signed=True
    )
    for place in (0.0, None):
        hashed = hash_of("/a.wav", with_place=False, start_s=30.0, end_s=40.0, media_start_s=place)
        assert hashed == of_earlier_version


def test_failures_with_the_hash_of_an_earlier_version_have_not_changed():
    clips = fakes.clips({"clip_id": "a", "media": "/a.wav", "media_start_s": None, "start_s": 30.0, "end_s": 40.0})

    def with_hash(section_hash: pa.Array) -> pa.Table:
        why = {"stage": "decode", "reason": "silent", "message": "", "attempts": 1, "retry": False, "tool_versions": ""}
        row = {"clip_id": "a", "split": "train", "section_hash": section_hash[0].as_py()} | why
        return pa.Table.from_pylist([row], schema=FAILURES).cast(FAILURE_ROWS)

    earlier, now = (with_hash(section_hashes(clips, with_place=with_place)) for with_place in (False, True))
    assert [bool(has_changed(failures, clips)[0]) for failures in (earlier, now)] == [False, False]
    otherwise = read_otherwise(clips)
    assert [bool(has_changed(failures, otherwise)[0]) for failures in (earlier, now)] == [False, True]
