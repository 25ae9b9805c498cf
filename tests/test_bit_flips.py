"""Flipped bits in the files of a data set. `benchmarks.bit_flips` tries more of them, and the files of a run."""

import logging
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bit_flips
from pipeline import dataset
from pipeline.dataset import PreparedDataset
from pipeline.prepare.clip import FAILURES
from pipeline.prepare.output.publish import publish
from pipeline.train.data.feed import FbankReader
from tests import fakes
from tests.damage import flip_bit, refusal


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bits") / "data"
    bit_flips.make_data(output)
    return output


def wrong(data: Path, files: list[Path], readers: dict[str, bit_flips.Reader], num_flips: int, seed: int) -> list[str]:
    found = bit_flips.flips(data, files, readers, num_flips, np.random.default_rng(seed))
    return [
        f"{outcome}: {file.name}: {message}" for file, outcome, message in found if outcome in bit_flips.OUTCOMES[-2:]
    ]


def test_case_4_flipped_bits_of_shards_are_reported_or_change_no_value(data: Path):
    shards = [file for file in bit_flips.files_of(data) if file.parent.name == "shards"]
    assert wrong(data, shards, {"feed": bit_flips.read_clips}, 60, seed=1) == []


def test_flipped_bits_of_any_file_are_reported_or_change_nothing(data: Path):
    files = bit_flips.files_of(data)
    readers = {name: bit_flips.DATA_READERS[name] for name in ("feed", "prepare")}
    assert wrong(data, files, readers, 2 * len(files), seed=2) == []


@pytest.mark.parametrize("name", ["dataset.json", "labels.csv", "train/index.parquet", "train/failures.parquet"])
@pytest.mark.parametrize("content", [b"", b"\x00\x01\x02", b"PAR1PAR1", b"[]", b"{}"])
def test_file_with_wrong_content_is_one_line_with_its_name_and_the_remedy(
    data: Path, tmp_path: Path, name: str, content: bytes
):
    with bit_flips.copied(data, tmp_path / "data"):
        (tmp_path / "data" / name).write_bytes(content)
        readers = (bit_flips.read_clips, bit_flips.read_doctor, bit_flips.prepare_again)
        lines = [refusal(partial(read, tmp_path / "data")) for read in readers]
    read_by = {"train/failures.parquet": (1, 2), "train/index.parquet": (0, 1)}.get(name, (0, 1, 2))
    for reader in read_by:
        assert str(tmp_path / "data" / name) in lines[reader]
        assert "; " in lines[reader]
        assert "\n" not in lines[reader]


