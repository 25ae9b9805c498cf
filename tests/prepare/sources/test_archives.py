"""Members of archives: listed without their audio, read one by one, and refused with a reason."""

import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ast_core.errors import DataError
from pipeline.prepare.audio import archive_members
from pipeline.prepare.audio.archive_members import read_member
from pipeline.prepare.audio.decode import Decode, decode_section
from pipeline.prepare.clip import ClipError, Reason, in_progress
from pipeline.prepare.sources import archives, read_manifest
from pipeline.prepare.sources.archives import bytes_member, list_archive, row_member, tar_members
from pipeline.prepare.sources.locate import AudioFolder, is_media
from tests import fakes


def hugging_face(path: Path, rows: list[dict[str, object]], *, rows_a_group: int = 100) -> str:
    """A Parquet file written by `datasets`; `audio` of a row is (path, bytes)."""
    rows = [row | {"audio": dict(zip(("path", "bytes"), row["audio"], strict=True))} for row in rows]
    made = datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio())
    path.parent.mkdir(parents=True, exist_ok=True)
    made.to_parquet(str(path), batch_size=rows_a_group)
    return str(path)


def media_bytes(folder: Path, name: str, waveform: np.ndarray) -> bytes:
    return fakes.write_media(folder / name, waveform).read_bytes()


def reason_of(uri: str, member: str) -> tuple[Reason, str]:
    with pytest.raises(ClipError) as caught:
        read_member(uri, member)
    assert "\n" not in caught.value.message
    return caught.value.reason, caught.value.message


# Listing


def test_a_tar_is_listed_by_its_headers(tmp_path: Path):
    long_name = "d/" * 80 + "abcdefghijk.flac"  # too long for a header: GNU and PAX use a separate block
    uri = fakes.write_tar(
        tmp_path / "a.tar", {"a/x.flac": b"abc", "a/x.json": b'{"labels": [1]}', long_name: b"d" * 700}
    )
    members = list(tar_members(uri, sidecars=True))
    assert [(m.name, m.size, m.sidecar) for m in members] == [
        ("a/x.flac", 3, None),
        ("a/x.json", 15, {"labels": [1]}),
        (long_name, 700, None),
    ]
    assert [read_member(uri, bytes_member(m.offset, m.size)).audio[:3] for m in members] == [b"abc", b'{"l', b"ddd"]


def test_links_folders_and_devices_in_a_tar_are_not_members(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for name, kind in (("l.flac", tarfile.SYMTYPE), ("h.flac", tarfile.LNKTYPE), ("d.flac", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info)
    assert list(tar_members(str(tmp_path / "a.tar"))) == []


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_truncated_tar_is_refused_by_name(tmp_path: Path, share: float):
    whole = Path(fakes.write_tar(tmp_path / "a.tar", {f"{i}.flac": bytes(3000) for i in range(9)})).read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[: int(len(whole) * share)])
    if share < 0.5:
        with pytest.raises(DataError, match=r"b\.tar is no tar or damaged"):
            list(tar_members(str(tmp_path / "b.tar")))
    else:  # only padding is missing
        assert len(list(tar_members(str(tmp_path / "b.tar")))) == 9


def test_a_file_that_only_looks_like_an_archive_is_refused_by_name(tmp_path: Path):
    fakes.write_tar(tmp_path / "z.tar", {"a.flac": b"x"})
    with tarfile.open(tmp_path / "gz.tar", "w:gz") as file:
        file.add(tmp_path / "z.tar", "a.flac")
    (tmp_path / "html.tar").write_text("<html>Sign in</html>" * 100)
    (tmp_path / "html.parquet").write_text("<html>Sign in</html>" * 100)
    for name in ("gz.tar", "html.tar", "html.parquet"):
        with pytest.raises(DataError, match=name) as caught:
            list_archive(str(tmp_path / name), is_media)
        assert "\n" not in str(caught.value)


def test_a_parquet_file_is_listed_without_its_audio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    uri = hugging_face(
        tmp_path / "a.parquet",
        [{"video_id": f"video-{i:05d}", "audio": (f"audio/video-{i:05d}.flac", bytes(50_000))} for i in range(40)],
    )
    read = []
    iter_batches = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda *args, **kw: read.extend(kw["columns"]) or iter_batches(*args, **kw)
    )
    archive, names = list_archive(uri, is_media)
    assert (archive.num_members, names.names.to_pylist()[:2]) == (40, ["video-00000", "video-00001"])
    assert (len(names.names), read) == (40, ["video_id", "audio.path"])


