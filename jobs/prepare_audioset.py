"""Prepare a data set from a list of clips: audio → fbank → Parquet shards with sample weights.

    python jobs/prepare_audioset.py --segments balanced_train eval --audio-dir ~/audioset --output data
    ray job submit --working-dir . -- python jobs/prepare_audioset.py --segments eval --output s3://bucket/data

To resume, run the same command again.
"""

# This file is long because it declares the options of a preparation and checks them against each other. The preparation
# itself is in `pipeline/prepare/plan.py`.

if __name__ == "__main__":  # before the imports that follow, which take seconds
    from jobs import entry

    entry.begin()

import argparse
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

from ast_core.errors import ConfigError, DataError, UserError
from ast_core.features import FEATURES, FeatureSettings
from ast_core.labels import LabelVocabulary
from ast_core.recipe_yaml import read_yaml
from jobs.common import JobParser, add_ray_options, check_numbers, output_uri, run
from pipeline import storage
from pipeline.prepare import progress, sources
from pipeline.prepare.clip import Reason, printable
from pipeline.prepare.fetch import rate_limiter
from pipeline.prepare.fetch.download import FetchSettings
from pipeline.prepare.fetch.private_hosts import Endpoint, endpoint_of
from pipeline.prepare.fetch.rate_limiter import YOUTUBE_PER_HOUR, RateLimit
from pipeline.prepare.fetch.ytdlp_settings import YtDlp
from pipeline.prepare.output import membership
from pipeline.prepare.sources import ClipList, locate, registry
from pipeline.prepare.sources.registry import Request, Source

if TYPE_CHECKING:
    from pipeline.prepare.plan import Prepared

LONGEST_WAIT_S, LONGEST_COOL_DOWN_S, MAX_CLIPS_LISTED = 86_400.0, 30 * 86_400.0, 10**9
"""Upper bounds of options: a day, a month, and more clips than exist."""


