"""Batches contain the stored values in the epoch's order, the same on any number of ranks."""

import threading
import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ast_core.errors import DataError
from ast_core.features import FeatureSettings
from ast_core.recipe import Recipe
from pipeline.dataset import ROW_GROUP_CLIPS, Clips, PreparedDataset
from pipeline.train.data.feed import FbankReader, TrainBatch, TrainFeed, eval_batches
from pipeline.train.data.sampling import EpochOrder, epoch_order
from tests.ast_core import small
from tests.train.made import clips_of, table_of

CPU = torch.device("cpu")
RECIPE = Recipe(
    model_size="tiny224", input_tdim=64, freqm=24, timem=20, batch_size=10, mixup=0.5, sampling="weighted", seed=3
)


def values(item: TrainBatch) -> dict[str, np.ndarray]:
    return small.values(item.augmentations)


@pytest.fixture(scope="module")
def clips(tone_data: str) -> Clips:
    return PreparedDataset.open(tone_data).clips(["train"])


@pytest.fixture(scope="module")
def stored(clips: Clips) -> list[np.ndarray]:
    """Every clip's fbank, read by plain pyarrow, in the order of the data set."""
    tables = [pq.read_table(shard)["fbank"] for shard in clips.shards]
    return [np.array(tables[s][int(r)].as_py(), np.float16) for s, r in zip(clips.shard_of, clips.row, strict=True)]


def epoch(clips: Clips, recipe: Recipe = RECIPE, rank: int = 0, world_size: int = 1) -> list[TrainBatch]:
    return list(TrainFeed(clips, recipe, 4, rank, world_size).epoch(1, CPU))


def test_the_reader_returns_what_is_stored_with_one_row_group_in_memory(clips: Clips, stored: list[np.ndarray]):
    reader = FbankReader(clips, groups_in_memory=1)
    for i in np.random.default_rng(0).permutation(len(clips)):
        np.testing.assert_array_equal(reader[int(i)], stored[i])


def test_clips_are_padded_with_zeros_and_cut_at_the_end(clips: Clips, stored: list[np.ndarray]):
    reader = FbankReader(clips)
    long, frames = reader.padded(np.array([3]), 64)
    assert (frames.tolist(), long.shape) == ([48], (1, 64, 128))
    np.testing.assert_array_equal(long[0, :48].numpy(), stored[3])
    assert (long[0, 48:] == 0).all()
    short, frames = reader.padded(np.array([3]), 30)
    assert frames.tolist() == [30]
    np.testing.assert_array_equal(short[0].numpy(), stored[3][:30])


