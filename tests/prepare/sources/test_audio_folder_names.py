"""File names that downloaders give to sections, and the report on other names."""

from pathlib import Path

import pytest

from ast_core.errors import DataError
from jobs.prepare_audioset import main
from pipeline.prepare.sources import read_segments
from pipeline.prepare.sources.locate import AudioFolder
from tests import fakes

ID = "-bCdEf_hI-K"


def touch(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return str(folder)


@pytest.mark.parametrize(
    "name",
    [
        f"{ID}_30000_40000.flac", f"{ID}_30.0-40.0.wav", f"{ID}_30-40.wav", f"{ID}-30-40.wav", f"{ID}_000030.mp4",
        f"Y{ID}_30.000_40.000.wav", f"{ID}-30_40.wav", f"Y{ID}_30000-40000.ogg",
    ],
)  # fmt: skip
def test_case_15_sections_are_found_under_the_names_of_downloaders(tmp_path: Path, name: str):
    locate = AudioFolder(touch(tmp_path, name))
    assert locate(ID, 30.0, 40.0) == (f"{tmp_path}/{name}", None, 0.0)
    assert locate(ID, 31.0, 41.0) is None
    assert locate(ID[:-1], 30.0, 40.0) is None


def test_case_15_a_recording_named_by_yt_dlp_is_found(tmp_path: Path):
    name = f"A dog. Barks [loud] [{ID}].webm"
    locate = AudioFolder(touch(tmp_path, name))
    assert locate(ID, 30.0, 40.0) == (f"{tmp_path}/{name}", None, None)


def test_audio_without_a_usual_suffix_is_counted(tmp_path: Path):
    others = ["a.webm.part", "b.part", "c.xyz", "d.txt", "e.JSON", "f_30.000", "Mr. Smith", ".hidden"]
    locate = AudioFolder(touch(tmp_path, f"{ID}.sph", *others))
    assert locate(ID, 30.0, 40.0) == (f"{tmp_path}/{ID}.sph", None, None)
    assert locate.notes == ["not read, because they have no usual suffix of audio or video: .part (2), .xyz (1)"]
    with pytest.raises(DataError, match=r"\(not read, because .*: \.xyz \(1\)\)"):
        AudioFolder(touch(tmp_path / "none", "c.xyz"))


def test_packed_files_are_counted_apart_from_those_of_other_suffixes(tmp_path: Path):
    locate = AudioFolder(touch(tmp_path, f"{ID}.wav", "a.wav.gz", "day.ZIP", "c.xyz"))
    packed, others = locate.notes
    assert packed == f"not read: 2 packed files, {tmp_path}/a.wav.gz for one; unpack them"
    assert others == "not read, because they have no usual suffix of audio or video: .xyz (1)"
    with pytest.raises(DataError, match=r"\(not read: 1 packed files, .*/day\.zip for one; unpack them\)"):
        AudioFolder(touch(tmp_path / "none", "day.zip"))


def test_a_start_alone_is_in_milliseconds_if_no_other_reading_fits(tmp_path: Path):
    names = [
        f"{ID}_30000.wav",
        "aaaaaaaaaaa_30000.wav",
        "aaaaaaaaaaa_30000_40000.wav",
        "bbbbbbbbbbb.wav",
        "bbbbbbbbbbb_30000.wav",
    ]
    locate = AudioFolder(touch(tmp_path, *names, "ccccccccccc_001000.wav", "Yddddddddddd_1500.wav"))
    assert locate(ID, 30.0, 40.0) == (f"{tmp_path}/{ID}_30000.wav", None, 0.0)
    assert locate(ID, 30_000.0, 30_010.0) == (f"{tmp_path}/{ID}_30000.wav", None, 0.0)
    assert locate("aaaaaaaaaaa", 30.0, 40.0) == (f"{tmp_path}/aaaaaaaaaaa_30000_40000.wav", None, 0.0)
    assert locate("bbbbbbbbbbb", 30.0, 40.0) == (f"{tmp_path}/bbbbbbbbbbb.wav", None, None)
    assert locate("ccccccccccc", 1.0, 11.0) is None  # zeros in front are those of seconds
    assert locate("ddddddddddd", 1.5, 11.5) == (f"{tmp_path}/Yddddddddddd_1500.wav", None, 0.0)
    touch(tmp_path, "eeeeeeeeeee_20.wav")  # so starts are in seconds, also those of long recordings
    assert AudioFolder(str(tmp_path))("ddddddddddd", 1.5, 11.5) is None


def test_an_id_that_ends_in_a_number_is_not_taken_for_a_start(tmp_path: Path):
    names = ["abcdefgh_12_30000.wav", "abcdefgh-34_30000.wav", "Yabcdefgh_56_30000.wav", "abcdefgh_78.wav"]
    locate = AudioFolder(touch(tmp_path, *names, "ijklmnop_90_5000_15000.wav"))
    for video_id, name in zip(("abcdefgh_12", "abcdefgh-34", "abcdefgh_56"), names, strict=False):
        assert locate(video_id, 30.0, 40.0) == (f"{tmp_path}/{name}", None, 0.0)
    assert locate("abcdefgh_78", 30.0, 40.0) == (f"{tmp_path}/abcdefgh_78.wav", None, None)
    assert locate("ijklmnop_90", 5.0, 15.0) == (f"{tmp_path}/ijklmnop_90_5000_15000.wav", None, 0.0)
    assert locate("abcdefgh_12", 31.0, 41.0) is None


def test_case_15_a_section_in_milliseconds_begins_at_zero_too(tmp_path: Path):
    locate = AudioFolder(touch(tmp_path, "aaaaaaaaaaa_0_10000.flac", "bbbbbbbbbbb_30_40.flac"))
    assert locate("aaaaaaaaaaa", 0.0, 10.0) is not None
    assert locate("bbbbbbbbbbb", 30.0, 40.0) is not None
    assert locate("bbbbbbbbbbb", 0.03, 0.04) is None  # ten seconds may be a clip, so these are not milliseconds


@pytest.mark.parametrize(
    "name",
    ["{}_30s_40s.wav", "audio-{}.f140.m4a", "A title-{}.webm", "{} (30-40).wav", "Y{}_50.000.wav", "{}_30_10.wav"],
)
def test_case_15_unsupported_file_names_are_reported(tmp_path: Path, name: str):
    ids = ["aaaaaaaaaaa", "bbbbbbbbbbb", "ccccccccccc"]
    folder = touch(tmp_path / "audio", *(name.format(video_id) for video_id in ids[:2]), "other______1.wav")
    (tmp_path / "list.csv").write_text("".join(f'{video_id}, 30.000, 40.000, "/m/09x0r"\n' for video_id in ids))
    out = read_segments(str(tmp_path / "list.csv"), locate=AudioFolder(folder))
    assert out.refused["reason"].to_pylist() == ["missing_file"] * 3
    (note,) = out.notes
    assert note.startswith("files of 2 of the 3 ids without a file are there")
    assert repr(Path(name.format("aaaaaaaaaaa")).stem) in note


def test_case_15_folders_named_by_an_id_are_reported(tmp_path: Path):
    folder = AudioFolder(
        touch(tmp_path, "aaaaaaaaaaa/audio.wav", "bbbbbbbbbbb/30_40.wav", "ccccccccccc/ccccccccccc.wav")
    )
    note = folder.under_other_names({"aaaaaaaaaaa", "bbbbbbbbbbb"})
    assert note.startswith("files of 2 of the 2 ids without a file are there")
    assert "'aaaaaaaaaaa/' for aaaaaaaaaaa" in note


def test_case_15_a_word_that_contains_an_id_is_not_its_file(tmp_path: Path):
    folder = touch(tmp_path / "audio", "abcd.wav", "xabc.wav", "abc1.wav")
    (tmp_path / "list.csv").write_text('abc, 0, 10, "/m/09x0r"\n')
    assert read_segments(str(tmp_path / "list.csv"), locate=AudioFolder(folder)).notes == ()


def test_case_15_names_in_archives_are_reported_too(tmp_path: Path):
    fakes.write_tar(tmp_path / "a.tar", {"x/aaaaaaaaaaa_part1.flac": b"x"})
    assert "'aaaaaaaaaaa_part1' for aaaaaaaaaaa" in AudioFolder(str(tmp_path)).under_other_names({"aaaaaaaaaaa"})


def test_case_15_the_job_prints_the_report_as_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = touch(tmp_path / "audio", "aaaaaaaaaaa_part1.wav", "bbbbbbbbbbb_30.wav")
    (tmp_path / "list.csv").write_text('aaaaaaaaaaa, 30, 40, "/m/09x0r"\nbbbbbbbbbbb, 30, 40, "/m/09x0r"\n')
    argv = [
        "--segments",
        str(tmp_path / "list.csv"),
        "--audio-dir",
        folder,
        "--output",
        str(tmp_path / "out"),
        "--dry-run",
    ]
    assert main(argv) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert "'aaaaaaaaaaa_part1' for aaaaaaaaaaa" in note


def test_case_30_macos_metadata_files_are_not_audio(tmp_path: Path):
    locate = AudioFolder(
        touch(
            tmp_path, "._aaaaaaaaaaa.wav", "aaaaaaaaaaa.wav", "__MACOSX/bbbbbbbbbbb.wav", ".Trashes/501/bbbbbbbbbbb.wav"
        )
    )
    assert locate("bbbbbbbbbbb", 0.0, 10.0) is None
    assert locate.under_other_names({"bbbbbbbbbbb"}) == ""
