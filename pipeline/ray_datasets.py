"""Running a Dataset of Ray Data: its rows, its errors, and what it prints."""

import logging
from collections.abc import Generator
from typing import Any

from ray.data import DataContext, Dataset

from pipeline.ray_errors import user_errors_from_tasks


def rows_of(data: Dataset, is_whole: str = "") -> Generator[dict[str, Any]]:
    """Yield the rows of a Dataset. Errors are those of `user_errors_from_tasks`.

    When the loop over them ends for any reason, the Dataset's executor is stopped. Otherwise its thread would start
    Ray again after a shutdown: Ray stops it only while it waits for a row, or when the iterator is garbage-collected.
    """
    rows = data.iter_rows()
    try:
        with user_errors_from_tasks(is_whole):
            yield from rows
    finally:
        executor = data._current_executor
        if executor is not None:
            executor.shutdown(force=True)


def silence_ray() -> None:
    """Turn off Ray's progress bars and tracebacks, because our progress counts clips and failures, and the job prints
    an error as one line. Ray's warnings still appear, and its log files contain everything.
    """
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.issue_detectors_config.high_memory_detector_config.detection_time_interval_s = -1  # chunks bound memory
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that progress bars are off
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.WARNING)
            handler.addFilter(_is_not_a_raised_error)


def _is_not_a_raised_error(record: logging.LogRecord) -> bool:
    return not record.exc_info and record.name != "ray.data.exceptions"
