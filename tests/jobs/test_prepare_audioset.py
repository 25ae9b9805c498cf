"""The whole preparation job: real media over HTTP, real yt-dlp and Ray, and the data set on disk."""

import csv
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ast_core.errors import ConfigError, DataError
from ast_core.labels import audioset_labels
from jobs.common import run_job
from jobs.demo.media_server import serve
from jobs.prepare_audioset import _own_mirrors, _read_list, main, parser
from pipeline.dataset import PreparedDataset, fbank_type
from pipeline.prepare.audio.decode import decode_section
from pipeline.prepare.audio.features import clip_fbank
from pipeline.prepare.output.shards import clip_facts
from pipeline.prepare.sources.locate import any_of_youtube
from tests import fakes
from tests.conftest import SHARED

SPEECH, DOG = "/m/09x0r", "/m/0bt9lr"


def segment_list(path: Path, *rows: str) -> Path:
    path.write_text(
        "# Segments csv\n# num_ytids=9\n# YTID, start_seconds, end_seconds, positive_labels\n" + "\n".join(rows)
    )
    return path


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    for i, suffix in enumerate(("webm", "m4a", "ogg")):
        fakes.write_media(folder / f"video-{suffix:_>5}.{suffix}", fakes.noise(31, seed=i))
    fakes.write_media(folder / "silentvideo.ogg", np.zeros(31 * 16_000, np.float32))
    (folder / "htmlvideo__.webm").write_text("<html>Sign in</html>")
    return folder


@pytest.fixture(scope="module")
def base_url(media: Path) -> Iterator[str]:
    with serve(media) as url:
        yield url


ROWS = (
    f'video-_webm, 3.000, 8.000, "{SPEECH},{DOG}"',
    f'video-__m4a, 20.500, 25.500, "{DOG}"',
    f'video-__ogg, 25.000, 30.000, "{SPEECH}"',
    f'silentvideo, 3.000, 8.000, "{SPEECH}"',
    f'htmlvideo__, 3.000, 8.000, "{SPEECH}"',
    f'nowhere____, 3.000, 8.000, "{SPEECH}"',
    f'video-_webm, 29.000, 39.000, "{SPEECH}"',
    f'video-_webm, 9.000, 8.000, "{SPEECH}"',
    'video-_webm, 8.000, 9.000, "/m/unknown"',
)


