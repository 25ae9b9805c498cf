"""Flip bits in all files of a data set and of a run: each flip must be reported with the file's name, or be harmless.

    python -m benchmarks.bit_flips [--flips 200] [--shard-flips 1000] [--seed 0]

The benchmark makes a small data set and trains a run on it. For each flip it flips one bit of one file in a copy and
calls everything that reads the file: the feed, the doctor and a second preparation; evaluation, export,
cross-validation and resuming. Files take turns, and every second flip of a Parquet file is in its footer. The outcome
is one of

    noticed     one line names the file: an error, or a warning if the file is replaced or skipped
    no matter   everything that was read is equal to before the flip
    a report    a file that no command reads has changed
    UNNOTICED   something else was read, without a message
    CRASHED     an error that is not one line, or does not name the file

The exit status is 1 if there is one of the last two.
"""

import argparse
import contextlib
import hashlib
import io
import json
import logging
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from ast_core.checkpoints import load_model
from ast_core.errors import UserError
from ast_core.recipe import Recipe
from jobs import train
from pipeline import dataset
from pipeline.dataset import PreparedDataset
from pipeline.inspect import checks, findings
from pipeline.inspect.data_report import write_report
from pipeline.prepare.clip import FAILURES
from pipeline.prepare.output.publish import check_output, publish
from pipeline.train import cross_validation, fit
from pipeline.train.checkpoints import (
    CHECKPOINTS,
    DamagedStateError,
    checkpoint_folders,
    load_state,
    unlisted_checkpoints,
)
from pipeline.train.data.fbank_reader import FbankReader
from pipeline.train.evaluation.epoch_results import EpochResults
from pipeline.train.evaluation.scores import read_scores
from pipeline.train.metrics_log import RunLog
from tests import fakes

SPLITS = ("train", "eval")
REPORTS = ("report.html", "metrics.jsonl", "per_class.csv", "events.out.tfevents", "/_report/", "scores.parquet")
"""Parts of the names of files that only people and reports read."""

OUTCOMES = ("noticed", "no matter", "a report", "UNNOTICED", "CRASHED")
Reader = Callable[[Path], str]
"""Reads files below a folder and returns a digest. Raises UserError if a file is refused."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=200, help="flips over all files, half of them of the data set")
    parser.add_argument("--shard-flips", type=int, default=1000, help="flips over shards only, which the feed reads")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng = np.random.default_rng(args.seed)
    with tempfile.TemporaryDirectory(prefix="ast-bits-") as folder:
        data, run = Path(folder, "data"), Path(folder, "run")
        make_data(data)
        command = make_run(data, run)
        counted: dict[str, Counter[str]] = defaultdict(Counter)
        of_shards = [file for file in files_of(data) if file.parent.name == "shards"]
        campaigns = (
            (data, files_of(data), DATA_READERS, args.flips // 2),
            (run, files_of(run), run_readers(command), args.flips - args.flips // 2),
            (data, of_shards, {"feed": read_clips}, args.shard_flips),
        )
        for whole, files, readers, num_flips in campaigns:
            for file, outcome, message in flips(whole, files, readers, num_flips, rng):
                counted[kind_of(file.relative_to(whole))][outcome] += 1
                if outcome in OUTCOMES[-2:]:
                    print(f"{outcome}: {file.relative_to(whole)}: {message}", flush=True)
    print(f"| file | flips | {' | '.join(OUTCOMES)} |\n|---|{'---|' * (1 + len(OUTCOMES))}")
    for kind, outcomes in sorted(counted.items()):
        print(f"| `{kind}` | {outcomes.total()} | {' | '.join(str(outcomes[outcome]) for outcome in OUTCOMES)} |")
    total = sum(counted.values(), Counter())
    print(f"| all | {total.total()} | {' | '.join(str(total[outcome]) for outcome in OUTCOMES)} |")
    return int(any(total[outcome] for outcome in OUTCOMES[-2:]))


def make_data(output: Path) -> None:
    """Prepare a data set with one failed clip, and its report."""
    fakes.write_data(str(output), splits=[("train", 40), ("eval", 21)])
    labels = PreparedDataset.open(str(output)).labels
    failed = {"clip_id": "lost", "stage": "source", "reason": "bad_time", "message": "start_s is x", "attempts": 1}
    missing = pa.Table.from_pylist(
        [failed | {"split": split, "retry": False, "tool_versions": "", "labels": [1]} for split in SPLITS], FAILURES
    )
    publish(str(output), labels, {split: missing.slice(i, 1) for i, split in enumerate(SPLITS)})
    write_report(str(output))


def make_run(data: Path, run: Path) -> list[str]:
    """Train a run of two epochs on Ray, with averaged weights. Returns its command line."""
    recipe = fakes.SMALL_RECIPE | {"epochs": "2", "wa_start": "1", "wa_end": "2", "batch_size": "16", "mixup": "0"}
    keys = [word for key, value in recipe.items() for word in (f"--{key}", value)]
    splits = ["--train-splits", "train", "--eval-splits", "eval", "--log-every-steps", "1"]
    command = ["--recipe", "audioset-full", "--data", str(data), *splits, "--output", str(run), *keys]
    assert train.main([*command, "--num-workers", "1", "--cpus-per-worker", "1"]) == 0
    return [*command, "--num-workers", "1"]


def files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.stat().st_size)


def kind_of(file: Path) -> str:
    """The file's name without the part that differs between files of a kind."""
    name = (
        str(file.parent / ("*" + file.suffix)) if file.parent.name in ("shards", "evaluation", "tensorboard") else file
    )
    parts = Path(name).parts
    return "/".join("SPLIT" if part in SPLITS else "*" if part.startswith("epoch-") else part for part in parts)