def parser() -> argparse.ArgumentParser:
    parser = JobParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_argument_group("which clips (one of these)").add_mutually_exclusive_group(required=True)
    for kind in registry.SOURCES:
        source.add_argument(
            kind.option,
            nargs="+" if kind.takes_several else None,
            type=storage.options_first,
            metavar=kind.metavar,
            help=kind.help,
        )

    audio = parser.add_argument_group(
        "where the audio of --segments is (default: YouTube)"
    ).add_mutually_exclusive_group()
    audio.add_argument(
        "--audio-dir",
        metavar="DIR",
        help="folder with files ID.ext or ID_START[_END].ext at any depth, also in tar or Parquet archives",
    )
    audio.add_argument("--media-url", metavar="TEMPLATE", help="URLs such as http://127.0.0.1:8000/{video_id}.webm")
    parser.add_argument(
        "--files-are-clips", action="store_true", help="ID.ext in --audio-dir is the clip, not a whole recording"
    )

    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="vocabulary: CSV with index,mid,display_name (default: AudioSet's 527 for --segments and --datafile, the "
        "labels found or the archives' own for --manifest)",
    )
    parser.add_argument("--split", help="name of the split (default: from the list's name)")
    parser.add_argument("--output", required=True, metavar="URI", help="folder for the data set: local, s3:// or gs://")
    parser.add_argument(
        "--features",
        default="kaldi128",
        metavar="NAME|FILE|{KEY: VALUE}",
        help=f"feature settings: {', '.join(FEATURES)}, a YAML file, or a mapping such as '{{num_mel_bins: 64, "
        f"frame_shift_ms: 20}}' (default kaldi128); keys: {', '.join(field.name for field in fields(FeatureSettings))}",
    )
    parser.add_argument(
        "--keep-audio",
        metavar="URI",
        help="keep the decoded audio here (FLAC in Parquet); it can be an --audio-dir or --manifest later",
    )
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="take only the first N clips of each split, and N of the refused rows",
    )
    parser.add_argument("--keep-silent", action="store_true", help="prepare digitally silent clips too")
    parser.add_argument(
        "--retry",
        nargs="+",
        default=[],
        metavar="REASON",
        help="try clips again that failed for good for one of these reasons, or `all`; the rest is tried again anyway",
    )
    parser.add_argument("--dry-run", action="store_true", help="only print what there is to do and how long it takes")

    fetch = parser.add_argument_group("fetching")
    fetch.add_argument("--download-workers", type=int, default=4, metavar="N", help="parallel fetches (default 4)")
    fetch.add_argument(
        "--fetches-per-hour",
        type=float,
        metavar="N",
        help=f"rate limit of one address (default: {YOUTUBE_PER_HOUR:g} for YouTube, else none)",
    )
    fetch.add_argument(
        "--addresses",
        nargs="+",
        default=[],
        metavar="ADDRESS",
        help="addresses that share the fetches: HTTP proxies (http://HOST:PORT) or IP addresses of this machine; or "
        "`node`: each node of the cluster has its own public address (default: all share one)",
    )
    fetch.add_argument(
        "--rest-s", type=float, default=3600.0, help="cool-down of a throttled address in seconds (default 3600)"
    )
    fetch.add_argument(
        "--timeout-s", type=float, default=30.0, help="seconds without an answer of a media host (default 30)"
    )
    fetch.add_argument("--deadline-s", type=float, default=120.0, help="seconds for one attempt in all (default 120)")
    fetch.add_argument(
        "--yt-dlp",
        default="",
        metavar="OPTIONS",
        help='options for yt-dlp, in one argument: "--extractor-args youtube:player_client=tv --cookies cookies.txt"',
    )
    fetch.add_argument(
        "--allow-private-hosts",
        action="store_true",
        help="URLs of a list may lead to this machine, its network and other addresses that are not public (the host "
        "of --media-url always may)",
    )
    add_ray_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    _check(args)
    features = _features(args.features)
    listed = membership.refuse_repeated_sections(_read_list(args)).limited(args.limit)
    for note in listed.notes:
        print(f"note: {printable(note, 600)}", flush=True)
    # Ray, which `--help` and refused lists do not need.
    from jobs.ray_session import ray_session
    from pipeline.prepare.plan import PrepareSettings, prepare, remaining_work

    settings = PrepareSettings(
        output=output_uri(args.output),
        keep_silent=args.keep_silent,
        download_workers=args.download_workers,
        own_addresses=args.addresses == ["node"],
        fetch=_fetch_settings(args, listed),
        retry=_reasons(args.retry) | _now_allowed(args),
        keep_audio=output_uri(args.keep_audio, "--keep-audio") if args.keep_audio else None,
        features=features,
    )
    if args.dry_run:
        remaining = remaining_work(listed, settings)
        refused = progress.refused_line(listed.refused, len(listed.clips))
        for line in filter(None, [refused, remaining.line(), *remaining.notes]):
            print(line)
        own = settings.own_addresses
        print(
            progress.plan_of(
                len(remaining.clips),
                remaining.num_fetches,
                remaining.num_done,
                settings.fetch.rate_limit,
                own_addresses=own,
            )
        )
        return 0
    with ray_session(args.address, args.num_cpus):
        prepared = prepare(listed, settings, partial(print, flush=True))
        _write_report(settings.output, prepared)
    reports = prepared.splits
    print(f"\n{progress.table(reports)}\n{progress.advice(reports)}\ndata set: {settings.output}")
    if not any(split.info["clips"] for split in reports):
        raise DataError(f"no clip was prepared; see the reasons in SPLIT/failures.parquet below {settings.output}")
    _check_all_accounted_for(reports)
    return 0


def _write_report(output: str, prepared: "Prepared") -> None:
    """Write the data set's report. If this fails, the data set is complete without it."""
    import ray

    from pipeline.cluster import NOT_ON_GPU_NODES
    from pipeline.inspect.data_report import write_report
    from pipeline.prepare.plan import STAGE_CPUS
    from pipeline.ray_errors import user_errors_from_tasks

    try:
        with user_errors_from_tasks():
            listed = {split.split: split.num_listed for split in prepared.splits}
            write = ray.remote(num_cpus=STAGE_CPUS, label_selector=NOT_ON_GPU_NODES)(write_report)
            page = ray.get(write.remote(output, listed, prepared.stored))
    except (UserError, ray.exceptions.RayError) as err:
        reason = str(err).strip().splitlines()[-1]
        print(f"the data set is complete, but its report could not be written: {reason}", flush=True)
    else:
        print(f"report: {page}", flush=True)


def _check_all_accounted_for(reports: Sequence[progress.SplitReport]) -> None:
    for split in reports:
        if split.num_unaccounted:
            raise DataError(
                f"split {split.split}: {split.num_listed:,} clips are listed, {split.info['clips']:,} prepared and "
                f"{sum(split.info['failures'].values()):,} failed, so {split.num_unaccounted:,} are not accounted for; "
                "run the same command again while no other job writes to this output"
            )


