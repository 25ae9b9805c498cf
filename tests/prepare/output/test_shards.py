"""Files on disk: other programs can read them, runs can resume from them, and unfinished ones are recognised."""

import hashlib
import itertools
import json
import uuid
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from datasets import Dataset as HuggingFaceDataset

from ast_core.errors import DataError
from ast_core.features import KALDI128
from ast_core.labels import LabelVocabulary
from pipeline import dataset, storage, versions
from pipeline.dataset import PreparedDataset
from pipeline.prepare.audio.features import clip_fbank, features
from pipeline.prepare.clip import FAILURES, WAVEFORM, ragged
from pipeline.prepare.output import failures_table
from pipeline.prepare.output.publish import publish, start_output
from pipeline.prepare.output.shards import WriteShards, clip_facts, scan_shards, write_rows
from pipeline.prepare.output.split_state import clean_up, load_split
from tests import fakes
from tests.fakes import prepared_rows
from tests.s3 import S3Server


@pytest.fixture(scope="module")
def shard(tone_data: str) -> Path:
    return max(Path(tone_data, "train", "shards").iterdir(), key=lambda file: file.stat().st_size)


@pytest.fixture(scope="module")
def expected(shard: Path) -> np.ndarray:
    """The first clip's fbank, read only by pyarrow: `[frames, mel bins]`."""
    return np.array(pq.read_table(shard)["fbank"][0].as_py(), np.float16)


def test_pyarrow_sees_frames_by_mel_bins_in_small_row_groups(shard: Path, expected: np.ndarray):
    assert expected.shape == (48, 128)
    file = pq.ParquetFile(shard)
    assert file.metadata.row_group(0).num_rows == dataset.ROW_GROUP_CLIPS
    assert str(file.schema_arrow.field("fbank").type.value_type.value_type) == "halffloat"


def test_pandas_sees_the_same(shard: Path, expected: np.ndarray):
    np.testing.assert_array_equal(np.stack(pd.read_parquet(shard)["fbank"][0]), expected)


def test_polars_sees_the_same(shard: Path, expected: np.ndarray):
    np.testing.assert_array_equal(np.array(pl.read_parquet(shard)["fbank"][0].to_list(), np.float16), expected)


def test_duckdb_sees_the_same(shard: Path, expected: np.ndarray):
    ((frames, bins, values),) = duckdb.sql(f"select len(fbank), len(fbank[1]), fbank from '{shard}' limit 1").fetchall()
    assert (frames, bins) == expected.shape
    np.testing.assert_array_equal(np.array(values, np.float16), expected)


def test_hugging_face_datasets_sees_the_same(shard: Path, expected: np.ndarray, tmp_path: Path):
    rows = HuggingFaceDataset.from_parquet(str(shard), cache_dir=str(tmp_path))
    np.testing.assert_array_equal(np.array(rows[0]["fbank"], np.float16), expected)


def test_the_fbank_is_that_of_the_waveform_and_the_index_points_to_it(tone_data: str):
    clips = PreparedDataset.open(tone_data).clips(["train"])
    for i in (0, 19, 20, 47):
        table = pq.read_table(clips.shards[clips.shard_of[i]])
        assert table["clip_id"][int(clips.row[i])] == clips.clip_id[i]
        assert table["num_frames"][int(clips.row[i])].as_py() == clips.num_frames[i] == 48


def stored_values(output: str, *splits: str) -> np.ndarray:
    """float64 values of all frames × bins of the clips in the index, each shard row once."""
    clips = PreparedDataset.open(output).clips(splits)
    tables = [pq.read_table(uri) for uri in clips.shards]
    fbanks = [tables[i]["fbank"][int(row)] for i, row in zip(clips.shard_of, clips.row, strict=True)]
    return np.concatenate([np.array(fbank.as_py(), np.float64) for fbank in fbanks])


def mean_and_std(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std())


def test_the_norm_covers_all_values_of_all_shards_and_splits(tone_data: str):
    opened = PreparedDataset.open(tone_data)
    for splits in (["train"], ["eval"], ["train", "eval"]):
        expected = mean_and_std(stored_values(tone_data, *splits))
        np.testing.assert_allclose(opened.norm(splits), expected, rtol=1e-12)


