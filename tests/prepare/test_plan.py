"""How the stages are chained, on a real Ray."""

import errno
import os
import shutil
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from threading import enumerate as enumerate_threads
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.data._internal.block_batching.iter_batches import BatchIterator
from ray.data._internal.execution.streaming_executor import StreamingExecutor

from ast_core.errors import DataError, UserError
from ast_core.features import KALDI128
from ast_core.labels import LabelVocabulary
from jobs.demo.media_server import serve
from pipeline.prepare import plan
from pipeline.prepare.clip import FAILED_AT, FAILURES, in_progress
from pipeline.prepare.fetch.download import FetchSettings
from pipeline.prepare.fetch.rate_limiter import RateLimit
from pipeline.prepare.fetch.ytdlp_settings import YtDlp
from pipeline.prepare.output import failures_table
from pipeline.prepare.output.publish import publish, start_output
from pipeline.prepare.output.shards import WriteShards, scan_shards
from pipeline.prepare.output.work_list import read_chunks, write_chunks
from pipeline.prepare.plan import (
    MAX_DEATHS,
    SHARDS_ARE_WHOLE,
    FetchAndPrepare,
    PrepareSettings,
    RemainingWork,
    Stages,
    fail_after_deaths,
    prepare,
    remaining_work,
)
from pipeline.prepare.sources import read_manifest
from pipeline.ray_datasets import rows_of
from pipeline.ray_errors import user_errors_from_tasks
from tests import fakes


def fetched_and_prepared(folder: Path, fetch: Any, prepare_chunk: Stages, num_clips: int, workers: int = 1) -> Dataset:
    """Send chunks of four clips through download workers."""
    clips = fakes.clips(*({"clip_id": f"clip{i:02}", "media": "x"} for i in range(num_clips)))
    chunks = write_chunks(str(folder / "todo"), clips, 4)
    return ray.data.from_items(list(chunks), override_num_blocks=len(chunks)).map_batches(
        FetchAndPrepare,
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=0.01,
        compute=ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        fn_constructor_args=(fetch, prepare_chunk),
    )


class RecordedFetch:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, rows: pa.Table) -> pa.Table:
        for clip_id in rows["clip_id"].to_pylist():
            (self._folder / clip_id).touch()
        return rows


class CountedFetch:
    """Records at each chunk how many clips are fetched but not yet prepared."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, rows: pa.Table) -> pa.Table:
        fetched, prepared, ahead = (self._folder / name for name in ("fetched", "prepared", "ahead"))
        num_ahead = len(list(fetched.iterdir())) - len(list(prepared.iterdir()))
        (ahead / f"{num_ahead} {rows['clip_id'][0]}").touch()
        return RecordedFetch(fetched)(rows)


class SlowPreparation:
    """Is so slow that a fetch that does not wait would run many chunks ahead."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, rows: pa.Table) -> pa.Table:
        time.sleep(0.1)
        for clip_id in rows["clip_id"].to_pylist():
            (self._folder / "prepared" / clip_id).touch()
        return rows.select(["clip_id"])


def test_each_download_worker_fetches_at_most_one_chunk_ahead(local_ray: None, tmp_path: Path):
    """C25 of the review. The count that each fetch records at its start does not depend on the machine's speed."""
    for name in ("fetched", "prepared", "ahead"):
        (tmp_path / name).mkdir()
    data = fetched_and_prepared(
        tmp_path, CountedFetch(tmp_path), Stages((SlowPreparation(tmp_path),)), num_clips=60, workers=2
    )
    prepared = [row["clip_id"] for row in data.iter_rows()]
    assert len(prepared) == len(set(prepared)) == 60
    of_others = [int(file.name.partition(" ")[0]) for file in (tmp_path / "ahead").iterdir()]
    assert len(of_others) == 60 / 4
    assert max(of_others) <= 4  # the other worker's chunk


def slowly(rows: pa.Table) -> pa.Table:
    time.sleep(0.5)
    return rows


