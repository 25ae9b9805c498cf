"""Unwrapping of errors that Ray's tasks raise."""

from collections.abc import Iterator
from contextlib import contextmanager

import ray

from ast_core.errors import UserError
from pipeline.os_errors import explain


@contextmanager
def user_errors_from_tasks(is_whole: str = "") -> Iterator[None]:
    """Raise a task's UserError again without Ray's wrapping, and a machine's error that a user can fix as one line.

    Args:
        is_whole: What is complete in spite of the error; such a line begins with it.
    """
    try:
        yield
    except ray.exceptions.RayError as err:
        cause: BaseException = err
        while isinstance(cause, ray.exceptions.RayTaskError):  # one for each task on the way
            cause = cause.cause
        if isinstance(cause, UserError):
            raise type(cause)(str(cause).partition("\n")[0]) from err  # Ray adds lines of its own
        if line := explain(cause):
            raise UserError(f"{is_whole}: {line}" if is_whole else line) from err
        raise
