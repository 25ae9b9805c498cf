"""The service on Ray Serve: a door, readers and networks.

| deployment | replicas | what it does |
|---|---|---|
| `Front` | 1 | HTTP, limits, the page (`front.py`). One replica, so that the limits count all requests. |
| `Reader` | scale | decodes in sandboxes, computes features, finds events (`recording_tagger.py`) |
| `Network` | scale | scores windows, in batches of several recordings |
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ray import serve
from ray.serve.handle import DeploymentHandle

from ast_core.errors import UserError
from pipeline.serve.door import StaticFile
from pipeline.serve.front import Front
from pipeline.serve.limits import Limits
from pipeline.serve.recording_tagger import RecordingTagger
from pipeline.serve.refusals import Refusal
from pipeline.serve.upload import Upload
from pipeline.tag.predictor import Member, Predicted, Predictor, labels_of
from pipeline.tag.windows import BATCH_WINDOWS
from pipeline.tag.work import TagSettings

logger = logging.getLogger("ray.serve")

NAME = "ast-ray"
SANDBOXES = 4
"""Sandboxes of a reader. A recording that takes all of its time holds one of them."""

BATCH_WAIT_S = 0.005
"""Time that a batch waits for windows of other requests."""

REPLICA_REQUESTS = 1000
"""Requests that Ray Serve gives to a replica of `Front` and `Network` at once. `Front` itself says no earlier."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Where the deployments run."""

    max_replicas: int = 1
    """Replicas of readers and of networks that there may be."""
    device: str = "cpu"
    cpus_per_network: float = 1
    gpus_per_network: float = 0


class Network:
    """Scores windows of features."""

    def __init__(self, members: Sequence[Member], has_frames: bool, device: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.predictor = Predictor(members, torch.device(device), embeddings=False, frames=has_frames)

    async def score(self, fbank_NTM: np.ndarray) -> Predicted:
        """The results for the windows of one request."""
        predicted: Predicted = await self._score(fbank_NTM)
        return predicted

    @serve.batch(
        max_batch_size=BATCH_WINDOWS,
        batch_wait_timeout_s=BATCH_WAIT_S,
        batch_size_fn=lambda items: sum(map(len, items)),
    )
    async def _score(self, items: list[np.ndarray]) -> list[Predicted]:
        predicted = await asyncio.to_thread(self.predictor, np.concatenate(items))
        ends = np.cumsum([len(item) for item in items])[:-1]
        scores = np.split(predicted.scores_NC, ends)
        frames = predicted.frame_scores_NTC
        frame_scores = [None] * len(items) if frames is None else np.split(frames, ends)
        return [Predicted(own, None, of_frames) for own, of_frames in zip(scores, frame_scores, strict=True)]


class _RemoteScorer:
    """The networks, for a thread of a reader."""

    def __init__(self, network: DeploymentHandle, input_frames: int, timeout_s: float) -> None:
        self._network, self.input_frames, self._timeout_s = network, input_frames, timeout_s

    def __call__(self, fbank_NTM: np.ndarray) -> Predicted:
        predicted: Predicted = self._network.score.remote(fbank_NTM).result(timeout_s=self._timeout_s)
        return predicted


class Reader:
    """Tags recordings, with scores by `Network`."""

    def __init__(
        self, network: DeploymentHandle, settings: TagSettings, labels: Any, input_frames: int, limits: Limits
    ) -> None:
        torch.set_num_threads(1)
        self.input_frames, self.num_mel_bins = input_frames, settings.windows.features.num_mel_bins
        self.scorer = _RemoteScorer(network, input_frames, limits.timeout_s)
        self.tagger = RecordingTagger(settings, labels, self.scorer, limits, num_readers=SANDBOXES)

    async def tag(self, upload: Upload, on_read: Callable[[float], None] = lambda _: None) -> dict[str, Any] | Refusal:
        """The answer. A refusal is returned, because an error that is raised would become one of Ray's."""
        try:
            return await asyncio.to_thread(self.tagger, upload, on_read)
        except Refusal as refusal:
            return refusal
        except UserError as err:
            logger.error("the service lacks something: %s", err)
            return Refusal(503, "setup", "the server lacks something that it needs")

    async def tag_in_steps(self, upload: Upload) -> AsyncIterator[dict[str, Any] | Refusal]:
        """How far the tagging is, as `{"read_s": …}`, and then what `tag` returns."""
        loop, steps = asyncio.get_running_loop(), asyncio.Queue[float | None]()

        def on_read(read_s: float) -> None:
            loop.call_soon_threadsafe(steps.put_nowait, read_s)

        answer = asyncio.create_task(self.tag(upload, on_read))
        answer.add_done_callback(lambda _: steps.put_nowait(None))
        while (read_s := await steps.get()) is not None:
            yield {"read_s": round(read_s, 3)}
        yield await answer

    async def check(self) -> None:
        """Raises an error if no network scores a window."""
        window = np.zeros((1, self.input_frames, self.num_mel_bins), np.float16)
        await asyncio.to_thread(self.scorer, window)


def _scaling(most: int, ongoing_of_a_replica: int) -> dict[str, Any]:
    """Options of a deployment that gets another replica, of at most `most`, while its replicas have more requests.

    `Front` has them too: at the end Ray Serve warns of a deployment without, if others of the application have them.
    """
    scaling = {"min_replicas": 1, "max_replicas": most, "target_ongoing_requests": ongoing_of_a_replica}
    return {"autoscaling_config": scaling}


def application(
    members: Sequence[Member],
    settings: TagSettings,
    limits: Limits,
    scale: Scale,
    *,
    files: dict[str, StaticFile],
    hosts: Sequence[str],
    origins: Sequence[str],
) -> serve.Application:
    """The three deployments, to be given to `serve.run`."""
    input_frames = max(member.config.recipe.input_tdim for member in members)
    of_network = {"num_cpus": scale.cpus_per_network, "num_gpus": scale.gpus_per_network}
    network = serve.deployment(
        ray_actor_options=of_network,
        max_ongoing_requests=REPLICA_REQUESTS,
        **_scaling(scale.max_replicas, 2 * BATCH_WINDOWS),
    )(Network).bind(members, settings.frame_s is not None, scale.device, max(1, int(scale.cpus_per_network)))
    reader = serve.deployment(
        ray_actor_options={"num_cpus": 1}, max_ongoing_requests=SANDBOXES, **_scaling(scale.max_replicas, SANDBOXES)
    )(Reader).bind(network, settings, labels_of(members), input_frames, limits)
    return serve.deployment(
        ray_actor_options={"num_cpus": 0}, max_ongoing_requests=REPLICA_REQUESTS, **_scaling(1, REPLICA_REQUESTS)
    )(Front).bind(reader, limits, files, hosts, origins)
