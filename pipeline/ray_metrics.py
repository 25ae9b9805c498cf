"""The project's own metrics in Ray's: its dashboard and Prometheus show them under `ray_NAME`. See docs/cluster.md.

They can be made and counted without a running Ray, and then go nowhere.
"""

from functools import cache

from ray.util.metrics import Counter


@cache
def prepared_clips() -> Counter:
    """Clips by how their preparation ended: `prepared`, or the reason why it failed."""
    return Counter("prepare_clips", description="Clips that are prepared or have failed", tag_keys=("outcome",))


@cache
def fetches() -> Counter:
    """Fetches by how they ended: `fetched`, or the reason why they failed."""
    return Counter("prepare_fetches", description="Fetches from media hosts that have ended", tag_keys=("outcome",))
