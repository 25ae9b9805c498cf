"""Versions of this project and of the tools that its results depend on. They are recorded with every output."""

from collections.abc import Sequence
from importlib.metadata import version

VERSION = "0.1.0"
"""This project's version. pyproject.toml reads it here: under `ray job submit` no package is installed."""

TOOLS = ("av", "numpy", "pyarrow", "ray", "soxr", "timm", "torch", "torchaudio", "yt-dlp")


def tool_versions(tools: Sequence[str] = TOOLS) -> dict[str, str]:
    return {"ast-ray": VERSION} | {tool: version(tool) for tool in tools}


def in_words(tools: Sequence[str] = ()) -> str:
    """Versions as text, for example `ast-ray 0.1.0 av 15.1.0`. It is recorded with a clip that failed."""
    return " ".join(map(" ".join, tool_versions(tools).items()))
