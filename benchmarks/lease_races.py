"""Let two processes prepare into one S3 output, and see that one of them does, whatever becomes of the other.

    python -m benchmarks.lease_races [--races 50]

A race is between two processes with overlapping lists of clips. Each takes the lock, writes shards of random rows with
the code of a preparation, and publishes, without Ray. They do not know that they are on one machine, so only S3 tells
them of each other. The kinds of races:

- together: both begin at the same time. One is refused.
- killed: the first is killed between two shards or within one. The second waits until its lease is over, and completes.
- frozen: the first is stopped by SIGSTOP, and goes on while the second, which took over, works. The first must end, and
  name the second.
- late: the same, but it goes on after the second has published. It must end too. If S3 takes a renewal of the first
  after it was stopped, the second is refused and the first completes, in both kinds.
- paused: the first is stopped for half of its lease. The second is refused.

Counted over all races: clips that are twice in the index or in the shards, and clips of the list of the process that
ended well that are not in the index (lost). Rows of shards that are not in the index are `unlisted`: a frozen process
had begun to write them.
"""

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import feather

from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary
from pipeline import lease
from pipeline.dataset import PreparedDataset
from pipeline.locks import exclusive
from pipeline.os_errors import explain
from pipeline.prepare.clip import FAILURES
from pipeline.prepare.output.publish import publish, start_output
from pipeline.prepare.output.shards import WriteShards, scan_shards
from pipeline.prepare.output.split_state import clean_up
from pipeline.text_table import text_table
from tests.s3 import S3Server, serve

KINDS = ("together", "killed", "frozen", "late", "paused")
TTL_S = 24.0
NUM_CLIPS, SHARED, CLIPS_A_SHARD = 40, 20, 4
CLIPS = [f"clip {i:03d}" for i in range(2 * NUM_CLIPS - SHARED)]
MADE = "clips.arrow"
SHARD_S = 1.0
"""A pause after each shard, so that a race has a course."""
AT_ONCE = 5
LABELS = LabelVocabulary.from_names(["cat", "dog"])
LONGEST_S = 300.0

_processes = multiprocessing.get_context("forkserver")


def write(output: str, clip_ids: Sequence[str], made: str, log: str, env: dict[str, str]) -> None:
    """A writer's process. The file `made` has the rows of all clips; its lines go to `log`."""
    os.environ.update(env)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    lease.TTL_S = TTL_S
    lease.this_machine = lambda: None
    try:
        with exclusive("prepare", output) as held:
            print("held", flush=True)
            start_output(output, LABELS)
            prepared = set(clean_up(output, "train").prepared["clip_id"].to_pylist())
            left = [clip_id for clip_id in clip_ids if clip_id not in prepared]
            rows = feather.read_table(made)
            for begin in range(0, len(left), CLIPS_A_SHARD):
                chunk = left[begin : begin + CLIPS_A_SHARD]
                WriteShards(output, held=held)(rows.filter(pc.is_in(rows["clip_id"], value_set=pa.array(chunk))))
                print(f"shard {begin // CLIPS_A_SHARD}", flush=True)
                time.sleep(SHARD_S)
            publish(output, LABELS, {"train": FAILURES.empty_table()}, held=held)
        print("published", flush=True)
    except (DataError, OSError) as err:
        print(f"error: {explain(err) or err}", flush=True)
        os._exit(2)


@dataclass
class Found:
    """What a process reads back after a race."""

    twice: int
    in_two_shards: int
    unlisted: int
    lost: int


def read_back(output: str, listed: Sequence[str], env: dict[str, str], results: str) -> None:
    os.environ.update(env)
    indexed = Counter(PreparedDataset.open(output).clips(["train"]).clip_id.to_pylist())
    stored = Counter(scan_shards(output, "train")["clip_id"].to_pylist())
    found = Found(
        twice=sum(n > 1 for n in indexed.values()),
        in_two_shards=sum(n > 1 for n in stored.values()),
        unlisted=stored.total() - indexed.total(),
        lost=len(set(listed) - set(indexed)),
    )
    Path(results).write_text(" ".join(map(str, vars(found).values())))


