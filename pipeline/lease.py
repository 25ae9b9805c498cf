"""A lock in a bucket, which jobs on all machines respect: an object that its owner renews, and that a dead owner loses.

The object is written on condition only (`s3.ConditionalS3`), so of two jobs that want it, one gets it. No clocks are
compared: a job that finds the object of another one watches it. If it changes, its owner lives. If it does not change
for `ttl_s` on the watcher's own clock, the watcher takes it over. An owner that cannot renew it ends before that
(`Lease._watch`), and asks before it publishes whether the object is still its own (`Held.check`).

The module is long because it is one protocol: each step of it relies on the others.
"""

import getpass
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import pyarrow.fs as pafs

from ast_core.errors import DataError
from pipeline import storage
from pipeline.os_errors import explain
from pipeline.redaction import without_secrets
from pipeline.s3 import ConditionalS3, S3Error, UnconditionalError

TTL_S = 120.0
"""How long an object that does not change is left alone. It outlasts a cut of a minute and a restart of S3."""

RENEWALS = 6
"""Renewals in `ttl_s`."""

STOP_AFTER = 0.75
"""The share of `ttl_s` without a renewal after which an owner ends."""

TICKS = 20
"""How often in `ttl_s` an owner looks whether it is too late, and a watcher whether the object has changed."""

ATTEMPTS = 8
"""Attempts to get the lock, over half a minute like pyarrow's."""

RENEWAL_TIMEOUT_S = 5.0

LOST = signal.SIGUSR2
"""Tells the main thread that the lease is lost, also while it waits in a library."""


class LeaseLostError(DataError):
    """Another job may have taken the output over."""


@dataclass(frozen=True)
class Owner:
    """A process that has a lease."""

    host: str
    user: str
    pid: int
    command: str
    started: str
    """On its own clock, for people."""
    machine: str | None
    """Names a running kernel and its table of processes; None if that is unknown."""
    process_start: int | None
    """In the kernel's ticks since it started."""

    @classmethod
    def this_process(cls) -> "Owner":
        return cls(
            host=socket.gethostname(),
            user=_user(),
            pid=os.getpid(),
            command=without_secrets(" ".join(sys.argv))[:300],
            started=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            machine=this_machine(),
            process_start=_process_start(os.getpid())[0],
        )

    @property
    def text(self) -> str:
        return f"on {self.host}, by {self.user}, process {self.pid}, since {self.started}"

    def state(self) -> Literal["alive", "dead", "unknown"]:
        """Whether this process lives, if it is of this machine. A stopped one may go on, or not: that is unknown."""
        if self.machine is None or self.machine != this_machine() or self.process_start is None:
            return "unknown"
        start, letter = _process_start(self.pid)
        if start != self.process_start or letter in "ZX":
            return "dead"
        return "unknown" if letter in "Tt" else "alive"


def this_machine() -> str | None:
    """This kernel's name for its run, and the table of processes that this process is in; None where unknown."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return None  # a table of other processes
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _process_start(pid: int) -> tuple[int | None, str]:
    """When a process started, and the letter of its state; None, X if there is none, or no table of processes."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None, "X"
    return int(fields[19]), fields[0]


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return str(os.getuid())


@dataclass(frozen=True)
class Record:
    """The content of the object."""

    owner: Owner
    token: str
    ttl_s: float
    renewals: int = 0
    """Makes each version another one."""
    is_released: bool = False
    note: str = "The lock of a running job. Jobs that are killed lose it; nobody needs to delete this file."

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), indent=2).encode()

    @classmethod
    def parse(cls, data: bytes, lock: str) -> "Record":
        """Read the object of a job of this version, or of a later one, which may have more fields.

        Raises:
            DataError: it is something else.
        """
        try:
            content = json.loads(data)
            owner = Owner(**_of_fields(Owner, content["owner"]))
            return cls(**_of_fields(cls, content) | {"owner": owner})
        except (ValueError, TypeError, KeyError, AttributeError) as err:
            raise DataError(
                f"{lock} is no lock that this version can read ({type(err).__name__}); delete it if no job writes there"
            ) from err


def _of_fields(kind: type, content: dict[str, Any]) -> dict[str, Any]:
    return {known.name: content[known.name] for known in fields(kind) if known.name in content}


class HeldError(Exception):
    """Another job has the lease."""

    def __init__(self, owner: Owner) -> None:
        super().__init__(owner.text)
        self.owner = owner


