"""Fresh processes that have imported PyTorch and torchvision, and none of the project's other dependencies.

They are forked from a server that has imported both and computed nothing. This takes a tenth of the time of a new
interpreter that imports them. torchvision, which timm needs, imports PyTorch's compiler, which optimizers need. timm
itself is left out: it reads the environment when it is imported.
"""

import contextlib
import io
import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any
from unittest.mock import patch

START_METHOD = "forkserver"
"""Also used by `torch.multiprocessing.start_processes`."""

_context = multiprocessing.get_context(START_METHOD)
_context.set_forkserver_preload(["torch", "torchvision"])


def in_new_process(function: Callable[..., Any], *args: Any, env: Mapping[str, str] | None = None) -> Any:
    """Call `function`, which must be importable by name, in a new process, and return its result.

    `env` is set before the call.

    Raises RuntimeError if the process ends without a result; its traceback is on standard error.
    """
    ours, theirs = _context.Pipe(duplex=False)
    process = _context.Process(target=_call, args=(theirs, env or {}, function, args))  # type: ignore[attr-defined]
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process ended with status {process.exitcode}") from None
    finally:
        process.join()


def _call(connection: Connection, env: Mapping[str, str], function: Callable[..., Any], args: Sequence[Any]) -> None:
    os.environ.update(env)
    connection.send(function(*args))


def run_module(name: str, argv: Sequence[str], without: Sequence[str]) -> str:
    """The output of `python -m NAME ARGV` if the modules `without` cannot be imported. For `in_new_process`."""
    output = io.StringIO()
    with (
        patch.dict(sys.modules, dict.fromkeys(without)),  # None: importing it is an error
        patch.object(sys, "argv", [name, *argv]),
        contextlib.redirect_stdout(output),
    ):
        try:
            runpy.run_module(name, run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                raise RuntimeError(f"{name} ended with {ended.code}") from ended
    return output.getvalue()
