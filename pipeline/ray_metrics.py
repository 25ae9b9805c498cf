"""The project's own metrics in Ray's: its dashboard and Prometheus show them under `ray_NAME`. See docs/cluster.md.

They can be made and counted without a running Ray, and then go nowhere.
"""

from functools import cache
from typing import Any


@cache
def prepared_clips() -> Any:
    """Clips by how their preparation ended: `prepared`, or the reason why it failed."""
    from ray.util.metrics import Counter

    return Counter("prepare_clips", description="Clips that are prepared or have failed", tag_keys=("outcome",))


@cache
def fetches() -> Any:
    """Fetches by how they ended: `fetched`, or the reason why they failed."""
    from ray.util.metrics import Counter

    return Counter("prepare_fetches", description="Fetches from media hosts that have ended", tag_keys=("outcome",))


@cache
def training() -> dict[str, Any]:
    """The last figures of a run, by their names in metrics.jsonl, and the step that they belong to."""
    from ray.util.metrics import Gauge

    descriptions = {
        "step": "Steps that the run has done",
        "clips_per_s": "Clips per second that all ranks train on",
        "data_wait_share": "Share of the time in which rank 0 waits for data",
    }
    return {
        name: Gauge(f"train_{name}", description=description, tag_keys=("run",))
        for name, description in descriptions.items()
    }