def now_s() -> float:
    """Seconds on a clock that nobody sets, and that goes on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def is_possible(uri: str) -> bool:
    return isinstance(storage.resolve(uri)[0], pafs.S3FileSystem)


def owner_of(lock: str) -> Owner | None:
    """Who has this lease now; None if nobody has."""
    record = _read(lock)
    return None if record is None or record.is_released else record.owner


@dataclass(frozen=True)
class Held:
    """A lock that a job holds. It travels to the job's tasks, which ask it before they publish something."""

    lock: str
    what: str
    """What the job is doing, for lines: `preparing s3://bucket/data`."""
    token: str | None
    """None for a lock that cannot be lost while its owner lives."""

    def check(self) -> None:
        """Raise LeaseLostError if another job has taken over, because this one was frozen or cut off for too long."""
        if self.token is not None:
            record = _read(self.lock)
            if record is None or record.token != self.token or record.is_released:
                raise LeaseLostError(_lost_line(self.what, record))


def _read(lock: str) -> Record | None:
    try:
        return Record.parse(storage.read_bytes(lock), lock)
    except DataError:
        if storage.exists(lock):
            raise
        return None


def _lost_line(what: str, record: Record | None) -> str:
    if record is None or record.is_released:
        why = "another job took over while this one was frozen or cut off, and has ended, or the lock was deleted"
    else:
        why = f"another job ({record.owner.text}) has taken over, while this one was frozen or cut off"
    return f"stopped {what}: {why}; run the same command again when no other job does"


@contextmanager
def leased(lock: str, what: str, say: Callable[[str], None], ttl_s: float | None = None) -> Iterator[Held]:
    """Hold the lease in the object `lock`.

    Args:
        what: what the job is doing, for lines: `preparing s3://bucket/data`.
        say: gets a line if it waits for a sign of life from another owner.

    Raises:
        HeldError: another job has it.
        LeaseLostError: it could not be renewed in time. In the main thread this is raised wherever the block is.
        UnconditionalError: the store cannot write on condition.
        S3Error: S3 refuses it.
    """
    fs, path = storage.resolve(lock)
    record = Record(Owner.this_process(), uuid.uuid4().hex, TTL_S if ttl_s is None else ttl_s)
    patient, prompt = ConditionalS3(fs, attempts=ATTEMPTS), ConditionalS3(fs, attempts=1, timeout_s=RENEWAL_TIMEOUT_S)
    etag, sent_s = _acquire(patient, lock, path, record, what, say)
    with Lease(patient, prompt, path, what, record, etag, sent_s).kept():
        yield Held(lock, what, record.token)


def _acquire(
    objects: ConditionalS3, lock: str, path: str, record: Record, what: str, say: Callable[[str], None]
) -> tuple[str, float]:
    """Write `record`, or raise what `leased` does. Returns its ETag, and when it was sent (`now_s`)."""
    seen_etag, seen_s, sent_s = "", 0.0, 0.0
    while True:
        looked_s = now_s()
        if etag := objects.create(path, record.to_bytes()):
            _check_conditions(objects, path, record, etag)
            return etag, looked_s
        found = objects.read(path)
        if found is None:  # it was released just now
            time.sleep(record.ttl_s / TICKS / 10)
            continue
        other, etag = Record.parse(found[0], lock), found[1]
        if other.token == record.token:  # S3 has written it, and its answer was lost
            return etag, sent_s or looked_s
        state = "dead" if other.is_released else other.owner.state()
        if state == "alive" or (state == "unknown" and seen_etag and etag != seen_etag):
            raise HeldError(other.owner)
        if not seen_etag and state == "unknown":
            say(
                f"another job has the lock for {what} ({other.owner.text}): waiting up to {other.ttl_s:.0f} s for a "
                "sign of life; without one this job takes over"
            )
        if etag != seen_etag:
            seen_etag, seen_s = etag, now_s()
        if state == "dead" or looked_s - seen_s > other.ttl_s:
            sent_s = now_s()
            if new_etag := objects.replace(path, record.to_bytes(), etag):
                return new_etag, sent_s
        else:
            time.sleep(other.ttl_s / TICKS)


def _check_conditions(objects: ConditionalS3, path: str, record: Record, etag: str) -> None:
    """Raise UnconditionalError if the store ignores conditions: writing again must fail, in both ways."""
    if objects.create(path, record.to_bytes()) or objects.replace(path, record.to_bytes(), f'"{uuid.uuid4().hex}"'):
        with suppress(OSError, UnconditionalError):
            objects.delete(path, etag)
        raise UnconditionalError("it ignores If-None-Match or If-Match")


