"""`make docs` builds a site without warnings. It has the repository's pages and loads nothing from other hosts."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.pages import Page


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_loads_nothing_from_other_hosts(site: Path):
    loading = {"script", "link", "img", "iframe", "source", "video", "audio", "object", "embed"}
    for file in site.rglob("*.html"):
        for tag, attributes in Page(file.read_text(encoding="utf-8")).tags:
            address = attributes.get("src") or attributes.get("href") or attributes.get("data") or ""
            assert tag not in loading or not re.match(r"(\w+:)?//", address), f"{file.name} loads {address}"
    for file in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", file.read_text(encoding="utf-8")), file.name


def test_every_link_between_pages_leads_to_a_page(site: Path):
    for file in site.rglob("*.html"):
        if file.name == "404.html":  # its links start at the root of a server
            continue
        for address in Page(file.read_text(encoding="utf-8")).loads:
            path = address.partition("#")[0].partition("?")[0]
            if path and ":" not in path and not path.startswith("//"):
                assert (file.parent / path).is_file(), f"{file}: {address}"


def test_the_site_has_the_readme_and_the_public_names(site: Path):
    assert "The first ten minutes" in (site / "index.html").read_text(encoding="utf-8")
    names = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    ids = {attributes.get("id") for _, attributes in Page((site / "api.html").read_text("utf-8")).tags}
    assert len(names) > 15
    assert set(names) <= ids
