"""Tag recordings over HTTP, with a page to try the model on, on Ray Serve.

    python jobs/serve.py --checkpoint runs/1
    python jobs/serve.py --checkpoint runs/1 --port 9000 --max-mb 200 --max-recording-s 3600
    curl --data-binary @barking.ogg http://127.0.0.1:8000/tag

GET / is the page: drop a file, or use the microphone. POST /tag takes a recording in any container, or raw samples, and
answers with JSON. The server listens on this machine only, unless --host says otherwise; it has no log-in.
"""

# This file is long because it declares and checks the options of the service, which is in `pipeline/serve`.

if __name__ == "__main__":  # before the imports that follow, which take seconds
    from jobs import entry

    entry.begin(stopped="stopped")

import argparse
import ipaddress
import os
import socket
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ast_core.errors import ConfigError
from jobs.common import JobParser, add_ray_options, check_numbers, run
from pipeline.serve import web_runtime
from pipeline.serve.limits import Limits
from pipeline.tag.events import EventSettings

if TYPE_CHECKING:
    from pipeline.serve.door import StaticFile
    from pipeline.tag.predictor import Member
    from pipeline.tag.work import TagSettings

DEFAULT_THRESHOLD = 0.5
PACKAGES = ("fastapi", "starlette", "uvicorn")
DEFAULT_PORTS = {"https": 443, "http": 80}


def parser() -> argparse.ArgumentParser:
    limits = Limits()
    parser = JobParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", required=True, nargs="+", metavar="C", help="path or URI; the scores of several are averaged"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=8000, help="default 8000")
    parser.add_argument(
        "--allow-origin",
        nargs="+",
        default=[],
        metavar="URL",
        help="sites whose pages may use the server (CORS), such as that of a reverse proxy in front of it",
    )
    group = parser.add_argument_group("scores")
    group.add_argument("--window-s", type=float, metavar="S", help="length of a window (default: the model's input)")
    group.add_argument("--hop-s", type=float, metavar="S", help="from one window to the next (default: a window)")
    group.add_argument("--raw-scores", action="store_true", help="do not use the model's calibration.json")
    group.add_argument(
        "--threshold",
        type=float,
        metavar="P",
        help=f"score from which a class is heard (default: those of calibration.json, else {DEFAULT_THRESHOLD})",
    )
    group = parser.add_argument_group("page")
    group.add_argument(
        "--fetch-web-runtime",
        action="store_true",
        help="fetch onnxruntime-web with npm, once, so that the page can run the model in the browser",
    )
    group.add_argument(
        "--browser-model", metavar="FILE", help="the model for browsers, by export.py --format onnx-waveform"
    )
    group = parser.add_argument_group("limits")
    max_mb = limits.max_bytes / (1 << 20)
    group.add_argument("--max-mb", type=float, default=max_mb, metavar="MB", help="MiB of a body (default 64)")
    group.add_argument(
        "--max-recording-s", type=float, default=limits.max_recording_s, metavar="S", help="of sound (default 600)"
    )
    group.add_argument(
        "--upload-s", type=float, default=limits.upload_s, metavar="S", help="to send a body in (default 30)"
    )
    group.add_argument(
        "--timeout-s", type=float, default=limits.timeout_s, metavar="S", help="to answer in (default 60)"
    )
    group.add_argument(
        "--max-concurrent", type=int, default=limits.max_concurrent, metavar="N", help="requests at once (default 64)"
    )
    group.add_argument(
        "--per-second",
        type=float,
        default=limits.per_second,
        metavar="X",
        help="requests of an address; 0: no limit (default 20)",
    )
    group = parser.add_argument_group("where it runs")
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda if there is a GPU")
    group.add_argument(
        "--max-replicas", type=int, metavar="N", help="readers, and networks, at most (default: those with room)"
    )
    group.add_argument("--cpus-per-network", type=int, default=1, metavar="N", help="default 1")
    add_ray_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    check_numbers(args, threshold=1, window_s=3600, hop_s=3600, max_replicas=1000, cpus_per_network=1000)
    check_numbers(args, max_mb=4096, max_recording_s=86_400, upload_s=3600, timeout_s=3600, max_concurrent=10_000)
    check_numbers(args, port=65_535)
    if not 0 <= args.per_second <= 1e6:
        raise ConfigError(f"--per-second is {args.per_second:g}; use 0 (no limit) to 1,000,000")
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ConfigError(
            f"serving needs packages that are not installed ({', '.join(missing)}); "
            "in the project's folder, pip install -e '.[serve]'"
        )
    for origin in args.allow_origin:
        _check_origin(origin)
    _check_browser_model(args)
    if args.address == "local":
        _check_port(args.host, args.port)
    limits = Limits(
        max_bytes=int(args.max_mb * (1 << 20)),
        max_recording_s=args.max_recording_s,
        upload_s=args.upload_s,
        timeout_s=args.timeout_s,
        max_concurrent=args.max_concurrent,
        per_second=args.per_second,
    )
    _serve(args, limits)
    return 0


