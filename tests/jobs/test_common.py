"""What jobs share: an error that the user can mend is one line."""

import pytest

from ast_core.errors import DataError
from jobs.common import run_job


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DataError("data is not finished"), "data is not finished"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (ConnectionError('ray::task()\n  File "x.py"\nConnectionError: refused\n'), "ConnectionError: refused"),
        (TimeoutError(), "TimeoutError"),
        (ConnectionError(" \n"), "ConnectionError"),
    ],
)
def test_what_the_user_can_mend_is_one_line(error: Exception, said: str, capsys: pytest.CaptureFixture[str]):
    def job(_: object) -> int:
        raise error

    assert run_job(job) == 2
    assert capsys.readouterr().err == f"error: {said}\n"


def test_what_nobody_foresaw_keeps_its_traceback():
    def job(_: object) -> int:
        raise RuntimeError("our mistake")

    with pytest.raises(RuntimeError, match="our mistake"):
        run_job(job)