@pytest.mark.parametrize("where", ["before the first row", "in the loop over the rows"])
def test_case_26_no_executor_outlives_the_loop_over_rows(where: str, local_ray: None, monkeypatch: pytest.MonkeyPatch):
    """The executor's thread would start another Ray after a shutdown, and the job would not end.

    The error is kept, as in a job that ends. Otherwise Ray's iterators would be deleted with the error's frames, and
    end the executor.
    """

    def press(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    begun, begin = [], StreamingExecutor.execute

    def note(executor: StreamingExecutor, *args: Any, **options: Any) -> Any:
        begun.append(executor)
        return begin(executor, *args, **options)

    def work() -> None:
        data = ray.data.range(60, override_num_blocks=60).map_batches(slowly, batch_format="pyarrow")
        with closing(rows_of(data)) as rows:
            for _ in rows:
                press()

    monkeypatch.setattr(StreamingExecutor, "execute", note)
    if where == "before the first row":
        monkeypatch.setattr(BatchIterator, "__init__", press)
    with pytest.raises(KeyboardInterrupt) as held:
        work()
    assert held.traceback
    assert len(begun) == 1, "no executor had begun; the test shows nothing"
    assert not begun[0].is_alive()
    assert not [thread for thread in enumerate_threads() if isinstance(thread, StreamingExecutor)]


def refuse(*_: Any) -> pa.Table:
    raise DataError("no room there; make some")


def test_a_user_error_in_a_task_keeps_its_message(local_ray: None, tmp_path: Path):
    """The error may come from a task, a download worker's task, that worker, or a task outside Ray Data."""
    (tmp_path / "fetched").mkdir()
    fetch = RecordedFetch(tmp_path / "fetched")
    ways = {
        "stage": lambda: list(rows_of(ray.data.range(1).map_batches(refuse, batch_format="pyarrow"))),
        "preparing": lambda: list(rows_of(fetched_and_prepared(tmp_path, fetch, Stages((refuse,)), num_clips=8))),
        "fetching": lambda: list(rows_of(fetched_and_prepared(tmp_path, refuse, Stages(()), num_clips=8))),
        "outside Ray Data": lambda: _outside_ray_data(),
    }
    raises_original, DataContext.get_current().raise_original_map_exception = False, True
    try:
        for name, way in ways.items():
            with pytest.raises(DataError) as caught:
                way()
            assert (type(caught.value), str(caught.value)) == (DataError, "no room there; make some"), name
    finally:
        DataContext.get_current().raise_original_map_exception = raises_original


def no_room(rows: pa.Table) -> pa.Table:
    raise OSError(errno.ENOSPC, "No space left on device", "/data/train/shards/0.parquet")


def test_part_3_5_a_full_disk_is_named_by_its_path(local_ray: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(DataContext.get_current(), "raise_original_map_exception", True)
    with pytest.raises(UserError) as caught:
        list(rows_of(ray.data.range(1).map_batches(Stages((no_room,)), batch_format="pyarrow")))
    expected = "No space left on device: /data/train/shards/0.parquet; make room there, and run the same command again"
    assert str(caught.value) == f"{SHARDS_ARE_WHOLE}: {expected}"


def _outside_ray_data() -> None:
    with user_errors_from_tasks():
        ray.get(ray.remote(refuse).remote())


class NoRoom:
    """Settings of a fetch on a machine that cannot continue."""

    rate_limit, ytdlp = RateLimit(), YtDlp()

    @property
    def deadline_s(self) -> float:
        raise DataError("no room there; make some")


def test_many_shards_are_read_by_tasks(
    local_ray: None, tone_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = shutil.copytree(tone_data, tmp_path / "data")
    monkeypatch.setattr(plan, "SHARDS_AT_ONCE", 1)
    here = scan_shards(str(data), "train")
    first = here.filter(pc.equal(here["shard"], here["shard"][0]))
    for known in (None, first, here):
        assert (
            plan.scan_in_tasks(str(data), "train", known).sort_by([("shard", "ascending"), ("row", "ascending")])
            == here
        )
    next((data / "train" / "shards").iterdir()).write_bytes(b"PAR1")
    with pytest.raises(DataError, match="is no shard of ours or damaged"):
        plan.scan_in_tasks(str(data), "train")


def test_a_preparation_ends_with_its_workers_user_error(local_ray: None, tmp_path: Path):
    (tmp_path / "list.csv").write_text("url,labels\nhttp://127.0.0.1:9/x.ogg,a\n")
    listed = read_manifest(str(tmp_path / "list.csv"))
    with pytest.raises(DataError) as caught:
        prepare(listed, PrepareSettings(output=str(tmp_path / "data"), fetch=NoRoom()))  # type: ignore[arg-type]
    assert (type(caught.value), str(caught.value)) == (DataError, "no room there; make some")


def test_files_next_to_urls_are_prepared_apart_from_them(local_ray: None, tmp_path: Path):
    """Otherwise one URL would make download workers prepare all files, in small chunks."""
    for name in "abcd":
        fakes.write_media(tmp_path / f"{name}.flac", fakes.noise(0.5, seed=ord(name)))
    fakes.write_media(tmp_path / "fetched.ogg", fakes.noise(0.5))
    with serve(tmp_path) as url:
        rows = [*(f"{name}.flac,,x" for name in "abcd"), f",{url}/fetched,x", f",{url}/gone,x", "none.flac,,x"]
        (tmp_path / "list.csv").write_text("\n".join(["path,url,labels", *rows]))
        settings = PrepareSettings(
            output=str(tmp_path / "data"), fetch=FetchSettings(ytdlp=YtDlp(allow_private_hosts=True))
        )
        lines: list[str] = []
        (report,) = prepare(read_manifest(str(tmp_path / "list.csv")), settings, lines.append).splits
        assert (report.info["clips"], report.info["failures"]) == (5, {"missing_file": 1, "unavailable": 1})
        done = [line for line in lines if line.startswith("done: ")]
        assert any(line.startswith("done: 5 of 5 clips") for line in done)
        assert done[-1].startswith("done: 2 of 2 clips")
        stored = scan_shards(settings.output, "train").to_pylist()
        shards = {row["shard"]: [] for row in stored}
        for row in stored:
            shards[row["shard"]].append(row["clip_id"])
        assert sorted(map(sorted, shards.values())) == [["a", "b", "c", "d"], ["fetched"]]
        lines.clear()
        prepare(read_manifest(str(tmp_path / "list.csv")), settings, lines.append)
        assert lines[0].startswith("6 clips are done by an earlier run, 1 to do")
    assert not (tmp_path / "data" / "_work").exists()


def test_each_kind_has_chunks_of_its_own_size(local_ray: None):
    clips = fakes.clips(
        *({"clip_id": f"f{i}", "media": "/x.wav"} for i in range(3)), {"clip_id": "u", "media": "https://host/x"}
    )
    files, urls = RemainingWork(clips, 4, {}, 0).by_kind()
    assert (files["clip_id"].to_pylist(), urls["clip_id"].to_pylist()) == (["f0", "f1", "f2"], ["u"])
    for one_kind in (files, urls):
        assert RemainingWork(one_kind, 4, {}, 0).num_fetches in (0, len(one_kind))
        assert sorted(map(len, RemainingWork(one_kind, 4, {}, 0).by_kind())) == [0, len(one_kind)]
    settings = PrepareSettings(output="", download_workers=1)
    assert plan._clips_per_chunk(10**6, settings, are_fetched=False) == plan.MAX_CLIPS
    assert plan._clips_per_chunk(10**6, settings, are_fetched=True) == plan.MAX_FETCHED_CLIPS


def test_a_dry_run_compares_the_features_of_every_shard(tmp_path: Path):
    output = str(tmp_path / "data")
    labels = LabelVocabulary.from_names(["x"])
    start_output(output, labels)
    WriteShards(output)(fakes.prepared_rows("a"))
    publish(output, labels, {"train": FAILURES.empty_table()})
    WriteShards(output, features=replace(KALDI128, low_freq_hz=50.0))(fakes.prepared_rows("b"))
    (tmp_path / "list.csv").write_text("clip_id,path,labels,end_s\na,x,x,0.5\nb,x,x,0.5\nc,x,x,0.5\n")
    with pytest.raises(DataError, match=r"contains other features than these: low_freq_hz is 20\.0, not 50\.0"):
        remaining_work(read_manifest(str(tmp_path / "list.csv")), PrepareSettings(output=output))


class DiesWith:
    """A stage whose process ends at once if this clip is among the rows that have not failed."""

    def __init__(self, clip_id: str) -> None:
        self._clip_id = clip_id

    def __call__(self, rows: pa.Table) -> pa.Table:
        well = rows.filter(pc.is_null(rows["reason"]))
        if self._clip_id in well["clip_id"].to_pylist():
            os._exit(1)
        return rows.select(["clip_id", *FAILED_AT.names])


def test_c16_a_chunk_whose_task_always_dies_fails_and_the_rest_continues(local_ray: None, tmp_path: Path):
    clips = fakes.clips(*({"clip_id": f"clip{i:02}", "media": "x"} for i in range(12)))
    chunks = write_chunks(str(tmp_path), clips, 4)
    data = ray.data.from_items(list(chunks), override_num_blocks=len(chunks)).map_batches(
        Stages((read_chunks, fail_after_deaths, DiesWith("clip05"))), batch_size=1, batch_format="pyarrow"
    )
    rows = {row["clip_id"]: row for row in rows_of(data)}
    failed = [clip_id for clip_id, row in rows.items() if row["reason"] is not None]
    assert (len(rows), len(failed), "clip05" in failed) == (12, 4, True)
    (why,) = {(row["stage"], row["reason"], row["attempts"], row["message"]) for row in rows.values() if row["reason"]}
    assert why[:3] == ("prepare", "crashed", MAX_DEATHS)
    assert why[3] == "the task that prepared it and 3 other clips ended 3 times, killed or out of memory"


def test_c16_the_next_run_tries_clips_of_a_dead_chunk_again(tmp_path: Path):
    rows = in_progress(fakes.clips({"clip_id": "a", "media": "x"}, {"clip_id": "b", "media": "x"}))
    for name, values in {"stage": ["prepare", "decode"], "reason": ["crashed"] * 2, "message": [""] * 2}.items():
        rows = rows.set_column(rows.column_names.index(name), name, pa.array(values))
    rows = rows.set_column(rows.column_names.index("attempts"), "attempts", pa.array([3, 1], pa.int32()))
    failures_table.write_part(str(tmp_path), "train", rows)
    failures = failures_table.collect(str(tmp_path), "train", pa.chunked_array([[]], pa.string()))
    assert failures_table.final(failures, frozenset())["clip_id"].to_pylist() == ["b"]
