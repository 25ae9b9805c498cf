"""What a second run says about prepared clips whose files may be others now."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline import storage
from pipeline.prepare.output import same_clips
from pipeline.prepare.output.same_clips import other_id_lines, other_media_lines
from pipeline.prepare.output.shards import WriteShards
from pipeline.prepare.output.split_state import load_split
from tests import fakes

FAR_LATER_US = 1 << 60


def test_clips_of_other_files_are_counted_by_why_they_may_be_other_sounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output = str(tmp_path)
    WriteShards(output)(fakes.prepared_rows("a", "b", "c", "d"))  # of the file x
    prepared = load_split(output, "train").prepared
    others = {"b": {"media": "y"}, "c": {"media_start_s": None}}
    listed = fakes.clips(*({"clip_id": i, "media": "x", "end_s": 0.5} | others.get(i, {}) for i in "dcbae"))
    monkeypatch.setattr(same_clips, "ROWS_AT_ONCE", 3)
    monkeypatch.setattr(storage, "written_us", lambda uri: 0)
    by_file = "1 prepared clips of split 'train' are prepared from other files or URLs than this list names (b for one)"
    by_way = (
        "1 prepared clips of split 'train' are of files that only one of the two runs reads with --files-are-clips "
        "(c for one)"
    )
    by_time = "2 prepared clips of split 'train' have files that were written or copied later (a for one)"
    lines = other_media_lines(output, "train", listed, prepared)
    assert sorted(line.partition(" and are not read")[0] for line in lines) == [by_way, by_file]
    monkeypatch.setattr(storage, "written_us", lambda uri: FAR_LATER_US if uri == "x" else 0)
    lines = other_media_lines(output, "train", listed, prepared)
    assert sorted(line.partition(" and are not read")[0] for line in lines) == [by_way, by_file, by_time]


def test_clips_under_other_ids_are_known_by_their_sections(tmp_path: Path):
    WriteShards(str(tmp_path))(fakes.prepared_rows("a"))
    prepared = load_split(str(tmp_path), "train").prepared
    same, other = ({"media": "x", "end_s": end_s} for end_s in (0.5, 0.4))
    listed = fakes.clips({"clip_id": "dog_a"} | same, {"clip_id": "cat_a", "media": "y"})
    (line,) = other_id_lines("train", listed, prepared)
    assert line == (
        "1 clips of split 'train' are prepared under other ids (a for one, which is dog_a in this list) and are "
        "prepared again: ids contain folders if files have equal names, or the list gives other ids"
    )
    assert other_id_lines("train", fakes.clips({"clip_id": "dog_a"} | other), prepared) == []
    assert other_id_lines("train", fakes.clips({"clip_id": "a"} | same, {"clip_id": "b"} | same), prepared) == []
    of_earlier_version = prepared.set_column(
        prepared.column_names.index("section_hash"), "section_hash", pa.nulls(1, pa.int64())
    )
    assert other_id_lines("train", listed, of_earlier_version) == []


def test_many_clips_are_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    WriteShards(str(tmp_path))(fakes.prepared_rows("a", "b"))
    prepared = load_split(str(tmp_path), "train").prepared
    listed = fakes.clips(*({"clip_id": i, "media": "x", "end_s": 0.5} for i in "ab"))
    said: list[str] = []
    assert other_media_lines(str(tmp_path), "train", listed, prepared, said.append) == said == []
    monkeypatch.setattr(same_clips, "SAID_ABOVE", 1)
    assert other_media_lines(str(tmp_path), "train", listed, prepared, said.append) == []
    assert said == ["looking for changes in the files of 2 prepared clips of split 'train'"]


def test_several_files_are_asked_for_at_a_time(monkeypatch: pytest.MonkeyPatch):
    together = threading.Barrier(2, timeout=60)

    def written_us(uri: str) -> int:
        together.wait()
        return int(uri)

    monkeypatch.setattr(storage, "written_us", written_us)
    monkeypatch.setattr(same_clips, "FILES_A_TASK", 1)
    with ThreadPoolExecutor(2) as pool:
        assert same_clips._written_us(pa.chunked_array([["7", "5"], ["7"]]), pool).tolist() == [7, 5, 7]
        assert same_clips._written_us(pa.chunked_array([], pa.string()), pool).tolist() == []
