"""Load on the service: many clients at once post good and hostile files, while others send slowly.

    python -m benchmarks.serve [--clients 200] [--slow 20] [--seconds 60]

`jobs/serve.py` runs in a process of its own on two CPUs, with a small AST with random weights and AudioSet's classes.
Each client posts one file after the other, and comes again after the time that a 503 names. An answer is right if it
has the scores of `jobs/tag.py`'s code in this process, or if a file that cannot be tagged gets a reason. The memory is
that of all processes of the server, in three parts of the time.
"""

import argparse
import asyncio
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np
import psutil
import torch

from benchmarks.tag import small_ast
from jobs.demo.sounds import GENERATORS, mixture
from pipeline.serve.limits import Limits
from pipeline.serve.recording_tagger import RecordingTagger
from pipeline.serve.upload import Upload
from pipeline.tag.events import EventSettings
from pipeline.tag.predictor import Predictor, labels_of, read_members, thresholds_of
from pipeline.tag.work import settings_for
from tests import fakes

TOLERANCE = 0.02
"""Largest accepted difference of a score: batches of other sizes round float16 features and products differently."""

SHARE_HOSTILE = 0.4
START_S = 180.0


@dataclass
class Counts:
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    good_s: list[float] = field(default_factory=list)
    """Seconds of answers with tags."""
    slow: Counter[str] = field(default_factory=Counter)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--slow", type=int, default=20, help="clients that send a byte a second")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--port", type=int, default=8765)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="ast-bench-") as folder:
        checkpoint = small_ast(Path(folder, "model"))
        good, hostile = _good(Path(folder), checkpoint), _hostile(Path(folder))
        command = [sys.executable, "jobs/serve.py", "--checkpoint", checkpoint, "--port", str(args.port)]
        command += ["--per-second", "0", "--num-cpus", "2", "--max-recording-s", "60"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            for line in server.stdout:
                print(line, end="", flush=True)
                if "serving" in line:
                    break
            counts, memory = asyncio.run(_load(args, server.pid, good, hostile))
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
    _print(args, counts, memory)
    return 1 if counts.wrong or server.returncode != 143 else 0


def _good(folder: Path, checkpoint: str) -> dict[bytes, dict[str, float]]:
    """Recordings, and the scores of their classes by `jobs/tag.py`'s code."""
    members = read_members([checkpoint])
    settings = settings_for(
        members, thresholds_of(members, None, 0.5), window_s=None, hop_s=None, events=EventSettings()
    )
    predictor = Predictor(members, torch.device("cpu"), embeddings=False, frames=False)
    tagger = RecordingTagger(settings, labels_of(members), predictor, Limits(), num_readers=1)
    rng, found = np.random.default_rng(1), {}
    for i, suffix in enumerate(("webm", "flac", "ogg", "wav", "mp3", "m4a")):
        mids = rng.choice(list(GENERATORS), 2, replace=False).tolist()
        waveform = mixture(rng, mids, 5.0 + 5 * i, 16_000)
        body = fakes.write_media(folder / f"good.{suffix}", waveform).read_bytes()
        found[body] = {one["label"]: one["score"] for one in tagger(Upload(body))["classes"]}
    tagger.stop()
    return found


def _hostile(folder: Path) -> list[bytes]:
    """Bodies that get a reason."""
    rng = random.Random(2)
    whole = fakes.write_media(folder / "long.flac", np.zeros(61 * 16_000, np.float32)).read_bytes()
    ogg = fakes.write_media(folder / "hostile.ogg", fakes.noise(5.0)).read_bytes()
    return [
        b"",
        b"not audio",
        rng.randbytes(100_000),
        b"#EXTM3U\n#EXTINF:5\nfile:///etc/passwd\n",
        b'<?xml version="1.0"?><MPD><Period/></MPD>',
        whole,  # too long
        ogg[:60],
        b"RIFF\xff\xff\xff\xffWAVEfmt " + b"\xff" * 64,
        b"\x1aE\xdf\xa3" + rng.randbytes(50_000),
        b"fLaC" + b"\x00" * 10_000,
    ]


async def _load(
    args: argparse.Namespace, server: int, good: dict[bytes, dict[str, float]], hostile: list[bytes]
) -> tuple[Counts, list[float]]:
    counts, url, ends_s = Counts(), f"http://127.0.0.1:{args.port}/tag", time.monotonic() + args.seconds
    memory: list[float] = []
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(120)) as session:
        clients = [_client(session, url, random.Random(i), ends_s, good, hostile, counts) for i in range(args.clients)]
        slow = [_slow(session, url, ends_s, counts) for _ in range(args.slow)]
        await asyncio.gather(_watch(server, ends_s, memory), *clients, *slow)
        async with session.get(url.replace("/tag", "/health")) as answer:
            print("health afterwards:", answer.status, await answer.text())
    return counts, memory


