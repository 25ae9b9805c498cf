"""How commands end on Ctrl-C, SIGTERM and a closed pipe, with real processes and signals."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray.data._internal.block_batching.iter_batches import BatchIterator

from jobs import prepare_audioset
from jobs.common import run_job
from jobs.demo.media_server import serve
from jobs.entry import STOPPED
from tests import fakes

WAIT_S = 120.0
BEGIN = "from jobs import entry; entry.begin(); entry.UNWIND_S = 1; import sys, time\n"


def script(code: str, *, sigint: signal.Handlers = signal.SIG_DFL) -> "subprocess.Popen[str]":
    """Run `code` in a process that begins as a job does. It prints a line when it is ready."""
    return subprocess.Popen(
        [sys.executable, "-c", BEGIN + code],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, sigint),
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_the_job_with_one_line_and_its_status(number: int, status: int):
    job = script("print('ready'); time.sleep(60)")
    assert job.stdout.readline() == "ready\n"
    job.send_signal(number)
    _, err = job.communicate(timeout=WAIT_S)
    assert (job.returncode, err) == (status, f"{STOPPED}\n")


def test_a_child_that_has_not_replaced_itself_yet_prints_no_second_line():
    """Ray's processes are such children for a moment, and Ctrl-C reaches the whole group."""
    job = script(
        "import os\nchild = os.fork()\n"
        "if child == 0:\n    time.sleep(60)\n"
        "else:\n    print('ready', child)\n    os.waitpid(child, 0)\n    time.sleep(60)"
    )
    ready, child = job.stdout.readline().split()
    assert ready == "ready"
    os.kill(int(child), signal.SIGINT)
    job.send_signal(signal.SIGINT)
    _, err = job.communicate(timeout=WAIT_S)
    assert (job.returncode, err) == (130, f"{STOPPED}\n")


def test_output_of_libraries_after_an_interrupt_is_hidden():
    """The library catches the interrupt, prints something and raises another error."""
    job = script(
        "try:\n    print('ready'); time.sleep(60)\n"
        "except BaseException as err:\n    print('aborting', file=sys.stderr); raise ValueError('x') from err"
    )
    assert job.stdout.readline() == "ready\n"
    job.send_signal(signal.SIGINT)
    assert job.communicate(timeout=WAIT_S)[1] == f"{STOPPED}\n"
    assert job.returncode == 130


def test_job_that_does_not_unwind_is_ended():
    """The main thread catches the interrupt, as destructors do. Two more signals change nothing."""
    job = script("try:\n    print('ready'); time.sleep(60)\nexcept BaseException:\n    time.sleep(60)")
    assert job.stdout.readline() == "ready\n"
    pressed_s = time.monotonic()
    for _ in range(3):
        job.send_signal(signal.SIGINT)
        time.sleep(0.1)
    assert job.communicate(timeout=WAIT_S)[1] == f"{STOPPED}\n"
    assert job.returncode == 130
    assert time.monotonic() - pressed_s > 0.9, "the job ended by itself, so the test shows nothing"


def test_job_that_is_blocked_in_a_library_call_is_ended():
    """Python runs no signal handler before the call returns."""
    job = script("import hashlib; print('ready'); hashlib.pbkdf2_hmac('sha256', b'x', b'y', 2**31 - 1)")
    assert job.stdout.readline() == "ready\n"
    job.send_signal(signal.SIGTERM)
    assert job.communicate(timeout=WAIT_S)[1] == f"{STOPPED}\n"
    assert job.returncode == 143


def test_sigint_that_the_caller_ignores_stays_ignored():
    """Shells ignore it for commands with `&` in a script."""
    job = script("print('ready'); time.sleep(1); print('done')", sigint=signal.SIG_IGN)
    assert job.stdout.readline() == "ready\n"
    job.send_signal(signal.SIGINT)
    assert job.communicate(timeout=WAIT_S) == ("done\n", "")
    assert job.returncode == 0


def test_job_continues_when_its_output_is_closed(tmp_path: Path):
    """As in `job | head -1`. Another thread and standard error are included."""
    done = tmp_path / "done"
    job = script(
        "import threading\n"
        "def say():\n    for i in range(2000): print('line', i); print('line', i, file=sys.stderr)\n"
        "thread = threading.Thread(target=say); thread.start(); say(); thread.join()\n"
        f"open({str(done)!r}, 'w').close(); entry.leave(0)"
    )
    assert job.stdout.readline().startswith("line")
    job.stdout.close()
    job.stderr.close()
    assert job.wait(WAIT_S) == 0
    assert done.exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize(("status", "expected"), [("0", 0), ("status_of_printed()", 2)])