def _check(args: argparse.Namespace) -> None:
    kind = _source(args)
    if (args.audio_dir or args.media_url) and not kind.needs_locate:
        raise ConfigError(
            f"--audio-dir and --media-url are only for --segments; {kind.option} names its own files, so leave them out"
        )
    if args.files_are_clips and not args.audio_dir:
        raise ConfigError("--files-are-clips needs --audio-dir; give both")
    if kind.brings_own_labels and (args.split or args.labels):
        raise ConfigError(f"--split and --labels are not for {kind.option}, which brings its own; leave them out")
    if args.split and kind.takes_several and len(_value(args, kind)) > 1:
        raise ConfigError("--split names one split; give one list, or leave it out")
    check_numbers(args, limit=MAX_CLIPS_LISTED, download_workers=10_000, fetches_per_hour=1e9)
    check_numbers(args, timeout_s=LONGEST_WAIT_S, deadline_s=LONGEST_WAIT_S, rest_s=LONGEST_COOL_DOWN_S)
    _split(args.yt_dlp)


def _fetch_settings(args: argparse.Namespace, listed: ClipList) -> FetchSettings:
    addresses = [] if args.addresses == ["node"] else args.addresses
    for address in addresses:
        rate_limiter.check_address(address)
    usual = YOUTUBE_PER_HOUR if locate.any_of_youtube(listed.clips["media"]) else math.inf
    rate_limit = RateLimit(
        fetches_per_hour=usual if args.fetches_per_hour is None else args.fetches_per_hour,
        addresses=tuple(addresses),
        cool_down_s=args.rest_s,
        own_hosts=_own_mirrors(args.media_url),
    )
    ytdlp = YtDlp.from_args(
        _split(args.yt_dlp),
        timeout_s=args.timeout_s,
        allow_private_hosts=args.allow_private_hosts,
        own_hosts=_own_hosts(args.media_url),
    )
    return FetchSettings(ytdlp=ytdlp, rate_limit=rate_limit, deadline_s=args.deadline_s)


def _split(ytdlp_options: str) -> list[str]:
    try:
        return shlex.split(ytdlp_options)
    except ValueError as err:
        raise ConfigError(f"--yt-dlp is no list of options: {err}; close each quote, as in a shell") from err


def _own_mirrors(media_url: str | None) -> frozenset[str]:
    """The host of --media-url as the rate limiter calls it. YouTube is nobody's own."""
    if media_url is None or re.match(locate.YOUTUBE_URL, media_url):
        return frozenset()
    return frozenset([locate.host_of(media_url)])


def _own_hosts(media_url: str | None) -> tuple[Endpoint, ...]:
    """The host of --media-url, unless the host contains the video id and so comes from the list."""
    try:
        return (endpoint_of(media_url),) if media_url else ()
    except ValueError as err:
        raise ConfigError(f"--media-url {media_url}: {err}") from err


def _features(given: str) -> FeatureSettings:
    """The settings that --features names or contains."""
    if given in FEATURES:
        return FEATURES[given]
    if given.lstrip().startswith("{"):
        return FeatureSettings.from_mapping(read_yaml(given, origin="--features"), origin="--features")
    if not storage.exists(given):
        raise ConfigError(
            f"no features {given!r}; use {' or '.join(FEATURES)}, the path of a YAML file, or a mapping in braces"
        )
    return FeatureSettings.from_mapping(read_yaml(storage.read_text(given), origin=given), origin=given)


def _now_allowed(args: argparse.Namespace) -> frozenset[Reason]:
    """Reasons of failed clips that an option now allows."""
    allowed = {Reason.SILENT: args.keep_silent, Reason.PRIVATE_HOST: args.allow_private_hosts}
    return frozenset(reason for reason, is_allowed in allowed.items() if is_allowed)


def _reasons(given: Sequence[str]) -> frozenset[Reason]:
    if given == ["all"]:
        return frozenset(Reason)
    if unknown := sorted(set(given) - set(Reason)):
        raise ConfigError(f"--retry {unknown[0]} is not a reason; use all, or one or more of {', '.join(Reason)}")
    return frozenset(map(Reason, given))


def _source(args: argparse.Namespace) -> Source:
    """The source whose option is given."""
    return next(kind for kind in registry.SOURCES if _value(args, kind) is not None)


def _value(args: argparse.Namespace, kind: Source) -> Any:
    return getattr(args, kind.option.removeprefix("--"))


def _read_list(args: argparse.Namespace) -> ClipList:
    kind = _source(args)
    return kind.read(Request(_value(args, kind), args.output, _locate(args), _vocabulary(args), args.split))


def _vocabulary(args: argparse.Namespace) -> LabelVocabulary | None:
    """The vocabulary of --labels, or None for the source's own."""
    return LabelVocabulary.from_csv(storage.read_text(args.labels), origin=args.labels) if args.labels else None


def _locate(args: argparse.Namespace) -> sources.Locate:
    if args.audio_dir:
        return locate.AudioFolder(args.audio_dir, files_are_clips=args.files_are_clips)
    return locate.url_template(args.media_url) if args.media_url else locate.youtube


if __name__ == "__main__":
    run(main)