def test_parquet_with_other_audio_is_refused(tmp_path: Path):
    audio = pa.array(
        [{"bytes": None, "path": "/a.flac"}] * 3, pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    pq.write_table(pa.table({"audio": audio}), tmp_path / "paths.parquet")
    pq.write_table(pa.table({"audio": [[0.1, 0.2]]}), tmp_path / "arrays.parquet")
    pq.write_table(pa.table({"path": ["x"]}), tmp_path / "index.parquet")
    with pytest.raises(DataError, match="paths of audio files, not their bytes"):
        list_archive(str(tmp_path / "paths.parquet"), is_media)
    with pytest.raises(DataError, match=r"list<.*double>, not struct<bytes, path>"):
        list_archive(str(tmp_path / "arrays.parquet"), is_media)
    assert list_archive(str(tmp_path / "index.parquet"), is_media) is None


READS_ALL = """
import sys
from pipeline.prepare.audio.archive_members import read_member
from pipeline.prepare.sources import archives, read_manifest
from pipeline.prepare.clip import ClipError
from ast_core.errors import DataError

for uri in sys.argv[1:]:
    try:
        archives.list_archive(uri, lambda name: True)
        archives.first_rows(uri)
        read_member(uri, archives.row_member(0))
        print("read")
    except (DataError, ClipError) as err:
        print(err)
"""


def test_a_crafted_footer_gives_one_line_and_does_not_end_the_process(tmp_path: Path):
    """With some of them, such as a column of another type than in the schema, pyarrow aborts when it reads a column."""
    uri = Path(hugging_face(tmp_path / "whole.parquet", [{"audio": ("a.wav", b"abc")}, {"audio": ("b.wav", b"de")}]))
    whole = uri.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    bits = np.random.default_rng(0).choice(np.arange(footer * 8, len(whole) * 8), 800, replace=False)
    for bit in bits:
        crafted = bytearray(whole)
        crafted[bit // 8] ^= 1 << bit % 8
        (tmp_path / f"{bit}.parquet").write_bytes(crafted)
    files = [str(tmp_path / f"{bit}.parquet") for bit in bits]
    done = subprocess.run([sys.executable, "-c", READS_ALL, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(files)
    refused = [(line, file) for line, file in zip(lines, files, strict=True) if line != "read"]
    assert len(refused) > 100
    assert all(file in line for line, file in refused)


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"path": "audio/-_345678901.flac", "video_id": "-_345678901"}, ["-_345678901"]),
        ({"path": None, "video_id": "-_345678901"}, ["-_345678901"]),
        ({"path": "0001.wav", "clip_id": "rex"}, ["0001", "rex"]),
        ({"path": "v_20.000.flac", "clip_id": "v_20.000", "video_id": "v", "start_s": 20.0}, ["v_20.000"]),
        ({"path": "v_20.flac", "start_s": 20.0}, ["v_20.000"]),
        ({"path": "v_20.flac", "start_s": 0.5}, ["v_20_0.500"]),
        ({"path": None}, []),
    ],
)
def test_the_names_of_a_parquet_row(row, names):
    assert archives.row_names(row) == names


# Reading


def test_each_row_gives_its_own_bytes_and_a_row_group_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = [f"audio {i}".encode() for i in range(10)]
    uri = hugging_face(tmp_path / "a.parquet", [{"audio": ("x.flac", d)} for d in data], rows_a_group=3)
    groups = []
    read_row_group = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, i, **kw: groups.append(i) or read_row_group(self, i, **kw)
    )
    assert [read_member(uri, row_member(i)).audio for i in range(10)] == data
    assert groups == [0, 1, 2, 3]
    assert read_member(uri, row_member(7)).audio == data[7]
    assert groups == [0, 1, 2, 3, 2]  # only the last group is cached