def test_batches_contain_the_clips_of_the_order_with_their_labels(clips: Clips, stored: list[np.ndarray]):
    feed = TrainFeed(clips, RECIPE, 4)
    order = feed.order(1)
    batches = list(feed.epoch(1, CPU))
    assert [len(item.batch.fbank_BTM) for item in batches] == [10, 10, 10, 10, 8]
    assert feed.steps_per_epoch == 5
    labels = [row[0] for row in clips.labels.to_pylist()]
    for k in (0, 17, 47):
        item, i = batches[k // 10], k % 10
        np.testing.assert_array_equal(item.batch.fbank_BTM[i, :48].numpy(), stored[order.clip[k]])
        target = np.zeros(4)
        target[labels[order.clip[k]]] += order.lam[k]
        if order.partner[k] >= 0:
            target[labels[order.partner[k]]] += 1 - order.lam[k]
            partners = item.batch.partners
            (j,) = np.flatnonzero(partners.position == i)
            np.testing.assert_array_equal(partners.fbank_KTM[j, :48].numpy(), stored[order.partner[k]])
            assert partners.lam_K[j] == order.lam[k]
        np.testing.assert_allclose(item.batch.target_BC[i].numpy(), target, rtol=1e-6)


def test_partners_are_read_only_for_a_recipe_that_lists_mixup(clips: Clips):
    unmixed = replace(RECIPE, augmentations=["spec_augment"])
    assert all(item.batch.partners is None for item in epoch(clips, unmixed))
    assert any(item.batch.partners is not None for item in epoch(clips))


def test_batches_have_the_feature_settings_of_the_data_set(clips: Clips):
    features = FeatureSettings(frame_shift_ms=20.0)
    item = next(iter(TrainFeed(clips, RECIPE, 4, features=features).epoch(1, CPU)))
    assert item.batch.part(0, 1).features == features


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_together_get_the_batch_and_augmentation_of_one_rank(clips: Clips, world_size: int):
    whole = epoch(clips)
    parts = [epoch(clips, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, item in enumerate(whole):
        shares = [part[step] for part in parts]
        assert len({len(share.batch.weight_B) for share in shares}) == 1
        for rank, share in enumerate(shares):
            real = share.batch.weight_B.bool()
            mine = slice((rank - step * RECIPE.batch_size) % world_size, None, world_size)
            assert torch.equal(share.batch.fbank_BTM[real], item.batch.fbank_BTM[mine])
            assert torch.equal(share.batch.target_BC[real], item.batch.target_BC[mine])
            expected = values(item)["time_start"][mine]
            np.testing.assert_array_equal(values(share)["time_start"][real.numpy()], expected)
            assert share.num_clips_global == item.num_clips_global


@pytest.mark.parametrize("world_size", [1, 3])
def test_compiled_training_gets_batches_of_one_shape(clips: Clips, world_size: int):
    for rank in range(world_size):
        bare = epoch(clips, rank=rank, world_size=world_size)
        filled = epoch(clips, replace(RECIPE, compile=True), rank, world_size)
        assert {len(item.batch) for item in filled} == {-(-RECIPE.batch_size // world_size)}
        for one, other in zip(bare, filled, strict=True):
            counts = other.batch.weight_B.bool()
            assert torch.equal(other.batch.fbank_BTM[counts], one.batch.fbank_BTM[one.batch.weight_B.bool()])
            assert other.num_clips_global == one.num_clips_global
            np.testing.assert_array_equal(
                values(other)["time_start"][: len(one.batch)],
                values(one)["time_start"],
            )


@pytest.mark.parametrize("first_step", [1, 3])
def test_an_epoch_resumes_at_a_step_with_exactly_the_next_batches(clips: Clips, first_step: int):
    """On one rank, and on two ranks of another world size, as after a loss of workers."""
    for world_size in (1, 2):
        for rank in range(world_size):
            whole = epoch(clips, rank=rank, world_size=world_size)
            rest = list(TrainFeed(clips, RECIPE, 4, rank, world_size).epoch(1, CPU, first_step))
            assert [item.step for item in rest] == list(range(first_step, 5))
            for one, other in zip(whole[first_step:], rest, strict=True):
                assert torch.equal(one.batch.fbank_BTM, other.batch.fbank_BTM)
                assert torch.equal(one.batch.partners.lam_K, other.batch.partners.lam_K)
                np.testing.assert_array_equal(values(one)["freq_start"], values(other)["freq_start"])


def test_row_groups_read_ahead_stay_in_memory_until_they_are_used(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """The data set has five shuffle windows of row groups, for clips and for partners."""
    num_clips, shard = 6000, str(tmp_path / "all.parquet")
    table, fbanks = table_of([2] * num_clips)
    pq.write_table(table, shard, row_group_size=ROW_GROUP_CLIPS)
    used, gone, read = [], [], FbankReader.__getitem__

    def counted(reader: FbankReader, clip: int) -> np.ndarray:
        used.append(clip)
        if (0, clip // ROW_GROUP_CLIPS) not in reader._groups:
            gone.append(clip)
        return read(reader, clip)

    monkeypatch.setattr(FbankReader, "__getitem__", counted)
    recipe = replace(RECIPE, input_tdim=16, timem=2, batch_size=12, sampling="uniform")
    for _ in TrainFeed(clips_of([shard] * num_clips, range(num_clips), fbanks), recipe, 1).epoch(1, CPU):
        pass
    assert len(used) > num_clips
    assert not gone


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_evaluation_sees_every_row_once_in_order(clips: Clips, stored: list[np.ndarray], world_size: int):
    seen = []
    for rank in range(world_size):
        for batch in eval_batches(clips, RECIPE, 4, rank=rank, world_size=world_size, batch_size=7, device=CPU):
            seen += list(batch.fbank_BTM[:, :48].numpy())
    for row, expected in zip(seen, stored, strict=True):
        np.testing.assert_array_equal(row, expected)


def test_evaluation_keeps_only_row_groups_that_it_will_read(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Those of 16 batches before and after the current one. The last row group of a shard is smaller."""
    per_shard, shards = 1500, [str(tmp_path / f"{i}.parquet") for i in range(4)]
    table, fbanks = table_of([2] * per_shard)
    for shard in shards:
        pq.write_table(table, shard, row_group_size=ROW_GROUP_CLIPS)
    clips = clips_of([shard for shard in shards for _ in range(per_shard)], [*range(per_shard)] * 4, fbanks * 4)
    clips = replace(clips, clip_id=pa.array([f"clip{i}" for i in range(per_shard)] * 4))
    most, gone, read = 0, [], FbankReader.__getitem__

    def counted(reader: FbankReader, clip: int) -> np.ndarray:
        nonlocal most
        most = max(most, len(reader._groups))
        if (int(clips.shard_of[clip]), int(clips.row[clip]) // ROW_GROUP_CLIPS) not in reader._groups:
            gone.append(clip)
        return read(reader, clip)

    monkeypatch.setattr(FbankReader, "__getitem__", counted)
    recipe = replace(RECIPE, input_tdim=16, timem=2)
    batches = eval_batches(clips, recipe, 1, rank=0, world_size=1, batch_size=32, device=CPU)
    assert sum(map(len, batches)) == len(clips)
    assert not gone
    assert most == 68


def test_an_unreadable_shard_raises_instead_of_hanging(clips: Clips, tmp_path):
    lost = replace(clips, shards=[str(tmp_path / "gone.parquet")] * len(clips.shards))
    with pytest.raises(DataError, match=r"the shard .*gone\.parquet is missing; restore it, or prepare the data again"):
        epoch(lost)


def test_leaving_a_feed_early_ends_its_thread(clips: Clips):
    batches = TrainFeed(clips, RECIPE, 4).epoch(1, CPU)
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "feed"]


def test_drawing_the_order_happens_in_the_consumer_and_counts_as_waiting(clips: Clips, monkeypatch: pytest.MonkeyPatch):
    drawn_by = []

    def slow_order(**args) -> EpochOrder:
        drawn_by.append(threading.current_thread())
        time.sleep(0.3)
        return epoch_order(**args)

    monkeypatch.setattr("pipeline.train.data.feed.epoch_order", slow_order)
    feed = TrainFeed(clips, RECIPE, 4)
    for _ in range(2):
        next(feed.epoch(1, CPU))
    assert drawn_by == [threading.current_thread()] * 2
    assert feed.waits.wait_s >= 0.6
