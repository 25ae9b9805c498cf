"""Thresholds and calibrated scores of a model's classes, from scores of clips that it was not trained on.

    python jobs/calibrate.py --checkpoint runs/1
    python jobs/calibrate.py --checkpoint runs/1/averaged --data data --split eval
    python jobs/calibrate.py --checkpoint runs/1 --precision 0.9
    python jobs/calibrate.py --checkpoint runs/1 --events events.csv --hop-s 1

Without --data, the scores are those that a run has kept of its evaluation clips (best/scores.parquet). The result is
calibration.json in the model's folder, which jobs/tag.py uses. By default a class's threshold has the largest F1.
With --events, the settings and thresholds of events are chosen too: those that best find known events of recordings.
"""

# This file is long because it declares and checks the options of a calibration, which is in `ast_core/calibration.py`.

if __name__ == "__main__":  # before the imports that follow, which take seconds
    from jobs import entry

    entry.begin()

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ast_core.calibration import EventTuning, Goal, ModelCalibration, calibrate, names_of_few
from ast_core.errors import ConfigError, DataError
from ast_core.labels import LabelVocabulary
from jobs.common import JobParser, add_ray_options, check_numbers, output_uri, run
from pipeline.redaction import without_secrets
from pipeline.text_table import text_table
from pipeline.train.evaluation.scores import read_scores

if TYPE_CHECKING:
    from pipeline.tag.predictor import Member

FEW_SHOWN = 10
"""Classes without a calibration of their own that a line names."""

CLASSES_SHOWN = 20


def parser() -> argparse.ArgumentParser:
    parser = JobParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="C", help="a run or a model folder: path or URI")
    parser.add_argument("--data", metavar="URI", help="a prepared data set, to score it again")
    parser.add_argument("--split", nargs="+", metavar="SPLIT", help="its splits; clips that the model has not seen")
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument("--precision", type=float, metavar="P", help="thresholds with at least this precision")
    goal.add_argument("--recall", type=float, metavar="R", help="thresholds with at least this recall")
    group = parser.add_argument_group("events")
    group.add_argument(
        "--events",
        metavar="FILE",
        help="CSV with path, start_s, end_s, label: all events of recordings that the model was not trained on; they "
        "are tagged in this process",
    )
    group.add_argument("--window-s", type=float, metavar="S", help="length of a window, as tag.py's")
    group.add_argument("--hop-s", type=float, metavar="S", help="from one window to the next, as tag.py's")
    parser.add_argument("--per-class", action="store_true", help="print all classes")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda if there is a GPU"
    )
    add_ray_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    check_numbers(args, precision=1, recall=1, window_s=3600, hop_s=3600)
    if bool(args.data) != bool(args.split):
        raise ConfigError("give --data and --split together, or neither of them")
    if args.events is None and (args.window_s or args.hop_s):
        raise ConfigError("--window-s and --hop-s are for --events")
    checkpoint = output_uri(args.checkpoint, "--checkpoint")  # calibration.json is written there
    from pipeline.tag.predictor import Member  # PyTorch, which `--help` does not need
    from pipeline.tag.work import local_device
    from pipeline.train import models

    device = local_device(args.device) if args.events is not None else None  # refused before clips are scored elsewhere
    uri = models.find(checkpoint)
    models.calibration_file(uri)  # refuses a file of weights before any work
    model, config = models.read(uri)
    scores, targets, facts = _scored_again(args, uri) if args.data else _kept(args.checkpoint, uri, config.labels)
    goal: Goal = "precision" if args.precision else "recall" if args.recall else "f1"
    value = args.precision or args.recall or 0.0
    facts |= {"clips": len(scores), "goal": goal, "value": value}
    made = calibrate(scores, targets, goal=goal, value=value, facts=facts)
    if device is not None:
        member = Member(uri, model, config, list(range(len(config.labels))), made, "")
        made = replace(made, events=_tuned(args, member, made.thresholds(), device))
    file = models.write_calibration(uri, made, model, config)
    print(_table(made, config.labels, None if args.per_class else CLASSES_SHOWN))
    for line in [*_lines(made, config.labels), *_event_lines(made.events)]:
        print(line)
    print(f"wrote {file}")
    return 0


def _kept(checkpoint: str, uri: str, labels: LabelVocabulary) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """The scores of a run's best model, which must be the model at `uri`."""
    kept = read_scores(uri.removesuffix("/best")) if uri.endswith("/best") else None
    if kept is None:
        raise ConfigError(f"{checkpoint} has no best/scores.parquet; give --data and --split to score clips")
    if kept.scores.shape[1] != len(labels):
        raise DataError(f"the scores of {checkpoint} have {kept.scores.shape[1]} classes, the model {len(labels)}")
    return kept.scores, kept.targets(), {"scores": "best/scores.parquet"}


