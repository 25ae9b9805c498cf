"""Ctrl-C at random moments of each job: how long it takes to end, what it prints, and whether the next run ends right.

    python -m benchmarks.interrupts --presses 60

Each press is a SIGINT to the process group of a command, as a terminal sends it, at a random moment between its start
and its usual end; every third is pressed twice. Then the same command runs to its end, and its result is held against
that of an undisturbed run.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from jobs.entry import STOPPED
from pipeline import dataset

JOBS = ("prepare", "train", "train in process", "evaluate")
LIMIT_S = 10.0
SETTLE_S = 3.0
"""After the end of a command, before its processes are counted."""


@dataclass
class Tally:
    presses: int = 0
    ended_before: int = 0
    seconds: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class World:
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
        data = self.folder / "calm prepare"
        if job == "prepare":
            words = ["prepare_audioset", "--manifest", str(self.folder / "list.csv"), "--output", str(output)]
        elif job == "evaluate":
            run = str(self.folder / "calm train" / "best")
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
            keys = {"model_size": "tiny224", "imagenet_pretrain": "false", "fstride": 16, "tstride": 16, "lr": 1e-4}
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


def press(command: list[str], after_s: float, twice: bool) -> tuple[float, int, str, list[str]]:
    """Seconds to the end (negative: it ended before), status, standard error, names of processes that are left."""
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
            for process in psutil.Process(job.pid).children(recursive=True):
                family[process.pid] = process
            time.sleep(0.1)
        pressed_s, is_over = time.monotonic(), job.poll() is not None
        if not is_over:
            os.killpg(job.pid, signal.SIGINT)
            if twice:
                time.sleep(0.5)
                if job.poll() is None:
                    os.killpg(job.pid, signal.SIGINT)
        status = job.wait(120)
        took_s = -1.0 if is_over else time.monotonic() - pressed_s
        psutil.wait_procs(family.values(), timeout=SETTLE_S)
        left = [process.name() for process in family.values() if process.is_running()]
        err.seek(0)
        return took_s, status, err.read(), left


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presses", type=int, default=60)
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory(prefix="ast-interrupts-") as name:
        world = World(Path(name))
        world.make(args.clips)
        usual_s, calm, tallies = {}, {}, {job: Tally() for job in JOBS}
        for job in JOBS:
            output, began_s = world.folder / f"calm {job}", time.monotonic()
            subprocess.run(world.command(job, output), check=True, capture_output=True)
            usual_s[job], calm[job] = time.monotonic() - began_s, world.result(job, output)
        for number in range(args.presses):
            job = JOBS[number % len(JOBS)]
            tally, output, after_s = tallies[job], world.folder / f"out{number}", rng.uniform(0.3, usual_s[job])
            command = world.command(job, output)
            took_s, status, said, left = press(command, after_s, twice=number % 3 == 2)
            tally.presses += 1
            if took_s < 0:
                tally.ended_before += 1
            else:
                tally.seconds.append(took_s)
                last = said.splitlines()[-1:]
                ours = [line for line in said.splitlines() if not re.match(r".*(epoch \d|wa_|warning: )", line)]
                wrong = {
                    f"{took_s:.1f} s": took_s > LIMIT_S,
                    f"status {status}": status != 130 and not (status == 0 and STOPPED not in said),
                    f"lines {ours}": status == 130 and (ours != [STOPPED] or last != [STOPPED]),
                    f"left {left}": bool(left),
                }
                tally.faults += [f"{job} after {after_s:.1f} s: {what}" for what, is_so in wrong.items() if is_so]
            again = subprocess.run(command, capture_output=True, text=True, check=False)
            if again.returncode or world.result(job, output) != calm[job]:
                tally.faults.append(f"{job} after {after_s:.1f} s: the next run differs ({again.stderr[-300:]})")
            print(f"{number + 1:3} {job} after {after_s:.1f} s: {took_s:.1f} s, status {status}", flush=True)
    print(f"\nload {os.getloadavg()[0]:.0f}\n\n| job | presses | ended before | median s | longest s | faults |")
    print("|---|---|---|---|---|---|")
    for job, tally in tallies.items():
        seconds = tally.seconds or [0.0]
        figures = f"{np.median(seconds):.1f} | {max(seconds):.1f} | {len(tally.faults)}"
        print(f"| {job} | {tally.presses} | {tally.ended_before} | {figures} |")
    faults = [fault for tally in tallies.values() for fault in tally.faults]
    print("\n".join(faults))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
