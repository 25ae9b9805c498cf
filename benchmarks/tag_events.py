"""Tag a recording whose truth is known, by a model that is trained on its kinds of sounds: event F1 and PSDS.

    python -m benchmarks.tag_events [--minutes 30] [--esc10 DIR] [--output FOLDER]

The sounds are the demo's 14 classes, and ESC-10's ten where its folder is there. A small TALNet is trained on 2 s
clips that have labels and no times, thresholds are calibrated on other clips, and the recording has sounds of neither.
Then the settings and thresholds of events are chosen by a second recording (calibrate.py --events), whose sounds are
those of the other clips, and the first one is tagged again. The jobs do all of this. An event is found if its onset and
offset are within 0.5 s (the offset: or within half of its length), as sed_eval defines it. PSDS is that of DCASE's
first scenario, from the scores of windows. The two libraries are not among the requirements: `pip install sed_eval
sed_scores_eval 'pandas<3'` brings 25 more, and one is compiled. Without them the F1 is by our own count, with 0.5 s for
all offsets, and there is no PSDS.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks.event_recordings import Event, Sounds, recording, training_clip
from tests import fakes
from tests.tag.stub import event_f1

ROOT = Path(__file__).parents[1]
CLIP_S, NUM_TRAIN, NUM_EVAL = 2.0, 2400, 400
RECIPE = {
    "model": "talnet",
    "embedding_size": 256,
    "features": "small64",
    "input_fdim": 64,
    "input_tdim": 80,
    "norm_stats": "data",
    "loss": "BCE",
    "metrics": "mAP",
    "sampling": "uniform",
    "freqm": 8,
    "timem": 0,
    "mixup": 0.3,
    "lr": 1e-3,
    "batch_size": 24,
    "epochs": 12,
    "lrscheduler_start": 8,
    "lrscheduler_step": 1,
    "lrscheduler_decay": 0.6,
    "wa_start": 10,
    "wa_end": 12,
    "compile": False,
}
HOP_S = 1.0
EVENTS = ("--median-s", "0.5", "--merge-s", "1", "--min-s", "0.5")
COLLAR_S = 0.5


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--tuning-minutes", type=float, default=30.0, help="length of the second recording")
    parser.add_argument("--esc10", type=Path, default=ROOT.parent / "shared" / "data" / "esc10", metavar="DIR")
    parser.add_argument("--output", type=Path, help="keep everything here (default: a temporary folder)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    esc10 = args.esc10 if args.esc10.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="ast-bench-") as temporary:
        out = (args.output or Path(temporary)).absolute()
        train(out, args.seed, esc10)
        sounds = Sounds("recording", args.seed, esc10=esc10)
        waveform, truth = recording(sounds, args.minutes * 60)
        path = fakes.write_media(out / "recording.flac", waveform)
        checkpoint = ["--checkpoint", str(out / "run")]
        given = [*checkpoint, "--input", str(path), "--hop-s", str(HOP_S), "--num-workers", "0", "--output"]
        run("calibrate.py", *checkpoint)
        began_s = time.monotonic()
        run("tag.py", *given, str(out / "tags"), *EVENTS)
        print(
            f"{len(truth)} events of {len(sounds.names)} classes in {args.minutes:g} min, tagged in "
            f"{time.monotonic() - began_s:.0f} s"
        )
        known = write_known(out, args.seed, esc10, args.tuning_minutes)
        began_s = time.monotonic()
        run("calibrate.py", *checkpoint, "--events", str(known), "--hop-s", str(HOP_S))
        print(f"settings chosen in {time.monotonic() - began_s:.0f} s by {args.tuning_minutes:g} other minutes\n")
        run("tag.py", *given, str(out / "tuned"))
        print("| output | events | F1 | mean onset error of found events, s |\n|---|---|---|---|")
        for name, found in (
            ("windows, not merged", window_events(out / "tags")),
            ("events, thresholds of clips", tagged_events(out / "tags")),
            ("events, chosen by known events", tagged_events(out / "tuned")),
        ):
            print(
                f"| {name} | {len(found)} | {f1(found, truth, sounds.names):.3f} | {onset_error_s(found, truth):.2f} |"
            )
        if find_spec("sed_scores_eval"):
            print(f"\nPSDS 1: {psds(out / 'tags', truth, args.minutes * 60):.3f}")
    return 0


def train(out: Path, seed: int, esc10: Path | None) -> None:
    """Synthesise clips, prepare them, train the model and calibrate it."""
    if (out / "run" / "summary.json").exists():
        return
    write_clips(out, {"train": NUM_TRAIN, "eval": NUM_EVAL}, seed, esc10)
    (out / "recipe.yaml").write_text(json.dumps(RECIPE))  # JSON is YAML
    data = ["--data", str(out / "data"), "--train-splits", "train", "--eval-splits", "eval"]
    run(
        "prepare_audioset.py",
        "--manifest",
        str(out / "clips.csv"),
        "--output",
        str(out / "data"),
        "--features",
        "small64",
    )
    workers = ["--num-workers", "2", "--device", "cpu"]
    run("train.py", "--recipe", str(out / "recipe.yaml"), *data, "--output", str(out / "run"), *workers)


def write_known(out: Path, seed: int, esc10: Path | None, minutes: float) -> Path:
    """A recording with sounds of the calibration's clips, and the list of its events."""
    waveform, truth = recording(Sounds("eval", seed + 1, esc10=esc10), minutes * 60)
    fakes.write_media(out / "known.flac", waveform)
    with open(out / "known.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "start_s", "end_s", "label"])
        rows.writerows(["known.flac", start_s, end_s, name] for start_s, end_s, name in truth)
    return out / "known.csv"


def write_clips(out: Path, number: dict[str, int], seed: int, esc10: Path | None) -> None:
    """Clips with one or two classes, as FLAC, and their manifest."""
    (out / "clips").mkdir(parents=True, exist_ok=True)
    with open(out / "clips.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "labels", "split"])
        for split, count in number.items():
            sounds = Sounds(split, seed, esc10=esc10)
            for i in range(count):
                names = sounds.rng.choice(sounds.names, 1 + i % 2, replace=False).tolist()
                path = fakes.write_media(out / "clips" / f"{split}{i:04d}.flac", training_clip(sounds, names, CLIP_S))
                rows.writerow([path, ";".join(names), split])


def run(job: str, *argv: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "jobs" / job), *argv], check=True, stdout=sys.stderr)


