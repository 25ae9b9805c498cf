"""A work list belongs to one run."""

import os
import socket
import time
from pathlib import Path

import pyarrow as pa
import pytest

from ast_core.errors import DataError
from pipeline import dataset, storage
from pipeline.prepare.output import work_list as module
from pipeline.prepare.output.work_list import read_chunks, work_list, work_lists_dir, write_chunks
from tests import fakes
from tests.s3 import S3Server


def clips(*names: str) -> pa.Table:
    return fakes.clips(*({"clip_id": name, "media": name} for name in names))


def names_read(chunks: list[module.Chunk]) -> list[str]:
    return sorted(read_chunks(pa.Table.from_pylist([*map(dict, chunks)]))["clip_id"].to_pylist())


def test_part_3_2_runs_of_two_clusters_read_their_own_lists(s3: S3Server):
    output = s3.uri("two-lists")
    with work_list(output) as one:
        chunks_one = write_chunks(one, clips("a", "b"), 16)
        with work_list(output) as two:
            chunks_two = write_chunks(two, clips("c", "d", "e"), 16)
            assert (names_read(chunks_one), names_read(chunks_two)) == (["a", "b"], ["c", "d", "e"])
        assert names_read(chunks_one) == ["a", "b"]  # the end of one run does not delete the other's list
    assert not storage.list_files(work_lists_dir(output), recursive=True)


def test_case_c9_secrets_of_urls_reach_the_tasks_but_no_file(tmp_path: Path):
    media = [
        "/a.wav",
        "https://host/b.wav?X-Amz-Signature=PLANTED",
        "https://me:PLANTED@host/c.wav",
        "https://h/d?id=1",
    ]
    listed = fakes.clips(*({"clip_id": name, "media": uri} for name, uri in zip("abcd", media, strict=True)))
    with work_list(str(tmp_path)) as folder:
        chunks = write_chunks(folder, listed, 1)
        rows = read_chunks(pa.Table.from_pylist([*map(dict, chunks)]))
        written = [dataset.read_table(uri)["media"] for uri in storage.list_files(folder, suffix=".parquet")]
    by_name = dict(zip(rows["clip_id"].to_pylist(), rows["media"].to_pylist(), strict=True))
    assert by_name == dict(zip("abcd", media, strict=True))
    shown = ["/a.wav", "https://h/d?id=1", "https://host/b.wav", "https://host/c.wav"]
    assert sorted(uri for column in written for uri in column.to_pylist()) == shown


def test_the_list_of_a_dead_run_is_deleted_and_that_of_a_live_one_stays(s3: S3Server, monkeypatch: pytest.MonkeyPatch):
    output = s3.uri("dead-lists")
    write_chunks(f"{work_lists_dir(output)}/killed", clips("a"), 16)
    with work_list(output):
        assert storage.list_files(f"{work_lists_dir(output)}/killed")  # it may be alive, because clocks differ
    monkeypatch.setattr(module, "DEAD_AFTER_S", 0.5)
    monkeypatch.setattr(module, "ALIVE_EVERY_S", 0.05)
    with work_list(output) as live:
        chunks = write_chunks(live, clips("b"), 16)
        while storage.list_files(f"{work_lists_dir(output)}/killed"):
            time.sleep(0.5)
            with work_list(output):
                pass
        assert names_read(chunks) == ["b"]


def test_on_a_local_disk_lists_of_earlier_runs_are_deleted_at_once(tmp_path: Path):
    output = str(tmp_path)
    write_chunks(f"{work_lists_dir(output)}/killed", clips("a"), 16)
    with work_list(output) as folder:
        assert os.listdir(work_lists_dir(output)) == [Path(folder).name]


def test_a_node_that_does_not_see_the_list_is_named(tmp_path: Path):
    with work_list(str(tmp_path)) as folder:
        (chunk,) = write_chunks(folder, clips("a"), 16)
        os.unlink(chunk["uri"])
        with pytest.raises(DataError, match=f"the node {socket.gethostname()} does not see {chunk['uri']}; give"):
            names_read([chunk])


def test_a_list_that_another_job_deletes_at_once_ends_no_other_list(s3: S3Server, monkeypatch: pytest.MonkeyPatch):
    output = s3.uri("deleted-lists")
    write_chunks(f"{work_lists_dir(output)}/other", clips("a"), 16)
    listed = storage.modified_s_below

    def without_own(folder: str) -> dict[str, float]:
        return {name: modified_s for name, modified_s in listed(folder).items() if name == "other"}

    monkeypatch.setattr(storage, "modified_s_below", without_own)
    with work_list(output):
        assert storage.list_files(f"{work_lists_dir(output)}/other")
