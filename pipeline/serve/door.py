"""The HTTP side of the service, an ASGI application: limits, the bodies of requests, JSON. It imports neither Ray nor
PyTorch, and knows no file of the server but those that the page loads.
"""

import asyncio
import hashlib
import ipaddress
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ast_core.errors import UserError
from pipeline.serve.limits import Limits, RateLimit
from pipeline.serve.refusals import Refusal
from pipeline.serve.upload import PCM_DTYPES, Pcm, Upload

logger = logging.getLogger(__name__)

MAX_TOP = 1000
MAX_BODIES_IN_MEMORY = 8
"""Bodies of the largest size that all requests together may have in memory, from their first byte to the answer."""

LARGE_BYTES = 1 << 20
"""A larger file of the page counts for the rate limit of downloads: the model, and the WebAssembly that runs it."""

HEALTH_S, CHECK_EVERY_S = 10.0, 2.0
RETRY_S = 2.0
"""After how long a client that came at a bad time may try again."""

LINES = "application/x-ndjson"
"""The type of an answer that has a line of JSON for each step of the tagging, and then one with the tags."""

FORM, MAX_PARTS = "multipart/form-data", 100

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # With these two a browser lets the page use several threads.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True)
class StaticFile:
    """A file that the page loads."""

    content: bytes
    media_type: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Door:
    """What the application needs.

    Args:
        tag: the answer for an upload, as JSON. Raises Refusal or UserError.
        tag_in_steps: the same, with how far it is before the answer.
        check: raises an error if the service cannot tag.
        files: what GET gives, by path.
        hosts: names under which the server may be called. Empty: any. A page of another site whose name leads to this
            machine (DNS rebinding) has another one.
        origins: sites whose pages may use the service, as browsers name them: https://tags.example.org. One of them may
            be that of a reverse proxy in front of this server, so their names are allowed besides `hosts`.
    """

    tag: Callable[[Upload], Awaitable[dict[str, Any]]]
    tag_in_steps: Callable[[Upload], AsyncGenerator[dict[str, Any]]]
    check: Callable[[], Awaitable[None]]
    limits: Limits
    files: Mapping[str, StaticFile]
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()

    def application(self) -> Starlette:
        state = _State(self)
        routes = [Route("/tag", state.tag, methods=["POST"]), Route("/health", state.health)]
        routes += [Route(path, state.file) for path in self.files]
        cors = [Middleware(CORSMiddleware, allow_origins=list(self.origins), allow_methods=["POST", "GET"])]
        return Starlette(
            routes=routes,
            middleware=cors if self.origins else [],
            exception_handlers={Refusal: _refused, HTTPException: _http_error, Exception: _fault},
        )


