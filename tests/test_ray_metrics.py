"""The counters of a preparation at Ray's metrics endpoint."""

import re
import time
import urllib.error
import urllib.request

import ray

from pipeline.prepare.progress import Progress

WITHIN_S = 120.0


def exported(pattern: str) -> dict[str, float]:
    """Values by outcome from the endpoint for Prometheus, which Ray updates every few seconds."""
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            text = response.read().decode()
    except urllib.error.URLError:
        return {}  # Ray's agent has not started yet
    found = re.finditer(rf'^{pattern}{{.*outcome="(\w+)".*}} (\S+)$', text, re.MULTILINE)
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
