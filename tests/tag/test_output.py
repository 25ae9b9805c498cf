"""What a tagging reads back from its parts."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.tag import output


def test_parts_are_summed_up_one_by_one(tmp_path: Path):
    (tmp_path / "scores").mkdir()
    for part, names in enumerate((["b", "b", "a"], ["c", "c"])):
        starts = [10.0 * i for i in range(len(names))]
        table = pa.table({"recording": names, "start_s": starts, "end_s": [s + 10 for s in starts]})
        pq.write_table(table, tmp_path / "scores" / f"{part}.parquet")
    whole = output._columns_of(str(tmp_path / "scores"), ["recording", "start_s", "end_s"], output._spans_of_windows)
    assert len(whole) == 3, "a row for each window, of which there are three million in a year"
    assert output._recordings(str(tmp_path)).to_pylist() == [
        {"recording": "a", "seconds": 10.0, "windows": 1},
        {"recording": "b", "seconds": 20.0, "windows": 2},
        {"recording": "c", "seconds": 20.0, "windows": 2},
    ]
    of_part = {name: f"{tmp_path}/scores/{part}.parquet" for name, part in {"a": 0, "b": 0, "c": 1}.items()}
    assert output.read_done(str(tmp_path)).tagged == of_part
