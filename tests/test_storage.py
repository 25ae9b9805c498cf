"""Files by URI are written atomically, listed and deleted."""

import os
from pathlib import Path

import pytest

from ast_core.errors import DataError
from pipeline import storage


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    uri = str(tmp_path / "deep" / "a.txt")
    storage.write_bytes(uri, b"old")

    def fail(file) -> None:
        file.write(b"half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        storage.write_file(uri, fail)
    assert storage.read_bytes(uri) == b"old"
    assert storage.list_files(tmp_path, recursive=True) == [uri]


def test_an_open_reader_continues_with_the_old_file(tmp_path: Path):
    uri = str(tmp_path / "a.txt")
    storage.write_bytes(uri, b"old")
    with open(uri, "rb") as reader:
        storage.write_bytes(uri, b"new")
        assert reader.read() == b"old"
    assert storage.read_bytes(uri) == b"new"


def test_files_are_listed_by_suffix_and_depth_and_a_missing_folder_is_empty(tmp_path: Path):
    for name in ("b.parquet", "a.parquet", "a.tmp", "deep/c.parquet"):
        storage.write_bytes(str(tmp_path / name), b"")
    names = [Path(uri).name for uri in storage.list_files(str(tmp_path), suffix=".parquet")]
    assert names == ["a.parquet", "b.parquet"]
    assert len(storage.list_files(str(tmp_path), recursive=True)) == 4
    assert storage.list_files(str(tmp_path / "nowhere")) == []
    assert storage.is_empty(str(tmp_path / "nowhere"))
    assert not storage.is_empty(str(tmp_path))


def test_modification_times_are_returned_by_name(tmp_path: Path):
    for name, time_s in (("a.parquet", 1.7e9), ("b.parquet", 1.7e9 + 0.5), ("c.tmp", 0), ("deep/d.parquet", 0)):
        storage.write_bytes(str(tmp_path / name), b"")
        os.utime(tmp_path / name, (time_s, time_s))
    assert storage.modified_s(str(tmp_path), suffix=".parquet") == {"a.parquet": 1.7e9, "b.parquet": 1.7e9 + 0.5}
    assert storage.modified_s(str(tmp_path / "nowhere")) == {}


def test_a_missing_file_and_an_unknown_scheme_are_data_errors(tmp_path: Path):
    with pytest.raises(DataError, match="there is no file"):
        storage.read_bytes(str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="cannot open gopher://x/y"):
        storage.read_bytes("gopher://x/y")


def test_delete_removes_files_and_folders_and_ignores_missing_ones(tmp_path: Path):
    storage.write_bytes(str(tmp_path / "d" / "a"), b"")
    storage.delete(str(tmp_path / "d"))
    storage.delete(str(tmp_path / "d"))
    assert storage.is_empty(str(tmp_path))