def test_every_row_of_a_list_is_in_the_data_set_or_the_failures_table(
    local_ray: None, media: Path, base_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "data"
    clips = segment_list(tmp_path / "tiny_segments.csv", *ROWS)
    argv = ["--segments", str(clips), "--media-url", base_url + "/{video_id}", "--output", str(output)]
    argv += ["--download-workers", "1"]
    assert main(argv) == 0

    opened = PreparedDataset.open(str(output))
    prepared = opened.clips(["tiny"])
    assert sorted(prepared.clip_id.to_pylist()) == ["video-__m4a_20.500", "video-__ogg_25.000", "video-_webm_3.000"]
    failures = pq.read_table(output / "tiny" / "failures.parquet").to_pylist()
    assert {row["clip_id"]: (row["stage"], row["reason"]) for row in failures} == {
        "silentvideo_3.000": ("decode", "silent"),
        "htmlvideo___3.000": ("download", "not_audio"),
        "nowhere_____3.000": ("download", "unavailable"),
        "video-_webm_29.000": ("download", "truncated"),
        "video-_webm": ("source", "bad_time"),
        "video-_webm_8.000": ("source", "unknown_label"),
    }
    assert len(failures) + len(prepared) == len(ROWS)

    # The stored fbank is that of the right section of the right file.
    i = prepared.clip_id.to_pylist().index("video-__ogg_25.000")
    shard = pq.read_table(prepared.shards[prepared.shard_of[i]]).to_pylist()[int(prepared.row[i])]
    expected = clip_fbank(decode_section(str(media / "video-__ogg.ogg"), 25.0, 5.0))
    np.testing.assert_allclose(np.array(shard["fbank"]), expected, atol=0.05)
    assert (shard["start_s"], shard["end_s"], shard["num_frames"]) == (25.0, 30.0, 498)
    assert shard["video_id"] == "video-__ogg"

    info = json.loads((output / "dataset.json").read_text())
    assert info["labels"] == {"count": 527, "sha256": audioset_labels().sha256}
    assert info["splits"]["tiny"]["failures"]["truncated"] == 1
    assert "tiny" in capsys.readouterr().out

    # A second run only tries temporary failures again, and changes nothing. A recording that was gone is not fetched
    # again, though it exists now.
    fakes.write_media(media / "nowhere____.ogg", fakes.noise(31, seed=9))
    before = {path.name: path.stat().st_mtime_ns for path in (output / "tiny" / "shards").iterdir()}
    assert main(argv) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (output / "tiny" / "shards").iterdir()} == before
    assert "7 clips" not in (printed := capsys.readouterr().out)
    assert "6 clips are done by an earlier run, 1 to do" in printed  # the truncated clip is tried again
    failures = {
        row["clip_id"]: row["attempts"] for row in pq.read_table(output / "tiny" / "failures.parquet").to_pylist()
    }
    assert (failures["video-_webm_29.000"], failures["silentvideo_3.000"]) == (4, 1)

    # A longer list adds the new clip. Options request the silent clip and the one that was gone.
    segment_list(clips, *ROWS, f'video-_webm, 12.000, 17.000, "{DOG}"')
    assert main([*argv, "--keep-silent", "--retry", "unavailable"]) == 0
    now = PreparedDataset.open(str(output)).clips(["tiny"]).clip_id.to_pylist()
    added = {"video-_webm_12.000", "silentvideo_3.000", "nowhere_____3.000"}
    assert set(now) == {*prepared.clip_id.to_pylist(), *added}

    # A list with other labels for a prepared clip disagrees with the shards.
    segment_list(clips, *ROWS[1:], f'video-_webm, 3.000, 8.000, "{DOG}"')
    with pytest.raises(DataError, match="1 clips of split 'tiny' are prepared with other labels"):
        main(argv)


def test_dry_run_prints_the_duration_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [f'abcdefghij{i}, 3.000, 8.000, "{SPEECH}"' for i in range(6)]
    clips = segment_list(tmp_path / "tiny_segments.csv", *rows)
    argv = ["--segments", str(clips), "--output", str(tmp_path / "data"), "--dry-run"]
    assert main(argv) == 0
    assert capsys.readouterr().out.splitlines() == [
        "to do: 6 clips, 6 of them to be fetched; done: 0",
        "at 300 fetches an hour from one address: 1 min 12 s, and longer if it is throttled",
    ]
    assert main([*argv, "--fetches-per-hour", "60", "--addresses", "http://a:1", "http://b:1"]) == 0
    assert "at 60 fetches an hour from 2 addresses: 3 min" in capsys.readouterr().out
    assert main([*argv, "--addresses", "node"]) == 0
    assert "from one address: 1 min 12 s, divided by the number of nodes" in capsys.readouterr().out
    assert main([*argv, "--media-url", "http://127.0.0.1:9/{video_id}"]) == 0
    assert "the fetches have no rate limit" in capsys.readouterr().out
    assert not (tmp_path / "data").exists()


def test_dry_run_counts_the_refused_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "audio").mkdir()
    fakes.write_media(tmp_path / "audio" / "abcdefghij0.flac", fakes.noise(1))
    rows = [f'abcdefghij{i}, 0.000, 1.000, "{SPEECH}"' for i in range(3)] + ['abcdefghij3, 0.000, 1.000, "wolf"']
    clips = segment_list(tmp_path / "tiny_segments.csv", *rows)
    argv = ["--segments", str(clips), "--audio-dir", str(tmp_path / "audio"), "--output", str(tmp_path / "data")]
    assert main([*argv, "--dry-run"]) == 0
    refused, to_do = capsys.readouterr().out.splitlines()[-2:]
    assert refused == (
        "3 of 4 rows are refused: 2 missing_file, 1 unknown_label (first: abcdefghij1_0.000: no file for abcdefghij1 "
        "from 0 s to 1 s)"
    )
    assert to_do == "to do: 1 clips, 0 of them to be fetched; done: 0"


