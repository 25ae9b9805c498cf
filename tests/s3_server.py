"""The S3 server of the tests, moto's, which is slow to import. `python -m tests.s3_server` prints its port.

With the number of an inherited socket as an argument it also listens there, for machines of another network.

A request to CONTROL sets the share of the requests, or the number of the following ones, that it refuses, whether
deleting is forbidden, whether conditions of requests are refused or ignored, and the request from which on it is away.
"""

import json
import re
import socket
import sys
import threading
from io import BytesIO
from random import Random
from typing import Any
from urllib.parse import parse_qs
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wsgi import get_input_stream

from tests.s3 import CONTROL

SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message><RequestId>1</RequestId></Error>"
)


DENIED = b"<Error>%b<Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


class Busy:
    """Refuses a share of the requests, drawn by a seed and the request's number, or a number of the following ones.

    If deleting is forbidden, all requests to delete are denied, as for a key without s3:DeleteObject. From the first
    request that matches `away_from` on, each connection is closed without an answer.

    Requests are handled one at a time: moto checks a condition and then writes, and computes an object's ETag at the
    position at which another thread reads it.
    """

    def __init__(self, app: WSGIApplication) -> None:
        self.app, self.lock = app, threading.Lock()
        self.one_at_a_time, self.conditions = threading.Lock(), ""
        self.share, self.following, self.draw = 0.0, 0, Random(0)
        self.forbids_deleting, self.away_from, self.is_away = False, "", False
        self.counts = {"requests": 0, "refused": 0, "dropped": 0, "sent_bytes": 0}

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Any:
        if environ["PATH_INFO"] == CONTROL:
            start_response("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(self._reset(parse_qs(environ["QUERY_STRING"]))).encode()]
        if self._drop(environ):
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionAbortedError
        if not self._refuse():
            many = environ["REQUEST_METHOD"] == "POST" and "delete" in environ["QUERY_STRING"].split("&")
            if self.forbids_deleting and (many or environ["REQUEST_METHOD"] == "DELETE"):
                return _deny(environ, start_response, many)
            if "HTTP_IF_MATCH" in environ or "HTTP_IF_NONE_MATCH" in environ:
                if self.conditions == "refused":
                    return _refuse_conditions(environ, start_response)
                if self.conditions == "ignored":
                    environ.pop("HTTP_IF_MATCH", None)
                    environ.pop("HTTP_IF_NONE_MATCH", None)
            # The body first: a client that is stopped in the middle of it must not stop the others.
            environ["wsgi.input"] = BytesIO(get_input_stream(environ).read())
            with self.one_at_a_time:
                answer = list(self.app(environ, start_response))
            with self.lock:
                self.counts["sent_bytes"] += 0 if environ["REQUEST_METHOD"] == "HEAD" else sum(map(len, answer))
            return answer
        get_input_stream(environ).read()  # otherwise this body is read as the next request
        start_response("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", f"{len(SLOW_DOWN)}")])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [SLOW_DOWN]

    def _reset(self, query: dict[str, list[str]]) -> dict[str, int]:
        with self.lock:
            before, self.counts = self.counts, dict.fromkeys(self.counts, 0)
            settings = {name: values[0] for name, values in query.items()}
            self.share, self.following, self.draw = (
                float(settings.get("share", 0)),
                int(settings.get("following", 0)),
                Random(0),
            )
            self.forbids_deleting = "forbids_deleting" in settings
            self.conditions = settings.get("conditions", "")
            self.away_from, self.is_away = settings.get("away_from", ""), False
            return before

    def _drop(self, environ: WSGIEnvironment) -> bool:
        with self.lock:
            request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
            self.is_away |= bool(self.away_from) and re.match(self.away_from, request) is not None
            self.counts["dropped"] += self.is_away
            return self.is_away

    def _refuse(self) -> bool:
        with self.lock:
            refuse = self.following > 0 or self.draw.random() < self.share
            self.following = max(0, self.following - 1)
            self.counts["requests"] += 1
            self.counts["refused"] += refuse
            return refuse


def _deny(environ: WSGIEnvironment, start_response: StartResponse, many: bool) -> list[bytes]:
    """S3 denies a single key with a status, and many keys with an error for each in the answer."""
    asked = get_input_stream(environ).read()
    answer = DENIED % b""
    if many:
        keys = re.findall(b"<Key>.*?</Key>", asked)
        answer = b"<DeleteResult>%b</DeleteResult>" % b"".join(DENIED % key for key in keys)
    headers = [("Content-Type", "application/xml"), ("Content-Length", f"{len(answer)}")]
    start_response("200 OK" if many else "403 Forbidden", headers)
    return [answer]


def _refuse_conditions(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
    get_input_stream(environ).read()
    answer = b"<Error><Code>NotImplemented</Code><Message>A header is not implemented</Message></Error>"
    start_response("501 Not Implemented", [("Content-Type", "application/xml"), ("Content-Length", f"{len(answer)}")])
    return [answer]


class Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open, as with S3

    def log(self, *_: object) -> None:
        pass


def main() -> None:
    app = Busy(DomainDispatcherApplication(create_backend_app))
    for inherited in map(int, sys.argv[1:]):
        elsewhere = make_server("0.0.0.0", 0, app, threaded=True, request_handler=Quiet, fd=inherited)
        threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
