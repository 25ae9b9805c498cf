"""A door to the service in this process, without Ray."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from pipeline.serve.door import Door
from pipeline.serve.limits import Limits
from pipeline.serve.upload import Upload


@contextmanager
def serving(door: Door) -> Iterator[str]:
    """The address of a server on loopback, until the block ends."""
    server = uvicorn.Server(uvicorn.Config(door.application(), port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        threading.Event().wait(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


def door(
    tag: Callable[[Upload], Awaitable[dict[str, Any]]] | None = None, *, files: Any = None, **changes: Any
) -> Door:
    """A door whose answers say how many bytes came, unless there is a `tag`."""
    limits = {name: changes.pop(name) for name in list(changes) if name in Limits.__dataclass_fields__}

    async def count(upload: Upload) -> dict[str, Any]:
        return {"bytes": len(upload.body), "top": upload.top, "rate_hz": upload.pcm and upload.pcm.rate_hz}

    async def steps(upload: Upload) -> AsyncGenerator[dict[str, Any]]:
        yield {"read_s": 1.0}
        yield await (tag or count)(upload)

    async def check() -> None:
        return None

    usual = {"tag": tag or count, "tag_in_steps": steps, "check": check, "limits": Limits(**limits)}
    return Door(**usual | {"files": files or {}} | changes)


def in_thread(function: Callable[[Upload], dict[str, Any]]) -> Callable[[Upload], Awaitable[dict[str, Any]]]:
    async def tag(upload: Upload) -> dict[str, Any]:
        return await asyncio.to_thread(function, upload)

    return tag
