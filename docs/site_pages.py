"""Hooks of MkDocs for `make docs`: the pages outside docs/ become part of the site.

The pages are written for a reader of the repository. So links to files that have no page become plain text here.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "THIRD_PARTY_NOTICES.md": "notices.md",
    "benchmarks/RESULTS.md": "figures.md",
}
"""Pages outside docs/, by their path in the repository, and their path in the site."""

_FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    in_site = page.file.src_uri
    source = next((path for path, name in OUTSIDE.items() if name == in_site), f"docs/{in_site}")
    parts = _FENCED.split(markdown)  # every second part is a code block
    parts[::2] = [_LINK.sub(lambda link: _for_site(link, source, in_site), prose) for prose in parts[::2]]
    return "".join(parts)


def _for_site(link: re.Match[str], source: str, in_site: str) -> str:
    """A link of the page at `source` in the repository, for the page at `in_site`."""
    text, (target, mark, anchor) = link[1], link[2].partition("#")
    if ":" in target or not target:
        return link[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    page = OUTSIDE.get(path) or (path.removeprefix("docs/") if re.fullmatch(r"docs/.*\.md", path) else None)
    if page is None:
        return text
    return f"[{text}]({posixpath.relpath(page, posixpath.dirname(in_site) or '.')}{mark}{anchor})"