@dataclass
class Lease:
    """A lease that this process has: it renews it, and ends the job if that fails for too long."""

    patient: ConditionalS3
    """Tries a request for half a minute."""
    prompt: ConditionalS3
    """Tries it once."""
    path: str
    what: str
    record: Record
    etag: str
    renewed_s: float
    """When the last request that renewed it was sent (`now_s`): it is ours for `ttl_s` from then on at least."""
    line: str | None = None
    """Why it is lost."""
    _trouble: Exception | None = None
    _over: threading.Event = field(default_factory=threading.Event)
    _is_in_main_thread: bool = False
    _outer_handler: Any = None
    _request: threading.Lock = field(default_factory=threading.Lock)
    """Held while the lease is renewed."""
    _once: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def kept(self) -> Iterator[None]:
        self._is_in_main_thread = threading.current_thread() is threading.main_thread()
        if self._is_in_main_thread:
            self._outer_handler = signal.signal(LOST, self._raise_lost)
        renewing = threading.Thread(target=self._renew, name="renew the lock", daemon=True)
        watching = threading.Thread(target=self._watch, name="watch the lock", daemon=True)
        renewing.start()
        watching.start()
        try:
            yield
        finally:
            self._over.set()
            watching.join()
            renewing.join(2 * RENEWAL_TIMEOUT_S)
            if self._is_in_main_thread:
                signal.signal(LOST, self._outer_handler or signal.SIG_DFL)
            if not renewing.is_alive():
                self._release()
        if self.line is not None:  # a library has swallowed the signal's exception
            raise LeaseLostError(self.line)

    def _renew(self) -> None:
        while not self._over.wait(self._until_renewal_s()) and self.line is None:
            self._renew_once()

    def _until_renewal_s(self) -> float:
        ttl_s = self.record.ttl_s
        return ttl_s / TICKS / 4 if self._trouble else max(0.0, self.renewed_s + ttl_s / RENEWALS - now_s())

    def _renew_once(self) -> None:
        """Renew the lease, or end the job if it is another one's. A failure is kept in `_trouble`."""
        if not self._request.acquire(timeout=RENEWAL_TIMEOUT_S):  # the other thread's request hangs
            return
        line = None
        try:
            began_s = now_s()
            renewed = replace(self.record, renewals=self.record.renewals + 1)
            etag = self.prompt.replace(self.path, renewed.to_bytes(), self.etag) or self._own_etag()
            self.record, self.etag, self.renewed_s, self._trouble = renewed, etag, began_s, None
        except (OSError, UnconditionalError) as err:
            self._trouble = err
        except DataError as err:
            line = str(err)
        finally:
            self._request.release()
        if line is not None:
            self._end_job(line)

    def _own_etag(self) -> str:
        """The ETag, if the object is ours although S3 did not renew it: its answer to the first attempt was lost."""
        found = self.prompt.read(self.path)
        there = None if found is None else Record.parse(found[0], self.path)
        if found is None or there is None or there.token != self.record.token:
            raise LeaseLostError(_lost_line(self.what, there))
        return found[1]

    def _watch(self) -> None:
        """End the job before another one may take the lease. A process that was frozen is late, and tries once more."""
        while not self._over.wait(self.record.ttl_s / TICKS) and self.line is None:
            if self._is_late() and self._trouble is None:  # it was frozen until now
                self._renew_once()
            if self._is_late():
                self._end_job(self._cut_off_line())

    def _is_late(self) -> bool:
        return now_s() - self.renewed_s > STOP_AFTER * self.record.ttl_s

    def _cut_off_line(self) -> str:
        seconds, reason = now_s() - self.renewed_s, explain(self._trouble) or self._trouble or "S3 does not answer"
        return (
            f"stopped {self.what}: its lock could not be renewed for {seconds:.0f} s, and others may take it: {reason}"
        )

    def _end_job(self, line: str) -> None:
        """Raise in the main thread. If that does not end the block soon, end the process."""
        with self._once:
            if self.line is not None:
                return
            self.line = line
        if self._is_in_main_thread:
            signal.pthread_kill(threading.main_thread().ident or 0, LOST)
        if not self._over.wait(self.record.ttl_s / TICKS):
            with suppress(OSError):
                os.write(2, f"error: {line}\n".encode())
            os._exit(2)

    def _raise_lost(self, number: int, frame: FrameType | None) -> None:
        if self.line is not None and not self._over.is_set():
            raise LeaseLostError(self.line)
        if callable(self._outer_handler):  # another lease of this process is lost
            self._outer_handler(number, frame)

    def _release(self) -> None:
        """Delete the object, or say in it that it is free, where deleting is forbidden. Best effort: it expires."""
        if (
            self.line is not None
            or self._trouble is not None
            or now_s() - self.renewed_s > STOP_AFTER * self.record.ttl_s
        ):
            return
        try:
            self.patient.delete(self.path, self.etag)
        except (S3Error, UnconditionalError) as err:
            if isinstance(err, S3Error) and err.status is None:  # no answer
                return
            with suppress(OSError, UnconditionalError):
                self.patient.replace(self.path, replace(self.record, is_released=True).to_bytes(), self.etag)
