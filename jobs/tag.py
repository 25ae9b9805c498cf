"""Tag recordings: files, folders, globs, buckets, archives, lists, URLs, or a prepared data set.

    python jobs/tag.py --checkpoint runs/1 --input barking.wav
    python jobs/tag.py --checkpoint runs/1 --input ~/recordings s3://bucket/field --output tags
    python jobs/tag.py --checkpoint runs/1 runs/2 --input list.csv --output tags --window-s 2 --hop-s 1
    python jobs/tag.py --checkpoint runs/1 --input data --split eval --output tags --embeddings

With --output, scores of windows, events and embeddings become Parquet files there, with a report (report.html). Run
again, the same command goes on where it stopped, and tags new recordings. Without --output, the answer for a handful of
recordings is printed. Recordings may have any length. Thresholds and calibrated scores come from the model's
calibration.json, if jobs/calibrate.py has written it.
"""

# This file is long because it declares the options of tagging. The tagging itself is in `pipeline/tag`.

if __name__ == "__main__":  # before the imports that follow, which take seconds
    from jobs import entry

    entry.begin()

import argparse
import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pyarrow as pa

from ast_core.errors import ConfigError, DataError
from jobs.common import JobParser, add_ray_options, check_numbers, output_uri, run, status_of_printed
from pipeline.prepare.fetch.rate_limiter import YOUTUBE_PER_HOUR, LocalPermits, RateLimit
from pipeline.prepare.sources.checks import WEB
from pipeline.prepare.sources.locate import any_of_youtube
from pipeline.tag.events import EventSettings
from pipeline.tag.inputs import Inputs, find_inputs
from pipeline.tag.label_files import FORMATS
from pipeline.tag.windows import BATCH_WINDOWS

if TYPE_CHECKING:
    from pipeline.tag.output import Summary
    from pipeline.tag.predictor import Member
    from pipeline.tag.work import TagSettings

DEFAULT_THRESHOLD = 0.5
MAX_WORKERS = 10_000

EVENT_OPTIONS = (
    ("release", "SHARE", "an event begins and ends at this share of its threshold"),
    ("median_s", "S", "median filter over time, 0 is off"),
    ("merge_s", "S", "gaps up to this length are closed"),
    ("min_s", "S", "shorter events are dropped"),
)
"""Field of EventSettings, placeholder and meaning of each option."""