class _State:
    """The requests in progress."""

    def __init__(self, door: Door) -> None:
        self.door, self.limits = door, door.limits
        self._etags = {path: f'"{hashlib.sha256(file.content).hexdigest()}"' for path, file in door.files.items()}
        num_large = sum(map(_is_large, door.files.values()))
        self._rate = RateLimit(door.limits.per_second)
        self._downloads = RateLimit(door.limits.per_second, at_once=num_large)  # a page loads all of them
        self._hosts = {*door.hosts, *(urlsplit(origin).hostname for origin in door.origins)} if door.hosts else set()
        self._uploads = Counter[str]()  # by address
        self._tagging = self._bytes = 0
        self._check: asyncio.Future[None] | None = None
        self._checked_s = 0.0

    async def tag(self, request: Request) -> Response:
        self._check_caller(request)
        self._check_rate(self._rate, request)
        upload = _upload_of(request)
        with ExitStack() as held:
            body = await self._body(request, held.enter_context(self._in_memory()))
            # Other types are not looked at: curl says application/x-www-form-urlencoded of any file.
            if request.headers.get("content-type", "").lower().startswith(FORM):
                body = file_of_form(body, request.headers["content-type"])
            if not body:
                raise Refusal(HTTPStatus.BAD_REQUEST, "bad_request", "the body is empty; it must be a recording")
            if self._tagging >= self.limits.max_concurrent:
                raise _busy(f"{self._tagging} recordings are being tagged")
            headers = HEADERS | {"Cache-Control": "no-store"}
            if LINES in request.headers.get("accept", ""):
                steps = self._steps(upload(body), held.pop_all())
                first = await anext(steps)  # a refusal before it still decides the status
                return StreamingResponse(_lines(first, steps), media_type=LINES, headers=headers)
            with self._being_tagged():
                answer = await asyncio.wait_for(self.door.tag(upload(body)), self.limits.timeout_s)
            return JSONResponse(answer, headers=headers)

    async def _steps(self, upload: Upload, held: ExitStack) -> AsyncIterator[dict[str, Any]]:
        """What `Door.tag_in_steps` gives, within the time for an answer. Closes `held` at its end."""
        ends_s = time.monotonic() + self.limits.timeout_s
        with held, self._being_tagged():
            async with aclosing(self.door.tag_in_steps(upload)) as steps:
                while (step := await asyncio.wait_for(anext(steps, None), ends_s - time.monotonic())) is not None:
                    yield step

    @contextmanager
    def _being_tagged(self) -> Iterator[None]:
        """Count a recording while it is tagged."""
        self._tagging += 1
        try:
            yield
        except TimeoutError:
            limit = f"not tagged within {self.limits.timeout_s:g} s"
            raise Refusal(HTTPStatus.GATEWAY_TIMEOUT, "timeout", limit) from None
        finally:
            self._tagging -= 1

    def _checked(self) -> "asyncio.Future[None]":
        """A check in progress, or a recent one: many callers at once take one window's work."""
        now_s = time.monotonic()
        if self._check is None or (self._check.done() and now_s - self._checked_s > CHECK_EVERY_S):
            self._check, self._checked_s = asyncio.ensure_future(self.door.check()), now_s
        return self._check

    async def health(self, request: Request) -> Response:
        self._check_caller(request)
        try:
            await asyncio.wait_for(asyncio.shield(self._checked()), HEALTH_S)
        except Exception as err:
            message = f"the tagger does not answer ({type(err).__name__})"
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "unhealthy", message) from err
        counts = {"receiving": self._uploads.total(), "tagging": self._tagging}
        return JSONResponse({"status": "ok"} | counts, headers=HEADERS | {"Cache-Control": "no-store"})

    async def file(self, request: Request) -> Response:
        self._check_caller(request)
        file, etag = self.door.files[request.url.path], self._etags[request.url.path]
        headers = HEADERS | dict(file.headers) | {"ETag": etag}
        known = request.headers.get("if-none-match", "").split(",")
        if etag in (one.strip().removeprefix("W/") for one in known):  # a proxy that compresses adds the W/
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
        if _is_large(file):
            self._check_rate(self._downloads, request)
        return Response(file.content, media_type=file.media_type, headers=headers)

    def _check_rate(self, rate: RateLimit, request: Request) -> None:
        wait_s = rate.wait_s(_address(request))
        if wait_s:
            limit = f"{self.limits.per_second:g} requests per second are allowed from one address"
            raise Refusal(HTTPStatus.TOO_MANY_REQUESTS, "rate", limit, retry_after_s=wait_s)

    def _check_caller(self, request: Request) -> None:
        """Refuse names of other machines, and pages of other sites."""
        try:
            host = (urlsplit(f"//{request.headers.get('host', '')}").hostname or "").lower()
        except ValueError:  # no address, as with one bracket
            host = ""
        if self._hosts and host not in self._hosts:
            raise Refusal(HTTPStatus.FORBIDDEN, "host", f"this server is not called {host!r}")
        origin = request.headers.get("origin")
        own = {f"http://{request.headers.get('host')}", f"https://{request.headers.get('host')}"}
        if origin is not None and origin not in own | set(self.door.origins):
            raise Refusal(HTTPStatus.FORBIDDEN, "origin", "pages of other sites may not use this server")

    async def _body(self, request: Request, took: Callable[[int], None]) -> bytes:
        """The body, within the limits of size, time and memory. `took` is called with the size of each part."""
        limits = self.limits
        declared = int(request.headers.get("content-length") or 0)
        parts: list[bytes] = []
        with self._receiving(_address(request)):
            try:
                async with asyncio.timeout(limits.upload_s):
                    num_bytes = 0
                    async for part in request.stream():
                        num_bytes += len(part)
                        if max(num_bytes, declared) > limits.max_bytes:
                            parts.clear()
                            if num_bytes > 2 * limits.max_bytes:
                                break  # a client that goes on sending may not see the answer
                            continue
                        took(len(part))
                        parts.append(part)
            except TimeoutError:
                limit = f"the body was not complete after {limits.upload_s:g} s"
                raise Refusal(HTTPStatus.REQUEST_TIMEOUT, "upload_timeout", limit) from None
            except ClientDisconnect:
                raise Refusal(HTTPStatus.BAD_REQUEST, "disconnected", "the client went away") from None
            if max(num_bytes, declared) > limits.max_bytes:
                limit = f"the body has more than {limits.max_bytes:,} bytes"
                raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_large", limit)
            return b"".join(parts)

    @contextmanager
    def _receiving(self, address: str) -> Iterator[None]:
        """Count a body while it is received."""
        if self._uploads.total() >= self.limits.max_uploads:
            raise _busy(f"{self._uploads.total()} bodies are being received")
        if self._uploads[address] >= self.limits.max_uploads_of_address:
            raise _busy(f"{self._uploads[address]} bodies from this address are being received")
        self._uploads[address] += 1
        try:
            yield
        finally:
            self._uploads -= Counter([address])  # addresses without a body are forgotten

    @contextmanager
    def _in_memory(self) -> Iterator[Callable[[int], None]]:
        """Count the bytes of a body. The block calls the result with the size of each part that it gets."""
        mine = 0

        def took(num_bytes: int) -> None:
            nonlocal mine
            if self._bytes + num_bytes > MAX_BODIES_IN_MEMORY * self.limits.max_bytes:
                raise _busy("the recordings that are being received and tagged fill the memory for them")
            mine += num_bytes
            self._bytes += num_bytes

        try:
            yield took
        finally:
            self._bytes -= mine


