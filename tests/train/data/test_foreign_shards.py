"""Shards that another program rewrote after indexing are read correctly, or refused by name."""

import shutil
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ast_core.errors import DataError
from ast_core.features import KALDI128
from pipeline import dataset
from pipeline.dataset import Clips, PreparedDataset
from pipeline.prepare.clip import FAILURES
from pipeline.prepare.output.publish import publish
from pipeline.train.data.feed import FbankReader
from tests import fakes
from tests.train.made import clips_of, table_of

NUM_CLIPS = 130


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A data set of one shard, and each clip's fbank, read by plain pyarrow."""
    output = tmp_path_factory.mktemp("foreign") / "data"
    fakes.write_data(str(output), splits=[("train", NUM_CLIPS)], clips_a_shard=NUM_CLIPS)
    (shard,) = (output / "train" / "shards").iterdir()
    rows = pq.read_table(shard, columns=["clip_id", "fbank"]).to_pylist()
    return output, {row["clip_id"]: np.array(row["fbank"], np.float16) for row in rows}


def rewritten(whole: tuple[Path, object], folder: Path, rewrite: Callable[[str], None]) -> Clips:
    shutil.copytree(whole[0], folder / "data")
    (shard,) = (folder / "data" / "train" / "shards").iterdir()
    rewrite(str(shard))
    return PreparedDataset.open(str(folder / "data")).clips(["train"])


def assert_right(clips: Clips, expected: dict[str, np.ndarray]) -> None:
    with FbankReader(clips) as reader:
        for i in np.random.default_rng(0).permutation(len(clips)):
            np.testing.assert_array_equal(reader[int(i)], expected[clips.clip_id[int(i)].as_py()])


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("size", [1, 7, 16, 32, 64, NUM_CLIPS])
def test_review_c1_clips_are_found_in_row_groups_of_any_size(whole, tmp_path: Path, size: int, checksums: bool):
    def rewrite(shard: str) -> None:
        options = {"compression": "zstd", "row_group_size": size, "write_page_checksum": checksums}
        pq.write_table(pq.read_table(shard), shard, **options, use_dictionary=["clip_id"])
        assert pq.ParquetFile(shard).metadata.row_group(0).num_rows == size

    assert_right(rewritten(whole, tmp_path, rewrite), whole[1])


def test_row_groups_of_different_sizes_and_empty_ones_are_read(whole, tmp_path: Path):
    def rewrite(shard: str) -> None:
        table = pq.read_table(shard)
        with pq.ParquetWriter(shard, table.schema, compression="zstd", write_page_checksum=True) as writer:
            begin = 0
            for size in (5, 0, 40, 1, 0, NUM_CLIPS - 46):
                writer.write_table(table.slice(begin, size))
                begin += size

    assert_right(rewritten(whole, tmp_path, rewrite), whole[1])


def by_pandas(shard: str) -> None:
    pd.read_parquet(shard).to_parquet(shard, row_group_size=20)


def by_polars(shard: str) -> None:
    pl.read_parquet(shard).write_parquet(shard, row_group_size=50, compression="lz4")


def by_duckdb(shard: str) -> None:
    duckdb.sql(f"copy (from '{shard}') to '{shard}.new' (format parquet, row_group_size 2048)")
    shutil.move(f"{shard}.new", shard)


def with_nulls_allowed(shard: str) -> None:
    table = pq.read_table(shard)
    fields = [pa.field(f.name, f.type if f.name != "fbank" else pa.list_(pa.list_(pa.float32()))) for f in table.schema]
    pq.write_table(table.cast(pa.schema(fields)), shard, row_group_size=33, data_page_version="2.0")


def with_small_pages(shard: str) -> None:
    table = pq.read_table(shard)
    pq.write_table(table, shard, row_group_size=32, data_page_size=5000, compression="zstd", write_page_checksum=True)


def with_a_dictionary(shard: str) -> None:
    pq.write_table(pq.read_table(shard), shard, row_group_size=64, use_dictionary=True, compression="none")


