"""Functions that tests run in a sandbox: its child process imports this module."""

import errno
import os
import pickle
import resource
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from deno import find_deno_bin

from ast_core.errors import DataError, UserError
from pipeline.prepare.clip import ClipError, Reason


def double(x: np.ndarray) -> np.ndarray:
    return 2 * x


def process_id() -> int:
    return os.getpid()


def sleep_next_to_a_program(pid_file: str, busy_s: float = 600) -> None:
    """Wait for another program, as yt-dlp waits for ffmpeg."""
    program = subprocess.Popen(["sleep", "600"])
    Path(pid_file).write_text(f"{os.getpid()} {program.pid}")
    time.sleep(busy_s)


def die(signal_number: int) -> None:
    os.write(2, b"about to fall\n")
    os.kill(os.getpid(), signal_number)


def take(num_bytes: int) -> int:
    return len(bytearray(num_bytes))


def page_faults_of_reuse(num_rounds: int) -> int:
    """Number of pages that the system had to clear for temporary arrays in later rounds, after a first round."""
    for i in range(num_rounds + 1):
        if i == 1:
            began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        arrays = [np.ones(3 << 20, np.float32) for _ in range(4)]
        del arrays
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - began


def count_in_javascript(num_objects: int) -> int:
    code = f"let a = []; for (let i = 0; i < {num_objects}; i++) a.push({{i}}); console.log(a.length)"
    return int(subprocess.run([find_deno_bin(), "eval", code], check=True, capture_output=True).stdout)


def fetch_as_of_a_known_site(url: str, start_s: float, duration_s: float, **settings: Any) -> np.ndarray:
    """Fetch with yt-dlp's extractor for pages of unknown sites."""
    from pipeline.prepare.fetch import ytdlp  # the other functions' processes start without yt-dlp

    with patch.object(ytdlp, "_is_site", lambda url: True):
        return ytdlp.fetch_with_ytdlp(url, start_s, duration_s, **settings)


def write(path: str, num_bytes: int) -> None:
    with open(path, "wb") as file:
        file.write(b"x" * num_bytes)


def find_the_disk_full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def fail(kind: str) -> None:
    raise {
        "clip": ClipError(Reason.NOT_AUDIO, "noise"),
        "user": UserError("disk"),
        "data": DataError("bucket"),
        "other": ZeroDivisionError("x"),
    }[kind]


def give_back(value: Any) -> Any:
    return value


def give_bytes(num_bytes: int) -> bytes:
    return b"x" * num_bytes


def answer_by_itself(head: bytes, rest: bytes) -> None:
    """Write to every socket, as code that controls this process could."""
    for fd in map(int, os.listdir("/dev/fd")):  # its number is the same as in the parent, which may be large
        with suppress(OSError), socket.socket(fileno=os.dup(fd)) as taken:
            taken.sendall(head + rest)
    time.sleep(600)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.path),)


def send_pickled(path: str, num_head_bytes: int) -> None:
    trap = pickle.dumps((None, Trap(path)))
    answer_by_itself(len(trap).to_bytes(num_head_bytes), trap)