def flips(
    whole: Path, files: Sequence[Path], readers: Mapping[str, Reader], num_flips: int, rng: np.random.Generator
) -> Iterator[tuple[Path, str, str]]:
    """Yield file, outcome and message of each flip. Afterwards the files are as before."""
    copy = whole.parent / f"{whole.name}-copy"
    expected = {}
    for name, read in readers.items():
        with copied(whole, copy):
            expected[name] = read(copy)
    for i in range(num_flips):
        file = files[i % len(files)]
        is_report = any(part in str(file) for part in REPORTS)
        outcome, message = "no matter", ""
        at = flipped_bit(file, rng, in_footer=i // len(files) % 2 == 1)
        for name, read in readers.items():
            with copied(whole, copy), logged_warnings() as lines:
                flip(copy / file.relative_to(whole), *at)
                try:
                    is_same = read(copy) == expected[name]
                except UserError as err:
                    lines.append(str(err))
                    is_same = False
                except Exception as err:
                    outcome, message = "CRASHED", f"{name}, bit {at}: {type(err).__name__}: {err}"
                    break
            named = [line for line in lines if file.name in line or file.parent.name in line]
            if named and "\n" not in named[0]:
                outcome, message = "noticed", named[0]
            elif not is_same and is_report:
                outcome = "a report"
            elif not is_same:
                outcome, message = "CRASHED" if lines else "UNNOTICED", f"{name}, bit {at}: {lines}"
                break
        yield file, outcome, message


def flipped_bit(file: Path, rng: np.random.Generator, *, in_footer: bool) -> tuple[int, int]:
    """Draw a byte and a bit in it, anywhere in the file or in the footer of a Parquet file."""
    first, size = 0, file.stat().st_size
    if in_footer and file.suffix == ".parquet":
        first = size - 8 - int.from_bytes(file.read_bytes()[-8:-4], "little")
    return int(rng.integers(first, size)), int(rng.integers(8))


def flip(file: Path, byte: int, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[byte] ^= 1 << bit
    file.write_bytes(data)


@contextlib.contextmanager
def copied(whole: Path, copy: Path) -> Iterator[None]:
    """Copy the files to another folder, where a reader may write."""
    shutil.copytree(whole, copy)
    try:
        yield
    finally:
        shutil.rmtree(copy)


@contextlib.contextmanager
def logged_warnings() -> Iterator[list[str]]:
    """Collect the warnings that this project logs."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    listener, logger = Listener(logging.WARNING), logging.getLogger("pipeline")
    logger.addHandler(listener)
    try:
        yield lines
    finally:
        logger.removeHandler(listener)


def digest(*values: object) -> str:
    made = hashlib.sha256()
    for value in values:
        made.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return made.hexdigest()


# --- readers of a data set


def read_clips(data: Path) -> str:
    """Read all columns that training and evaluation use."""
    opened = PreparedDataset.open(str(data))
    clips = opened.clips(SPLITS)
    with FbankReader(clips) as reader:
        fbanks = [reader[i].copy() for i in range(len(clips))]
    facts = (clips.num_frames, clips.weight, clips.labels.to_pylist(), clips.clip_id.to_pylist())
    return digest(*fbanks, *facts, opened.norm(SPLITS), opened.labels, opened.info["features"])


def read_doctor(data: Path) -> str:
    found = findings.as_json("", checks.examine(PreparedDataset.open(str(data))))
    return digest(json.dumps(found, sort_keys=True))


def prepare_again(data: Path) -> str:
    """Run a second preparation from its check on, without a list and without clips to prepare."""
    output = str(data)
    info = dataset.read_info(output)
    labels = dataset.read_labels(output, info)
    check_output(output, labels)
    made, *_ = publish(output, labels, {split: FAILURES.empty_table() for split in SPLITS})
    return digest(json.dumps(made["splits"], sort_keys=True), labels)


def prepare_report(data: Path) -> str:
    write_report(str(data))
    return ""


DATA_READERS: dict[str, Reader] = {
    "feed": read_clips,
    "doctor": read_doctor,
    "prepare": prepare_again,
    "report": prepare_report,
}


# --- readers of a run


def run_readers(command: Sequence[str]) -> dict[str, Reader]:
    """The readers of a run. `command` made the run; a copy in another folder is resumed by the same command there."""

    def resume(run: Path) -> str:
        """Run the command again, up to the first batch."""
        claimed = train.claim(
            [str(run) if word == command[command.index("--output") + 1] else word for word in command]
        )
        opened = PreparedDataset.open(claimed.data)
        clips = [opened.clips([split]) for split in SPLITS]
        _, config = load_model(run / "initial")
        results = EpochResults(str(run), config, *clips)
        log = RunLog(str(run), 10**6)
        log.close()
        scores = np.full((len(clips[1]), len(opened.labels)), 0.5, np.float32)
        records = [results.records(2), results.best(), results.first_missing()]
        sums = results.record(3, 0.5, scores, load_model(run / "averaged")[0].state_dict())["score_sum_sha256"]
        unlisted = [Path(uri).name for uri in unlisted_checkpoints(str(run / CHECKPOINTS))]
        return digest(claimed.recipe, records, sums, log.epochs, unlisted if unlisted else "listed")

    def checkpoints(run: Path) -> str:
        """Read the whole checkpoints. A resumed run skips the others with a message."""
        values: list[object] = []
        for folder in checkpoint_folders(str(run / CHECKPOINTS)):
            try:
                state = load_state(folder)
            except DamagedStateError as err:
                raise UserError(f"passing over the checkpoint {folder}: {err}") from err
            values += [*(value.numpy() for value in state["model"].values()), state["progress"]["epochs_done"]]
        return digest(*values)

    return {"models": read_models, "resume": resume, "checkpoints": checkpoints, "results": read_results}


def read_models(run: Path) -> str:
    """Read the models as evaluation and export do."""
    loaded = [load_model(run / name) for name in ("initial", "best", "averaged")]
    return digest(
        *(value.numpy() for model, _ in loaded for value in model.state_dict().values()),
        *(config for _, config in loaded),
    )


def read_results(run: Path) -> str:
    """Read what cross-validation uses of a run, and what a finished run prints again."""
    figures = cross_validation._figures(str(run), "map")
    with contextlib.redirect_stdout(io.StringIO()):
        fit.results(str(run), Recipe())
    read_scores(str(run))
    return digest(json.dumps(figures, sort_keys=True))


if __name__ == "__main__":
    sys.exit(main())