@pytest.mark.parametrize(
    "rewrite", [by_pandas, by_polars, by_duckdb, with_nulls_allowed, with_small_pages, with_a_dictionary]
)
def test_shards_rewritten_by_other_programs_are_read_correctly(whole, tmp_path: Path, rewrite: Callable[[str], None]):
    assert_right(rewritten(whole, tmp_path, rewrite), whole[1])


def in_another_order(shard: str) -> None:
    pq.write_table(pq.read_table(shard)[::-1], shard, row_group_size=16, compression="zstd")


def without_a_row(shard: str) -> None:
    pq.write_table(pq.read_table(shard)[: NUM_CLIPS - 1], shard, row_group_size=16, compression="zstd")


def without_names(shard: str) -> None:
    pq.write_table(pq.read_table(shard).drop_columns(["clip_id"]), shard, row_group_size=16)


def louder(shard: str) -> None:
    """Change the values of one clip and its hash, as preparing it again with other audio would."""
    table = pq.read_table(shard)
    rows = table.to_pylist()
    rows[3] |= {"fbank": rows[4]["fbank"], "fbank_hash": rows[4]["fbank_hash"]}
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), shard, row_group_size=16)


@pytest.mark.parametrize("rewrite", [in_another_order, without_a_row, without_names, louder])
def test_shards_with_other_rows_are_refused_by_name(whole, tmp_path: Path, rewrite: Callable[[str], None]):
    clips = rewritten(whole, tmp_path, rewrite)
    with pytest.raises(DataError, match=rf"the shard {clips.shards[0]} is damaged[^\n]+; restore it, or "):
        assert_right(clips, whole[1])


def test_reordered_rows_are_correct_after_indexing_again(whole, tmp_path: Path):
    clips = rewritten(whole, tmp_path, in_another_order)
    labels = PreparedDataset.open(str(tmp_path / "data")).labels
    publish(str(tmp_path / "data"), labels, {"train": FAILURES.empty_table()})
    again = PreparedDataset.open(str(tmp_path / "data")).clips(["train"])
    assert again.row[0] == NUM_CLIPS - 1 - clips.row[0]
    assert_right(again, whole[1])


def test_a_footer_that_points_to_pages_of_other_rows_is_detected(tmp_path: Path):
    """The checksums of such pages are valid. Each clip has one value, so that both row groups have equal page sizes."""
    fbanks = [np.full((10, 128), 1 + i // 16, np.float16) for i in range(32)]
    table, _ = table_of([10] * 32)
    values = pa.array(np.concatenate(fbanks).reshape(-1))
    frames = pa.FixedSizeListArray.from_arrays(values, type=dataset.fbank_type(128).value_type)
    column = pa.ListArray.from_arrays(np.arange(33, dtype=np.int32) * 10, frames, type=dataset.fbank_type(128))
    hashes = pa.array([dataset.hash_fbank(fbank) for fbank in fbanks], pa.int64())
    table = table.set_column(2, "fbank_hash", hashes).set_column(
        3, dataset.shard_schema(KALDI128).field("fbank"), column
    )
    shard = tmp_path / "shard.parquet"
    dataset.write_table(str(shard), table, row_group_size=16)
    clips = clips_of([str(shard)] * 32, range(32), fbanks)
    first, second = (pq.ParquetFile(shard).metadata.row_group(group).column(3) for group in (0, 1))
    assert first.total_compressed_size == second.total_compressed_size
    whole = shard.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    there, wanted = varint(second.data_page_offset), varint(first.data_page_offset)
    assert len(there) == len(wanted)
    shard.write_bytes(whole[:footer] + whole[footer:].replace(there, wanted))
    assert pq.read_table(shard)["fbank"][20].as_py()[0][0] == 1  # pyarrow returns them for the second
    with FbankReader(clips) as reader:
        assert reader[3][0, 0] == 1
        with pytest.raises(DataError, match=rf"the shard {shard} is damaged \(the values of a clip are not those of"):
            reader[20]


def varint(number: int) -> bytes:
    """A positive number as Thrift's compact protocol writes it."""
    rest, made = 2 * number, bytearray()
    while rest >= 0x80:
        made.append(rest & 0x7F | 0x80)
        rest >>= 7
    return bytes([*made, rest])