@pytest.mark.parametrize(
    ("urls", "expected"),
    [
        (["https://www.youtube.com/watch?v=abc"], True),
        (["/a/file.wav", "http://youtu.be/abc"], True),
        (["HTTPS://m.YouTube.com/watch?v=abc"], True),
        (["/a/youtube.com/file.wav", "https://notyoutube.com/x", "https://mirror.example/youtube.com/x"], False),
    ],
)
def test_one_youtube_recording_sets_the_rate_limit_of_youtube(urls: list[str], expected: bool):
    assert any_of_youtube(pa.chunked_array([urls])) is expected


def test_an_open_quote_in_ytdlps_options_is_one_line_before_the_list_is_read():
    argv = ["--segments", "nowhere.csv", "--output", "data", "--yt-dlp", "--user-agent 'my client"]
    with pytest.raises(ConfigError, match="--yt-dlp is no list of options: No closing quotation; close each quote"):
        main(argv)


def test_the_host_of_media_url_is_the_users_own_unless_it_is_youtube():
    assert _own_mirrors("http://me:secret@Mirror.example:8000/{video_id}.webm") == {"mirror.example:8000"}
    assert _own_mirrors("https://www.youtube.com/watch?v={video_id}") == _own_mirrors(None) == set()


@pytest.mark.slow
def test_one_cpu_is_enough_to_fetch_and_decode(base_url: str, tmp_path: Path):
    rows = [f'video-{("_webm", "__m4a", "__ogg")[i % 3]}, {i}.000, {i + 5}.000, "{SPEECH}"' for i in range(24)]
    clips = segment_list(tmp_path / "tiny_segments.csv", *rows)
    script = str(Path(__file__).parents[2] / "jobs" / "prepare_audioset.py")
    argv = ["--segments", str(clips), "--media-url", base_url + "/{video_id}", "--output", str(tmp_path / "data")]
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    subprocess.run([sys.executable, script, *argv, "--num-cpus", "1"], env=env, check=True, timeout=240)
    assert len(PreparedDataset.open(str(tmp_path / "data")).clips(["tiny"])) == 24


def test_manifest_of_files_in_two_splits(local_ray: None, tmp_path: Path):
    rows = ["path,labels,split"]
    for i in range(6):
        fakes.write_media(tmp_path / f"{i}.flac", fakes.noise(1, seed=i))
        rows.append(f"{i}.flac,{'cat;dog' if i % 2 else 'cat'},{'test' if i > 3 else 'train'}")
    (tmp_path / "mine.csv").write_text("\n".join(rows))
    assert main(["--manifest", str(tmp_path / "mine.csv"), "--output", str(tmp_path / "data")]) == 0
    opened = PreparedDataset.open(str(tmp_path / "data"))
    assert (opened.labels.names, opened.splits) == (("cat", "dog"), ["train", "test"])
    assert opened.clips(["train"]).labels.to_pylist() == [[0], [0, 1], [0], [0, 1]]

    # A second list with fewer labels uses the existing vocabulary.
    (tmp_path / "more.csv").write_text("path,labels,split\n0.flac,dog,extra")
    assert main(["--manifest", str(tmp_path / "more.csv"), "--output", str(tmp_path / "data")]) == 0
    opened = PreparedDataset.open(str(tmp_path / "data"))
    assert opened.splits == ["train", "test", "extra"]
    assert opened.clips(["extra"]).labels.to_pylist() == [[1]]


