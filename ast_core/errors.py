"""Errors that the user can fix. Jobs show them as one line; any other error keeps its traceback."""


class UserError(Exception):
    """The message says what is wrong, what was given, and what to do."""


class ConfigError(UserError):
    """A setting does not exist, or its value is not allowed."""


class DataError(UserError):
    """A list, a data set or a checkpoint is missing, unfinished, damaged or not the expected one."""