def test_a_row_group_that_has_no_room_beside_another_is_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = [f"audio {i}".encode() for i in range(3)]
    uri = hugging_face(tmp_path / "a.parquet", [{"audio": ("x.flac", d)} for d in data], rows_a_group=1)
    read_row_group = pq.ParquetFile.read_row_group

    def read(self: pq.ParquetFile, group: int, **options: object) -> pa.Table:
        if archive_members._row_group.cache_info().currsize or group == 2:
            raise pa.ArrowMemoryError("malloc of size 1500000000 failed")
        return read_row_group(self, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read)
    archive_members._row_group.cache_clear()
    assert [read_member(uri, row_member(i)).audio for i in range(2)] == data[:2]
    reason, message = reason_of(uri, row_member(2))
    assert (reason, message.partition("; ")[2]) == (Reason.TOO_LARGE, "write the file with smaller row groups")


def test_a_missing_or_unreadable_member_has_its_reason(tmp_path: Path):
    uri = hugging_face(tmp_path / "a.parquet", [{"audio": ("x.flac", b"x" * 5000)}, {"audio": ("y.flac", None)}])
    assert reason_of(uri, row_member(1)) == (Reason.MISSING_FILE, f"row 1 of {uri} contains no audio")
    assert reason_of(uri, row_member(2))[0] == Reason.MISSING_FILE
    assert reason_of(str(tmp_path / "gone.parquet"), row_member(0))[0] == Reason.MISSING_FILE
    assert reason_of(str(tmp_path / "gone.tar"), bytes_member(0, 5))[0] == Reason.MISSING_FILE
    packed = fakes.write_tar(tmp_path / "a.tar", {"a.flac": b"x"})
    assert "changed since it was listed" in reason_of(packed, bytes_member(1 << 20, 5))[1]
    whole = bytearray(Path(uri).read_bytes())
    whole[4:400] = bytes(396)  # the first page's header
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(whole)
    assert reason_of(str(damaged), row_member(0))[0] == Reason.NOT_AUDIO


def test_members_decode_like_the_files_they_were(tmp_path: Path):
    files = {name: media_bytes(tmp_path, name, fakes.noise(6, seed=i)) for i, name in enumerate(("a.webm", "b.flac"))}
    packed = fakes.write_tar(tmp_path / "x.tar", files)
    table = hugging_face(tmp_path / "x.parquet", [{"audio": item} for item in files.items()])
    members = [(packed, bytes_member(m.offset, m.size)) for m in tar_members(packed)]
    members += [(table, row_member(i)) for i in range(2)]
    rows = fakes.clips(
        *(
            {"clip_id": f"c{i}", "media": media, "member": member, "media_start_s": 2.0, "start_s": 2.0, "end_s": 5.0}
            for i, (media, member) in enumerate(members)
        )
    )
    out = Decode()(in_progress(rows))
    assert out["reason"].to_pylist() == [None] * 4
    for i, waveform in enumerate(out["waveform"].to_pylist()):
        expected = decode_section(str(tmp_path / ("a.webm", "b.flac")[i % 2]), 2.0, 3.0)
        np.testing.assert_array_equal(np.array(waveform, np.float32), expected)


def test_a_bad_member_fails_only_its_own_clip(tmp_path: Path):
    good = media_bytes(tmp_path, "a.flac", fakes.noise(1))
    uri = hugging_face(
        tmp_path / "x.parquet",
        [{"audio": ("a.flac", good)}, {"audio": ("b.flac", b"<html>")}, {"audio": ("c.flac", None)}],
    )
    rows = fakes.clips(*({"clip_id": f"c{i}", "media": uri, "member": row_member(i)} for i in range(4)))
    out = Decode()(in_progress(rows))
    assert out["reason"].to_pylist() == [None, "not_audio", "missing_file", "missing_file"]