async def _client(
    session: aiohttp.ClientSession,
    url: str,
    rng: random.Random,
    ends_s: float,
    good: dict[bytes, dict[str, float]],
    hostile: list[bytes],
    counts: Counts,
) -> None:
    bodies = list(good)
    while time.monotonic() < ends_s:
        is_hostile = rng.random() < SHARE_HOSTILE
        body = rng.choice(hostile if is_hostile else bodies)
        began_s = time.monotonic()
        try:
            async with session.post(url, data=body) as answer:
                status, value = answer.status, await answer.json()
        except (aiohttp.ClientError, TimeoutError, ValueError) as err:
            counts.wrong.append(f"no answer: {type(err).__name__} {err}")
            continue
        reason = value.get("error", {}).get("reason", "")
        counts.statuses[f"{status} {reason}".strip()] += 1
        if status == 503 and reason == "busy":
            await asyncio.sleep(float(answer.headers["Retry-After"]) * rng.uniform(0.5, 1.5))
        elif is_hostile and (status == 200 or not reason):
            counts.wrong.append(f"a hostile file got {status} {reason}")
        elif not is_hostile and status != 200:
            counts.wrong.append(f"a good file got {status} {reason}")
        elif not is_hostile:
            counts.good_s.append(time.monotonic() - began_s)
            expected = good[body]
            if any(
                abs(one["score"] - expected.get(one["label"], one["score"])) > TOLERANCE for one in value["classes"]
            ):
                counts.wrong.append("other scores than tag.py's")


async def _slow(session: aiohttp.ClientSession, url: str, ends_s: float, counts: Counts) -> None:
    """Send a byte a second, until an answer comes."""

    async def drip() -> object:
        while True:
            yield b"x"
            await asyncio.sleep(1.0)

    while time.monotonic() < ends_s:
        try:
            async with session.post(url, data=drip()) as answer:
                counts.slow[f"{answer.status} {(await answer.json())['error']['reason']}"] += 1
        except (aiohttp.ClientError, TimeoutError) as err:
            counts.slow[f"closed ({type(err).__name__})"] += 1


async def _watch(server: int, ends_s: float, memory: list[float]) -> None:
    """The memory of the server's processes, MB, each second. Ray's are its children."""
    while time.monotonic() < ends_s:
        total = 0
        for process in [psutil.Process(server), *psutil.Process(server).children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except psutil.Error:  # it has ended
                continue
        memory.append(total / 1e6)
        await asyncio.sleep(1.0)


def _print(args: argparse.Namespace, counts: Counts, memory: list[float]) -> None:
    memory_mb = " | ".join(f"{np.median(part):,.0f}" for part in np.array_split(memory, 3))
    total, tags_s = sum(counts.statuses.values()), np.array(counts.good_s or [np.nan])
    print(f"\n{args.clients} clients and {args.slow} slow ones, {args.seconds:g} s\n")
    print("| answers | with tags, per s | median, s | 99 %, s | wrong | memory by thirds of the time, MB | | |")
    print("|---|---|---|---|---|---|---|---|")
    print(
        f"| {total:,} | {len(counts.good_s) / args.seconds:.1f} | {np.median(tags_s):.2f} "
        f"| {np.quantile(tags_s, 0.99):.2f} | {len(counts.wrong)} | {memory_mb} |\n"
    )
    print("| answer | number |\n|---|---|")
    for name, number in [*counts.statuses.most_common(), *((f"slow: {k}", n) for k, n in counts.slow.items())]:
        print(f"| {name} | {number:,} |")
    for line, number in Counter(re.sub(r"\d+", "N", line) for line in counts.wrong).most_common(10):
        print(f"wrong: {number} × {line}")


if __name__ == "__main__":
    sys.exit(main())
