"""The cache of remote shards fetches each once and keeps its size limit, also if other workers remove copies."""

import errno
import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.dataset import ROW_GROUP_CLIPS, write_table
from pipeline.train.data.feed import FbankReader
from pipeline.train.data.shard_cache import ShardCache
from tests.damage import refusal
from tests.train.made import clips_of, table_of


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """URIs `far://NAME` are files below tmp_path/far. The fixture is the list of those that were opened there."""
    opened: list[str] = []
    local = pafs.LocalFileSystem()

    class Handler(pafs.FSSpecHandler):
        def __init__(self) -> None:
            pass

        def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
            return local.get_file_info(paths)

        def open_input_file(self, path: str):
            opened.append(Path(path).name)
            return local.open_input_file(path)

    far = pafs.PyFileSystem(Handler())
    resolve = storage.resolve
    monkeypatch.setattr(
        storage,
        "resolve",
        lambda uri: (far, str(tmp_path / "far" / uri[6:])) if uri.startswith("far://") else resolve(uri),
    )
    (tmp_path / "far").mkdir()
    return opened


def write(folder: Path, name: str, size: int = 1000) -> str:
    (folder / "far" / name).write_bytes(name.encode().ljust(size))
    return f"far://{name}"


def test_a_remote_file_is_fetched_once_and_a_local_one_never(fetched: list[str], tmp_path: Path):
    cache = ShardCache(str(tmp_path / "cache"), 10_000)
    uri = write(tmp_path, "a")
    for _ in range(3):
        with cache.open(uri) as file:
            assert file.read().strip() == b"a"
    assert fetched == ["a"]
    with cache.open(str(tmp_path / "far" / "a")) as file:
        assert file.size() == 1000
    assert fetched == ["a"]


def test_least_recently_opened_files_are_removed_for_room(fetched: list[str], tmp_path: Path):
    cache = ShardCache(str(tmp_path / "cache"), 2500)
    uris = [write(tmp_path, name) for name in "abc"]
    for age_s, uri in ((300, uris[0]), (200, uris[1])):
        cache.open(uri).close()
        newest = max((tmp_path / "cache").iterdir(), key=os.path.getmtime)
        os.utime(newest, (newest.stat().st_mtime - age_s,) * 2)
    cache.open(uris[0]).close()  # used again: now b is the least recently opened
    cache.open(uris[2]).close()
    assert sum(file.stat().st_size for file in (tmp_path / "cache").iterdir()) <= 2500
    cache.open(uris[0]).close()
    assert fetched == ["a", "b", "c"]
    cache.open(uris[1]).close()
    assert fetched == ["a", "b", "c", "b"]


def test_a_copy_removed_by_another_worker_is_fetched_again(fetched: list[str], tmp_path: Path):
    cache = ShardCache(str(tmp_path / "cache"), 10_000)
    uri = write(tmp_path, "a")
    with cache.open(uri) as held:
        for file in (tmp_path / "cache").iterdir():
            file.unlink()
        assert held.read().strip() == b"a"
    assert cache.open(uri).read().strip() == b"a"
    assert fetched == ["a", "a"]


def test_a_shard_that_is_written_again_is_fetched_again(fetched: list[str], tmp_path: Path):
    cache = ShardCache(str(tmp_path / "cache"), 10_000)
    uri, shard = write(tmp_path, "a"), tmp_path / "far" / "a"
    cache.open(uri).close()
    for written_s, content in ((1, b"b" * 1000), (1, b"c" * 2000), (2, b"d" * 2000)):
        shard.write_bytes(content)
        os.utime(shard, (written_s, written_s))
        for _ in range(2):
            assert cache.open(uri).read() == content
    assert fetched == ["a"] * 4


def test_a_shard_larger_than_the_cache_is_read_directly(fetched: list[str], tmp_path: Path):
    cache = ShardCache(str(tmp_path / "cache"), 1500)
    small, large = write(tmp_path, "small"), write(tmp_path, "large", 1501)
    for _ in range(2):
        assert cache.open(small).read().strip() == b"small"
        assert cache.open(large).read().strip() == b"large"
    assert fetched == ["small", "large", "large"]


