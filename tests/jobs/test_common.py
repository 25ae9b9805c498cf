"""Code that jobs share: an error that the user can fix becomes one line."""

from pathlib import Path

import pytest

from ast_core.errors import DataError
from jobs.common import run_job


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