def test_case_38_files_and_folders_can_have_any_name(local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    sounds = tmp_path / "my sounds"
    sounds.mkdir()
    sound = fakes.write_media(tmp_path / "sound.wav", fakes.noise(0.5)).read_bytes()
    names = ["\N{DOG}", "it's", 'a "b"', "a%20b", "c#d", "e?f", "g,h", "i;j", "-k", "[1]", "loud"]
    files = [f"{name}.wav" for name in names[:-1]] + ["loud.WAV"]
    for file in files:
        (sounds / file).write_bytes(sound)
    (sounds / "link.wav").symlink_to(tmp_path / "sound.wav")
    with (sounds / "list.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([["path", "labels"], *([name, "x"] for name in [*files, "link.wav"])])
    assert b"\r\n" in (sounds / "list.csv").read_bytes()
    assert main(["--manifest", "~/my sounds/list.csv", "--output", "~/my data/"]) == 0
    opened = PreparedDataset.open(str(tmp_path / "my data"))
    assert sorted(opened.clips(["train"]).clip_id.to_pylist()) == sorted([*names, "link"])


def test_files_with_audioset_names_are_found_and_cut(local_ray: None, tmp_path: Path):
    (tmp_path / "audio" / "deep").mkdir(parents=True)
    whole = fakes.write_media(tmp_path / "audio" / "deep" / "abcdefghijk.flac", fakes.noise(30))
    fakes.write_media(tmp_path / "audio" / "Y-_345678901_40.000.wav", fakes.noise(10, seed=1))
    clips = segment_list(
        tmp_path / "mini_segments.csv",
        f'abcdefghijk, 12.000, 22.000, "{SPEECH}"',
        f'-_345678901, 40.000, 50.000, "{DOG}"',
        f'zzzzzzzzzzz, 0.000, 10.000, "{DOG}"',
    )
    argv = ["--segments", str(clips), "--audio-dir", str(tmp_path / "audio"), "--output", str(tmp_path / "data")]
    assert main([*argv, "--split", "mine"]) == 0
    prepared = PreparedDataset.open(str(tmp_path / "data")).clips(["mine"])
    assert sorted(prepared.clip_id.to_pylist()) == ["-_345678901_40.000", "abcdefghijk_12.000"]
    table = pq.read_table(prepared.shards[0])
    row = table["clip_id"].to_pylist().index("abcdefghijk_12.000")
    expected = clip_fbank(decode_section(str(whole), 12.0, 10.0))
    np.testing.assert_array_equal(np.array(table["fbank"][row].as_py(), np.float16), expected)
    failures = pq.read_table(tmp_path / "data" / "mine" / "failures.parquet")
    assert failures.select(["clip_id", "reason"]).to_pylist() == [
        {"clip_id": "zzzzzzzzzzz_0.000", "reason": "missing_file"}
    ]


def test_limit_applies_to_clips_and_to_refused_rows(tmp_path: Path):
    (tmp_path / "audio").mkdir()
    for name in "abc":
        fakes.write_media(tmp_path / "audio" / f"{name:_<11}_0.000.flac", fakes.noise(1))
    rows = [f'{name:_<11}, 0.000, 1.000, "{DOG}"' for name in "zayxbcw"]
    argv = ["--segments", str(segment_list(tmp_path / "few_segments.csv", *rows)), "--limit", "2"]
    args = parser().parse_args([*argv, "--audio-dir", str(tmp_path / "audio"), "--output", str(tmp_path / "data")])
    listed = _read_list(args).limited(args.limit)
    assert [name[0] for name in listed.clips["clip_id"].to_pylist()] == ["a", "b"]
    assert [name[0] for name in listed.refused["clip_id"].to_pylist()] == ["z", "y"]


def test_second_audio_folder_adds_missing_clips(local_ray: None, tmp_path: Path):
    for i, name in enumerate(("first", "second")):
        (tmp_path / name).mkdir()
        fakes.write_media(tmp_path / name / f"{name:_<11}_0.000.flac", fakes.noise(5, seed=i))
    rows = [f'{name:_<11}, 0.000, 5.000, "{DOG}"' for name in ("first", "second")]
    argv = ["--segments", str(segment_list(tmp_path / "two_segments.csv", *rows)), "--output", str(tmp_path / "data")]
    for name in ("first", "second"):
        assert main([*argv, "--audio-dir", str(tmp_path / name)]) == 0
    prepared = PreparedDataset.open(str(tmp_path / "data")).clips(["two"])
    assert sorted(prepared.clip_id.to_pylist()) == ["first_______0.000", "second______0.000"]
    assert len(pq.read_table(tmp_path / "data" / "two" / "failures.parquet")) == 0


def test_features_from_kept_audio_are_equal_to_the_byte(local_ray: None, tmp_path: Path):
    audio, store = tmp_path / "audio", tmp_path / "store"
    audio.mkdir()
    fakes.write_media(audio / "loud_______.webm", np.clip(9 * fakes.noise(12), -1, 1))
    fakes.write_media(audio / "Ysecond______20.flac", fakes.noise(5, seed=1))
    fakes.write_media(audio / "short______.ogg", fakes.noise(4.9, seed=2))
    (audio / "html_______.webm").write_text("<html>")
    clips = segment_list(
        tmp_path / "four_segments.csv",
        f'loud_______, 3.000, 8.000, "{SPEECH},{DOG}"',
        f'second_____, 20.000, 25.000, "{DOG}"',
        f'short______, 0.000, 5.000, "{DOG}"',
        f'html_______, 0.000, 5.000, "{DOG}"',
    )
    argv = ["--segments", str(clips), "--audio-dir", str(audio), "--output", str(tmp_path / "first")]
    assert main([*argv, "--keep-audio", str(store)]) == 0
    first = fakes.shard_rows(tmp_path / "first")
    assert (len(first), first["loud________3.000"]["num_clipped"] > 0) == (3, True)

    again = ["--segments", str(clips), "--audio-dir", str(store), "--output", str(tmp_path / "second")]
    assert main(again) == 0
    assert fakes.shard_rows(tmp_path / "second") == first
    assert main(["--manifest", str(store), "--output", str(tmp_path / "third")]) == 0
    assert fakes.shard_rows(tmp_path / "third") == first
    third = PreparedDataset.open(str(tmp_path / "third"))
    assert (third.labels, third.splits) == (audioset_labels(), ["four"])

    # A second run keeps no clip twice. A data set whose audio was not kept is refused, not passed over.
    assert main([*argv, "--keep-audio", str(store)]) == 0
    kept = [clip for file in store.glob("four/audio/*.parquet") for clip in pq.read_table(file)["clip_id"].to_pylist()]
    assert sorted(kept) == sorted(first)
    with pytest.raises(DataError, match="3 clips of split 'four' are prepared and their audio is not in"):
        main([*argv, "--keep-audio", str(tmp_path / "new_store")])


def test_archives_give_the_same_data_set_as_their_files(local_ray: None, tmp_path: Path):
    files = [fakes.write_media(tmp_path / f"{name:_<11}.flac", fakes.noise(3, seed=i)) for i, name in enumerate("abc")]
    rows = [{"video_id": file.stem, "audio": {"bytes": file.read_bytes(), "path": file.name}} for file in files]
    made = datasets.Dataset.from_list([row | {"labels": [DOG]} for row in rows])
    (tmp_path / "hub").mkdir()
    made.cast_column("audio", datasets.Audio()).to_parquet(str(tmp_path / "hub" / "00.parquet"))
    with tarfile.open(tmp_path / "clips.tar", "w") as tar:
        for file in files:
            file.with_suffix(".json").write_text(json.dumps({"labels": [DOG]}))
            tar.add(file, file.name)
            tar.add(file.with_suffix(".json"), file.with_suffix(".json").name)
    lines = [f'{file.stem}, 30.000, 33.000, "{DOG}"' for file in files]
    clips = segment_list(tmp_path / "hub_segments.csv", *lines, f'missing____, 30.000, 33.000, "{DOG}"')
    outputs = {
        "listed": ["--segments", str(clips), "--audio-dir", str(tmp_path / "hub")],
        "parquet": ["--manifest", str(tmp_path / "hub")],
        "tar": ["--manifest", str(tmp_path / "clips.tar")],
    }
    for name, source in outputs.items():
        assert main([*source, "--output", str(tmp_path / name)]) == 0
        fbanks = [row["fbank_hash"] for row in fakes.shard_rows(tmp_path / name).values()]
        expected = [clip_facts(clip_fbanks(file)) for file in files]
        assert sorted(fbanks) == sorted(facts["fbank_hash"][0].as_py() for facts in expected)
    failures = pq.read_table(tmp_path / "listed" / "hub" / "failures.parquet")
    assert failures["reason"].to_pylist() == ["missing_file"]


def clip_fbanks(file: Path) -> pa.ListArray:
    return pa.array([clip_fbank(decode_section(str(file), 0.0, None)).tolist()], fbank_type(128))


@pytest.mark.skipif(not (SHARED / "data" / "audioset").exists(), reason="needs the AudioSet clip in ../shared")
def test_stored_fbank_equals_that_of_the_reference_implementation(local_ray: None, tmp_path: Path):
    audioset = SHARED / "data" / "audioset"
    clips = segment_list(tmp_path / "one_segments.csv", '--BfvyPmVMo, 20.000, 30.000, "/m/03l9g"')
    assert main(["--segments", str(clips), "--audio-dir", str(audioset), "--output", str(tmp_path / "data")]) == 0
    prepared = PreparedDataset.open(str(tmp_path / "data")).clips(["one"])
    stored = np.array(pq.read_table(prepared.shards[0])["fbank"][0].as_py(), np.float16)
    expected = np.load(SHARED / "fixtures" / "clip_fbank_reference.npz")["fbank"]
    rounding = np.spacing(np.abs(expected).astype(np.float16)) / 2
    assert (np.abs(stored - expected) <= rounding + 1e-3).all()


@pytest.mark.parametrize(
    ("argv", "error", "message"),
    [
        (["--datafile", "x.json", "--audio-dir", "y"], ConfigError, "--audio-dir"),
        (["--segments", "a.csv", "b.csv", "--split", "s"], ConfigError, "--split names one split"),
        (["--esc50", "x", "--labels", "y.csv"], ConfigError, "brings its own"),
        (["--segments", "a.csv", "--files-are-clips"], ConfigError, "--audio-dir"),
        (["--segments", "a.csv", "--limit", "0"], ConfigError, "--limit is 0; use more than 0"),
        (["--segments", "nothing.csv"], DataError, "nothing.csv"),
        (["--esc50", "nothing"], DataError, "nothing"),
    ],
)
def test_invalid_command_is_refused_before_any_work(argv: list[str], error: type, message: str, tmp_path: Path):
    with pytest.raises(error, match=message):
        main([*argv, "--output", str(tmp_path / "data")])
    assert not (tmp_path / "data").exists()


def test_job_that_prepares_no_clip_ends_with_status_2(local_ray: None, tmp_path: Path):
    clips = segment_list(tmp_path / "lost_segments.csv", f'abcdefghijk, 3.000, 8.000, "{SPEECH}"')
    (tmp_path / "audio").mkdir()
    fakes.write_media(tmp_path / "audio" / "another_one.flac", fakes.noise(1))
    argv = ["--segments", str(clips), "--audio-dir", str(tmp_path / "audio"), "--output", str(tmp_path / "data")]
    assert run_job(main, argv) == 2
    failures = pq.read_table(tmp_path / "data" / "lost" / "failures.parquet")
    assert failures["reason"].to_pylist() == ["missing_file"]


def test_two_lists_with_the_same_name_are_refused(tmp_path: Path):
    (tmp_path / "other").mkdir()
    lists = [segment_list(folder / "a_segments.csv", ROWS[0]) for folder in (tmp_path, tmp_path / "other")]
    with pytest.raises(ConfigError, match="one split"):
        main(["--segments", *map(str, lists), "--output", str(tmp_path / "data")])


def test_relative_output_of_a_submitted_job_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    clips = segment_list(tmp_path / "a_segments.csv", ROWS[0])
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ConfigError, match="--output data would be lost with the submitted job"):
        main(["--segments", str(clips), "--output", "data"])


def test_error_that_the_user_can_fix_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    empty = segment_list(tmp_path / "empty_segments.csv")
    assert run_job(main, ["--segments", str(empty), "--output", str(tmp_path / "data")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