@pytest.mark.parametrize("is_seen_before", [True, False])
def test_a_full_disk_gives_one_warning_and_shards_are_read_directly(
    fetched: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_seen_before: bool,
):
    cache = ShardCache(str(tmp_path / "cache"), 10_000)
    kept, *others = (write(tmp_path, name) for name in "abc")
    cache.open(kept).close()
    if is_seen_before:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=999))
    else:  # another worker was faster
        monkeypatch.setattr(shutil, "copyfileobj", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with caplog.at_level(logging.WARNING):
        for uri in (kept, *others):
            assert cache.open(uri).read().strip() == uri[-1:].encode()
    said = f"the disk of the shard cache {tmp_path}/cache is full: shards are read directly from storage"
    assert [record.message for record in caplog.records] == [said]
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert fetched == (["a", "b", "c"] if is_seen_before else ["a", "b", "b", "c", "c"])


def test_an_interrupted_fetch_leaves_nothing(fetched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "copyfileobj", Mock(side_effect=OSError("the connection was lost")))
    with pytest.raises(OSError, match="the connection was lost"):
        ShardCache(str(tmp_path / "cache"), 10_000).open(write(tmp_path, "a"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_missing_shard_raises(fetched: list[str], tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        ShardCache(str(tmp_path / "cache"), 10_000).open("far://missing")


def test_incomplete_copies_are_removed_and_other_files_are_kept(fetched: list[str], tmp_path: Path):
    cache = ShardCache(str(tmp_path / "cache"), 1500)
    uris = [write(tmp_path, name) for name in "ab"]
    cache.open(uris[0]).close()
    (kept,) = (tmp_path / "cache").iterdir()
    cut_off, under_way = (kept.with_suffix(f".{digit * 32}{storage.UNFINISHED}") for digit in "01")
    strangers = [tmp_path / "cache" / name for name in ("mine.parquet", f"mine{storage.UNFINISHED}")]
    for file in (cut_off, under_way, *strangers):
        file.write_bytes(b"x" * 1000)
    for file in (cut_off, *strangers):
        os.utime(file, (0, 0))
    cache.open(uris[1]).close()
    assert {under_way, *strangers} < set((tmp_path / "cache").iterdir())
    assert not cut_off.exists()
    assert not kept.exists()


def test_the_feed_reads_remote_shards_through_the_cache(fetched: list[str], tmp_path: Path):
    table, fbanks = table_of([5] * 40)
    write_table(str(tmp_path / "far" / "s.parquet"), table, row_group_size=ROW_GROUP_CLIPS)
    assert pq.ParquetFile(tmp_path / "far" / "s.parquet").num_row_groups == 3
    cache = ShardCache(str(tmp_path / "cache"), 1 << 20)
    for _ in range(2):
        with FbankReader(clips_of(["far://s.parquet"] * 40, range(40), fbanks), cache=cache) as reader:
            assert all((reader[i] == fbanks[i]).all() for i in range(40))
    assert fetched == ["s.parquet"]


def test_a_damaged_copy_is_fetched_again_and_a_damaged_shard_is_named(
    fetched: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    table, fbanks = table_of([5] * 40)
    write_table(str(tmp_path / "far" / "s.parquet"), table, row_group_size=ROW_GROUP_CLIPS)
    clips, cache = clips_of(["far://s.parquet"] * 40, range(40), fbanks), ShardCache(str(tmp_path / "cache"), 1 << 20)

    def read_all() -> None:
        with FbankReader(clips, cache=cache) as reader:
            assert all((reader[i] == fbanks[i]).all() for i in range(40))

    read_all()
    (kept,) = (tmp_path / "cache").iterdir()
    about = pq.ParquetFile(kept).metadata.row_group(1)
    at = about.column(about.num_columns - 1).data_page_offset + 1000
    whole = kept.read_bytes()
    kept.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    read_all()
    assert "the copy of far://s.parquet on this node's disk was damaged, and is fetched again" in caplog.text
    read_all()
    assert kept.read_bytes() == whole
    kept.unlink()
    (tmp_path / "far" / "s.parquet").write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    assert refusal(read_all).startswith("the shard far://s.parquet is damaged (")