def _scored_again(args: argparse.Namespace, uri: str) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """The scores of a data set's clips by the code of evaluation, with the classes in the model's order."""
    from jobs.ray_session import ray_session  # Ray takes seconds to import
    from pipeline.dataset import PreparedDataset
    from pipeline.train.data.feed import Targets
    from pipeline.train.evaluation import ensemble
    from pipeline.train.evaluation.checkpoint_evaluation import Place, score_clips

    dataset = PreparedDataset.open(args.data)
    clips = dataset.clips(args.split)
    member = ensemble.read_member(uri, dataset)
    place = Place(args.device, args.address, partial(ray_session, args.address, args.num_cpus))
    (scores,) = score_clips([member], dataset, clips, place)
    targets = Targets(clips, len(dataset.labels))(np.arange(len(clips)))
    in_order_of_model = np.argsort(member.columns)
    facts = {"data": without_secrets(dataset.uri), "fingerprints": dataset.fingerprint(args.split)}
    return scores[:, in_order_of_model], targets[:, in_order_of_model], facts


def _tuned(args: argparse.Namespace, member: "Member", thresholds_C: np.ndarray, device: str) -> EventTuning:
    """Tag the recordings of `--events` in this process, and choose the settings of events."""
    from pipeline.recording_names import recording_name
    from pipeline.tag.event_tuning import Known, read_truth, tune
    from pipeline.tag.events import timeline
    from pipeline.tag.inputs import find_inputs
    from pipeline.tag.work import settings_for, tag_here

    listed = read_truth(args.events, member.config.labels)
    truth = {recording_name(uri): events for uri, events in listed.items()}
    settings = settings_for([member], thresholds_C, window_s=args.window_s, hop_s=args.hop_s)
    inputs, known = find_inputs(list(listed)), []
    there = set(inputs.recordings["recording"].to_pylist())
    for uri in listed:
        if recording_name(uri) not in there:
            raise DataError(
                f"{args.events}: {uri} is not one recording, but a folder, an archive, a list or a prepared data set; "
                "give each recording a row of its own"
            )
    for name, tagged in tag_here(inputs, [member], settings, device, keeps_frames=True):
        if tagged.lost:
            raise DataError(f"{name} cannot be read as a whole ({tagged.lost[0].message}); leave it out")
        starts_s, end_s = [start_s for start_s, _, _ in truth[name]], tagged.end_s.max(initial=0.0)
        if starts_s and max(starts_s) >= end_s:
            raise DataError(
                f"{args.events}: an event of {name} begins at {max(starts_s):g} s, and the recording ends at "
                f"{end_s:.1f} s; times are in seconds"
            )
        line = tagged.frames or timeline(tagged.start_s, tagged.end_s, tagged.scores_WC)
        known.append(Known(line, truth[name]))
        print(f"tagged {len(known):,} of {len(truth):,} recordings with known events", flush=True)
    found = tune(known, thresholds_C)
    windows = {"window_s": settings.windows.window_s, "hop_s": settings.windows.hop_s}
    return replace(found, facts={**found.facts, **windows})


def _table(made: ModelCalibration, labels: LabelVocabulary, most: int | None) -> str:
    """The classes with the most clips."""
    order = sorted(range(len(labels)), key=lambda c: -made.classes[c].num_positives)[:most]
    rows = [
        (
            labels.names[c],
            f"{made.classes[c].num_positives:,}",
            made.classes[c].map.method if made.classes[c].is_own else "of all classes",
            *(f"{getattr(made.classes[c].threshold, name):.3f}" for name in ("value", "precision", "recall", "f1")),
        )
        for c in order
    ]
    return text_table(["class", "clips", "calibration", "threshold", "precision", "recall", "F1"], rows, "lrlrrrr")


def _lines(made: ModelCalibration, labels: LabelVocabulary) -> list[str]:
    lines = [f"expected calibration error: {made.error_before:.4f} before, {made.error_after:.4f} after (held out)"]
    few, missed = names_of_few(made, labels), sum(not c.threshold.is_reached for c in made.classes)
    if few:
        more = f" and {len(few) - FEW_SHOWN:,} more" if len(few) > FEW_SHOWN else ""
        lines.append(
            f"{len(few):,} classes have too few clips, or scores that do not tell them apart, and take the calibration "
            f"and threshold of all classes together: {', '.join(few[:FEW_SHOWN])}{more}"
        )
    if missed:
        lines.append(f"{missed:,} classes do not reach the wanted precision; their threshold comes closest")
    return lines


def _event_lines(events: EventTuning | None) -> list[str]:
    if events is None:
        return []
    facts = events.facts
    few = f"; {facts['classes_with_few']:,} classes have few events and one threshold together"
    return [
        f"events: F1 {facts['f1']:.3f} on the {facts['events']:,} events of {facts['recordings']:,} recordings that "
        f"they are chosen on{few if facts['classes_with_few'] else ''}",
        f"events: --release {events.release:g} --median-s {events.median_s:g} --merge-s {events.merge_s:g} "
        f"--min-s {events.min_s:g} are now the defaults of tag.py for this model",
    ]


if __name__ == "__main__":
    run(main)
