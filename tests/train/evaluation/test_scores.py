"""The best epoch's scores are read as they were written, from disk and from S3."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ast_core.errors import DataError
from pipeline import dataset, storage
from pipeline.dataset import Clips
from pipeline.train.evaluation.scores import read_scores, scores_file, write_scores
from tests.s3 import S3Server


def clips_of(labels: list[list[int]]) -> Clips:
    num = len(labels)
    ids = pa.array([f"clip_{i}" for i in range(num)])
    zeros = np.zeros(num, np.int32)
    return Clips(["shard"], zeros, zeros, zeros, pa.array(labels, dataset.LABELS), ids, 128, np.ones(num))


def check(run: str) -> None:
    labels = [[0, 2], [], [1]]
    scores = np.random.default_rng(0).random((3, 4)).astype(np.float32)
    write_scores(run, scores, clips_of(labels))
    there = read_scores(run)
    assert there is not None
    assert there.clip_id.to_pylist() == ["clip_0", "clip_1", "clip_2"]
    assert there.labels.to_pylist() == labels
    np.testing.assert_array_equal(there.scores, scores)
    assert there.targets().tolist() == [[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]]


def test_scores_and_labels_come_back_in_order(tmp_path: Path):
    check(str(tmp_path))
    assert read_scores(str(tmp_path / "elsewhere")) is None


def test_scores_can_be_stored_on_s3(s3: S3Server):
    check(s3.uri("runs", "1"))


def test_other_programs_read_the_file_and_it_stays_small_for_audioset(tmp_path: Path):
    num_clips, num_classes = 2_000, 527
    scores = 1 / (1 + np.exp(4 - np.random.default_rng(0).normal(0, 2, (num_clips, num_classes))))
    write_scores(str(tmp_path), scores, clips_of([[i % num_classes] for i in range(num_clips)]))
    table = pq.read_table(scores_file(str(tmp_path)))
    assert table.schema.names == ["clip_id", "labels", "scores"]
    assert Path(scores_file(str(tmp_path))).stat().st_size < 4.1 * num_clips * num_classes


def test_scores_of_other_clips_and_a_damaged_file_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="2 rows of scores for 1 clips"):
        write_scores(str(tmp_path), np.zeros((2, 3)), clips_of([[0]]))
    write_scores(str(tmp_path), np.zeros((1, 3)), clips_of([[3]]))
    with pytest.raises(DataError, match="a label is 3 or 3; there are 3 classes"):
        read_scores(str(tmp_path))
    storage.write_bytes(scores_file(str(tmp_path)), b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"scores\.parquet is damaged"):
        read_scores(str(tmp_path))
