"""Sources on object storage that refuses one request in five: each gives the same data set as local copies."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from ast_core.labels import LabelVocabulary, audioset_labels
from jobs.prepare_audioset import main
from pipeline import storage
from pipeline.dataset import PreparedDataset
from tests import fakes
from tests.s3 import S3Server

ONE_IN_FIVE = 0.2
NUM_CLIPS = 24
PETS = ("cat", "dog")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Different WAV files. The first one is too loud, which the audio store must preserve."""
    folder = tmp_path_factory.mktemp("sounds")
    waveforms = [fakes.noise(0.5, seed=i) for i in range(NUM_CLIPS)]
    waveforms[0] = np.clip(9 * waveforms[0], -1, 1)
    return [fakes.write_media(folder / f"{i}.wav", waveform).read_bytes() for i, waveform in enumerate(waveforms)]


# Each function writes a source to a folder. It returns the source's option, and the option's path below the folder.

LayOut = Callable[[Path, list[bytes]], tuple[str, str]]


def hugging_face(folder: Path, sounds: list[bytes]) -> tuple[str, str]:
    for part in range(4):
        mine = range(part, NUM_CLIPS, 4)
        rows = [{"audio": {"bytes": sounds[i], "path": f"{i:02}.wav"}, "labels": [PETS[i % 2]]} for i in mine]
        made = datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio())
        made.to_parquet(str(folder / f"train-{part:05}-of-00004.parquet"), batch_size=2)
    return "--manifest", ""


def webdataset(folder: Path, sounds: list[bytes]) -> tuple[str, str]:
    for part in range(4):
        members: dict[str, bytes | dict[str, object]] = {}
        for i in range(part, NUM_CLIPS, 4):
            members |= {f"{i:02}.wav": sounds[i], f"{i:02}.json": {"labels": [PETS[i % 2]], "split": "train"}}
        fakes.write_tar(folder / "deep" / f"{part}.tar", members)
    return "--manifest", "deep/*.tar"


def data_file(folder: Path, sounds: list[bytes]) -> tuple[str, str]:
    """A data file as in the reference implementation's recipe."""
    mids = audioset_labels().mids
    entries = [{"wav": f"audio/{i:02}.wav", "labels": ",".join(mids[i : i + 2])} for i in range(NUM_CLIPS)]
    write_all(folder, {entry["wav"]: sound for entry, sound in zip(entries, sounds, strict=True)})
    (folder / "train_data.json").write_text(json.dumps({"data": entries}))
    return "--datafile", "train_data.json"


def esc50(folder: Path, sounds: list[bytes]) -> tuple[str, str]:
    names = [f"{1 + i % 5}-{i}-A-{i % 2}.wav" for i in range(NUM_CLIPS)]
    write_all(folder, {f"audio/{name}": sound for name, sound in zip(names, sounds, strict=True)})
    rows = [f"{name},{name[0]},{i % 2},{PETS[i % 2]}" for i, name in enumerate(names)]
    (folder / "meta").mkdir()
    (folder / "meta" / "esc50.csv").write_text("\n".join(["filename,fold,target,category", *rows]))
    return "--esc50", ""


def speech_commands(folder: Path, sounds: list[bytes]) -> tuple[str, str]:
    names = [f"{PETS[i % 2]}/{i:08x}_nohash_0.wav" for i in range(NUM_CLIPS)]
    write_all(folder, dict(zip(names, sounds, strict=True)))
    (folder / "validation_list.txt").write_text("\n".join(names[:4]))
    (folder / "testing_list.txt").write_text("\n".join(names[4:8]))
    return "--speechcommands", ""


def write_all(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def contents(uri: str) -> tuple[LabelVocabulary, dict[str, str], dict[str, dict[str, Any]]]:
    """The vocabulary, the split of each clip, and the clips' rows in the shards."""
    opened = PreparedDataset.open(uri)
    return opened.labels, opened.fingerprint(opened.splits), fakes.shard_rows(uri)


@pytest.mark.parametrize(
    "lay_out",
    [
        hugging_face,
        webdataset,
        data_file,
        pytest.param(esc50, marks=pytest.mark.slow),
        pytest.param(speech_commands, marks=pytest.mark.slow),
    ],
)
def test_source_on_s3_gives_the_same_data_set_as_its_local_copy(
    s3: S3Server, local_ray: None, tmp_path: Path, sounds: list[bytes], lay_out: LayOut
):
    (tmp_path / "source").mkdir()
    option, place = lay_out(tmp_path / "source", sounds)
    source = fakes.upload(tmp_path / "source", s3.uri("sources", lay_out.__name__))
    assert main([option, f"{tmp_path}/source/{place}".rstrip("/"), "--output", str(tmp_path / "local")]) == 0
    with s3.busy(share=ONE_IN_FIVE) as counts:  # only the source's requests: the output is on disk
        assert main([option, f"{source}/{place}".rstrip("/"), "--output", str(tmp_path / "remote")]) == 0
    assert counts["refused"] > 3
    *_, rows = expected = contents(str(tmp_path / "local"))
    assert contents(str(tmp_path / "remote")) == expected
    assert len({row["fbank_hash"] for row in rows.values()}) == NUM_CLIPS


def test_audio_kept_on_s3_gives_the_same_features(s3: S3Server, local_ray: None, tmp_path: Path, sounds: list[bytes]):
    (tmp_path / "source").mkdir()
    option, place = speech_commands(tmp_path / "source", sounds)
    source = [option, fakes.upload(tmp_path / "source", s3.uri("keep", "source"))]
    local = [option, f"{tmp_path}/source/{place}", "--output", str(tmp_path / "data")]
    assert main([*local, "--keep-audio", str(tmp_path / "store")]) == 0
    expected, store = contents(str(tmp_path / "data")), s3.uri("keep", "store")
    assert any(row["num_clipped"] for row in expected[-1].values())

    with s3.busy(share=ONE_IN_FIVE) as counts:
        assert main([*source, "--output", s3.uri("keep", "first"), "--keep-audio", store]) == 0
        assert contents(s3.uri("keep", "first")) == expected
        assert {kept.removeprefix(store) for kept in storage.list_files(store, recursive=True)} == {
            kept.removeprefix(f"{tmp_path}/store") for kept in storage.list_files(tmp_path / "store", recursive=True)
        }
    assert counts["refused"] > 20
    storage.delete(s3.uri("keep", "source"))  # now only the audio store exists
    with s3.busy(share=ONE_IN_FIVE) as counts:
        assert main(["--manifest", store, "--output", s3.uri("keep", "again")]) == 0
        assert contents(s3.uri("keep", "again")) == expected
    assert counts["refused"] > 20
