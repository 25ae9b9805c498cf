"""The door as a deployment of Ray Serve. It has a module of its own, so that its process does not import PyTorch."""

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ray import ObjectRef, serve
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette

from pipeline.serve.door import Door, StaticFile
from pipeline.serve.limits import Limits
from pipeline.serve.refusals import Refusal
from pipeline.serve.upload import Upload


@serve.ingress()
class Front:
    """The door to the service.

    Args:
        files: reference to the files that the page loads, by path.
    """

    def __init__(
        self,
        reader: DeploymentHandle,
        network: DeploymentHandle,
        limits: Limits,
        files: "ObjectRef[dict[str, StaticFile]]",
        hosts: Sequence[str],
        origins: Sequence[str],
    ) -> None:
        async def tag(upload: Upload) -> dict[str, Any]:
            answer = await reader.tag.remote(upload)
            if isinstance(answer, Refusal):
                raise answer
            return answer

        async def tag_in_steps(upload: Upload) -> AsyncGenerator[dict[str, Any]]:
            steps: Any = reader.options(stream=True).tag_in_steps.remote(upload)
            async for step in steps:
                if isinstance(step, Refusal):
                    raise step
                yield step

        async def check() -> None:
            await network.check.remote()  # not by a reader: all of these may be busy

        self.door = Door(
            tag=tag,
            tag_in_steps=tag_in_steps,
            check=check,
            limits=limits,
            files=files.future().result(),  # ray.get would warn that this is an asynchronous actor
            hosts=hosts,
            origins=origins,
        )

    def __serve_build_asgi_app__(self) -> Starlette:
        return self.door.application()
