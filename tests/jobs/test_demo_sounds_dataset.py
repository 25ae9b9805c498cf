"""The demo's data set agrees with its lists, and its server answers as real media hosts do."""

import http.client
from pathlib import Path
from urllib.parse import urlsplit

import av
import imageio_ffmpeg
import numpy as np
import pytest
import yt_dlp
from yt_dlp.postprocessor.ffmpeg import FFmpegPostProcessor
from yt_dlp.utils import download_range_func

from ast_core.labels import audioset_labels
from jobs.demo import sounds, sounds_dataset
from jobs.demo.media_server import parse_range, serve
from jobs.demo.sounds_dataset import CLIP_S, Fault, SoundsDataset, build_dataset

NUM_TRAIN, NUM_EVAL = 3 * sounds_dataset.CLIPS_PER_RECORDING, 2


@pytest.fixture(scope="module")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> SoundsDataset:
    return build_dataset(tmp_path_factory.mktemp("sounds"), num_train=NUM_TRAIN, num_eval=NUM_EVAL, seed=3)


@pytest.fixture(scope="module")
def base_url(small_dataset: SoundsDataset):
    with serve(small_dataset.media_dir) as url:
        yield url


def rows_of(segment_list: Path) -> list[tuple[str, float, float, list[str]]]:
    lines = segment_list.read_text().splitlines()
    assert [line[0] for line in lines[:3]] == ["#"] * 3
    rows = []
    for line in lines[3:]:
        video_id, start, end, labels = line.split(", ")
        assert labels[0] == labels[-1] == '"'
        assert [len(number.split(".")[1]) for number in (start, end)] == [3, 3]
        rows.append((video_id, float(start), float(end), labels.strip('"').split(",")))
    return rows


def decode(path: Path) -> tuple[str, int, np.ndarray]:
    with av.open(path) as container:
        stream = container.streams.audio[0]
        frames = [frame.to_ndarray()[0] for frame in container.decode(stream)]
        return stream.codec_context.name, stream.codec_context.sample_rate, np.concatenate(frames)


def cut(path: Path, start_s: float, end_s: float) -> np.ndarray:
    with av.open(path) as container:
        first_s = next(container.decode(audio=0)).time
    _, rate_hz, waveform = decode(path)
    assert first_s <= start_s
    assert len(waveform) / rate_hz + first_s >= end_s
    return waveform[round((start_s - first_s) * rate_hz) :][: round((end_s - start_s) * rate_hz)]


def media_of(dataset: SoundsDataset, video_id: str) -> Path:
    return next(path for path in dataset.media_dir.iterdir() if path.stem == video_id)


# ---- sounds ----


@pytest.mark.parametrize("mid", sounds.GENERATORS)
def test_class_is_in_audioset_and_its_instances_differ(mid):
    assert mid in audioset_labels().mids
    one, again, other = (sounds.GENERATORS[mid](np.random.default_rng(seed), 20_000, 16_000) for seed in (1, 1, 2))
    assert one.shape == (20_000,)
    assert np.isfinite(one).all()
    assert np.abs(one).max() > 0
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_mixture_has_the_given_length_and_does_not_clip():
    for seed in range(10):
        rng = np.random.default_rng(seed)
        clip = sounds.mixture(rng, rng.choice(list(sounds.GENERATORS), 3, replace=False), 1.5, 44_100)
        assert (clip.dtype, clip.shape) == (np.float32, (66_150,))
        assert np.abs(clip).max() < 1


# ---- lists and media ----


def test_the_lists_hold_the_good_clips_and_the_faults(small_dataset):
    train, evaluation = rows_of(small_dataset.train_list), rows_of(small_dataset.eval_list)
    assert len(train) + len(evaluation) == NUM_TRAIN + NUM_EVAL + len(Fault)
    assert sorted(small_dataset.faults.values()) == sorted(Fault)
    assert sum(row[0] not in small_dataset.faults for row in train) == NUM_TRAIN
    assert not {row[0] for row in train} & {row[0] for row in evaluation}
    assert all(len(row[0]) == 11 for row in train + evaluation)
    assert any(row[0].startswith("-") and "_" in row[0] for row in train)
    assert {mid for row in train for mid in row[3]} == set(sounds.GENERATORS)


def test_clips_of_a_recording_do_not_overlap(small_dataset):
    ends: dict[str, float] = {}
    for video_id, start_s, end_s, _ in rows_of(small_dataset.train_list):
        assert start_s > ends.get(video_id, 0.0)
        assert end_s - start_s == pytest.approx(CLIP_S)
        ends[video_id] = end_s


def test_recordings_decode_with_their_codec_and_length(small_dataset):
    train = rows_of(small_dataset.train_list)
    seen = set()
    for video_id in {row[0] for row in train} - set(small_dataset.faults):
        path = media_of(small_dataset, video_id)
        codec, rate_hz, waveform = decode(path)
        seen.add((path.suffix, codec.removeprefix("lib"), rate_hz))
        last_s = max(row[2] for row in train if row[0] == video_id)
        assert len(waveform) / rate_hz >= max(sounds_dataset.MIN_RECORDING_S, last_s) - 0.01
        assert np.sqrt(np.mean(waveform**2)) > 0.005
    assert seen == {(".webm", "opus", 48_000), (".m4a", "aac", 44_100), (".ogg", "opus", 48_000)}