def test_full_disk_of_the_output_is_reported_once_and_ends_commands_that_only_print(status: str, expected: int):
    code = f"from jobs.common import status_of_printed\nprint(1); print(2); entry.leave({status})"
    with open("/dev/full", "w") as full:
        job = subprocess.run(
            [sys.executable, "-c", BEGIN + code],
            cwd=Path(__file__).parents[2],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    warning = "warning: output can no longer be written (No space left on device); the job continues\n"
    assert (job.returncode, job.stderr) == (expected, warning)


@pytest.mark.parametrize(
    "ray_says",
    [
        "Actor x has constructor arguments in the object store and max_restarts > 0. If …",
        "[mutex.cc : 452] RAW: Lock blocking 0x558d3efd8690   @ 0x7ff2b4c2b1a2 0x7ff2b3cfb23c",
        "[mutex.cc : 452] RAW: Unlock 0x558d3efd8690   @ 0x7ff2b45c2125",
    ],
)
def test_noise_of_ray_is_hidden(ray_says: str):
    """Noise comes from C++ on descriptor 2 and from workers by Python. The last line before a crash is shown."""
    job = script(
        f"import os; os.write(2, {ray_says.encode()!r} + b'\\n'); print('(pid=1)', {ray_says!r}, file=sys.stderr)\n"
        "print('ours', file=sys.stderr); os.write(2, b'last words\\n'); os.abort()"
    )
    assert job.communicate(timeout=WAIT_S)[1] == "ours\nlast words\n"
    assert job.returncode == -signal.SIGABRT


OURS = re.compile(
    r"(?:\x1b\[\d+m)?(?:\(RayTrainWorker pid=\d+[^)]*\))?(?:\x1b\[0m)? ?(?:"
    r"epoch \d+.*|wa_(?:start|end) is .*|warning: .*|this CPU has no instructions for bf16: .*)"
)


SLOW_ACTOR = """
import importlib.util, sys, time
NAME = "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator"
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def run_and_delay(module):
            run(module)
            make = module._AutoscalingCoordinatorActor.__init__
            def make_late(*args, **options):
                time.sleep(6)
                make(*args, **options)
            module._AutoscalingCoordinatorActor.__init__ = make_late
        spec.loader.exec_module = run_and_delay
        return spec
sys.meta_path.insert(0, Finder())
"""
"""Each Python process runs this first. It delays the actor for which Ray Train's controller waits 5 s."""


@pytest.mark.slow
def test_case_16_jobs_print_no_lines_of_ray(tmp_path: Path):
    """Fetch, train with workers and in process, and evaluate.

    Another Ray runs on the machine, and one of Ray's processes starts as slowly as on a busy machine.
    """
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "sitecustomize.py").write_text(SLOW_ACTOR)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "first"), os.environ["PYTHONPATH"]])}
    (tmp_path / "media").mkdir()
    for i in range(8):
        fakes.write_media(tmp_path / "media" / f"clip{i}.wav", fakes.noise(1, seed=i))
    data, silent = tmp_path / "data", {"cwd": Path(__file__).parents[2], "check": False, "text": True, "env": env}
    other = subprocess.Popen(
        [sys.executable, "-c", "import ray; ray.init(address='local', num_cpus=1); print('up', flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with serve(tmp_path / "media") as url, other:
        other.stdout.readline()
        rows = [f"{url}/clip{i}.wav,{'ab'[i % 2]},{'test' if i > 5 else 'train'}" for i in range(8)]
        (tmp_path / "list.csv").write_text("\n".join(["url,labels,split", *rows]))
        train = ["train", "--recipe", "audioset-balanced", "--data", str(data), "--train-splits", "train"]
        train += [*("--eval-splits", "test", "--epochs", "2", "--wa_start", "2", "--wa_end", "2")]
        train += [*(f"--{k}={v}" for k, v in fakes.LINEAR_RECIPE.items())]
        for job in (
            [
                "prepare_audioset",
                "--manifest",
                str(tmp_path / "list.csv"),
                "--output",
                str(data),
                "--allow-private-hosts",
            ],
            [*train, "--output", str(tmp_path / "run"), "--num-workers", "2"],
            [*train, "--output", str(tmp_path / "in_process"), "--num-workers", "0"],
            ["evaluate", "--checkpoint", str(tmp_path / "run"), "--data", str(data), "--split", "test"],
        ):
            command = [sys.executable, f"jobs/{job[0]}.py", *job[1:]]
            ended = subprocess.run(command, capture_output=True, **silent)
            assert ended.returncode == 0, ended.stderr
            assert [line for line in ended.stderr.splitlines() if not OURS.fullmatch(line)] == [], job[0]
            assert "Ray" not in ended.stdout, ended.stdout
        other.stdin.close()


@pytest.mark.parametrize("name", ["prepare_audioset", "train", "compare", "evaluate", "export", "crossval", "doctor"])
def test_case_26_job_calls_begin_before_its_imports(name: str):
    """Ctrl-C during the imports then also ends in one line."""
    source = (Path(__file__).parents[2] / "jobs" / f"{name}.py").read_text()
    assert source.index("entry.begin()") < source.index("import argparse")
    assert source.endswith('if __name__ == "__main__":\n    run(main)\n')


def test_case_26_job_resumes_after_an_interrupt_before_the_first_row(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """This interrupt made a job hang. `test_plan` has the test of the executor that did not end."""

    def press(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(BatchIterator, "__init__", press)
    fakes.write_media(tmp_path / "a.wav", fakes.noise(1))
    (tmp_path / "list.csv").write_text("path,labels\na.wav,x\n")
    argv = ["--manifest", str(tmp_path / "list.csv"), "--output", str(tmp_path / "data")]
    assert run_job(prepare_audioset.main, argv) == 130
    assert capsys.readouterr().err == f"{STOPPED}\n"
    monkeypatch.undo()
    assert run_job(prepare_audioset.main, argv) == 0
