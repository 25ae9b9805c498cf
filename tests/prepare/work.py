"""What `pipeline.prepare.isolated` is given to run in tests: in a child process, which imports it."""

import errno
import os
import resource
import subprocess
import time
from pathlib import Path

import numpy as np
from deno import find_deno_bin

from ast_core.errors import UserError
from pipeline.prepare.clip import ClipError, Reason


def double(x: np.ndarray) -> np.ndarray:
    return 2 * x


def process_id() -> int:
    return os.getpid()


def sleep_beside_a_program(pid_file: str, busy_s: float = 600) -> None:
    """As yt-dlp waits for ffmpeg."""
    program = subprocess.Popen(["sleep", "600"])
    Path(pid_file).write_text(f"{os.getpid()} {program.pid}")
    time.sleep(busy_s)


def die(signal_number: int) -> None:
    os.write(2, b"about to fall\n")
    os.kill(os.getpid(), signal_number)


def take(num_bytes: int) -> int:
    return len(bytearray(num_bytes))


def page_faults_of_reuse(num_rounds: int) -> int:
    """Pages that the system had to clear for arrays that are made and dropped, round after round, after a first."""
    for i in range(num_rounds + 1):
        if i == 1:
            began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        arrays = [np.ones(3 << 20, np.float32) for _ in range(4)]
        del arrays
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - began


def count_in_javascript(num_objects: int) -> int:
    code = f"let a = []; for (let i = 0; i < {num_objects}; i++) a.push({{i}}); console.log(a.length)"
    return int(subprocess.run([find_deno_bin(), "eval", code], check=True, capture_output=True).stdout)


def write(path: str, num_bytes: int) -> None:
    with open(path, "wb") as file:
        file.write(b"x" * num_bytes)


def find_the_disk_full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def fail(kind: str) -> None:
    raise {"clip": ClipError(Reason.NOT_AUDIO, "noise"), "user": UserError("disk"), "other": ZeroDivisionError("x")}[
        kind
    ]
