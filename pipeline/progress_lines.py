"""A line about a long job every few seconds, readable in a terminal and in a log file."""

import threading
import time
from collections.abc import Callable

EVERY_S = 5.0
EVERY_S_LATER, LATER_S = 60.0, 600.0
"""After ten minutes one line per minute is enough, because a job may take weeks."""

LAST_LINE_S = 5.0
"""Longest wait at the end for a line in progress, which may ask an actor that does not answer."""


class ProgressLines:
    """Calls `say_line` in a thread every few seconds, with the seconds since the block began, until the block ends."""

    def __init__(self, say_line: Callable[[float], None]) -> None:
        self._say_line = say_line
        self._began_s = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "ProgressLines":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        if kind is not KeyboardInterrupt:
            self._thread.join(LAST_LINE_S)

    def elapsed_s(self) -> float:
        return time.monotonic() - self._began_s

    def _run(self) -> None:
        while not self._over.wait(EVERY_S if self.elapsed_s() < LATER_S else EVERY_S_LATER):
            self._say_line(self.elapsed_s())