def test_a_clip_in_two_shards_counts_once_in_norm_and_totals(tmp_path: Path):
    output, labels = str(tmp_path / "d"), LabelVocabulary.from_names(["x"])
    start_output(output, labels)
    write = WriteShards(output)
    write(prepared_rows("quiet", "loud"))
    write(prepared_rows("loud", "other"))
    write(prepared_rows("alone", split="eval"))
    info = publish(output, labels, {split: FAILURES.empty_table() for split in ("train", "eval")})[0]["splits"]
    assert (info["train"]["clips"], info["train"]["frames"]) == (3, 3 * 48)
    opened = PreparedDataset.open(output)
    for splits in (["train"], ["train", "eval"]):
        values = stored_values(output, *splits)
        assert len(values) == 48 * (3 + len(splits) - 1)
        np.testing.assert_allclose(opened.norm(splits), mean_and_std(values), rtol=1e-12)


def test_each_clip_has_the_sums_and_hash_of_its_own_values(tmp_path: Path):
    rows = prepared_rows("a", "b")
    facts = clip_facts(rows["fbank"].combine_chunks()).to_pylist()
    for fact, fbank in zip(facts, rows["fbank"].to_pylist(), strict=True):
        values = np.array(fbank, np.float16)
        wide = values.astype(np.float64)
        np.testing.assert_allclose((fact["fbank_sum"], fact["fbank_sum_sq"]), (wide.sum(), (wide**2).sum()), rtol=1e-14)
        digest = hashlib.blake2b(values.tobytes()).digest()
        assert fact["fbank_hash"] == int.from_bytes(digest[:8], "little", signed=True)
    WriteShards(str(tmp_path))(rows)
    stored = scan_shards(str(tmp_path), "train").select(list(facts[0])).to_pylist()
    assert [{name: row[name] for name in facts[0]} for row in stored] == facts


def test_equal_audio_has_equal_hashes(tmp_path: Path):
    waveforms = [fakes.noise(0.5, seed=seed) for seed in (1, 2, 1)]
    column = features(pa.table({"waveform": ragged(waveforms, WAVEFORM)}))["fbank"].combine_chunks()
    one, other, same = clip_facts(column)["fbank_hash"].to_pylist()
    assert one == same != other
    assert clip_facts(column.slice(1, 2))["fbank_hash"].to_pylist() == [other, same]


def test_only_frames_without_any_sound_are_silent():
    waveform = fakes.noise(1.0)
    waveform[4000:12000] = 0.0
    fbank = clip_fbank(waveform - waveform.mean())
    begins = 160 * np.arange(len(fbank))
    expected = int(((begins >= 4000) & (begins + 400 <= 12000)).sum())
    hardly_heard = clip_fbank(0.002 * fakes.noise(1.0))  # a few steps of 16-bit PCM
    column = pa.array([fbank.tolist(), hardly_heard.tolist()], dataset.fbank_type(128))
    assert (fbank == np.float16(KALDI128.floor)).all(axis=0).any()  # one bin is at the floor in every frame
    assert clip_facts(column)["num_silent_frames"].to_pylist() == [expected, 0]


def test_weights_of_joined_splits_differ_from_those_of_each_split(tone_data: str):
    opened = PreparedDataset.open(tone_data)
    union = opened.clips(["train", "eval"])
    assert len(union) == 48 + 21
    counts = np.bincount(union.labels.flatten().to_numpy(), minlength=4)
    np.testing.assert_allclose(union.weight, 1000 / (counts[union.labels.flatten().to_numpy()] + 0.01))


def test_without_dataset_json_there_is_no_data_set(tmp_path: Path):
    fakes.write_data(str(tmp_path / "d"), splits=[("train", 3)])
    (tmp_path / "d" / "dataset.json").unlink()
    with pytest.raises(DataError, match=r"no finished data set .* run jobs/prepare_audioset\.py"):
        PreparedDataset.open(str(tmp_path / "d"))


