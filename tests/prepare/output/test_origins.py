"""Hashes of where clips came from: equal for one recording however it is spelled and signed."""

import pytest

from pipeline.prepare.output.origins import section_hashes
from tests import fakes


def hash_of(media: str) -> int:
    rows = fakes.clips({"clip_id": "a", "media": media})
    (section_hash,) = section_hashes(rows).to_pylist()
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
