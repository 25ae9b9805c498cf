"""HTML pages for reports, and their charts. A page is one file that loads nothing and opens from disk in any browser.

Everything that a template shows is escaped, because names and messages come from untrusted lists and hosts. As a second
defence the page's content security policy (`base.html`) allows only the one script whose hash it names, and no loading.
"""

import base64
import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

WIDTH, HEIGHT = 380, 230
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 8, 38
"""Size and margins of a chart in CSS pixels. It is about as wide on a phone as in a row of three charts."""

BELOW_ONE = 0.7
"""Start of a logarithmic axis of counts, so that a count of 1 is visible."""

MAX_POINTS = 600
"""Points of a line. A chart has fewer pixels across."""

NUM_COLOURS = 6
"""Colours in base.html. Further lines repeat them, dashed."""


@dataclass(frozen=True)
class Series:
    name: str
    x: np.ndarray
    y: np.ndarray
    """As many values as x for a line; one fewer for a histogram, whose bin edges are x."""
    has_line: bool = True
    has_dots: bool = False
    notes: Sequence[str] = ()
    """A text for each dot, shown when the mouse is over it."""


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


@dataclass(frozen=True)
class Tick:
    at: float
    """CSS pixels from the left, or from the top."""
    text: str


def render(template: str, **values: Any) -> str:
    """The HTML of a page from a template of `pipeline/html/templates`."""
    script = _environment().get_template("script.html").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _environment().get_template(template).render(script=Markup(script), script_sha256=digest, **values)


@cache
def _environment() -> Environment:
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


def chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x_from: float | None = None,
    log_y_from: float | None = None,
    from_zero: bool = True,
) -> Markup:
    """A chart of lines, dots or histograms over common axes.

    The y axis begins at 0; with `from_zero` false it begins at the lowest value, unless all values are equal. An axis
    with `log_…_from` is logarithmic and begins there. Lower values, such as a count of 0, are drawn at its start.
    """
    xs, ys = (np.concatenate([getattr(one, axis) for one in series]).astype(float) for axis in "xy")
    # Ticks of integers are integers: there is no half epoch, and no half clip.
    x_step, y_step = (int(all(np.issubdtype(getattr(one, axis).dtype, np.integer) for one in series)) for axis in "xy")
    if log_x_from is None:
        x_axis = _Axis.linear(*_not_empty(xs.min(), xs.max()), about=5, min_step=x_step)
    else:
        x_axis = _Axis.log(log_x_from, xs.max(), min_step=x_step)
    if log_y_from is None:
        y_low = min(ys.min(), 0) if from_zero or ys.min() == ys.max() else ys.min()
        y_axis = _Axis.linear(*_not_empty(y_low, ys.max()), about=4, min_step=y_step, ends_at_tick=True)
    else:
        y_axis = _Axis.log(log_y_from, ys.max(), min_step=y_step)
    paths = []
    for one in series:
        x, y = one.x.astype(float), one.y.astype(float)
        stepped = len(x) > len(y)
        if stepped:
            x, y = np.repeat(x, 2), np.concatenate([[0], np.repeat(y, 2), [0]])
        elif len(x) > MAX_POINTS and not one.has_dots:
            thinned = np.linspace(0, len(x) - 1, MAX_POINTS).round().astype(int)
            x, y = x[thinned], y[thinned]
        points = [
            (f"{x:.1f}", f"{y:.1f}") for x, y in zip(_across(x_axis.share(x)), _down(y_axis.share(y)), strict=True)
        ]
        notes = one.notes or [one.name] * len(points)
        paths.append(
            {
                "points": " ".join(",".join(point) for point in points) if one.has_line else "",
                "filled": stepped,
                "dots": [(*point, note) for point, note in zip(points, notes, strict=True)] if one.has_dots else [],
            }
        )
    return _figure(
        title=title,
        x_label=x_label,
        y_label=y_label,
        x_ticks=[Tick(float(_across(x_axis.share(np.array(value)))), text) for value, text in x_axis.ticks],
        y_ticks=[Tick(float(_down(y_axis.share(np.array(value)))), text) for value, text in y_axis.ticks],
        paths=paths,
        names=[one.name for one in series],
    )


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    is_log: bool = False

    @classmethod
    def linear(cls, low: float, high: float, *, about: int, min_step: int = 0, ends_at_tick: bool = False) -> "_Axis":
        ticks = _ticks(low, high, about, min_step)
        return cls(low, max(high, ticks[-1][0]) if ends_at_tick else high, ticks)

    @classmethod
    def log(cls, low: float, high: float, *, min_step: int) -> "_Axis":
        """A logarithmic axis with ticks at powers of ten; if these are few, also at 2 and 5 times them, or evenly."""
        high = 1.25 * max(high, 1.25 * low)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factors in ((1,), (1, 2, 5)):
            values = [factor * 10.0**power for power in powers for factor in factors]
            ticks = [(value, _tick_text(value, value, value)) for value in values if low <= value <= high]
            if len(ticks) > 2:
                return cls(low, high, ticks, is_log=True)
        return cls(low, high, _ticks(low, high, 4, min_step), is_log=True)

    def share(self, values: np.ndarray) -> np.ndarray:
        """Positions of values on the axis, 0 to 1."""
        if self.is_log:
            return np.log(np.maximum(values, self.low) / self.low) / math.log(self.high / self.low)
        return (values - self.low) / (self.high - self.low)