def parser() -> argparse.ArgumentParser:
    parser = JobParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", required=True, nargs="+", metavar="C", help="path or URI; the scores of several are averaged"
    )
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="PATH",
        help="audio or video files, folders, globs, .tar and .parquet with audio, .csv lists with path or url (and "
        "start_s, end_s), http(s) URLs, prepared data sets; local or s3://, gs://",
    )
    parser.add_argument("--output", metavar="URI", help="folder for the results; default: print them")
    parser.add_argument("--split", nargs="+", metavar="SPLIT", help="splits of a prepared data set (default: all)")
    parser.add_argument("--retry-failed", action="store_true", help="try recordings again that failed for good")
    parser.add_argument(
        "--fetches-per-hour",
        type=float,
        metavar="N",
        help=f"rate limit for recordings at URLs of a host (default: {YOUTUBE_PER_HOUR:g} for YouTube, else none)",
    )
    group = parser.add_argument_group("scores")
    group.add_argument("--window-s", type=float, metavar="S", help="length of a window (default: the model's input)")
    group.add_argument("--hop-s", type=float, metavar="S", help="from one window to the next (default: a window)")
    group.add_argument("--top", type=int, metavar="K", help="store the K highest scores of a window, not all")
    group.add_argument(
        "--embeddings",
        nargs="?",
        const="window",
        choices=["window", "clip"],
        help="store the embedding of each window, or (clip) the mean over each recording or prepared clip",
    )
    group.add_argument("--raw-scores", action="store_true", help="do not use the model's calibration.json")
    group = parser.add_argument_group("events")
    group.add_argument(
        "--threshold",
        type=float,
        metavar="P",
        help=f"score from which a class is heard (default: those of calibration.json, else {DEFAULT_THRESHOLD})",
    )
    for field, metavar, meaning in EVENT_OPTIONS:
        default = getattr(EventSettings(), field)
        option = f"--{field.replace('_', '-')}"
        group.add_argument(
            option, type=float, metavar=metavar, help=f"{meaning} (default {default:g}, or that of calibration.json)"
        )
    group.add_argument("--format", choices=sorted(FORMATS), help="also write a label file a recording")
    group = parser.add_argument_group("where it runs")
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda if there is a GPU")
    group.add_argument(
        "--num-workers",
        type=int,
        metavar="N",
        help="processes with the model (default: as many as there is room for; 0, and for a handful of recordings on "
        "this machine: in this process, without Ray)",
    )
    group.add_argument("--cpus-per-worker", type=int, default=4, metavar="N", help="on CPUs (default 4)")
    group.add_argument(
        "--gpus-per-worker", type=float, default=1.0, metavar="X", help="on GPUs; 0.5: two share one (default 1)"
    )
    group.add_argument(
        "--readers-per-worker", type=int, metavar="N", help="processes that decode (default: 1, or 8 for a GPU)"
    )
    group.add_argument(
        "--batch-windows",
        type=int,
        default=BATCH_WINDOWS,
        metavar="N",
        help=f"windows of a batch (default {BATCH_WINDOWS}, with which scores equal those of evaluate.py to the bit)",
    )
    add_ray_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    check_numbers(args, threshold=1, top=100_000, cpus_per_worker=1000, gpus_per_worker=1, batch_windows=100_000)
    check_numbers(args, window_s=3600, hop_s=3600, readers_per_worker=1000, fetches_per_hour=1e9)
    if args.num_workers is not None and not 0 <= args.num_workers <= MAX_WORKERS:
        raise ConfigError(f"--num-workers is {args.num_workers}; use 0 (no Ray) to {MAX_WORKERS:,}")
    of_events = {field: getattr(args, field) for field, _, _ in EVENT_OPTIONS}
    EventSettings.of(None, **of_events)  # refuses impossible ones before any work
    output = None if args.output is None else output_uri(args.output)
    if output is None:
        for option in ("format", "embeddings", "retry_failed"):
            if getattr(args, option):
                raise ConfigError(f"--{option.replace('_', '-')} needs --output, a folder for the results")
    inputs = find_inputs(args.input, args.split)
    for line in inputs.notes:
        print(line, flush=True)
    from pipeline.tag import printed  # PyTorch, which `--help` and a refused input do not need
    from pipeline.tag.predictor import read_members, score_lines, thresholds_of, tuning_lines, tuning_of
    from pipeline.tag.work import local_device, settings_for

    if output is None:
        printed.check_few(inputs)
    members = read_members(args.checkpoint, calibrated=not args.raw_scores)
    settings = settings_for(
        members,
        thresholds_of(members, args.threshold, DEFAULT_THRESHOLD),
        window_s=args.window_s,
        hop_s=args.hop_s,
        events=EventSettings.of(tuning_of(members), **of_events),
        top=args.top,
        embeddings=args.embeddings,
        label_format=args.format,
    )
    lines = score_lines(members, args.threshold, DEFAULT_THRESHOLD, raw_scores=args.raw_scores)
    for line in lines + tuning_lines(members, settings.windows.window_s, settings.windows.hop_s):
        print(line, flush=True)
    if output is None:
        printed.print_tags(inputs, members, settings, local_device(args.device), args.batch_windows)
        return status_of_printed()
    summary = _tag(args, inputs, members, settings, output)
    print(printed.summary_table(summary))
    print(f"wrote {output}: scores, events, report.html")
    if not len(summary.recordings):
        raise DataError(f"no recording could be tagged; the reasons are in {output}/failures.parquet")
    return 0


def _tag(
    args: argparse.Namespace, inputs: Inputs, members: "Sequence[Member]", settings: "TagSettings", output: str
) -> "Summary":
    from pipeline.tag import plan, printed
    from pipeline.tag.work import Workers, local_device

    given = {"inputs_given": args.input, "retry_failed": args.retry_failed}
    rate_limit = _rate_limit(args.fetches_per_hour, inputs.recordings["media"])
    is_small = args.address == "local" and printed.are_few(inputs)
    if args.num_workers == 0 or (args.num_workers is None and is_small):
        device, readers = local_device(args.device), args.readers_per_worker or 1
        workers = Workers(number=0, device=device, num_readers=readers, batch_windows=args.batch_windows)
        local = None if rate_limit is None else LocalPermits(rate_limit)
        return plan.tag(inputs, members, settings, output, workers, permits=local, **given)
    from jobs.ray_session import ray_session  # Ray takes seconds to import
    from pipeline.prepare.fetch.rate_limit_actor import cluster_permits
    from pipeline.tag import on_ray

    with ExitStack() as stack:
        stack.enter_context(ray_session(args.address, args.num_cpus))
        permits = None if rate_limit is None else stack.enter_context(cluster_permits(rate_limit))
        workers = on_ray.workers_of_cluster(
            wanted=args.device,
            is_local=args.address == "local",
            number=args.num_workers,
            cpus=args.cpus_per_worker,
            gpus=args.gpus_per_worker,
            readers=args.readers_per_worker,
            batch_windows=args.batch_windows,
        )
        return plan.tag(
            inputs, members, settings, output, workers, run_chunks=on_ray.run_chunks, permits=permits, **given
        )


def _rate_limit(per_hour: float | None, media: pa.ChunkedArray) -> RateLimit | None:
    """The rate limit for recordings at URLs; None if there are none."""
    if not any(map(WEB.match, media.to_pylist())):
        return None
    usual = YOUTUBE_PER_HOUR if any_of_youtube(media) else math.inf
    return RateLimit(fetches_per_hour=usual if per_hour is None else per_hour)


if __name__ == "__main__":
    run(main)