def test_unknown_splits_and_schemas_are_named(tone_data: str, tmp_path: Path):
    with pytest.raises(DataError, match="no split 'test'; it has train, eval"):
        PreparedDataset.open(tone_data).clips(["test"])
    with pytest.raises(DataError, match="split 'train' is given twice"):
        PreparedDataset.open(tone_data).clips(["train", "train"])
    (tmp_path / "dataset.json").write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(DataError, match="schema version 99"):
        PreparedDataset.open(str(tmp_path))


def test_data_of_an_old_schema_version_must_be_prepared_again(tmp_path: Path):
    output, labels = str(tmp_path / "d"), LabelVocabulary.from_names(["x"])
    start_output(output, labels)
    WriteShards(output)(prepared_rows("a"))
    (shard,) = (tmp_path / "d" / "train" / "shards").iterdir()
    pq.write_table(pq.read_table(shard).drop_columns(["fbank_hash", "fbank_sum"]), shard)
    with pytest.raises(DataError, match=r"lacks fbank_hash, fbank_sum, .* prepare the data again"):
        load_split(output, "train")
    (tmp_path / "d" / "dataset.json").write_text(json.dumps({"schema_version": 1, "features": KALDI128.to_dict()}))
    with pytest.raises(DataError, match="has schema version 1, this program reads 3; prepare the data again"):
        PreparedDataset.open(output)
    with pytest.raises(
        DataError, match="has schema version 1, this program reads 3; prepare the data again into another"
    ):
        start_output(output, labels)


def test_a_folder_with_other_content_is_refused(tmp_path: Path):
    labels = LabelVocabulary.from_names(["a"])
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "thesis.docx").write_text("…")
    for folder in (tmp_path, tmp_path / "files"):
        with pytest.raises(DataError, match="not empty and contains no data set"):
            start_output(str(folder), labels)
    two_labels = LabelVocabulary.from_names(["a", "b"])
    assert not start_output(str(tmp_path / "new"), two_labels)
    assert start_output(str(tmp_path / "new"), labels)  # nothing was prepared with the two labels
    assert not start_output(str(tmp_path / "new"), labels)  # the same labels again
    WriteShards(str(tmp_path / "new"))(prepared_rows("clip"))
    with pytest.raises(DataError, match=r"other labels \(1, these are 2\)"):
        start_output(str(tmp_path / "new"), two_labels)


def test_a_folder_with_an_interrupted_reservation_is_reserved_again(tmp_path: Path):
    (tmp_path / f"labels.csv.{uuid.uuid4().hex}.tmp").write_text("index,m")
    start_output(str(tmp_path), LabelVocabulary.from_names(["a"]))
    assert [path.name for path in tmp_path.iterdir()] == ["labels.csv"]
    (tmp_path / "_report").mkdir()
    (tmp_path / "_report" / f"samples-0.parquet.{uuid.uuid4().hex}.tmp").touch()
    (tmp_path / "notes.tmp").touch()
    start_output(str(tmp_path), LabelVocabulary.from_names(["a"]))
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"labels.csv", "notes.tmp"}


def test_a_repeated_task_leaves_one_shard_and_no_partial_files(tmp_path: Path):
    for _ in range(2):
        written = WriteShards(str(tmp_path))(prepared_rows("a", "b", failed=("c",)))
    assert written.to_pylist() == [
        {"split": "train", "reason": None, "clips": 2},
        {"split": "train", "reason": "truncated", "clips": 1},
    ]
    files = sorted(path.suffix for path in tmp_path.rglob("*") if path.is_file())
    assert files == [".parquet", ".parquet"]


