"""Reading the fbanks' pages directly gives the same values as a general reader, for shards of any program."""

import gc
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ast_core.errors import DataError
from pipeline import dataset
from pipeline.train.data import fbank_reader
from pipeline.train.data.feed import FbankReader
from tests.train.made import clips_of, table_of


def lengths(num_clips: int) -> list[int]:
    """Lengths of clips: 0 to 40 frames, some 0."""
    return np.random.default_rng(1).integers(0, 40, num_clips).tolist()


def read_all(path: Path, fbanks: list[np.ndarray]) -> list[np.ndarray]:
    with FbankReader(clips_of([str(path)] * len(fbanks), range(len(fbanks)), fbanks)) as reader:
        return [reader[i] for i in range(len(fbanks))]


@pytest.mark.parametrize(
    "options", [{}, {"data_page_size": 1000}, {"data_page_version": "2.0"}, {"compression": "lz4"}]
)
def test_clips_equal_what_was_written_in_few_or_many_pages(tmp_path: Path, options: dict[str, object]):
    table, fbanks = table_of(lengths(50))
    usual = {"compression": "zstd", "use_dictionary": ["clip_id"], "row_group_size": dataset.ROW_GROUP_CLIPS}
    pq.write_table(table, tmp_path / "shard.parquet", **(usual | options))
    for got, expected in zip(read_all(tmp_path / "shard.parquet", fbanks), fbanks, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_shards_of_other_programs_with_nullable_values_are_read(tmp_path: Path):
    table, fbanks = table_of(lengths(20))
    nullable = table.set_column(
        table.column_names.index("fbank"),
        "fbank",
        table["fbank"].cast(pa.list_(pa.list_(pa.float16(), 128))),
    )
    pq.write_table(nullable, tmp_path / "shard.parquet", row_group_size=dataset.ROW_GROUP_CLIPS)
    for got, expected in zip(read_all(tmp_path / "shard.parquet", fbanks), fbanks, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_our_own_shards_take_the_fast_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    table, fbanks = table_of([30] * 16)
    dataset.write_table(str(tmp_path / "shard.parquet"), table, row_group_size=dataset.ROW_GROUP_CLIPS)
    read = []
    values = fbank_reader.read_values
    monkeypatch.setattr(fbank_reader, "read_values", lambda *args: read.append(values(*args)) or read[-1])
    read_all(tmp_path / "shard.parquet", fbanks)
    assert [len(each) for each in read] == [16 * 30 * 128]
    metadata = pq.ParquetFile(tmp_path / "shard.parquet").metadata.row_group(0)
    assert "PLAIN" in metadata.column(table.column_names.index("fbank")).encodings


def test_readers_are_freed_without_the_garbage_collector(tmp_path: Path):
    """A run opens very many shards, and full garbage collections are rare in a process with PyTorch."""
    table, fbanks = table_of([30] * 16)
    dataset.write_table(str(tmp_path / "shard.parquet"), table, row_group_size=dataset.ROW_GROUP_CLIPS)

    def readers_parts() -> set[int]:
        return {id(each) for each in gc.get_objects() if type(each) in (pq.FileMetaData, pq.ParquetSchema)}

    gc.collect()
    gc.disable()
    try:
        others = readers_parts()
        read_all(tmp_path / "shard.parquet", fbanks)
        assert readers_parts() <= others
    finally:
        gc.enable()


def test_any_damage_of_a_shard_is_reported_as_damage(tmp_path: Path):
    table, fbanks = table_of([30] * 32)
    path = tmp_path / "shard.parquet"
    dataset.write_table(str(path), table, row_group_size=dataset.ROW_GROUP_CLIPS)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    said = []
    for _ in range(300):
        mutated = bytearray(whole)
        for at in rng.integers(len(whole), size=8):
            mutated[at] = rng.integers(256)
        path.write_bytes(mutated[: int(rng.integers(len(whole)))] if rng.random() < 0.1 else mutated)
        try:
            for got, expected in zip(read_all(path, fbanks), fbanks, strict=True):
                np.testing.assert_array_equal(got, expected)
        except DataError as err:
            said.append(str(err))
    damaged = rf"the shard {path} is damaged .+; restore it, or .+"
    assert all(re.fullmatch(damaged, each, re.DOTALL) for each in said)
    assert len(said) > 290  # some bits change no value, such as those of statistics
