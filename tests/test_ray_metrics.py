"""The figures of a preparation and of a training at Ray's metrics endpoint."""

import re
import time
import urllib.error
import urllib.request
from pathlib import Path

import ray

from pipeline.prepare.progress import Progress
from pipeline.train.metrics_log import RunLog

WITHIN_S = 120.0


def exported(pattern: str, tag: str = "outcome") -> dict[str, float]:
    """Values by a tag from the endpoint for Prometheus, which Ray updates every few seconds."""
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            text = response.read().decode()
    except urllib.error.URLError:
        return {}  # Ray's agent has not started yet
    found = re.finditer(rf'^{pattern}{{.*\b{tag}="([^"]+)".*}} (\S+)$', text, re.MULTILINE)
    return {match[1]: float(match[2]) for match in found}


def test_ray_exports_the_clips_of_a_preparation_by_outcome(local_ray: None):
    progress = Progress(10, print)
    progress.add(None, 7)
    progress.add("silent", 2)
    progress.add(None, 1)
    deadline_s = time.monotonic() + WITHIN_S
    at_least = {"prepared": 8, "silent": 2}  # other tests of this process may have counted too
    while any(exported("ray_prepare_clips_total").get(key, 0) < number for key, number in at_least.items()):
        assert time.monotonic() < deadline_s
        time.sleep(0.5)


def test_ray_exports_the_last_figures_of_each_run(local_ray: None, tmp_path: Path):
    runs = [str(tmp_path / name) for name in ("one", "zwölf")]
    for run, rate in zip(runs, (40.5, 90.0), strict=True):
        log = RunLog(run, 0)
        log.step(epoch=1, step=20, values={"loss": 0.5, "clips_per_s": 1.0, "data_wait_share": 0.5})
        log.step(epoch=1, step=40, values={"loss": 0.5, "clips_per_s": rate, "data_wait_share": 0.01, "mfu": None})
        log.close()
    expected = {"clips_per_s": [40.5, 90.0], "step": [40, 40], "data_wait_share": [0.01, 0.01]}
    deadline_s = time.monotonic() + WITHIN_S
    for name, values in expected.items():
        while [exported(f"ray_train_{name}", "run").get(run.replace("ö", "%C3%B6")) for run in runs] != values:
            assert time.monotonic() < deadline_s
            time.sleep(0.5)
