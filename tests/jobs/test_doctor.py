"""The doctor's job: what it prints and writes, and its exit status."""

import json
import os
from pathlib import Path

import pytest
import ray

from ast_core.errors import ConfigError
from ast_core.labels import audioset_labels
from jobs.common import run_job
from jobs.doctor import main
from pipeline.prepare import sources
from pipeline.prepare.sources import read_segments
from pipeline.prepare.sources.locate import Place
from tests import fakes


def write_patient(folder: Path, *, ill: bool = False) -> list[str]:
    """Write a data set of two splits with their lists; if `ill`, both have one clip. Returns the job's arguments."""
    splits, given = {}, []
    for split in ("balanced_train", "eval"):
        uri = folder / f"{split}_segments.csv"
        rows = [f'{split[:4]}{i:07d}, 0.000, 10.000, "{audioset_labels().mids[i % 5]}"' for i in range(100)]
        uri.write_text("\n".join(rows))
        splits[split] = read_segments(str(uri), locate=lambda *_: Place("", None, 0.0), split=split).clips
        given.append(f"{split}={uri}")
    stored = {split: fakes.stored_clips(clips) for split, clips in splits.items()}
    if ill:
        at = stored["eval"].schema.get_field_index("fbank_hash")
        stored["eval"] = stored["eval"].set_column(at, "fbank_hash", stored["balanced_train"]["fbank_hash"])
    fakes.write_stored(str(folder / "data"), audioset_labels(), stored)
    return ["--data", str(folder / "data"), "--official", *given]


@pytest.mark.parametrize(("ill", "strict", "status"), [(True, True, 1), (True, False, 0), (False, True, 0)])
def test_exit_status_is_1_only_for_strict_and_a_serious_finding(
    ill: bool, strict: bool, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    argv = write_patient(tmp_path, ill=ill)
    assert run_job(main, [*argv, *(["--strict"] if strict else [])]) == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["severity", "check", "split", "what"]
    assert lines[1].startswith("serious   leakage" if ill else "note      labels")
    assert lines[-1].startswith("27 findings: " + ("1 serious, " if ill else "1 note, "))


def test_doctor_starts_no_ray_and_does_not_change_the_data(tmp_path: Path):
    argv = write_patient(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}
    was_up = ray.is_initialized()
    assert main(argv) == 0
    assert ray.is_initialized() == was_up
    assert {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))} == before


def test_json_has_the_printed_findings_and_the_table_by_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = write_patient(tmp_path, ill=True)
    assert main([*argv, "--json", str(tmp_path / "out" / "findings.json")]) == 0
    written = json.loads((tmp_path / "out" / "findings.json").read_text())
    assert (written["counts"]["serious"], len(written["findings"])) == (1, 27)
    out = " ".join(capsys.readouterr().out.split())
    for finding in written["findings"]:
        assert " ".join(finding["cost"].split()) in out
    (clips,) = [f for f in written["findings"] if (f["check"], f["split"]) == ("clips", "eval")]
    assert [row["listed"] for row in clips["figures"]["per_class"]] == [20] * 5


def test_list_that_cannot_be_fetched_does_not_stop_other_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    argv = write_patient(tmp_path)
    monkeypatch.setitem(sources.OFFICIAL_LISTS, "eval", "http://127.0.0.1:9/eval_segments.csv")  # no server there
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert run_job(main, [*argv[:-1], "--strict"]) == 0
    out = capsys.readouterr().out
    assert "unknown   clips, labels, marginals  eval" in out
    assert "27 findings: 3 unknown, 1 note, 23 ok" in out


def test_error_that_the_user_can_fix_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run_job(main, ["--data", str(tmp_path)]) == 2
    argv = write_patient(tmp_path)
    assert run_job(main, [*argv[:2], "--official", "evil=x.csv"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "no dataset.json" in errors[0]
    assert "no split 'evil'; it has balanced_train, eval" in errors[1]


def test_given_list_that_cannot_be_read_is_an_error_and_no_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = write_patient(tmp_path)
    os.remove(tmp_path / "eval_segments.csv")
    assert run_job(main, argv) == 2
    assert "eval_segments.csv" in capsys.readouterr().err


def test_official_can_be_repeated_with_one_list_per_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data, value, _, *lists = write_patient(tmp_path)
    assert main([data, value, "--official", lists[0], "--official", lists[1]]) == 0
    assert "unknown" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match="gives a split two lists"):
        main([data, value, "--official", *lists, "--official", lists[0]])


@pytest.mark.parametrize("given", ["eval", "=list.csv", "eval="])
def test_official_without_a_split_is_refused(given: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"is not SPLIT=LIST, as in eval=eval_segments\.csv"):
        main(["--data", str(tmp_path), "--official", given])


def test_help_explains_checks_and_severities(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(word in out for word in ("--official", "--strict", "serious (", "unknown (", "start Ray"))
