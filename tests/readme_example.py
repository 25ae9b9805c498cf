"""The README's example of a data set of your own: its lines, sounds for them, and a count of correct clips."""

import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.prepare.audio.decode import decode_media
from tests import fakes
from tests.conftest import ROOT, SHARED

HEADING = "## A data set of your own in five lines"
ESC10 = SHARED / "data" / "esc10"
NUM_CLIPS = 8
"""Number of clips of the example's training split."""


def printed(language: str) -> str:
    """The first code block in `language` below the heading; "" selects the shell's."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition(HEADING)[2]
    found = re.search(rf"^```{language}\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def printed_lines() -> tuple[list[str], list[str]]:
    """The shell lines that write the list, and the Python commands after them."""
    lines = printed("").replace("\\\n", " ").splitlines()
    return [x for x in lines if not x.startswith("python ")], [x for x in lines if x.startswith("python ")]


def write_sounds(folder: Path, *, recorded: bool) -> None:
    """Write `folder/sounds` and `folder/mine.csv`: the two files that the example names, and seven more for training.

    Recorded sounds are ESC-10's dogs, and its babies as cats. Other sounds are low and high tones in noise.
    """
    sounds = folder / "sounds"
    sounds.mkdir()
    dogs, cats = (["rex", *(f"dog{i}" for i in range(1, 4))], ["tom", *(f"cat{i}" for i in range(1, 5))])
    for names, class_folder, freq_hz in ((dogs, "001 - Dog bark", 400.0), (cats, "004 - Baby cry", 2000.0)):
        recordings = sorted((ESC10 / class_folder).glob("*.ogg"))
        for i, name in enumerate(names):
            if recorded:
                waveform = decode_media(str(recordings[i]), None, 0.0, None)[0]
            else:
                waveform = fakes.tone(freq_hz * (1 + 0.05 * i), 3.0) + fakes.noise(3.0, i)
            suffix = "wav" if name == "rex" else "flac"
            fakes.write_media(sounds / f"{name}.{suffix}", waveform)
    subprocess.run(["bash", "-ec", "\n".join(printed_lines()[0])], check=True, cwd=folder)
    with (folder / "mine.csv").open("a") as file:
        for name in dogs[1:]:
            file.write(f"sounds/{name}.flac,dog;outside,train\n")
        for name in cats[1:]:
            file.write(f"sounds/{name}.flac,cat,train\n")


def type_command(command: str, folder: Path, *more: str) -> str:
    """Run a printed command in `folder`, with `more` appended, in a separate process. Returns what the terminal shows.

    Raises CalledProcessError if it fails.
    """
    _, job, *argv = command.split()
    words = [sys.executable, str(ROOT / job), *argv, *more]
    done = subprocess.run(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    sys.stderr.write(done.stdout)
    done.check_returncode()
    return done.stdout


def num_right(scores: Path, data: Path) -> int:
    """Number of training clips whose labels are exactly the classes with scores above 0.5 in `evaluate.py --scores`."""
    rows = pq.read_table(scores).to_pylist()
    index = pq.read_table(data / "train" / "index.parquet").to_pylist()
    labels = {row["clip_id"]: set(row["labels"]) for row in index}
    assert len(rows) == len(labels) == NUM_CLIPS
    found = ({i for i, score in enumerate(list(row.values())[1:]) if score > 0.5} for row in rows)
    return sum(classes == labels[row["clip_id"]] for row, classes in zip(rows, found, strict=True))
