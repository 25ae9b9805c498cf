"""Errors that the user can mend. Jobs show them as one line; anything else keeps its traceback."""


class UserError(Exception):
    """Its message says what is wrong, what was given, and what to do."""


class ConfigError(UserError):
    """A setting that does not exist or cannot be."""


class DataError(UserError):
    """A list, a data set or a checkpoint that is missing, unfinished or not the one expected."""
