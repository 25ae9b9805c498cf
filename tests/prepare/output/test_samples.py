"""Samples: the same clips for any order and tasks, with lossless audio."""

import io

import av
import numpy as np
import pyarrow as pa
import pytest

from pipeline import storage
from pipeline.prepare.audio.decode import decode_section
from pipeline.prepare.clip import WAVEFORM, Reason, in_progress, ragged
from pipeline.prepare.output.samples import (
    MAX_SAMPLE_S,
    NUM_CANDIDATES,
    KeepSamples,
    flac_bytes,
    read_samples,
    sort_key,
    wanted,
)
from tests import fakes


def decoded(num_clips: int, *, seconds: float = 0.1, split: str = "train") -> pa.Table:
    """Rows as after `Decode`."""
    rows = in_progress(
        fakes.clips(
            *({"clip_id": f"clip_{i}", "split": split, "media": "made", "end_s": seconds} for i in range(num_clips))
        )
    )
    rows = rows.append_column("num_clipped", pa.array([0] * num_clips, pa.int32()))
    return rows.append_column("waveform", ragged([fakes.noise(seconds, seed=i) for i in range(num_clips)], WAVEFORM))


@pytest.mark.parametrize("num_samples", [1, 4096, 4608 * 3 + 1, 160_000])
def test_flac_returns_every_sample_rounded_to_16_bits(num_samples: int):
    waveform = np.random.default_rng(num_samples).uniform(-1.1, 1.1, num_samples).astype(np.float32)
    waveform[0] = 1.0  # full scale, which 16 bits cannot represent
    exact = np.clip(np.rint(waveform.astype(np.float64) * 32768), -32768, 32767)
    with av.open(io.BytesIO(flac_bytes(waveform))) as container:
        stream = container.streams.audio[0]
        assert (stream.codec_context.name, stream.rate, stream.channels) == ("flac", 16_000, 1)
        assert container.duration == pytest.approx(num_samples / 16_000 * av.time_base, abs=1)  # browsers show it
        pcm = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(stream)])
    assert pcm.dtype == np.int16
    np.testing.assert_array_equal(pcm, exact)
    if num_samples >= 4096:  # at least a frame, so the clip can be prepared again from it
        np.testing.assert_array_equal(decode_section(io.BytesIO(flac_bytes(waveform)), 0.0, None), exact / 32768)


def test_samples_depend_only_on_the_ids_and_number_about_20():
    names = [f"video{i}_{i}.000" for i in range(50_000)]
    chosen = wanted(names, len(names))
    assert NUM_CANDIDATES / 2 < sum(chosen) < NUM_CANDIDATES * 2
    assert wanted(names[::-1], len(names)) == chosen[::-1]
    assert [wanted([name], len(names))[0] for name in names[:2000]] == chosen[:2000]
    assert all(wanted(names[:NUM_CANDIDATES], NUM_CANDIDATES))  # all clips of a short list


def test_a_growing_list_has_the_samples_of_the_complete_list():
    names = [f"video{i}_{i}.000" for i in range(20_000)]
    at_once = sorted((name for name, is_in in zip(names, wanted(names, 20_000), strict=True) if is_in), key=sort_key)
    first = [name for name, is_in in zip(names[:500], wanted(names[:500], 500), strict=True) if is_in]
    later = [name for name, is_in in zip(names[500:], wanted(names[500:], 20_000), strict=True) if is_in]
    assert len(at_once) >= 10
    assert sorted([*first, *later], key=sort_key)[:10] == at_once[:10]


@pytest.mark.parametrize("batch", [1, 4, 7, 60])
def test_samples_do_not_depend_on_how_tasks_are_cut(batch: int, tmp_path):
    rows = decoded(60)
    keep = KeepSamples(str(tmp_path), num_listed=100)
    for begin in range(0, 60, batch):
        assert keep(rows.slice(begin, batch)).equals(rows.slice(begin, batch))
    keep(rows.slice(5, 20))  # a task of a killed run, with other borders
    samples = read_samples(str(tmp_path))
    names = rows["clip_id"].to_pylist()
    expected = sorted((name for name, is_in in zip(names, wanted(names, 100), strict=True) if is_in), key=sort_key)
    assert 0 < len(expected) < 60
    assert samples["clip_id"].to_pylist() == expected
    first = names.index(expected[0])
    assert samples["audio"][0].as_py() == flac_bytes(fakes.noise(0.1, seed=first))


def test_a_repeated_task_writes_one_file_and_none_without_samples(tmp_path):
    keep = KeepSamples(str(tmp_path / "a"), num_listed=1)
    keep(decoded(3))
    keep(decoded(3))
    assert len(storage.list_files(tmp_path / "a", recursive=True)) == 1
    KeepSamples(str(tmp_path / "b"), num_listed=10**9)(decoded(3))
    assert storage.is_empty(tmp_path / "b")
    assert len(read_samples(str(tmp_path / "b"))) == 0


def test_failed_clips_are_not_stored_and_long_ones_are_cut(tmp_path):
    rows = decoded(2, seconds=MAX_SAMPLE_S + 2)
    at = rows.column_names.index("reason")
    rows = rows.set_column(at, "reason", pa.array([str(Reason.SILENT), None], pa.string()))
    KeepSamples(str(tmp_path), num_listed=2)(rows)
    samples = read_samples(str(tmp_path))
    assert samples["clip_id"].to_pylist() == ["clip_1"]
    kept = decode_section(io.BytesIO(samples["audio"][0].as_py()), 0.0, None)
    assert len(kept) == MAX_SAMPLE_S * 16_000
    np.testing.assert_allclose(kept, fakes.noise(MAX_SAMPLE_S + 2, seed=1)[: len(kept)], atol=2**-16)