def test_after_crashes_each_clip_is_in_one_shard_without_leftovers(tmp_path: Path):
    write, folder = WriteShards(str(tmp_path)), tmp_path / "train" / "shards"
    for clip_ids in (["a", "b"], ["b", "c"], ["c", "a"]):
        write(prepared_rows(*clip_ids))
    fbanks = {row["clip_id"]: row["fbank"] for file in folder.iterdir() for row in pq.read_table(file).to_pylist()}
    (folder / f"half.parquet.{uuid.uuid4().hex}{storage.UNFINISHED}").write_bytes(b"PAR1")

    assert load_split(str(tmp_path), "train").prepared["clip_id"].to_pylist() == ["a", "b", "c"]
    clean_up(str(tmp_path), "train")
    prepared = load_split(str(tmp_path), "train").prepared
    assert prepared["clip_id"].to_pylist() == ["a", "b", "c"]
    stored = [row for file in folder.iterdir() for row in pq.read_table(file).to_pylist()]
    assert sorted(row["clip_id"] for row in stored) == ["a", "b", "c"]
    assert {row["clip_id"]: row["fbank"] for row in stored} == fbanks
    for row in prepared.to_pylist():  # the index points to the shards that exist now
        assert pq.read_table(folder / row["shard"])["clip_id"][row["row"]].as_py() == row["clip_id"]
    clean_up(str(tmp_path), "train")
    assert load_split(str(tmp_path), "train").prepared.equals(prepared)


@pytest.mark.parametrize("seed", range(12))
def test_a_shard_that_is_the_rest_of_another_one_loses_no_clip(seed: int, tmp_path: Path):
    """As after a crash between writing the rest and deleting the whole. The seeds give other orders of the names."""
    a, b, c = (f"{seed}-{name}" for name in "abc")
    for clip_ids in ((a, b), (a, b, c), (c,)):
        WriteShards(str(tmp_path))(prepared_rows(*clip_ids))
    clean_up(str(tmp_path), "train")
    assert load_split(str(tmp_path), "train").prepared["clip_id"].to_pylist() == [a, b, c]
    stored = [pq.read_table(file)["clip_id"].to_pylist() for file in (tmp_path / "train" / "shards").iterdir()]
    assert sorted(itertools.chain.from_iterable(stored)) == [a, b, c]


def test_of_two_copies_the_one_in_the_published_index_stays(tmp_path: Path):
    output, labels = str(tmp_path / "d"), LabelVocabulary.from_names(["x"])
    start_output(output, labels)
    WriteShards(output)(prepared_rows("b", "d"))
    publish(output, labels, {"train": FAILURES.empty_table()})
    published = dataset.read_table(dataset.index_file(output, "train"))
    for other in ("a", "c", "e"):  # their file names sort before and after that of the shard
        WriteShards(output)(prepared_rows(other, "b", "d"))
    clean_up(output, "train")
    left = load_split(output, "train").prepared
    assert left.filter(pc.is_in(left["clip_id"], pa.array(["b", "d"])))["shard"].equals(published["shard"])
    assert left["clip_id"].to_pylist() == ["a", "b", "c", "d", "e"]


def test_the_order_of_the_index_does_not_depend_on_the_shards(tmp_path: Path):
    for output, order in (("one", ["b", "d", "a", "c"]), ("two", ["c", "a", "d", "b"])):
        for begin in (0, 2):
            WriteShards(str(tmp_path / output))(prepared_rows(*order[begin : begin + 2]))
        assert load_split(str(tmp_path / output), "train").prepared["clip_id"].to_pylist() == ["a", "b", "c", "d"]


def test_failures_of_a_killed_run_are_kept_and_attempts_added(tmp_path: Path):
    output, labels = str(tmp_path / "d"), LabelVocabulary.from_names(["x"])
    start_output(output, labels)
    write = WriteShards(output)
    write(prepared_rows("a", failed=("b", "c")))
    clean_up(output, "train")  # the next run begins
    state = load_split(output, "train")
    assert dict(zip(*state.failures.select(["clip_id", "attempts"]).to_pydict().values(), strict=True)) == {
        "b": 1,
        "c": 1,
    }
    write(prepared_rows("b", failed=("c",)))
    info, *_ = publish(output, labels, {"train": FAILURES.empty_table()})
    failures = dataset.read_table(dataset.failures_file(output, "train"))
    assert failures.select(["clip_id", "attempts", "retry"]).to_pylist() == [
        {"clip_id": "c", "attempts": 2, "retry": True}
    ]
    assert info["splits"]["train"]["clips"] == 2
    assert not storage.exists(storage.join(output, "_work"))


