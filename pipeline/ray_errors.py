"""Errors on their way out of Ray's tasks."""

from collections.abc import Iterator
from contextlib import contextmanager

import ray

from ast_core.errors import UserError
from pipeline.os_errors import explain


@contextmanager
def users_errors(is_whole: str = "") -> Iterator[None]:
    """What a task says that the user can act on is raised as it said it; what the machine refused it, as one line.

    Args:
        is_whole: what such a line says first, of the data that are whole all the same.
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
