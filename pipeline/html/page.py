"""HTML pages for reports. A page is one file that loads nothing and opens from disk in any browser.

Everything that a template shows is escaped, because names and messages come from untrusted lists and hosts. As a second
defence the page's content security policy (`base.html`) allows only the one script whose hash it names, and no loading.
"""

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


@dataclass(frozen=True)
class Cell:
    text: str
    sort: float | str | None = None
    """The value that the column is sorted by. None, for an unknown value, is last in both directions."""
    share: float | None = None
    """Length of a bar next to the text, 0 to 1."""
    note: str = ""
    """Smaller text on a second line."""


@dataclass(frozen=True)
class Column:
    name: str
    is_number: bool = True
    is_sorted: bool = False
    """Whether the rows are already sorted by this column, highest value first."""


@dataclass(frozen=True)
class Table:
    """A table for the macro of `table.html`. The first cell of a row is its header."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    total: Sequence[Cell] = ()
    id: str = ""
    """The element's id. A table that has one can be sorted by a click."""


def render(template: str, **values: Any) -> str:
    """The HTML of a page from a template of `pipeline/html/templates`."""
    script = environment().get_template("script.html").render()
    return environment().get_template(template).render(**script_of(script), **values)


def script_of(source: str) -> dict[str, str]:
    """The values of `base.html` for a page's script: its text, and the hash by which the page's policy allows it."""
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    return {"script": Markup(source), "script_sha256": digest}


@cache
def environment() -> Environment:
    """The templates of `pipeline/html/templates`."""
    environment = Environment(
        loader=PackageLoader("pipeline.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": count, "percent": percent}
    return environment


def count(number: float) -> str:
    return f"{number:,.0f}"


def percent(share: float | None) -> str:
    """A share as text; – for None and NaN. A share that is only close to 0 or 100 % is not shown as such."""
    if share is None or math.isnan(share):
        return "–"
    if 0 < share < 0.001:
        return "< 0.1 %"
    return "> 99.9 %" if 0.999 < share < 1 else f"{100 * share:.1f} %"


def data_uri(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
