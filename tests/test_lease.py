"""A lease on S3: one owner at a time, whatever becomes of it. Owners are processes, and S3 is a server."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary
from pipeline import dataset, lease, locks, storage
from pipeline.dataset import PreparedDataset
from pipeline.lease import HeldError, LeaseLostError, leased
from pipeline.prepare.output import publish as module
from pipeline.prepare.output.publish import publish
from pipeline.prepare.output.shards import WriteShards
from pipeline.s3 import ConditionalS3, S3Error
from tests.fakes import FAILURES, noise, prepared_rows, write_media
from tests.s3 import S3Server
from tests.test_s3 import at_server

SHORT_S, LONG_S = 4.0, 30.0
"""Leases that are waited for, and leases that a busy machine must not lose."""

OWNER = """
import sys
from ast_core.errors import DataError
from pipeline import lease
_, lock, where, ttl_s = sys.argv
if where == "elsewhere":
    lease.this_machine = lambda: None
try:
    with lease.leased(lock, "preparing it", print, float(ttl_s)):
        print("held", flush=True)
        input()
    print("released", flush=True)
except DataError as err:
    print(err, flush=True)
    raise SystemExit(2)
"""
"""A process that holds a lease until it may read a line."""


@contextmanager
def owner(lock: str, ttl_s: float = 6.0, where: str = "elsewhere") -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", OWNER, lock, where, str(ttl_s)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_the_lock_of_a_later_version_with_more_fields_is_read():
    record = lease.Record(lease.Owner.this_process(), token="a", ttl_s=4.0)
    content = json.loads(record.to_bytes())
    later = content | {"owner": content["owner"] | {"cluster": "b"}, "priority": 1}
    assert lease.Record.parse(json.dumps(later).encode(), "lock") == record
    for damaged in (b"{}", b"[]", b"", json.dumps(content | {"owner": {}}).encode()):
        with pytest.raises(DataError, match=r"^lock is no lock that this version can read .*; delete it if"):
            lease.Record.parse(damaged, "lock")


def test_living_owner_is_named_and_a_released_lease_is_free(s3: S3Server):
    lock, lines = s3.uri("living", "lock.json"), []
    with owner(lock, LONG_S) as process:
        with pytest.raises(HeldError, match=f"by .*, process {process.pid}, since 20"):
            leased(lock, "preparing it", lines.append).__enter__()
        assert len(lines) == 1
        assert re.match(r"another job has the lock for preparing it \(on .*\): waiting up to 30 s", lines[0])
        assert process.communicate("\n")[0] == "released\n"
    assert not storage.exists(lock)
    with leased(lock, "preparing it", lines.append) as held:
        held.check()
    assert len(lines) == 1


def test_owner_on_this_machine_is_known_to_live_or_to_be_dead(s3: S3Server):
    lock, lines = s3.uri("here", "lock.json"), []
    with owner(lock, where="here") as process:
        with pytest.raises(HeldError):
            leased(lock, "preparing it", lines.append).__enter__()
        process.kill()
        process.wait()
    with leased(lock, "preparing it", lines.append):
        pass
    assert lines == []


def test_killed_owner_loses_the_lease_after_its_time(s3: S3Server):
    lock = s3.uri("killed", "lock.json")
    with owner(lock) as process:
        process.kill()
        process.wait()
    began_s = time.monotonic()
    with leased(lock, "preparing it", lambda _: None):
        assert time.monotonic() - began_s > 6


def test_frozen_owner_ends_when_it_goes_on_and_finds_another(s3: S3Server):
    lock = s3.uri("frozen", "lock.json")
    with owner(lock) as process:
        process.send_signal(signal.SIGSTOP)
        with leased(lock, "preparing it", lambda _: None) as held:
            process.send_signal(signal.SIGCONT)
            assert process.stdout is not None
            line = process.stdout.read()
            assert process.wait() == 2
            assert re.match(
                rf"stopped preparing it: another job \(on .*, process {os.getpid()}, since .*\) has ta", line
            )
            held.check()


def test_owner_that_was_frozen_goes_on_if_nobody_has_taken_over(s3: S3Server):
    lock = s3.uri("thawed", "lock.json")
    with owner(lock, SHORT_S) as process:
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.5 * SHORT_S)  # the time that is tested
        process.send_signal(signal.SIGCONT)
        before = storage.read_bytes(lock)
        until_s = time.monotonic() + 60
        while storage.read_bytes(lock) == before:  # until it is renewed
            assert time.monotonic() < until_s
            time.sleep(0.05)
        assert process.communicate("\n")[0] == "released\n"


def test_owner_that_is_cut_off_ends_before_another_may_take_over(s3: S3Server):
    """The exception reaches the main thread while it waits in a call."""
    lock = s3.uri("cut", "lock.json")
    began_s = time.monotonic()

    def work() -> None:
        with leased(lock, "preparing it", lambda _: None, SHORT_S), s3.away_from("PUT"):
            threading.Event().wait(60)

    with pytest.raises(
        LeaseLostError, match=r"^stopped preparing it: its lock could not be renewed for [34] s, and"
    ) as lost:
        work()
    assert time.monotonic() - began_s < 60
    assert f"others may take it: {lock}: S3 does not answer (" in str(lost.value)
    assert "see the network and AWS_ENDPOINT_URL" in str(lost.value)


def test_renewal_whose_answer_was_lost_is_no_loss(s3: S3Server, monkeypatch: pytest.MonkeyPatch):
    lock, renew, renewed = s3.uri("answer", "lock.json"), ConditionalS3.replace, threading.Event()

    def without_answer(self: ConditionalS3, *arguments: str) -> str | None:
        etag = renew(self, *arguments)
        if renewed.is_set() or etag is None:
            return etag
        renewed.set()
        return None  # what a repeated request gets

    with leased(lock, "preparing it", lambda _: None, LONG_S) as held:
        monkeypatch.setattr(ConditionalS3, "replace", without_answer)
        assert renewed.wait(60)
        monkeypatch.undo()
        before = storage.read_bytes(lock)
        while storage.read_bytes(lock) == before:
            time.sleep(0.05)
        held.check()


def test_lease_is_released_where_deleting_is_forbidden(s3: S3Server):
    lock = s3.uri("kept", "lock.json")
    with s3.without_deleting():
        for _ in range(2):
            with leased(lock, "preparing it", print) as held:
                held.check()
            assert lease.owner_of(lock) is None
    assert storage.exists(lock)


@pytest.mark.parametrize("conditions", ["refused", "ignored"])
def test_store_without_conditions_is_said(s3: S3Server, capsys: pytest.CaptureFixture[str], conditions: str):
    output = s3.uri(f"no-{conditions}", "data")
    with s3.without_conditions(conditions), locks.exclusive("tag", output) as held:  # type: ignore[arg-type]
        held.check()
    line = capsys.readouterr().out
    assert line.startswith(f"tagging {output}: this store does not write on condition (")
    assert line.endswith("so jobs of other clusters are not kept from it\n")


def test_lease_survives_refusals(s3: S3Server):
    lock = s3.uri("busy", "lock.json")
    with s3.busy(share=0.3), leased(lock, "preparing it", print, LONG_S) as held:
        while storage.read_json(lock)["renewals"] == 0:
            time.sleep(0.2)
        held.check()
    assert not storage.exists(lock)


def test_lease_has_the_keys_and_the_endpoint_of_a_uri(s3: S3Server, monkeypatch: pytest.MonkeyPatch):
    for name in s3.env:
        monkeypatch.delenv(name)
    lock = storage.join(at_server(s3.uri("of uri"), s3), "lock.json")
    with leased(lock, "preparing it", print) as held:
        held.check()
    with pytest.raises(LeaseLostError, match="the lock was deleted; run the same command"):
        held.check()


def test_lease_has_the_keys_of_a_profile(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fs, path = storage.resolve(s3.uri("profile", "lock.json"))
    with pytest.raises(S3Error, match="NO_CREDENTIALS"):
        ConditionalS3(fs, attempts=1).create(path, b"")
    (tmp_path / "credentials").write_text("[mine]\naws_access_key_id = key\naws_secret_access_key = secret\n")
    monkeypatch.setenv("AWS_PROFILE", "mine")
    assert ConditionalS3(fs, attempts=1).create(path, b"")


def test_job_that_was_taken_over_writes_no_shard_and_publishes_nothing(s3: S3Server):
    output, labels = s3.uri("taken", "data"), LabelVocabulary.from_names(["cat", "dog"])
    with locks.exclusive("prepare", output) as held:
        WriteShards(output, held=held)(prepared_rows("a"))
    folder = dataset.shards_dir(output, "train")
    storage.write_bytes(f"{folder}/copy.parquet", storage.read_bytes(storage.list_files(folder)[0]))
    shards = storage.list_files(folder)
    with locks.exclusive("prepare", output):
        for write in (
            lambda: WriteShards(output, held=held)(prepared_rows("b")),
            lambda: publish(output, labels, {"train": FAILURES.empty_table()}, held=held),
        ):
            with pytest.raises(DataError, match=f"stopped preparing {output}: another job .* has taken over"):
                write()
    assert storage.list_files(folder) == shards  # publishing would delete one of the two
    assert not storage.exists(dataset.dataset_json(output))


@pytest.mark.parametrize("moment", ["clean_up", "_publish_index"])
def test_job_that_is_taken_over_while_it_publishes_does_not_finish(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, moment: str
):
    output, labels, step = (
        s3.uri("publishing", moment),
        LabelVocabulary.from_names(["cat", "dog"]),
        vars(module)[moment],
    )

    def and_lose_the_lock(*arguments: object) -> object:
        storage.delete(storage.join(output, storage.LOCKS))
        return step(*arguments)

    with locks.exclusive("prepare", output) as held:
        WriteShards(output, held=held)(prepared_rows("a"))
        monkeypatch.setattr(module, moment, and_lose_the_lock)
        with pytest.raises(LeaseLostError):
            publish(output, labels, {"train": FAILURES.empty_table()}, held=held)
    assert storage.exists(dataset.index_file(output, "train")) == (moment == "_publish_index")
    assert not storage.exists(dataset.dataset_json(output))


@pytest.mark.slow
def test_case_part_3_two_clusters_with_different_lists_do_not_share_an_output(s3: S3Server, tmp_path: Path):
    """Two jobs, each with a Ray of its own. They used to lose clips of one list, with exit status 0."""
    output, names = s3.uri("clusters", "data"), [f"{i:03}" for i in range(160)]
    for i, name in enumerate(names):
        write_media(tmp_path / f"{name}.flac", noise(0.5, seed=i))
    lists = names[:100], names[60:]
    commands = []
    for number, listed in enumerate(lists):
        manifest = tmp_path / f"list{number}.csv"
        manifest.write_text("path,labels\n" + "".join(f"{name}.flac,cat\n" for name in listed))
        split = ["--split", "train", "--num-cpus", "1"]
        job = [sys.executable, "-m", "jobs.prepare_audioset", "--manifest", str(manifest), "--output", output, *split]
        commands.append(job)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    jobs = [subprocess.Popen(command, **pipes) for command in commands]  # type: ignore[call-overload]
    printed = [job.communicate() for job in jobs]
    winner, loser = sorted(range(2), key=lambda number: jobs[number].returncode)
    assert (jobs[winner].returncode, jobs[loser].returncode) == (0, 2), printed
    assert re.search(
        rf"^error: another job is preparing {output} \(on .*, process {jobs[winner].pid}, since .*\); wait for its end",
        printed[loser][1],
        re.MULTILINE,
    )
    assert sorted(PreparedDataset.open(output).clips(["train"]).clip_id.to_pylist()) == lists[winner]
    assert subprocess.run(commands[loser], capture_output=True).returncode == 0
    assert sorted(PreparedDataset.open(output).clips(["train"]).clip_id.to_pylist()) == lists[loser]
    assert not storage.exists(storage.join(output, storage.LOCKS))