def _is_large(file: StaticFile) -> bool:
    return len(file.content) > LARGE_BYTES


async def _lines(first: dict[str, Any], others: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """A line of JSON for each step, or for the reason why there is no further one."""
    try:
        yield f"{json.dumps(first)}\n"
        async for step in others:
            yield f"{json.dumps(step)}\n"
    except Exception as err:  # the status is sent already
        yield f"{json.dumps(_refusal_of(err).to_json())}\n"
        if not isinstance(err, Refusal):
            logger.exception("an error after the first step of an answer")  # raised, it would cut the answer off


def _busy(why: str) -> Refusal:
    return Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "busy", f"{why}; try again", retry_after_s=RETRY_S)


def _address(request: Request) -> str:
    """The address whose rate is counted. IPv6 addresses of the same network of 64 bits are one client."""
    host = request.client.host if request.client else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.version == 6 and address.ipv4_mapped is not None:  # a server on `::` sees IPv4 clients so
        return str(address.ipv4_mapped)
    return host if address.version == 4 else str(ipaddress.ip_network(f"{host}/64", strict=False))


def _upload_of(request: Request) -> Callable[[bytes], Upload]:
    """What the request's headers and parameters say about its body."""
    if request.headers.get("content-type", "").lower().startswith("application/json"):
        message = "the body is JSON; send the recording itself: curl --data-binary @FILE"
        raise Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "bad_request", message)
    query = request.query_params
    if unknown := set(query) - {"top", "windows", "threshold", "pcm", "rate"}:
        raise _bad(f"no parameter {min(unknown)!r}; use top, windows, threshold, pcm, rate")
    pcm = None
    if "pcm" in query:
        if query["pcm"] not in PCM_DTYPES:
            raise _bad(f"pcm is {query['pcm']!r}; use {' or '.join(PCM_DTYPES)}")
        pcm = Pcm(query["pcm"], int(_number(query.get("rate", ""), "rate", 1000, 384_000)))
    elif "rate" in query:
        raise _bad("rate is for raw samples; give pcm too")
    threshold = _number(query["threshold"], "threshold", 0, 1) if "threshold" in query else None
    top = int(_number(query.get("top", "10"), "top", 1, MAX_TOP))
    if query.get("windows", "0") not in ("0", "1"):
        raise _bad(f"windows is {query['windows']!r}; use 0 or 1")
    return lambda body: Upload(body, pcm, top, query.get("windows") == "1", threshold)


def file_of_form(body: bytes, content_type: str) -> bytes:
    """The first file of a form (RFC 7578), as `curl -F file=@FILE` and browsers send it.

    The parser of Python's `email` package gives the same, but takes a second of CPU time for 20 MB.

    Raises:
        Refusal: the form has no file.
    """
    header = Message()
    header["Content-Type"] = content_type
    if boundary := header.get_boundary():
        parts, edge = b"\r\n" + body, f"\r\n--{boundary}".encode()
        begin = parts.find(edge)
        for _ in range(MAX_PARTS):
            end = parts.find(edge, begin + len(edge))
            if begin < 0 or end < 0:
                break
            headers, _, content = parts[begin + len(edge) : end].partition(b"\r\n\r\n")
            if b"filename" in headers.lower():
                return content
            begin = end
    raise _bad("the form has no complete file; send one: curl -F file=@FILE, or curl --data-binary @FILE")


def _number(text: str, name: str, least: float, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        raise _bad(f"{name} is {text!r}; use {least:g} to {most:g}")
    return value


def _bad(message: str) -> Refusal:
    return Refusal(HTTPStatus.BAD_REQUEST, "bad_request", message)


async def _refused(request: Request, err: Exception) -> Response:
    assert isinstance(err, Refusal)
    headers = dict(HEADERS)
    if err.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(err.retry_after_s)))
    return JSONResponse(err.to_json(), err.status, headers)


async def _http_error(request: Request, err: Exception) -> Response:
    """No such path or method."""
    assert isinstance(err, HTTPException)
    reason = {404: "not_found", 405: "method"}.get(err.status_code, "bad_request")
    return await _refused(request, Refusal(err.status_code, reason, err.detail))


async def _fault(request: Request, err: Exception) -> Response:
    return await _refused(request, _refusal_of(err))


def _refusal_of(err: Exception) -> Refusal:
    """What the client is told. The text of an error that is not the client's is for the server's log: it may name
    files.
    """
    if isinstance(err, Refusal):
        return err
    if isinstance(err, UserError):
        return Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "setup", "the server lacks something")
    return Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "internal", "an error of the server")
