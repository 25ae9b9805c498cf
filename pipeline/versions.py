"""Versions of this project and of the tools that its numbers depend on, for the record beside every output."""

from collections.abc import Sequence
from importlib.metadata import version

VERSION = "0.1.0"
"""pyproject.toml takes it from here: under `ray job submit` the project is a folder and not an installed package."""

TOOLS = ("av", "numpy", "pyarrow", "ray", "soxr", "timm", "torch", "torchaudio", "yt-dlp")


def tool_versions(tools: Sequence[str] = TOOLS) -> dict[str, str]:
    return {"ast-ray": VERSION} | {tool: version(tool) for tool in tools}
