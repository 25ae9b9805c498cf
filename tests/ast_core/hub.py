"""A Hugging Face hub on loopback that serves one file of one revision."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


def fetch_and_read(*file: str) -> str:
    """The content of a `HubFile` with these arguments, or the error. Run it in a process without the hub's client."""
    from ast_core.errors import DataError
    from ast_core.weight_files import HubFile, fetch_audioset_weights, read_weights

    try:
        return str(read_weights(fetch_audioset_weights(HubFile(*file)))["v.cls_token"].tolist())
    except DataError as err:
        return f"DataError: {err}"


@contextmanager
def serving(path: str, content: bytes) -> Iterator[tuple[str, list[str]]]:
    """Yields the endpoint and the requests so far; `path` is `/OWNER/NAME/resolve/REVISION/FILE`."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(f"{self.command} {self.path}")
            found = self.path == path
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(content) if found else 0))
            if found:
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", path.split("/")[-2])
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            if self.path == path:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
