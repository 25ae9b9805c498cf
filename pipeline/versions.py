"""Versions of this project and of the tools that its numbers depend on, for the record beside every output."""

from collections.abc import Sequence
from importlib.metadata import version

VERSION = "0.1.0"
"""pyproject.toml takes it from here: under `ray job submit` the project is a folder and not an installed package."""

TOOLS = ("av", "numpy", "pyarrow", "ray", "soxr", "timm", "torch", "torchaudio", "yt-dlp")


def tool_versions(tools: Sequence[str] = TOOLS) -> dict[str, str]:
    return {"ast-ray": VERSION} | {tool: version(tool) for tool in tools}


def in_words(tools: Sequence[str] = ()) -> str:
    """`ast-ray 0.1.0 av 15.1.0`: of a clip that failed, what had a part in it."""
    return " ".join(map(" ".join, tool_versions(tools).items()))