def tagged_events(tags: Path) -> list[Event]:
    rows = pq.read_table(tags / "events").to_pylist()
    return [(row["start_s"], row["end_s"], row["label"]) for row in rows]


def window_events(tags: Path) -> list[Event]:
    """Each window and class above its threshold, as an output without merging would list them."""
    info = json.loads((tags / "tags.json").read_text())
    thresholds, names = info["settings"]["thresholds"], [label["display_name"] for label in info["labels"]]
    return [
        (row["start_s"], row["end_s"], names[c])
        for row in pq.read_table(tags / "scores").to_pylist()
        for c in np.flatnonzero(np.array(row["scores"]) >= thresholds)
    ]


def f1(found: Sequence[Event], truth: Sequence[Event], names: Sequence[str]) -> float:
    """Event-based F1 by sed_eval, or by our own count."""
    if find_spec("sed_eval") is None:
        return event_f1(found, truth, COLLAR_S)
    import sed_eval
    from dcase_util.containers import MetaDataContainer

    def listed(events: Sequence[Event]) -> MetaDataContainer:
        rows = [{"filename": "r", "onset": s, "offset": e, "event_label": name} for s, e, name in events]
        return MetaDataContainer(rows)

    metrics = sed_eval.sound_event.EventBasedMetrics(
        event_label_list=list(names), t_collar=COLLAR_S, percentage_of_length=0.5, event_matching_type="optimal"
    )
    metrics.evaluate(reference_event_list=listed(truth), estimated_event_list=listed(found))
    return float(metrics.results_overall_metrics()["f_measure"]["f_measure"])


def onset_error_s(found: Sequence[Event], truth: Sequence[Event]) -> float:
    """The mean distance of onsets, over true events that an event of their class overlaps."""
    errors = []
    for start_s, end_s, name in truth:
        near = [abs(s - start_s) for s, e, other in found if other == name and s < end_s and e > start_s]
        errors += [min(near)] if near else []
    return float(np.mean(errors)) if errors else float("nan")


def psds(tags: Path, truth: Sequence[Event], length_s: float) -> float:
    """PSDS with DCASE's first scenario (arXiv 1910.08440), from the mean of the windows over each time."""
    from sed_scores_eval import intersection_based
    from sed_scores_eval.base_modules.scores import create_score_dataframe

    from pipeline.tag.events import timeline

    info = json.loads((tags / "tags.json").read_text())
    table = pq.read_table(tags / "scores").sort_by("start_s")
    scores_WC = np.array(table["scores"].to_pylist(), np.float32)
    line = timeline(table["start_s"].to_numpy(), table["end_s"].to_numpy(), scores_WC)
    scores = create_score_dataframe(
        line.scores_SC, np.append(line.start_s, line.end_s[-1]), [label["display_name"] for label in info["labels"]]
    )
    found, *_ = intersection_based.psds(
        {"r": scores},
        {"r": list(truth)},
        {"r": length_s},
        dtc_threshold=0.7,
        gtc_threshold=0.7,
        cttc_threshold=None,
        alpha_ct=0.0,
        alpha_st=1.0,
        unit_of_time="hour",
        max_efpr=100.0,
    )
    return float(found)


if __name__ == "__main__":
    sys.exit(main())