def picture(
    values: np.ndarray,
    *,
    low: float,
    high: float,
    title: str,
    x_max: float,
    x_label: str,
    y_ticks: Sequence[tuple[float, str]],
    y_label: str,
) -> Markup:
    """An image of `values` `[rows, columns]`: first row at the bottom, dark at `low`, bright at `high`.

    `y_ticks` are shares of the height, 0 to 1, and texts.
    """
    return _figure(
        title=title,
        x_label=x_label,
        y_label=y_label,
        x_ticks=[Tick(_across(v / x_max), text) for v, text in _ticks(0, x_max, 5)],
        y_ticks=[Tick(_down(share), text) for share, text in y_ticks],
        image=_png_uri(values[::-1], low, high),
    )


def data_uri(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def _figure(**values: Any) -> Markup:
    size = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}
    values = {"paths": [], "names": [], "image": None} | values
    return Markup(_environment().get_template("figure.html").render(num_colours=NUM_COLOURS, **size, **values))


def _across(share: Any) -> Any:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _down(share: Any) -> Any:
    return TOP + (1 - share) * (HEIGHT - TOP - BOTTOM)


def _not_empty(low: float, high: float) -> tuple[float, float]:
    return (float(low), float(high)) if high > low else (float(low), float(low) + 1)


def _ticks(low: float, high: float, about: int, min_step: int = 0) -> list[tuple[float, str]]:
    """Ticks at round numbers from `low` to `high`, in steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    size = 10.0 ** math.floor(math.log10(rough))
    step = min((1 * size, 2 * size, 5 * size, 10 * size), key=lambda step: abs(math.log(step / rough)))
    step = max(step, min_step)
    values = np.arange(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1) * step
    return [(float(value), _tick_text(value, step, max(abs(low), abs(high)))) for value in values]


def _tick_text(value: float, step: float, largest: float) -> str:
    for size, unit in ((1e6, " M"), (1e3, " k")):
        if largest >= 10 * size and value:  # from 10,000 on
            return _tick_text(value / size, step / size, 0) + unit
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{decimals}f}".replace("-", "−")


# Anchors of a scale from dark to bright whose lightness rises evenly, so that it is readable without colour vision.
_COLOURS = "000008 220e48 571473 8e2676 c43d61 ed6942 fca842 fcf0be"
_NUM_SHADES = 96
"""Few enough for a small file, and too many to be distinguished."""


def _png_uri(values: np.ndarray, low: float, high: float) -> str:
    shade = np.clip((np.nan_to_num(values.astype(np.float32), nan=low) - low) / (high - low), 0, 1)
    image = Image.fromarray((shade * (_NUM_SHADES - 1)).round().astype(np.uint8), mode="P")
    anchors = np.array([list(bytes.fromhex(colour)) for colour in _COLOURS.split()])
    at = np.linspace(0, len(anchors) - 1, _NUM_SHADES)
    palette = [np.interp(at, np.arange(len(anchors)), channel) for channel in anchors.T]
    image.putpalette(np.stack(palette, axis=1).round().astype(np.uint8).tobytes())
    file = io.BytesIO()
    image.save(file, "png", optimize=True)
    return data_uri(file.getvalue(), "image/png")
