"""Ray Serve for the duration of a service: start it, or say in one line why this is not possible, and end it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from ast_core.errors import ConfigError, UserError

LOGGING = {"log_level": "WARNING", "enable_access_log": False}
"""Ray Serve would write three lines for each request to the terminal."""


@contextmanager
def serve_session(made: serve.Application, name: str, *, host: str, port: int) -> Iterator[None]:
    """The application on Ray Serve, until the block ends. Its HTTP server is on the head node.

    Raises:
        ConfigError: Ray Serve already runs on the cluster.
        UserError: the application does not start.
    """
    _check_not_running()
    # It says of its own serve.start that its options would not be applied.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        _start(made, name, host, port)
        yield
    finally:
        _end(name)


def _check_not_running() -> None:
    """A cluster has one Ray Serve. It would keep its HTTP server, which need not listen where ours is to."""
    status = serve.status()
    if status.applications or status.proxies:
        names = ", ".join(sorted(status.applications)) or "none"
        raise ConfigError(
            f"Ray Serve already runs on this cluster (applications: {names}), and has one HTTP server for all of them; "
            "if nobody needs it, end it with `serve shutdown` on the head node, or use another cluster"
        )


def _start(made: serve.Application, name: str, host: str, port: int) -> None:
    try:
        http = {"host": host, "port": port}
        serve.start(http_options=http, proxy_location="HeadOnly", logging_config=LOGGING)
        serve.run(made, name=name, route_prefix="/", logging_config=LOGGING)
    except (RuntimeError, TimeoutError, RayError, RayServeException) as err:
        raise UserError(f"the service does not start: {_cause(err, name)}") from err


def _cause(err: Exception, name: str) -> str:
    """The last line of the error in a replica, whose text begins with a traceback, or else of the error itself."""
    text = str(err) or type(err).__name__
    with suppress(RayError):  # Ray Serve has ended by itself
        found = serve.status().applications.get(name)
        for deployment in found.deployments.values() if found else ():
            text = deployment.message if deployment.status == "DEPLOY_FAILED" else text
    return text.strip().splitlines()[-1].strip()


def _end(name: str) -> None:
    """End the application, and Ray Serve unless others have put applications on it in the meantime."""
    others = set[str]()
    with suppress(RayError):  # Ray Serve has ended by itself
        others = set(serve.status().applications) - {name}
    if others:
        serve.delete(name)
    else:
        serve.shutdown()