class Writer:
    def __init__(self, output: str, clip_ids: Sequence[str], made: Path, log: Path, env: dict[str, str]) -> None:
        self.log, self.clip_ids = log, clip_ids
        self.process: BaseProcess = _processes.Process(target=write, args=(output, clip_ids, str(made), str(log), env))
        self.process.start()
        self.began_s = time.monotonic()

    @property
    def lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def wait_for(self, line: str) -> None:
        until_s = time.monotonic() + LONGEST_S
        while line not in self.lines and self.process.is_alive():
            if time.monotonic() > until_s:
                raise TimeoutError(f"no {line} in {self.lines}")
            time.sleep(0.01)

    def send(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def status(self) -> int:
        self.process.join(LONGEST_S)
        assert self.process.exitcode is not None, self.lines
        return self.process.exitcode

    def names(self, other: "Writer") -> bool:
        """Whether its last line names the other process."""
        return f"process {other.process.pid}," in (self.lines or [""])[-1]


@dataclass
class Race:
    kind: str
    is_right: bool
    """One process ended well, and it is the one that should."""
    names_owner: bool | None
    """The process that was refused or taken over says who has the output. None if it was killed, or nobody has it."""
    seconds: float
    """Until the second process was refused, or had the lock."""
    found: Found
    course: str


def race(number: int, kind: str, server: S3Server, folder: Path, env: dict[str, str]) -> Race:
    draw, output = random.Random(number), server.uri(f"race-{number}", "data")
    lists = draw.sample(CLIPS[:NUM_CLIPS], NUM_CLIPS), draw.sample(CLIPS[-NUM_CLIPS:], NUM_CLIPS)

    def begin(which: int) -> Writer:
        return Writer(output, lists[which], folder / MADE, folder / f"{number}-{which}.log", env)

    first = begin(0)
    if kind == "together":
        second = begin(1)
        winner, loser = sorted((first, second), key=lambda writer: writer.status())
        is_right, seconds = (winner.status(), loser.status()) == (0, 2), time.monotonic() - second.began_s
        return _result(kind, is_right, winner, loser, loser.names(winner), seconds, output, folder, env)
    first.wait_for(f"shard {draw.randrange(NUM_CLIPS // CLIPS_A_SHARD - 2)}")
    time.sleep(draw.random() * 2 * SHARD_S)
    first.send(signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
    second = begin(1)
    if kind == "paused":
        time.sleep(TTL_S / 2)
        first.send(signal.SIGCONT)
        is_right, seconds = (second.status(), first.status()) == (2, 0), time.monotonic() - second.began_s
        return _result(kind, is_right, first, second, second.names(first), seconds, output, folder, env)
    second.wait_for("held")
    seconds = time.monotonic() - second.began_s
    if kind == "killed":
        is_right = (second.status(), first.status()) == (0, -signal.SIGKILL)
        return _result(kind, is_right, second, first, None, seconds, output, folder, env)
    if "held" not in second.lines:  # S3 took a renewal of the first after it was stopped: it is alive
        first.send(signal.SIGCONT)
        is_right = (second.status(), first.status()) == (2, 0)
        return _result(kind, is_right, first, second, second.names(first), seconds, output, folder, env)
    second.wait_for("published" if kind == "late" else draw.choice(["held", "shard 0", "shard 2"]))
    first.send(signal.SIGCONT)
    is_right = (second.status(), first.status()) == (0, 2)
    names_owner = None if kind == "late" else first.names(second)
    return _result(kind, is_right, second, first, names_owner, seconds, output, folder, env)


def _result(
    kind: str,
    is_right: bool,
    winner: Writer,
    loser: Writer,
    names_owner: bool | None,
    seconds: float,
    output: str,
    folder: Path,
    env: dict[str, str],
) -> Race:
    results = folder / f"{winner.log.stem}.found"
    reader = _processes.Process(target=read_back, args=(output, winner.clip_ids, env, str(results)))
    reader.start()
    reader.join(LONGEST_S)
    found = Found(*map(int, results.read_text().split())) if results.exists() else Found(0, 0, 0, len(winner.clip_ids))
    course = f"winner {winner.status()} {winner.lines[-1:]}, loser {loser.status()} {loser.lines[-1:]}"
    return Race(kind, is_right, names_owner, seconds, found, course)


def table(races: Sequence[Race]) -> str:
    def row(kind: str, some: Sequence[Race]) -> list[str]:
        def total(count: Callable[[Found], int]) -> str:
            return str(sum(count(one.found) for one in some))

        seconds = [one.seconds for one in some]
        return [
            kind,
            str(len(some)),
            str(sum(one.is_right for one in some)),
            "–"
            if not (named := [one.names_owner for one in some if one.names_owner is not None])
            else (f"{sum(named)} of {len(named)}"),
            total(lambda found: found.twice),
            total(lambda found: found.in_two_shards),
            total(lambda found: found.unlisted),
            total(lambda found: found.lost),
            f"{median(seconds):.1f}",
            f"{max(seconds):.1f}",
        ]

    rows = [row(kind, [one for one in races if one.kind == kind]) for kind in KINDS]
    heads = ["kind", "races", "one winner", "owner named", "clips twice", "in two shards", "unlisted", "lost"]
    return text_table([*heads, "median s", "longest s"], [*rows, row("all", races)], "l" + 9 * "r")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--races", type=int, default=50)
    args = parser.parse_args()
    _processes.set_forkserver_preload(["botocore.session", "pipeline.locks", "pipeline.prepare.output.publish"])
    began_s = time.monotonic()
    with (
        serve() as server,
        tempfile.TemporaryDirectory(prefix="ast-bench-") as folder,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        from tests.fakes import prepared_rows  # it imports PyTorch, which the writers do not need

        feather.write_feather(prepared_rows(*CLIPS), f"{folder}/{MADE}")
        kinds = [KINDS[number % len(KINDS)] for number in range(args.races)]
        futures = [pool.submit(race, n, kind, server, Path(folder), server.env) for n, kind in enumerate(kinds)]
        races = [future.result() for future in futures]
    for number, one in enumerate(races):
        if not one.is_right or one.names_owner is False or one.found.twice or one.found.in_two_shards or one.found.lost:
            print(f"race {number} ({one.kind}): {one.course}, {one.found}")
    print(table(races))
    print(f"{time.monotonic() - began_s:.0f} s, a lease of {TTL_S:g} s")


if __name__ == "__main__":
    main()
