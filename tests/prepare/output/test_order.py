"""The order in which clips are stored does not depend on the order of their list."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.prepare.output.order import RUN_CLIPS, in_work_order, shuffled
from pipeline.prepare.sources.archives import bytes_member, row_member
from tests import fakes

NUM_CLASSES, CLIPS_A_CLASS = 50, 40


def sorted_list(**more: object) -> pa.Table:
    """2,000 clips sorted by class."""
    rows = range(NUM_CLASSES * CLIPS_A_CLASS)
    common = {"media": "x"} | more
    return fakes.clips(*({"clip_id": f"clip{i:04}", "labels": [i // CLIPS_A_CLASS]} | common for i in rows))


def share_of_pairs(clips: pa.Table, apart: int) -> float:
    """Share of pairs of one class among the pairs at this distance."""
    label = np.array([labels[0] for labels in clips["labels"].to_pylist()])
    return float((label[apart:] == label[:-apart]).mean())


def test_a_list_sorted_by_class_is_stored_as_a_shuffled_one():
    ordered = in_work_order(sorted_list())
    ideal = (CLIPS_A_CLASS - 1) / (NUM_CLASSES * CLIPS_A_CLASS - 1)
    for apart in (1, 8, 24, 64):
        assert abs(share_of_pairs(ordered, apart) - ideal) < 0.01


def test_the_order_does_not_depend_on_the_lists_order():
    clips = sorted_list()
    other = clips.take(pa.array(np.random.default_rng(0).permutation(len(clips))))
    assert in_work_order(other).equals(in_work_order(clips))
    assert shuffled(other).equals(in_work_order(clips))


def test_members_of_tars_are_ordered_like_files():
    of_tar = sorted_list(member=bytes_member(512, 100))
    assert in_work_order(of_tar)["clip_id"].equals(in_work_order(sorted_list())["clip_id"])


def test_rows_of_a_row_group_stay_together_in_few_runs(tmp_path: Path):
    """Reading a clip means reading its row group: each group is read four times, or once if it is small."""
    for rows_a_group, most_runs in ((200, 4), (RUN_CLIPS, 1), (20, 2)):
        uri = str(tmp_path / f"{rows_a_group}.parquet")
        num_rows = 10 * rows_a_group
        pq.write_table(pa.table({"audio": [b""] * num_rows}), uri, row_group_size=rows_a_group)
        rows = ({"clip_id": f"clip{i}", "media": uri, "member": row_member(i)} for i in range(num_rows))
        ordered = in_work_order(fakes.clips(*rows))
        row = np.array([int(member[4:]) for member in ordered["member"].to_pylist()])
        run_begins = np.flatnonzero(np.diff(row, prepend=-2) != 1)
        assert len(run_begins) <= 10 * most_runs
        assert len(run_begins) > 10 * most_runs - 10
        groups = row[run_begins] // rows_a_group
        assert (np.diff(groups) < 0).any()  # not the archive's order


def test_clips_of_files_and_of_archives_are_mixed(tmp_path: Path):
    uri = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"audio": [b""] * 160}), uri, row_group_size=16)
    rows = [{"clip_id": f"row{i}", "media": uri, "member": row_member(i)} for i in range(160)]
    files = [{"clip_id": f"file{i}", "media": f"{i}.wav"} for i in range(160)]
    ordered = in_work_order(fakes.clips(*rows, *files))["clip_id"].to_pylist()
    assert sorted(ordered) == sorted(row["clip_id"] for row in [*rows, *files])
    is_row = np.array([clip_id.startswith("row") for clip_id in ordered])
    assert 10 <= np.diff(is_row).sum() <= 20  # ten runs of rows
    assert 0 < is_row[:160].sum() < 160