def _serve(args: argparse.Namespace, limits: Limits) -> None:
    """Serve until the process is told to stop."""
    # On a busy machine a replica answers later than within 0.1 s, and Ray Serve would print a warning each time.
    os.environ.setdefault("RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S", "1")
    import ray  # Ray and PyTorch take seconds to import

    from jobs.ray_session import ray_session
    from pipeline.serve.application import NAME, Scale, application
    from pipeline.serve.session import serve_session
    from pipeline.tag.predictor import read_members, score_lines, thresholds_of, tuning_lines, tuning_of
    from pipeline.tag.work import settings_for
    from pipeline.train.evaluation.checkpoint_evaluation import Place, uses_gpu

    members = read_members(args.checkpoint, calibrated=not args.raw_scores)
    settings = settings_for(
        members,
        thresholds_of(members, args.threshold, DEFAULT_THRESHOLD),
        window_s=args.window_s,
        hop_s=args.hop_s,
        events=EventSettings.of(tuning_of(members)),
    )
    lines = score_lines(members, args.threshold, DEFAULT_THRESHOLD, raw_scores=args.raw_scores)
    for line in lines + tuning_lines(members, settings.windows.window_s, settings.windows.hop_s):
        print(line, flush=True)
    files = _page_files(args, members, settings)
    with ray_session(args.address, args.num_cpus):
        use_gpu = uses_gpu(Place(args.device, args.address, lambda: ray_session(args.address)))
        resources, cpus_per_network = ray.cluster_resources(), args.cpus_per_network
        cpus = int(resources.get("CPU", 1))
        if args.address == "local" and cpus < 1 + cpus_per_network:
            raise ConfigError(f"a reader and a network take {1 + cpus_per_network} CPUs, Ray has {cpus}; --num-cpus")
        made = application(
            members,
            settings,
            limits,
            Scale.of(resources, use_gpu=use_gpu, cpus_per_network=cpus_per_network, max_replicas=args.max_replicas),
            files=files,
            hosts=own_names(args.host),
            origins=args.allow_origin,
        )
        with serve_session(made, NAME, host=args.host, port=args.port):
            host = f"[{args.host}]" if ":" in args.host else args.host
            print(f"serving {', '.join(args.checkpoint)} at http://{host}:{args.port}/  (Ctrl-C ends it)", flush=True)
            threading.Event().wait()


def _page_files(
    args: argparse.Namespace, members: "Sequence[Member]", settings: "TagSettings"
) -> "dict[str, StaticFile]":
    """The page and what it loads. Says where its scores come from."""
    from pipeline.serve import browser_model
    from pipeline.serve.page import page_files

    if args.fetch_web_runtime and web_runtime.read() is None:
        web_runtime.fetch()
    runtime, model = web_runtime.read(), None
    if args.browser_model is not None:
        (member,) = members  # `_check_browser_model`
        model = browser_model.given_model(args.browser_model, member)
        print(f"the page has {args.browser_model} for browsers, {len(model) / 1e6:.1f} MB", flush=True)
    elif runtime is None:
        print(f"{browser_model.ASKS_SERVER}; --fetch-web-runtime lets it run the model in the browser too", flush=True)
    else:
        model, line = browser_model.browser_model(members)
        print(line, flush=True)
    name = " + ".join(uri.rstrip("/").rpartition("/")[2] for uri in args.checkpoint)
    return page_files(browser_model.page_model(name, members, settings), model, runtime)


def _check_browser_model(args: argparse.Namespace) -> None:
    """Raises ConfigError if the page could not use the file of `--browser-model`."""
    if args.browser_model is None:
        return
    if len(args.checkpoint) > 1:
        raise ConfigError(
            "--browser-model is one model, and the scores of several checkpoints are their mean; leave it out, and the "
            "page asks the server"
        )
    if not args.fetch_web_runtime and web_runtime.read() is None:
        raise ConfigError("--browser-model needs onnxruntime-web, which has not been fetched; add --fetch-web-runtime")


def _check_origin(given: str) -> None:
    """Raises ConfigError unless a value of `--allow-origin` is a site as browsers name it: scheme, host and port."""
    if given == "*":
        raise ConfigError("--allow-origin is *, which would let every page use the server; name the sites")
    try:
        parts = urlsplit(given)
        scheme, host, port = parts.scheme, parts.hostname, parts.port
    except ValueError:  # no port, or no address
        scheme, host, port = "", None, None
    expected = "https://tags.example.org"
    if scheme in DEFAULT_PORTS and host and host.isascii():
        own_port = "" if port in (None, DEFAULT_PORTS[scheme]) else f":{port}"
        expected = f"{scheme}://{f'[{host}]' if ':' in host else host}{own_port}"
    if given != expected:
        raise ConfigError(f"--allow-origin is {given}; give a site as browsers name it, without a path: {expected}")


def _check_port(host: str, port: int) -> None:
    """Raises ConfigError if the server cannot listen there."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as err:
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {err.strerror}; give another --port or --host"
        ) from err


def own_names(host: str) -> Sequence[str]:
    """The names under which a server on this machine is called; empty: any, because it listens for other machines."""
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost"
    return ("127.0.0.1", "localhost", "::1", host) if is_loopback else ()


if __name__ == "__main__":
    run(main)