@pytest.mark.parametrize("length_s", [2.0, 6.0])
def test_audio_longer_than_its_row_says_is_the_recording(tmp_path: Path, length_s: float):
    recording = media_bytes(tmp_path, "a.flac", fakes.noise(length_s))
    times = {"start_s": 3.0, "end_s": 5.0}
    packed = fakes.write_tar(tmp_path / "t.tar", {"a.flac": recording, "a.json": {"label": "dog", **times}})
    table = hugging_face(tmp_path / "x.parquet", [{"label": "dog", "audio": ("a.flac", recording), **times}])
    expected = decode_section(str(tmp_path / "a.flac"), 3.0 if length_s > 2 else 0.0, 2.0)
    for uri in (packed, table):
        rows = read_manifest(uri).clips
        out = Decode()(in_progress(rows)).to_pylist()
        assert [(row["reason"], row["start_s"], row["end_s"]) for row in out] == [(None, 3.0, 5.0)]
        np.testing.assert_array_equal(np.array(out[0]["waveform"], np.float32), expected)


@pytest.mark.parametrize(("name", "length_s"), [("a.mp3", 0.5), ("a.m4a", 0.5), ("a.flac", 1.1), ("a.flac", 1.4)])
def test_padding_of_short_coded_audio_makes_no_recording(tmp_path: Path, name: str, length_s: float):
    section = media_bytes(tmp_path, name, fakes.noise(length_s))
    times = {"start_s": 30.0, "end_s": 30.0 + round(length_s, 0 if length_s > 1 else 1)}
    table = hugging_face(tmp_path / "x.parquet", [{"label": "dog", "audio": (name, section), **times}])
    (row,) = Decode()(in_progress(read_manifest(table).clips)).to_pylist()
    assert (row["reason"], row["end_s"]) == (None, times["end_s"])


# Folders


def test_a_clip_has_the_same_names_in_files_tars_and_parquet(tmp_path: Path):
    fakes.write_tar(
        tmp_path / "t" / "0.tar",
        {"x/Yaaaaaaaaaaa_20.000.flac": b"1", "bbbbbbbbbbb.wav": b"2", "bbbbbbbbbbb.json": b"{}"},
    )
    hugging_face(tmp_path / "p" / "0.parquet", [{"video_id": v, "audio": (f"{v}.flac", b"3")} for v in ("ccc", "ddd")])
    hugging_face(
        tmp_path / "p" / "1.parquet",
        [{"video_id": "eee", "start_s": s, "end_s": s + 10, "audio": (None, b"4")} for s in (0.0, 30.0)],
    )
    (tmp_path / "fff.flac").touch()
    (tmp_path / "ddd_5.flac").touch()
    locate = AudioFolder(str(tmp_path))
    (first, second, _) = tar_members(str(tmp_path / "t" / "0.tar"))
    packed, table, cut = (str(tmp_path / name) for name in ("t/0.tar", "p/0.parquet", "p/1.parquet"))
    assert locate("aaaaaaaaaaa", 20.0, 30.0) == (packed, bytes_member(first.offset, 1), 0.0)
    assert locate("aaaaaaaaaaa", 40.0, 50.0) is None
    assert locate("bbbbbbbbbbb", 40.0, 50.0) == (packed, bytes_member(second.offset, 1), None)
    assert locate("ccc", 7.0, 17.0) == (table, row_member(0), None)
    assert locate("ddd", 7.0, 17.0) == (table, row_member(1), None)
    assert locate("ddd", 5.0, 15.0) == (f"{tmp_path}/ddd_5.flac", None, 0.0)
    assert locate("eee", 30.0, 40.0) == (cut, row_member(1), 0.0)
    assert locate("eee", 10.0, 20.0) is None  # another section of that recording would be the wrong sound
    assert locate("fff", 5.0, 15.0) == (f"{tmp_path}/fff.flac", None, None)
    assert AudioFolder(str(tmp_path), files_are_clips=True)("ccc", 7.0, 17.0) == (table, row_member(0), 0.0)


def test_a_folder_with_a_damaged_archive_is_refused_before_any_work(tmp_path: Path):
    (tmp_path / "a.flac").touch()
    whole = Path(hugging_face(tmp_path / "a.parquet", [{"audio": ("a.flac", b"x")}])).read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"b\.parquet"):
        AudioFolder(str(tmp_path))


def test_parquet_without_audio_is_not_a_source(tmp_path: Path):
    pq.write_table(pa.table({"clip_id": ["a"]}), tmp_path / "index.parquet")
    with pytest.raises(DataError, match="there is no audio file below"):
        AudioFolder(str(tmp_path))