def test_faulty_recordings_have_their_fault(small_dataset):
    video_id = {fault: video_id for video_id, fault in small_dataset.faults.items()}
    rows = {row[0]: row for row in rows_of(small_dataset.train_list) + rows_of(small_dataset.eval_list)}
    assert not list(small_dataset.media_dir.glob(f"{video_id[Fault.MISSING]}*"))
    assert not decode(media_of(small_dataset, video_id[Fault.SILENT]))[2].any()
    with pytest.raises(av.error.InvalidDataError):
        av.open(media_of(small_dataset, video_id[Fault.NOT_AUDIO]))
    _, rate_hz, waveform = decode(media_of(small_dataset, video_id[Fault.TRUNCATED]))
    assert 1 < len(waveform) / rate_hz < rows[video_id[Fault.TRUNCATED]][1]


def test_same_seed_gives_same_bytes_and_finished_dataset_is_kept(small_dataset, tmp_path):
    def contents(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    arguments = {"num_train": NUM_TRAIN, "num_eval": NUM_EVAL, "seed": 3}
    again = build_dataset(tmp_path, **arguments)
    assert contents(tmp_path) == contents(small_dataset.train_list.parent)

    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert build_dataset(tmp_path, **arguments) == again
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times


# ---- the server ----


def ask(base_url: str, path: str, method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection(urlsplit(base_url).netloc, timeout=60)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


def test_video_id_is_served_with_its_content_type(small_dataset, base_url):
    types = set()
    for video_id in {row[0] for row in rows_of(small_dataset.train_list)} - set(small_dataset.faults):
        response, body = ask(base_url, f"/{video_id}")
        assert (response.status, response.headers["Accept-Ranges"]) == (200, "bytes")
        assert body == media_of(small_dataset, video_id).read_bytes()
        types.add(response.headers["Content-Type"])
    assert types == {"audio/webm", "audio/mp4", "audio/ogg"}


def test_ranges_are_answered_exactly(small_dataset, base_url):
    path = media_of(small_dataset, rows_of(small_dataset.eval_list)[0][0])
    whole = path.read_bytes()
    size = len(whole)
    for asked, first, last in [
        ("bytes=0-99", 0, 99),
        ("bytes=100-", 100, size - 1),
        ("bytes=-50", size - 50, size - 1),
        (f"bytes=10-{size + 5}", 10, size - 1),
    ]:
        response, body = ask(base_url, f"/{path.name}", Range=asked)
        assert (response.status, response.headers["Content-Range"]) == (206, f"bytes {first}-{last}/{size}")
        assert body == whole[first : last + 1]
    response, body = ask(base_url, f"/{path.stem}", Range=f"bytes={size}-")
    assert (response.status, response.headers["Content-Range"], body) == (416, f"bytes */{size}", b"")
    response, body = ask(base_url, f"/{path.stem}", method="HEAD")
    assert (response.status, response.headers["Content-Length"], body) == (200, str(size), b"")


def test_a_malformed_range_is_ignored():
    assert [parse_range(text, 10) for text in ("bytes=-", "bytes=5-2", "lines=0-1", "bytes=0-1,4-5")] == [None] * 4


@pytest.mark.parametrize(
    "path", ["/nothing", "/", "/../sounds.json", "/%2e%2e/sounds.json", "/..%2fsounds.json", "/dataset"]
)
def test_path_that_is_not_a_recording_of_the_folder_is_not_found(base_url, path):
    assert ask(base_url, path)[0].status == 404


def test_missing_recording_is_a_404(small_dataset, base_url):
    missing = next(video_id for video_id, fault in small_dataset.faults.items() if fault is Fault.MISSING)
    assert ask(base_url, f"/{missing}")[0].status == 404


# ---- yt-dlp ----


@pytest.mark.parametrize("suffix", [".webm", ".m4a", ".ogg"])
def test_ytdlp_fetches_a_section(small_dataset, base_url, tmp_path, suffix):
    """A WebM section begins up to one WebM cluster (5 s) early. With -copyts it keeps the recording's timestamps."""
    FFmpegPostProcessor._ffmpeg_location.set(imageio_ffmpeg.get_ffmpeg_exe())
    rows = [row for row in rows_of(small_dataset.train_list) if row[0] not in small_dataset.faults]
    whole = {row[0]: media_of(small_dataset, row[0]) for row in rows}
    video_id, start_s, end_s, _ = next(row for row in rows if whole[row[0]].suffix == suffix and row[1] > 10)
    options = {
        "quiet": True,
        "noprogress": True,
        "cachedir": False,
        "outtmpl": str(tmp_path / "section.%(ext)s"),
        "download_ranges": download_range_func(None, [(start_s - 1, end_s + 1)]),
        "external_downloader_args": {"ffmpeg_o": ["-copyts"]},
    }
    with yt_dlp.YoutubeDL(options) as downloader:
        downloader.extract_info(f"{base_url}/{video_id}")
    (section,) = tmp_path.glob("section.*")
    clip = cut(section, start_s, end_s)
    expected = cut(whole[video_id], start_s, end_s)
    assert len(clip) == len(expected)
    lags = range(-100, 101)
    matches = [np.corrcoef(clip[200:-200], np.roll(expected, lag)[200:-200])[0, 1] for lag in lags]
    assert max(matches) > 0.95, "another part of the recording"
