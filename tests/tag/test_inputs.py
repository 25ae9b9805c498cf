"""Inputs: what becomes a recording, and its name."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ast_core.errors import ConfigError, DataError
from pipeline.tag.inputs import Inputs, find_inputs
from tests import fakes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "sub").mkdir()
    fakes.write_media(folder / "a.wav", fakes.noise(0.1))
    fakes.write_media(folder / "sub" / "b.flac", fakes.noise(0.1))
    (folder / "notes.txt").write_text("no recording")
    audio = (folder / "a.wav").read_bytes()
    fakes.write_tar(folder / "sub" / "c.tar", {"x/one.wav": audio, "x/one.json": {}, "two.wav": audio})
    rows = [{"bytes": audio, "path": "p.wav"}, {"bytes": audio, "path": "p.wav"}, {"bytes": audio, "path": None}]
    pq.write_table(pa.table({"audio": rows, "label": [0, 1, 2]}), folder / "d.parquet")
    return folder


def names(inputs: Inputs, folder: Path) -> list[str]:
    return [name.removeprefix(f"{folder}/") for name in inputs.recordings["recording"].to_pylist()]


ALL = ["a.wav", "sub/b.flac", "d.parquet/p.wav", "d.parquet/p.wav row 1", "d.parquet/row 2"]


def test_a_folder_gives_its_media_and_the_members_of_its_archives(folder: Path):
    found = find_inputs([str(folder)])
    assert names(found, folder) == [*ALL, "sub/c.tar/x/one.wav", "sub/c.tar/two.wav"]
    assert found.recordings["member"].null_count == 2


def test_globs_files_and_archives_are_inputs_and_repetitions_count_once(folder: Path):
    assert names(find_inputs([f"{folder}/*.wav"]), folder) == ["a.wav"]
    assert names(find_inputs([f"{folder}/**/*.flac"]), folder) == ["sub/b.flac"]
    found = find_inputs([str(folder / "a.wav"), str(folder / "sub" / "c.tar"), str(folder)])
    assert len(found.recordings) == 7
    assert found.notes == ["3 recordings are given more than once, and tagged once"]


def test_a_list_names_files_urls_and_sections(folder: Path):
    listed = folder / "list.csv"
    listed.write_text(
        "path,url,labels,start_s,end_s\na.wav,,x,,\na.wav,,y,1,2.5\n,https://h.org/v.mp3?sig=k,z,,\n,,,,\nb,u,,,\n"
    )
    found = find_inputs([str(listed)])
    assert names(found, folder) == ["a.wav", "a.wav#t=1,2.5", "https://h.org/v.mp3"]
    assert found.recordings["media"].to_pylist()[2] == "https://h.org/v.mp3?sig=k"
    assert found.recordings["is_own"].to_pylist() == [False] * 3
    assert [row["message"] for row in found.refused.to_pylist()] == ["a row needs a path or a url, not both"]
    pq.write_table(pa.table({"path": ["a.wav"], "start_s": [1.0]}), folder / "list.parquet")
    assert names(find_inputs([str(folder / "list.parquet")]), folder) == ["a.wav#t=1"]
    for name in ("list.csv", "list.parquet"):
        (folder / name).unlink()


def test_a_url_of_the_command_line_may_lead_to_its_own_host():
    found = find_inputs(["http://127.0.0.1:8000/a.wav"])
    assert found.recordings.to_pylist()[0]["is_own"]


def test_a_prepared_data_set_gives_its_splits(tone_data: str):
    ((data, splits),) = find_inputs([tone_data]).datasets
    assert (data.uri, sorted(splits)) == (tone_data, ["eval", "train"])
    assert find_inputs([tone_data], ["eval"]).datasets[0][1] == ["eval"]
    with pytest.raises(ConfigError, match=r"has no split test; it has: "):
        find_inputs([tone_data], ["test"])


def test_what_is_no_recording_is_refused_in_one_line(folder: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"^there is no file or folder /none; see --input$"):
        find_inputs(["/none"])
    with pytest.raises(DataError, match=r"contains no recording; give audio, archives or lists of it"):
        find_inputs([str(tmp_path)])
    with pytest.raises(ConfigError, match=r"^--split is for prepared data sets, and none is given$"):
        find_inputs([str(folder / "a.wav")], ["eval"])


def test_all_containers_of_a_folder_are_recordings_and_packed_files_are_named(tmp_path: Path):
    wanted = ["a.caf", "b.w64", "c.amr", "d.M4V", "e.mts", "f.mp2", "g.wv", "h.aifc"]
    wanted += ["i.sph", "j.ape", "k.dsf", "l.mpc", "m.rm", "n.m4r", "o.3gpp", "p.adts", "q.WAVE"]
    for name in [*wanted, "day.zip", "week.tar.gz", "readme.md"]:
        (tmp_path / name).touch()
    found = find_inputs([str(tmp_path)])
    assert sorted(names(found, tmp_path)) == wanted
    (note,) = found.notes
    assert note.startswith("not read: 2 packed files, ")
    assert sorted(names(find_inputs([f"{tmp_path}/*.caf"]), tmp_path)) == ["a.caf"]


def test_files_that_may_be_audio_and_are_not_read_are_counted(tmp_path: Path):
    for name in ("a.wav", "b.odd", "c.ODD", "d.odder", "e.json", "f.zip"):
        (tmp_path / name).touch()
    assert find_inputs([str(tmp_path)]).notes[1:] == [
        "not read, because they have no usual suffix of audio or video: .odd (2), .odder (1)"
    ]
    with pytest.raises(DataError, match=r"contains no recording \(not read, because .*: \.odd \(1\)\); give audio"):
        find_inputs([f"{tmp_path}/b.*"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("day.zip", r"day\.zip is packed or compressed as a whole; unpack it"),
        ("week.tar.gz", r"week\.tar\.gz is packed or compressed as a whole; unpack it"),
        ("list.txt", r"list\.txt is no recording; a list of them ends in \.csv, \.tsv or \.parquet"),
    ],
)
def test_what_is_no_recording_is_refused_with_what_to_do(tmp_path: Path, name: str, said: str):
    (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=said):
        find_inputs([str(tmp_path / name)])


def test_an_empty_path_is_refused():
    with pytest.raises(ConfigError, match="a path of --input is empty"):
        find_inputs([""])


def test_the_last_of_two_members_of_one_name_is_the_recording(tmp_path: Path):
    one, again = (Path(fakes.write_tar(tmp_path / f"{i}.tar", {"k.wav": b"x" * (i + 1)})) for i in range(2))
    both = tmp_path / "both.tar"
    both.write_bytes(one.read_bytes()[: 2 * 512] + again.read_bytes())
    assert find_inputs([str(both)]).recordings["member"].to_pylist() == ["bytes 000000001536 2"]


def test_columns_with_times_of_other_names_are_pointed_out(folder: Path):
    (folder / "times.csv").write_text("path,onset,end_time,species\na.wav,0,1,x\n")
    start, end = find_inputs([str(folder / "times.csv")]).notes
    assert start.endswith("is not read; if start_s is meant, give start_s in seconds")
    assert end.endswith("is not read; if end_s is meant, give end_s in seconds")


def test_a_file_has_one_name_however_its_path_is_spelled(folder: Path, tmp_path: Path):
    listed = folder / "spellings.csv"
    listed.write_text(f"path\na.wav\n./a.wav\nsub/../a.wav\n{folder}//a.wav\n/{folder}/a.wav\nfile://{folder}/a.wav\n")
    found = find_inputs([str(listed), str(folder / "sub" / ".." / "a.wav")])
    assert names(found, folder) == ["a.wav"]
    assert found.notes == ["6 recordings are given more than once, and tagged once"]
    (tmp_path / "other").mkdir()
    fakes.write_media(tmp_path / "other" / "a.wav", fakes.noise(0.1))
    (tmp_path / "other" / "sub").mkdir()
    (tmp_path / "sub").symlink_to(tmp_path / "other" / "sub")
    through_link = f"{tmp_path}/sub/../a.wav"  # of the folder `other`
    assert find_inputs([through_link]).recordings["recording"].to_pylist() == [through_link]
    listed.unlink()


def test_a_glob_of_lists_names_what_the_lists_do(folder: Path):
    for name, path in (("one", "a.wav"), ("two", "sub/b.flac")):
        (folder / f"list-{name}.csv").write_text(f"path\n{path}\n")
    assert names(find_inputs([f"{folder}/list-*.csv"]), folder) == ["a.wav", "sub/b.flac"]
    for name in ("one", "two"):
        (folder / f"list-{name}.csv").unlink()


def test_sections_of_long_recordings_have_names_of_their_own(folder: Path):
    listed = folder / "sections.csv"
    listed.write_text("path,start_s,end_s\na.wav,12345.11,12346.11\na.wav,12345.13,12346.13\n")
    expected = ["a.wav#t=12345.11,12346.11", "a.wav#t=12345.13,12346.13"]
    assert names(find_inputs([str(listed)]), folder) == expected
    listed.unlink()


def test_a_name_on_the_command_line_that_is_not_utf8_is_refused():
    with pytest.raises(
        ConfigError, match=r"--input 'bad.udcff.wav' is not UTF-8, as names of recordings are; rename it"
    ):
        find_inputs(["bad\udcff.wav"])


def test_names_that_are_not_utf8_are_left_out_with_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    good = fakes.write_media(tmp_path / "good.wav", fakes.noise(0.1))
    try:
        good.with_name("M\udcfcnchen.wav").write_bytes(good.read_bytes())
    except OSError:
        pytest.skip("the disk takes only UTF-8")
    for _ in range(2):
        assert names(find_inputs([str(tmp_path)]), tmp_path) == ["good.wav"]
    (line,) = [record.message for record in caplog.records]
    first = ascii(f"{tmp_path}/M\udcfcnchen.wav")
    assert line == f"1 names below {tmp_path} are not UTF-8 and are left out, {first} for one; rename them"


def test_lists_are_found_by_a_glob_with_a_question_mark(tmp_path: Path):
    for number in (1, 2):
        (tmp_path / f"part-{number}.csv").write_text(f"path,url\n{number}.wav,NA\n")
    found = find_inputs([f"{tmp_path}/part-?.csv"])
    assert found.recordings["recording"].to_pylist() == [f"{tmp_path}/1.wav", f"{tmp_path}/2.wav"]


def test_a_lists_name_is_the_same_however_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "l.csv").write_text("path,url\na.wav,NA\na.wav,u\n")
    monkeypatch.chdir(tmp_path)
    refused = [find_inputs([uri]).refused["recording"].to_pylist() for uri in ("l.csv", f"{tmp_path}/l.csv", "./*.csv")]
    assert refused[0] == refused[1] == refused[2]