def test_next_preparation_makes_a_damaged_index_again_and_says_so(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with bit_flips.copied(data, tmp_path / "data"):
        index = tmp_path / "data" / "train" / "index.parquet"
        expected = dataset.read_table(str(index))
        flip_bit(index, np.random.default_rng(0))
        with caplog.at_level(logging.WARNING):
            bit_flips.prepare_again(tmp_path / "data")
        assert dataset.read_table(str(index)).equals(expected)
    assert "train/index.parquet is damaged" in caplog.text
    assert "it is made again from the shards" in caplog.text


def test_edited_number_in_dataset_json_is_refused(data: Path, tmp_path: Path):
    with bit_flips.copied(data, tmp_path / "data"):
        file = tmp_path / "data" / "dataset.json"
        text = file.read_text()
        file.write_text(text.replace('"clips": 40', '"clips": 41'))
        line = refusal(lambda: PreparedDataset.open(str(tmp_path / "data")))
        assert "dataset.json is damaged or was edited" in line
        file.write_text(" ".join(text.split()))  # as a JSON formatter does
        assert PreparedDataset.open(str(tmp_path / "data")).info["splits"]["train"]["clips"] == 40


def as_version_2(output: Path) -> None:
    """Change the data set to schema version 2, which had no checksums."""
    info = PreparedDataset.open(str(output)).info | {"schema_version": 2}
    del info["row_group_clips"]
    for split, entry in info["splits"].items():
        del entry["sha256"]
        index = dataset.index_file(str(output), split)
        rows = dataset.read_table(index).drop_columns(["fbank_hash"])
        dataset.write_table(index, rows, write_page_checksum=False)
        for shard in (output / split / "shards").iterdir():
            rows = dataset.read_table(str(shard))
            dataset.write_table(str(shard), rows, row_group_size=16, write_page_checksum=False)
    dataset.storage.write_json(dataset.dataset_json(str(output)), info)


def test_data_of_version_2_are_read_with_a_warning_and_checked_by_hash(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    expected = bit_flips.read_clips(data)
    with bit_flips.copied(data, tmp_path / "data"):
        as_version_2(tmp_path / "data")
        for _ in range(2):
            assert bit_flips.read_clips(tmp_path / "data") == expected
        assert [record.getMessage() for record in caplog.records].count(
            f"{tmp_path / 'data'} is of schema version 2, without checksums of its index and labels: "
            "run the same preparation again, which adds them and prepares no clip again"
        ) == 1
        shard = max((tmp_path / "data" / "train" / "shards").iterdir(), key=lambda file: file.stat().st_size)
        whole, rng = shard.read_bytes(), np.random.default_rng(0)
        for _ in range(20):
            shard.write_bytes(whole)
            flip_bit(shard, rng)
            line = refusal(lambda: bit_flips.read_clips(tmp_path / "data"))
            assert line == "" or shard.name in line
            assert line or bit_flips.read_clips(tmp_path / "data") == expected


def test_second_preparation_upgrades_data_of_version_2(data: Path, tmp_path: Path):
    with bit_flips.copied(data, tmp_path / "data"):
        as_version_2(tmp_path / "data")
        labels = PreparedDataset.open(str(tmp_path / "data")).labels
        publish(str(tmp_path / "data"), labels, {split: FAILURES.empty_table() for split in bit_flips.SPLITS})
        opened = PreparedDataset.open(str(tmp_path / "data"))
        assert opened.info["schema_version"] == dataset.SCHEMA_VERSION
        assert bit_flips.read_clips(tmp_path / "data") == bit_flips.read_clips(data)


def test_second_preparation_refuses_a_shard_with_other_clips(data: Path, tmp_path: Path):
    with bit_flips.copied(data, tmp_path / "data"):
        shard, other = sorted((tmp_path / "data" / "train" / "shards").iterdir())[:2]
        other.write_bytes(shard.read_bytes())
        line = refusal(lambda: bit_flips.prepare_again(tmp_path / "data"))
    assert f"{other} is damaged or was changed: clip " in line
    assert "restore it, or delete it, and its clips are prepared again" in line


def test_copies_of_a_clip_with_different_values_are_not_mixed(tmp_path: Path):
    """Rows of a shard that is written again get new checksums, so their values are verified before."""
    fakes.write_data(str(tmp_path), splits=[("train", 20)])
    (shard,) = (tmp_path / "train" / "shards").iterdir()
    rows = dataset.read_table(str(shard))
    (tmp_path / "train" / "shards" / "second.parquet").write_bytes(shard.read_bytes())
    hashes = rows["fbank_hash"].to_pylist()
    spoilt = rows.set_column(
        rows.column_names.index("fbank_hash"), dataset.SCANNED.field("fbank_hash"), [[hashes[0] ^ 1, *hashes[1:]]]
    )
    dataset.write_table(str(tmp_path / "train" / "shards" / "second.parquet"), spoilt.slice(0, 10))
    line = refusal(lambda: bit_flips.prepare_again(tmp_path))
    assert (
        "second.parquet is damaged: its values are not those of their hashes" not in line
    )  # the whole shard is removed
    extra = spoilt.set_column(0, dataset.SCANNED.field("clip_id"), [["new", *rows["clip_id"].to_pylist()[1:]]])
    dataset.write_table(str(tmp_path / "train" / "shards" / "third.parquet"), extra.slice(0, 10))
    line = refusal(lambda: bit_flips.prepare_again(tmp_path))
    assert "third.parquet is damaged: its values are not those of their hashes; restore it, or delete it" in line


def test_feed_reads_the_written_values(data: Path):
    clips = PreparedDataset.open(str(data)).clips(["train"])
    assert clips.row_group_clips == 16
    with FbankReader(clips) as reader:
        assert [dataset.hash_fbank(reader[i]) for i in range(len(clips))] == clips.fbank_hash.tolist()
