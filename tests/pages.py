"""An HTML page as tests see it: its tables, and the addresses that it would load."""

from html.parser import HTMLParser
from typing import Any


class Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        """By caption: the header, then the rows with the total. Notes in a cell follow its text and a newline."""
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.text = ""
        self._caption: list[str] | None = None
        self._rows: list[list[str]] = []
        self._in_cell = False
        self.feed(html)
        self.close()

    @property
    def loads(self) -> list[str]:
        """All addresses that the browser would load by itself or at a click."""
        names = {"src", "href", "srcset", "action", "data", "poster", "xlink:href", "background", "ping"}
        return [value for _, attributes in self.tags for name, value in attributes.items() if name in names]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self._rows = []
        elif tag == "caption":
            self._caption = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("th", "td"):
            self._rows[-1].append("")
            self._in_cell = True
        elif tag == "br" and self._in_cell:
            self._rows[-1][-1] += "\n"

    def handle_endtag(self, tag: str) -> None:
        if tag == "caption" and self._caption is not None:
            self.tables["".join(self._caption)] = self._rows
            self._caption = None
        elif tag in ("th", "td"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._caption is not None:
            self._caption.append(data)
        elif self._in_cell:
            self._rows[-1][-1] += data
