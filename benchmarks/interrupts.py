"""Press Ctrl-C at random moments of each job: how long the job takes to end, what it prints, and the next run's result.

    python -m benchmarks.interrupts --presses 60

Each press is a SIGINT to the process group of a command, as a terminal sends it, at a random moment between its start
and its usual end. Every third one is sent twice. After some presses the same command runs to its end, and its result is
compared with that of an undisturbed run. A run that fails is a fault, and the campaign continues.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import wave
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from jobs.entry import STOPPED
from pipeline import dataset

JOBS = ("prepare", "train", "train in process", "evaluate")
LIMIT_S = 10.0
SETTLE_S = 3.0
"""Wait after the end of a command before its remaining processes are counted."""
RUN_S = 600.0
"""Time limit of a command."""
PROGRESS = re.compile(r".*(epoch \d|wa_|warning: |no instructions for bf16: )")
"""Lines of a run that goes well; CPUs without bf16 print the last."""


@dataclass
class Tally:
    presses: int = 0
    ended_before: int = 0
    gone_on: int = 0
    seconds: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Ended:
    seconds: float | None
    """Seconds from the press to the end; None if the command had ended before."""
    status: int
    stderr: str
    """What the command printed to standard error."""
    left: list[str]
    """Names of the processes that outlived it."""


@dataclass(frozen=True)
class Inputs:
    folder: Path

    def make(self, num_clips: int) -> None:
        rng, rows = np.random.default_rng(0), ["path,labels,split"]
        for i in range(num_clips):
            tone = np.sin(2 * np.pi * 200 * 2 ** (i % 4) * np.arange(160_000) / 16_000)
            samples = 8000 * tone + rng.normal(0, 1000, len(tone))
            with wave.open(str(self.folder / f"{i:04}.wav"), "wb") as file:
                file.setparams((1, 2, 16_000, 0, "NONE", ""))
                file.writeframes(samples.astype("<i2").tobytes())
            rows.append(f"{i:04}.wav,tone {i % 4},{'eval' if i % 4 == i // 4 % 4 else 'train'}")
        (self.folder / "list.csv").write_text("\n".join(rows))

    def command(self, job: str, output: Path) -> list[str]:
        data = self.folder / "undisturbed prepare"
        if job == "prepare":
            words = ["prepare_audioset", "--manifest", str(self.folder / "list.csv"), "--output", str(output)]
        elif job == "evaluate":
            run = str(self.folder / "undisturbed train" / "best")
            words = [
                "evaluate",
                "--checkpoint",
                run,
                "--data",
                str(data),
                "--split",
                "eval",
                "--json",
                f"{output}.json",
            ]
        else:
            words = ["train", "--recipe", "audioset-balanced", "--data", str(data), "--output", str(output)]
            words += ["--train-splits", "train", "--eval-splits", "eval", "--epochs", "3", "--checkpoint-every-s", "1"]
            words += ["--num-workers", "0" if job == "train in process" else "1", "--log-every-steps", "1"]
            keys = {
                "model_size": "tiny224",
                "imagenet_pretrain": "false",
                "fstride": 16,
                "tstride": 16,
                "lr": 1e-4,
                "wa_start": 3,
                "wa_end": 3,
            }
            keys |= {"input_tdim": 128, "freqm": 16, "timem": 8, "batch_size": 16, "warmup": "false"}
            words += [f"--{key}={value}" for key, value in keys.items()]
        return [sys.executable, f"jobs/{words[0]}.py", *words[1:]]

    def result(self, job: str, output: Path) -> object:
        if job == "evaluate":
            return json.loads(Path(f"{output}.json").read_text())
        if job != "prepare":
            records = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
            return {r["step"]: round(r["loss"], 4) for r in records if r["kind"] == "step"}
        clips = {}
        for split in ("train", "eval"):
            for row in dataset.read_table(dataset.index_file(str(output), split)).to_pylist():
                clips[split, row["clip_id"]] = row["num_frames"], tuple(row["labels"])
        return clips


def run_to_end(command: list[str]) -> None:
    """Run a command. Raises RuntimeError with its standard error if it fails or does not end."""
    try:
        ended = subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=RUN_S, check=False
        )
    except subprocess.TimeoutExpired as err:
        raise RuntimeError(f"no end within {RUN_S:.0f} s: {err.stderr}") from err
    if ended.returncode:
        raise RuntimeError(f"status {ended.returncode}: {ended.stderr}")


def press(command: list[str], after_s: float, twice: bool) -> Ended:
    with tempfile.TemporaryFile("w+") as err:
        job = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=err,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        family, began_s = {}, time.monotonic()
        while time.monotonic() - began_s < after_s and job.poll() is None:
            family |= {process.pid: process for process in _children(job.pid)}
            time.sleep(0.1)
        pressed_s, is_over = time.monotonic(), job.poll() is not None
        if not is_over:
            family |= {process.pid: process for process in _children(job.pid)}
            os.killpg(job.pid, signal.SIGINT)
            if twice:
                time.sleep(0.5)
                if job.poll() is None:
                    os.killpg(job.pid, signal.SIGINT)
        try:
            status = job.wait(RUN_S)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            status = job.wait()
        took_s = None if is_over else time.monotonic() - pressed_s
        psutil.wait_procs(family.values(), timeout=SETTLE_S)
        left = [name for process in family.values() if (name := _name_of_running(process))]
        err.seek(0)
        return Ended(took_s, status, err.read(), left)


def _children(pid: int) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []


def _name_of_running(process: psutil.Process) -> str | None:
    with suppress(psutil.Error):
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            return process.name()
    return None


def faults_of(ended: Ended) -> list[str]:
    if ended.seconds is None:  # it ended before the press
        return [] if ended.status == 0 else [f"status {ended.status} before it was pressed: {ended.stderr}"]
    others = [line for line in ended.stderr.splitlines() if not PROGRESS.match(line)]
    is_stopped = STOPPED in ended.stderr
    wrong = {
        f"{ended.seconds:.1f} s": ended.seconds > LIMIT_S,
        f"status {ended.status}: {ended.stderr}": ended.status != (130 if is_stopped else 0),
        f"lines {others}": others != [STOPPED] * is_stopped,
        f"lines after the last: {ended.stderr}": is_stopped and ended.stderr.splitlines()[-1] != STOPPED,
        f"left {ended.left}": bool(ended.left),
    }
    return [what for what, is_so in wrong.items() if is_so]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presses", type=int, default=60)
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument(
        "--go-on-every", type=int, default=1, metavar="N", help="resume the command after every Nth press"
    )
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="number of commands at a time")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop pressing after this time")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng, began_s, say = np.random.default_rng(args.seed), time.monotonic(), threading.Lock()
    with tempfile.TemporaryDirectory(prefix="ast-stop-") as name, ThreadPoolExecutor(args.at_once) as pool:
        inputs = Inputs(Path(name))
        inputs.make(args.clips)
        usual_s, undisturbed, tallies = {}, {}, {job: Tally() for job in JOBS}
        for job in JOBS:
            output, job_began_s = inputs.folder / f"undisturbed {job}", time.monotonic()
            run_to_end(inputs.command(job, output))
            usual_s[job], undisturbed[job] = time.monotonic() - job_began_s, inputs.result(job, output)
            print(f"{job}: {usual_s[job]:.0f} s undisturbed", flush=True)

        def one(number: int, moment: float) -> None:
            if time.monotonic() - began_s > 60 * args.minutes:
                return
            job, goes_on = JOBS[number % len(JOBS)], number // len(JOBS) % args.go_on_every == 0
            output, after_s = inputs.folder / f"out{number}", 0.3 + moment * usual_s[job]
            command = inputs.command(job, output)
            ended = press(command, after_s, twice=number % 3 == 2)
            faults = faults_of(ended)
            if goes_on:
                try:
                    run_to_end(command)
                    if inputs.result(job, output) != undisturbed[job]:
                        faults.append("the next run's result differs")
                except (RuntimeError, OSError) as err:
                    faults.append(f"the next run failed: {err}")
            with say:
                tally = tallies[job]
                tally.presses += 1
                tally.gone_on += goes_on
                tally.ended_before += ended.seconds is None
                tally.seconds += [] if ended.seconds is None else [ended.seconds]
                tally.faults += (found := [f"{number + 1} {job} after {after_s:.1f} s: {fault}" for fault in faults])
                took = "had ended" if ended.seconds is None else f"{ended.seconds:.1f} s"
                print(f"{number + 1:3} {job} after {after_s:.1f} s: {took}, status {ended.status}", flush=True)
                print("".join(f"FAULT {line}\n" for line in found), end="", flush=True)

        list(pool.map(one, range(args.presses), rng.random(args.presses)))
    print(f"\nload {os.getloadavg()[0]:.0f}\n")
    print("| job | presses | ended before | median s | longest s | run again | faults |\n|---|---|---|---|---|---|---|")
    for job, tally in tallies.items():
        seconds = tally.seconds or [0.0]
        figures = f"{np.median(seconds):.1f} | {max(seconds):.1f} | {tally.gone_on} | {len(tally.faults)}"
        print(f"| {job} | {tally.presses} | {tally.ended_before} | {figures} |")
    return int(any(tally.faults for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
