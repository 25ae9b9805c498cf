"""Publishing: what a list does to splits that it does not name, and shards that do not belong to the data set."""

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pyarrow as pa
import pytest

from ast_core.errors import DataError
from ast_core.features import KALDI128
from ast_core.labels import LabelVocabulary
from pipeline import dataset, storage
from pipeline.dataset import PreparedDataset
from pipeline.prepare.clip import FAILURES
from pipeline.prepare.output import failures_table
from pipeline.prepare.output.membership import Listed
from pipeline.prepare.output.publish import publish, start_output
from pipeline.prepare.output.shards import WriteShards
from tests.fakes import prepared_rows

LABELS = LabelVocabulary.from_names(["x"])


def publish_list(output: str, split: str, *clip_ids: str) -> list[str]:
    """Publish a list of these clips. Returns the lines for the user."""
    listed = Listed(len(clip_ids), pa.array(clip_ids, pa.string()), pa.array([], pa.string()))
    return publish(output, LABELS, {split: FAILURES.empty_table()}, {split: listed})[1]


def train_and_a_test_clip_of_it(output: str) -> None:
    """Publish `train` with a, b and c, and prepare b again, for `test`."""
    start_output(output, LABELS)
    WriteShards(output)(prepared_rows("a", "b", failed=("f",)))
    WriteShards(output)(prepared_rows("c"))
    publish_list(output, "train", "a", "b", "c", "f")
    WriteShards(output)(prepared_rows("b", split="test"))


def clips_of(output: str) -> dict[str, list[str]]:
    opened = PreparedDataset.open(output)
    return {split: opened.clips([split]).clip_id.to_pylist() for split in opened.splits}


def splits_in_dataset_json(output: str) -> dict[str, dict[str, object]]:
    splits: dict[str, dict[str, object]] = json.loads(Path(dataset.dataset_json(output)).read_text())["splits"]
    return splits


def test_a_run_that_is_killed_while_clips_move_is_repaired_by_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
    for output in (whole, killed):
        train_and_a_test_clip_of_it(output)
    assert publish_list(whole, "test", "b")[0].startswith("1 clips moved from train to test")
    monkeypatch.setattr(dataset, "write_info", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        publish_list(killed, "test", "b")
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"index\.parquet is "):
        clips_of(killed)
    publish_list(killed, "test", "b")
    assert clips_of(killed) == clips_of(whole) == {"train": ["a", "c"], "test": ["b"]}
    assert splits_in_dataset_json(killed) == splits_in_dataset_json(whole)
    assert not Path(killed, "_work").exists()


def test_a_marker_of_a_split_that_is_published_as_it_is_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output = str(tmp_path)
    train_and_a_test_clip_of_it(output)
    monkeypatch.setattr(storage, "discard", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        publish_list(output, "test", "b")
    monkeypatch.undo()
    before = splits_in_dataset_json(output)
    publish_list(output, "test", "b")
    assert splits_in_dataset_json(output) == before
    assert not Path(output, "_work").exists()


def test_clips_of_a_chunk_that_died_are_counted_as_tried_again(tmp_path: Path):
    output = str(tmp_path)
    start_output(output, LABELS)
    WriteShards(output)(prepared_rows("a"))
    rows = prepared_rows(failed=("b", "c", "d"))
    for name, values in {"stage": ["prepare", "decode", "decode"], "reason": ["crashed", "crashed", "network"]}.items():
        rows = rows.set_column(rows.column_names.index(name), name, pa.array(values))
    failures_table.write_part(output, "train", rows)
    publish_list(output, "train", "a", "b", "c", "d")
    split = splits_in_dataset_json(output)["train"]
    assert (split["failures"], split["tried_again"]) == ({"crashed": 2, "network": 1}, 2)


def test_clips_with_many_clipped_samples_are_counted(tmp_path: Path):
    output = str(tmp_path)
    start_output(output, LABELS)
    rows = prepared_rows("a", "b", "c")
    num_samples = rows["num_frames"][0].as_py() * KALDI128.frame_shift_samples
    clipped = pa.array([num_samples // 100, num_samples // 100 + 1, num_samples], pa.int32())
    WriteShards(output)(rows.set_column(rows.column_names.index("num_clipped"), "num_clipped", clipped))
    assert publish_list(output, "train", "a", "b", "c") == [
        "2 prepared clips of split 'train' have more than 1 % of their samples beyond full scale, which are cut to ±1 "
        "(b for one)"
    ]
    assert publish_list(output, "train", "a") == []


def test_no_clip_leaves_an_index_because_its_shard_is_missing(tmp_path: Path):
    output = str(tmp_path)
    train_and_a_test_clip_of_it(output)
    (lost,) = (row["shard"] for row in dataset.read_table(dataset.index_file(output, "train")).to_pylist()[2:])
    shard = tmp_path / "train" / "shards" / lost
    copy = shard.read_bytes()
    shard.unlink()
    before = splits_in_dataset_json(output)
    with pytest.raises(
        DataError, match=f"1 clips of split 'train' are in its index and in no shard, c of {shard} for one; restore"
    ):
        publish_list(output, "test", "b")
    assert splits_in_dataset_json(output) == before
    shard.write_bytes(copy)
    publish_list(output, "test", "b")
    assert clips_of(output) == {"train": ["a", "c"], "test": ["b"]}


def test_a_shard_of_other_features_is_refused_by_its_name(tmp_path: Path):
    output = str(tmp_path)
    train_and_a_test_clip_of_it(output)
    known = set((tmp_path / "train" / "shards").iterdir())
    WriteShards(output, features=replace(KALDI128, low_freq_hz=50.0))(prepared_rows("d"))
    (other,) = set((tmp_path / "train" / "shards").iterdir()) - known
    with pytest.raises(
        DataError, match=f"{other} contains other features than these: low_freq_hz is 20.0, not 50.0; delete it, and"
    ):
        publish_list(output, "train", "a", "b", "c", "d")
