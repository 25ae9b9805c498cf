"""The service on Ray Serve: a door, readers and networks.

| deployment | replicas | what it does |
|---|---|---|
| `Front` | 1 | HTTP, limits, the page (`front.py`). One replica, so that the limits count all requests. |
| `Reader` | scale | decodes in sandboxes, computes features, finds events (`recording_tagger.py`) |
| `Network` | scale | scores windows, in batches of several recordings |
"""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray import ObjectRef, serve
from ray.serve.exceptions import RequestCancelledError
from ray.serve.handle import DeploymentHandle

from ast_core.errors import UserError
from pipeline.serve.door import StaticFile
from pipeline.serve.front import Front
from pipeline.serve.limits import Limits
from pipeline.serve.recording_tagger import CALL_WINDOWS, RecordingTagger
from pipeline.serve.refusals import Refusal
from pipeline.serve.upload import Upload
from pipeline.tag.predictor import Member, Predicted, Predictor, labels_of
from pipeline.tag.windows import BATCH_WINDOWS
from pipeline.tag.work import TagSettings

logger = logging.getLogger("ray.serve")

NAME = "ast-ray"
SANDBOXES = 4
"""Sandboxes of a reader. A recording that takes all of its time holds one of them."""

READER_CPUS = 1

NETWORK_CALLS = BATCH_WINDOWS // CALL_WINDOWS
"""Calls with a full batch: with more of them open, windows wait while the network computes. A recording has one call
open at a time, so one busy reader keeps one network busy, and a second reader asks for a second network."""

BATCH_WAIT_S = 0.005
"""Time that a batch waits for windows of other requests."""

REPLICA_REQUESTS = 1000
"""Requests that Ray Serve gives to a replica of `Front` and `Network` at once. `Front` itself says no earlier."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Where the deployments run, and how many replicas of them there may be."""

    max_readers: int = 1
    max_networks: int = 1
    device: str = "cpu"
    cpus_per_network: int = 1

    @classmethod
    def of(
        cls, resources: Mapping[str, float], *, use_gpu: bool, cpus_per_network: int, max_replicas: int | None
    ) -> "Scale":
        """As many replicas as these resources have room for, unless `max_replicas` readers and networks are wanted."""
        cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
        if use_gpu:
            max_networks = max(1, gpus)  # a cluster may get its first GPU later
            max_readers = max(1, (cpus - max_networks * cpus_per_network) // READER_CPUS)
        else:
            max_readers = max_networks = max(1, cpus // (READER_CPUS + cpus_per_network))
        return cls(
            max_readers=max_replicas or max_readers,
            max_networks=max_replicas or max_networks,
            device="cuda" if use_gpu else "cpu",
            cpus_per_network=cpus_per_network,
        )


class Network:
    """Scores windows of features.

    Args:
        members: reference to the models.
    """

    def __init__(self, members: "ObjectRef[Sequence[Member]]", has_frames: bool, device: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        own = members.future().result()  # ray.get would warn that this is an asynchronous actor
        self.predictor = Predictor(own, torch.device(device), embeddings=False, frames=has_frames)
        self.num_mel_bins = own[0].config.features.num_mel_bins

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

    async def check(self) -> None:
        """Raises an error if no window can be scored. It waits for no batch, so a busy network answers in time."""
        window = np.zeros((1, self.predictor.input_frames, self.num_mel_bins), np.float16)
        await asyncio.to_thread(self.predictor, window)


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
        scorer = _RemoteScorer(network, input_frames, limits.timeout_s)
        self.tagger = RecordingTagger(settings, labels, scorer, limits, num_readers=SANDBOXES)

    async def tag(self, upload: Upload, on_read: Callable[[float], None] = lambda _: None) -> dict[str, Any] | Refusal:
        """The answer. A refusal is returned, because an error that is raised would become one of Ray's."""
        is_over = threading.Event()
        try:
            return await asyncio.to_thread(self.tagger, upload, on_read, lambda: not is_over.is_set())
        except Refusal as refusal:
            return refusal
        except UserError as err:
            logger.error("the service lacks something: %s", err)
            return Refusal(503, "setup", "the server lacks something that it needs")
        except RequestCancelledError:  # with this request, Ray Serve has cancelled its call of the network
            return Refusal(504, "timeout", "nobody waits for the answer")
        finally:
            is_over.set()  # also when Ray Serve cancels this call: the client has its 504, or has gone

    async def tag_in_steps(self, upload: Upload) -> AsyncGenerator[dict[str, Any] | Refusal]:
        """How far the tagging is, as `{"read_s": …}`, and then what `tag` returns."""
        loop, steps = asyncio.get_running_loop(), asyncio.Queue[float | None]()

        def on_read(read_s: float) -> None:
            loop.call_soon_threadsafe(steps.put_nowait, read_s)

        answer = asyncio.create_task(self.tag(upload, on_read))
        answer.add_done_callback(lambda _: steps.put_nowait(None))
        try:
            while (read_s := await steps.get()) is not None:
                yield {"read_s": round(read_s, 3)}
            yield await answer
        finally:
            answer.cancel()


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
    """The three deployments, to be given to `serve.run`.

    Models and files are references, because Ray Serve keeps the arguments of deployments in the cluster's database,
    which takes no hundreds of megabytes.
    """
    input_frames = max(member.config.recipe.input_tdim for member in members)
    of_network = {"num_cpus": scale.cpus_per_network, "num_gpus": int(scale.device == "cuda")}
    network = serve.deployment(
        ray_actor_options=of_network,
        max_ongoing_requests=REPLICA_REQUESTS,
        **_scaling(scale.max_networks, NETWORK_CALLS),
    )(Network).bind(ray.put(members), settings.frame_s is not None, scale.device, scale.cpus_per_network)
    reader = serve.deployment(
        ray_actor_options={"num_cpus": READER_CPUS},
        max_ongoing_requests=SANDBOXES,
        **_scaling(scale.max_readers, SANDBOXES),
    )(Reader).bind(network, settings, labels_of(members), input_frames, limits)
    return serve.deployment(
        ray_actor_options={"num_cpus": 0}, max_ongoing_requests=REPLICA_REQUESTS, **_scaling(1, REPLICA_REQUESTS)
    )(Front).bind(reader, network, limits, ray.put(files), hosts, origins)