def test_failures_count_once_in_a_bucket_that_forbids_deleting(s3: S3Server):
    """The parts of a run stay there. Read again, they would hide the reasons of later runs."""
    output = s3.uri("failures", "data")
    for first, second in ((("a", "b"), ("b", "c")), (("d", "e"), ("e", "f"))):  # names of parts in both orders
        for reason, failed in {"network": first, "unavailable": second}.items():
            rows = prepared_rows(failed=failed)
            place = rows.column_names.index("reason")
            reasons = pa.array([reason] * len(rows), rows.schema.field(place).type)
            failures_table.write_part(output, "train", rows.set_column(place, "reason", reasons))
            with s3.without_deleting():
                clean_up(output, "train")
    clean_up(output, "train")
    failures = load_split(output, "train").failures.select(["clip_id", "reason", "attempts"]).to_pylist()
    assert sorted(tuple(row.values()) for row in failures) == [
        *(("a", "network", 1), ("b", "unavailable", 2), ("c", "unavailable", 1)),
        *(("d", "network", 1), ("e", "unavailable", 2), ("f", "unavailable", 1)),
    ]


def test_preparing_one_split_keeps_the_failures_of_an_unfinished_one(tmp_path: Path):
    output, labels = str(tmp_path / "d"), LabelVocabulary.from_names(["x"])
    start_output(output, labels)
    WriteShards(output)(prepared_rows("a", failed=("b",)))  # of "train"; then the job is killed
    publish(output, labels, {"other": FAILURES.empty_table()})
    assert load_split(output, "train").failures["clip_id"].to_pylist() == ["b"]


def test_an_index_newer_than_dataset_json_is_not_used_for_training(tmp_path: Path):
    output = str(tmp_path / "d")
    fakes.write_data(output, splits=[("train", 3)])
    index = dataset.read_table(dataset.index_file(output, "train"))
    dataset.write_table(dataset.index_file(output, "train"), index.slice(0, 2))
    with pytest.raises(DataError, match=r"index\.parquet is .* another file than was recorded .* same preparation"):
        PreparedDataset.open(output).clips(["train"])


def test_a_damaged_shard_is_named(tmp_path: Path):
    output = str(tmp_path / "d")
    fakes.write_data(output, splits=[("train", 3)])
    (shard,) = (tmp_path / "d" / "train" / "shards").iterdir()
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(DataError, match=f"{shard.name} is no shard of ours or damaged .*; restore it, or delete it"):
        load_split(output, "train")


def test_versions_are_found_without_an_installed_project(monkeypatch: pytest.MonkeyPatch):
    """As under `ray job submit --working-dir .` on a node that has only the requirements installed."""

    def installed(name: str) -> str:
        assert name != "ast-ray"
        return "1"

    monkeypatch.setattr(versions, "version", installed)
    assert versions.tool_versions()["ast-ray"] == versions.VERSION


def test_a_split_without_prepared_clips_is_published_but_not_trained_on(tmp_path: Path):
    output, labels = str(tmp_path / "d"), LabelVocabulary.from_names(["x"])
    start_output(output, labels)
    WriteShards(output)(prepared_rows(failed=("a",)))
    publish(output, labels, {"train": FAILURES.empty_table()})
    with pytest.raises(DataError, match="no clip was prepared"):
        PreparedDataset.open(output).clips(["train"])


def test_small_columns_are_one_request_a_row_group_to_a_bucket(s3: S3Server):
    clips = fakes.clips(*({"clip_id": f"c{i}", "media": "m", "end_s": 1.0, "labels": [1]} for i in range(48)))
    write_rows(dataset.shards_dir(s3.uri("scanned"), "train"), fakes.noise_shard(clips, 98), KALDI128)
    with s3.busy() as counts:
        assert len(scan_shards(s3.uri("scanned"), "train")) == 48
    listed_and_footer = 4
    assert counts["requests"] <= 48 / dataset.ROW_GROUP_CLIPS + listed_and_footer
