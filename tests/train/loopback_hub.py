"""A Hugging Face hub on loopback to which files are uploaded, as the hub's client does it: weights by Git LFS."""

import base64
import contextlib
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_loopback"
USER = "somebody"
LARGE = (".safetensors", ".onnx", ".pth")
"""Files that go to Git LFS."""


@dataclass
class Hub:
    """What has been uploaded."""

    endpoint: str = ""
    repos: dict[str, bool] = field(default_factory=dict)
    """Whether each repository is private."""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Content by repository and path."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """LFS objects by SHA-256."""
    commits: int = 0
    forbids: tuple[str, ...] = ()
    """Repositories to which nobody may write."""

    def env(self, home: object, token: str | None = TOKEN) -> dict[str, str]:
        """The environment of a process that uses this hub. The client reads it when it is imported."""
        env = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return env if token is None else env | {"HF_TOKEN": token}


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, value: Any, status: int = 200) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers["Content-Length"] or 0))

        def is_known(self) -> bool:
            if self.headers["Authorization"] == f"Bearer {TOKEN}":
                return True
            self.answer({"error": "Invalid token"}, 401)
            return False

        def do_GET(self) -> None:
            if self.is_known():
                if self.path == "/api/whoami-v2":
                    return self.answer({"name": USER, "type": "user"})
                self.answer({"error": "not found"}, 404)

        def do_PUT(self) -> None:
            hub.objects[self.path.rpartition("/")[2]] = self.body()
            self.answer({})

        def do_POST(self) -> None:
            if not self.is_known():
                return
            body = self.body()
            if self.path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked.get('organization') or USER}/{asked['name']}"
                if name in hub.forbids:
                    return self.answer({"error": "no write access"}, 403)
                exists = name in hub.repos
                hub.repos.setdefault(name, asked.get("visibility", "public") == "private")
                return self.answer({"url": f"{hub.endpoint}/{name}"}, 409 if exists else 200)
            if self.path.endswith(".git/info/lfs/objects/batch"):
                return self.answer({"transfer": "basic", "objects": list(map(_action, json.loads(body)["objects"]))})
            repo, _, action = self.path.removeprefix("/api/models/").partition("/preupload/")
            if action:
                names = [file["path"] for file in json.loads(body)["files"]]
                modes = [("lfs" if name.endswith(LARGE) else "regular") for name in names]
                files = [
                    {"path": name, "uploadMode": mode, "shouldIgnore": False}
                    for name, mode in zip(names, modes, strict=True)
                ]
                return self.answer({"files": files})
            repo = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            _commit(hub, repo, body)
            self.answer({"commitUrl": f"{hub.endpoint}/{repo}/commit/0", "commitOid": "0" * 40, "success": True})

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    def _action(item: dict[str, Any]) -> dict[str, Any]:
        return item | {"actions": {"upload": {"href": f"{hub.endpoint}/objects/{item['oid']}"}}}

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()


def _commit(hub: Hub, repo: str, body: bytes) -> None:
    files = hub.files.setdefault(repo, {})
    for line in map(json.loads, body.splitlines()):
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            content = hub.objects[value["oid"]]
            assert hashlib.sha256(content).hexdigest() == value["oid"]
            files[value["path"]] = content
    hub.commits += 1


def export_here(argv: Sequence[str]) -> tuple[int, str, str]:
    """Status, standard output and errors of `jobs/export.py`. Run it in a process without the hub's client."""
    from jobs import export
    from jobs.common import run_job

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run_job(export.main, argv)
    return status, out.getvalue(), err.getvalue()
