"""Errors that the user can fix. Jobs show them as one line; any other error keeps its traceback."""


class UserError(Exception):
    """The message says what is wrong, what was given, and what to do."""


class ConfigError(UserError):
    """A setting does not exist, or its value is not allowed."""


class DataError(UserError):
    """A list, a data set or a checkpoint is missing, unfinished, damaged or not the expected one."""


def one_line(err: BaseException) -> str:
    """The message of a library's error on one line, not too long; the error's type if it has no message."""
    return " ".join(str(err).split())[:300] or type(err).__name__
