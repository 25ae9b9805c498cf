"""The page of the service, and the files that it loads: the model for browsers, and onnxruntime-web."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import ChoiceLoader, PackageLoader
from markupsafe import Markup

from pipeline.html import page
from pipeline.serve.door import StaticFile
from pipeline.serve.web_runtime import RUNTIME_TYPES

MOST_BYTES_UNASKED = 64 << 20
"""A larger model is loaded into the browser only when the user asks for it."""

SCRIPTS = ("scores.js", "results.js", "spectrogram.js", "files.js", "microphone.js")
"""The parts of the page's script, in their order. `engine.js` and `recorder.js` run in other threads."""

CACHED = {"Cache-Control": "no-cache"}
"""The browser asks whether a file is still the same."""


@dataclass(frozen=True, kw_only=True)
class PageModel:
    """What the page knows of the model."""

    name: str
    labels: Sequence[str]
    mids: Sequence[str]
    thresholds: Sequence[float]
    rate_hz: int
    window_s: float
    hop_s: float
    window_samples: int
    frame_samples: int


def page_files(model: PageModel, onnx: bytes | None, runtime: dict[str, bytes] | None) -> dict[str, StaticFile]:
    """What GET gives, by path.

    Args:
        onnx: the file of `save_onnx_waveform`.
        runtime: the files of onnxruntime-web, by name. Without these or the model, the page asks the server only.
    """
    in_browser = onnx is not None and runtime is not None
    found = {"/": StaticFile(_html(model, onnx if in_browser else None), "text/html", {"Cache-Control": "no-store"})}
    if onnx is not None and runtime is not None:
        found["/model.onnx"] = StaticFile(onnx, "application/octet-stream", CACHED)
        for name, content in runtime.items():
            found[f"/ort/{name}"] = StaticFile(content, RUNTIME_TYPES[name.rpartition(".")[2]], CACHED)
    return found


def _html(model: PageModel, onnx: bytes | None) -> bytes:
    known: dict[str, Any] = vars(model) | {
        "in_browser": onnx is not None,
        "bytes": 0 if onnx is None else len(onnx),
        "most_bytes": MOST_BYTES_UNASKED,
    }
    templates = page.environment()
    own = templates.overlay(
        loader=ChoiceLoader([PackageLoader("pipeline.serve", "page"), PackageLoader("pipeline.html")])
    )
    html = own.get_template("page.html").render(
        model=known,
        engine=Markup(_source("engine.js")),
        recorder=Markup(_source("recorder.js")),
        **page.script_of("\n".join(map(_source, SCRIPTS))),
    )
    return html.encode()


def _source(name: str) -> str:
    return (files("pipeline.serve") / "page" / name).read_text(encoding="utf-8")
