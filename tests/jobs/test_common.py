"""Code that jobs share: an error that the user can fix becomes one line."""

import importlib
from pathlib import Path

import pytest

from ast_core.errors import ConfigError, DataError
from jobs.common import run_job

ROOT = Path(__file__).parents[2]
JOBS = sorted(file.stem for file in (ROOT / "jobs").glob("*.py") if "def parser()" in file.read_text())


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (DataError("data is not finished"), "data is not finished"),
        (
            OSError(28, "No space left on device", "/data/x"),
            "No space left on device: /data/x; make room there, and run the same command again",
        ),
        (ConnectionError("refused"), "refused; see the network, and run the same command again"),
        (TimeoutError(), "TimeoutError; see the network, and run the same command again"),
    ],
)
def test_error_that_the_user_can_fix_is_one_line(error: Exception, line: str, capsys: pytest.CaptureFixture[str]):
    def job(_: object) -> int:
        raise error

    assert run_job(job) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def test_case_c18_os_error_from_a_bug_keeps_its_traceback():
    def job(_: object) -> int:
        return len(Path("/nowhere/typo.json").read_text())

    with pytest.raises(FileNotFoundError, match="typo"):
        run_job(job)


def test_unforeseen_error_keeps_its_traceback():
    def job(_: object) -> int:
        raise RuntimeError("our mistake")

    with pytest.raises(RuntimeError, match="our mistake"):
        run_job(job)


@pytest.mark.parametrize("job", JOBS)
def test_an_empty_path_or_name_is_refused_by_every_job(job: str):
    """A variable of the shell that is not set would otherwise mean the default, such as YouTube for --audio-dir."""
    parser = importlib.import_module(f"jobs.{job}").parser()
    others = ("yt_dlp", "num_workers")  # no options for yt-dlp are its default, and the other is a number
    texts = [
        action
        for action in parser._actions
        if action.nargs in (None, "+") and not action.choices and action.type not in (int, float)
    ]
    texts = [action for action in texts if action.dest not in others]
    assert texts
    groups = [group._group_actions for group in parser._mutually_exclusive_groups if group.required]
    for action in texts:
        needed = [other for other in parser._actions if other.required and other is not action]
        needed += [group[0] for group in groups if action not in group]
        words = [word for other in needed for word in (other.option_strings[0], *(other.choices or ["x"])[:1])]
        for value in ("", "  "):
            with pytest.raises(ConfigError, match=rf"^{action.option_strings[0]} is empty; give a value, or leave"):
                parser.parse_known_args([*words, action.option_strings[0], value])


def test_no_options_for_ytdlp_are_none(tmp_path: Path):
    parser = importlib.import_module("jobs.prepare_audioset").parser()
    assert parser.parse_args(["--segments", "eval", "--output", str(tmp_path), "--yt-dlp", ""]).yt_dlp == ""
