"""Charts of reports: matplotlib draws them, and they become SVG elements of the page.

Their colours are CSS variables of `base.html`, so a chart follows the reader's light or dark scheme. Text stays text.
The same data give the same bytes. matplotlib is imported when the first chart is drawn, because it takes about a second
and most processes that import a report write none.
"""

import base64
import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from pipeline.html.page import data_uri, environment

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 380, 230
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 8, 38
"""Size and margins of a chart in CSS pixels. It is about as wide on a phone as in a row of three charts."""

BELOW_ONE = 0.7
"""Start of a logarithmic axis of counts, so that a count of 1 is visible."""

MAX_POINTS = 600
"""Points of a line. A chart has fewer pixels across."""

LINE_COLOURS = ("#1f6fb5", "#c4500c", "#14804f", "#a8407f", "#806000", "#5b5bb8")
"""The colours --c0 to --c5 of base.html. Further lines repeat them, dashed."""
SOFT, RULE = "#5d646c", "#e1e4e8"

CSS_VARIABLES = {SOFT: "var(--soft)", RULE: "var(--rule)"} | {
    colour: f"var(--c{i})" for i, colour in enumerate(LINE_COLOURS)
}
"""What takes the place of each colour that matplotlib draws with."""

NUM_SHADES = 96
"""Colours of a picture: few enough for a small file, and too many to be distinguished."""

COLOUR = re.compile(r"#[0-9a-f]{6}")

LINE_WIDTH = 1.75

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "axes.labelcolor": SOFT,
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.spines.bottom": False,
    "grid.color": RULE,
    "grid.linewidth": 1,
    "xtick.color": RULE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "ytick.major.size": 0,
    "lines.linewidth": LINE_WIDTH,
    "lines.markersize": 5,
    "lines.markeredgewidth": 0,
}

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
HREF = f"{{{XLINK}}}href"


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
    xs, ys = (np.concatenate([getattr(one, axis) for one in series]) for axis in "xy")
    y_low = min(ys.min(), 0) if from_zero or ys.min() == ys.max() else ys.min()
    notes = {}
    with _axes(title, x_label, y_label) as axes:
        axes.grid(axis="y")
        _set_scale(axes, "x", xs, xs.min(), log_x_from)
        _set_scale(axes, "y", ys, y_low, log_y_from)
        for i, one in enumerate(series):
            colour = LINE_COLOURS[i % len(LINE_COLOURS)]
            dashes = "--" if i >= len(LINE_COLOURS) else "-"
            x = one.x if log_x_from is None else np.maximum(one.x, log_x_from)
            y = one.y if log_y_from is None else np.maximum(one.y, log_y_from)
            if len(x) > len(y):
                steps = axes.stairs(y, x, baseline=log_y_from or 0, fill=True, gid="line")
                steps.set(facecolor=(colour, 0.13), edgecolor=colour, linestyle=dashes, linewidth=LINE_WIDTH)
            elif one.has_line:
                shown = np.linspace(0, len(x) - 1, min(len(x), MAX_POINTS)).round().astype(int)
                axes.plot(x[shown], y[shown], dashes, color=colour, gid="line")
            if one.has_dots:
                axes.plot(x, y, "o", color=colour, alpha=0.65, gid=f"dots-{i}")
                notes[f"dots-{i}"] = one.notes or [one.name] * len(x)
        for drawn in axes.get_children():
            drawn.set_clip_on(False)  # half of a line at the edge would be missing
        about = f"{y_label}, {_extent(ys)}, over {x_label}, {_extent(xs)}"
        return _figure(_svg(axes, notes), title, about, [one.name for one in series])


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
    from matplotlib import colormaps

    with _axes(title, x_label, y_label) as axes:
        image = axes.imshow(np.nan_to_num(values.astype(np.float32), nan=low), vmin=low, vmax=high, origin="lower")
        image.set(cmap=colormaps["inferno"].resampled(NUM_SHADES), extent=(0, x_max, 0, 1), interpolation="none")
        axes.set_aspect("auto")
        axes.set_yticks([share for share, _ in y_ticks], [text for _, text in y_ticks])
        axes.axvline(0, color="#ffffff", linewidth=1.5, gid="playhead")
        svg = _svg(axes, {})
    playhead = next(svg.iterfind(".//*[@class='playhead']"))
    playhead.set("data-width", str(WIDTH - LEFT - RIGHT))  # how far script.html moves it
    return _figure(svg, title, f"{y_label}, over {x_label}, 0 to {_text(x_max)}")


def lanes(
    rows: Sequence[tuple[str, Sequence[tuple[float, float]]]], *, title: str, x_max: float, x_label: str
) -> Markup:
    """A lane for each row, the first one at the top, with a bar for each of its spans from begin to end."""
    about = f"{x_label} from 0 to {_text(x_max)}; " + "; ".join(
        f"{name}: " + ", ".join(f"{_text(begin)} to {_text(end)}" for begin, end in spans) for name, spans in rows
    )
    with _axes(title, x_label, "") as axes:
        axes.set(xlim=(0, x_max), ylim=(len(rows), 0), yticks=[])
        for i, (name, spans) in enumerate(rows):
            bars = [(begin, end - begin) for begin, end in spans]
            axes.broken_barh(bars, (i + 0.45, 0.5), facecolors=LINE_COLOURS[i % len(LINE_COLOURS)])
            axes.text(0, i + 0.4, name, va="bottom")
        svg = _svg(axes, {})
    return _figure(svg, title, about)


@contextmanager
def _axes(title: str, x_label: str, y_label: str) -> "Iterator[Axes]":
    """Axes on a figure whose points are the CSS pixels of the page. The figure must be saved before the block ends."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE | {"svg.hashsalt": title}):  # otherwise the ids of markers are random
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), facecolor="none")
        size = ((WIDTH - LEFT - RIGHT) / WIDTH, (HEIGHT - TOP - BOTTOM) / HEIGHT)
        yield figure.add_axes((LEFT / WIDTH, BOTTOM / HEIGHT, *size), facecolor="none", xlabel=x_label, ylabel=y_label)


def _set_scale(axes: "Axes", name: str, values: np.ndarray, low: float, log_from: float | None) -> None:
    """Set limits and ticks of the axis x or y. Ticks of integers are integers: there is no half epoch or half clip."""
    from matplotlib.ticker import FuncFormatter, Locator, LogLocator, MaxNLocator

    high = float(values.max())
    locator: Locator
    if log_from is None:
        high = high if high > low else low + 1
        locator = MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=np.issubdtype(values.dtype, np.integer))
        if name == "y":
            high = max(high, locator.tick_values(low, high)[-1])
    else:
        axes.set(**{f"{name}scale": "log"})
        low, high = log_from, 1.25 * max(high, 1.25 * log_from)
        locator = LogLocator(subs=(1,) if high > 1000 * low else (1, 2, 5))
    axes.set(**{f"{name}lim": (low, high)})
    axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set_major_locator(locator)
    axis.set_major_formatter(FuncFormatter(_text))
    axis.minorticks_off()


def _text(value: float, _: int | None = None) -> str:
    """A number as on an axis: 0.05, 2,500, 20 k, 1.5 M. matplotlib also passes the position of the tick."""
    size, unit = (1e6, " M") if abs(value) >= 1e6 else (1e3, " k") if abs(value) >= 1e4 else (1, "")
    return f"{value / size:,.4g}{unit}".replace("-", "−")


def _extent(values: np.ndarray) -> str:
    return f"{_text(values.min())} to {_text(values.max())}"


def _figure(svg: ET.Element, title: str, about: str, names: Sequence[str] = ()) -> Markup:
    """A drawing with its title, a legend if it has several lines, and a description for screen readers."""
    svg.attrib |= {"role": "img", "aria-label": "; ".join([f"{title}. {about}", *names])}
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", XLINK)
    drawing = Markup(ET.tostring(svg, encoding="unicode"))
    template = environment().get_template("figure.html")
    return Markup(template.render(title=title, names=names, num_colours=len(LINE_COLOURS), svg=drawing))


def _svg(axes: "Axes", notes: Mapping[str, Sequence[str]]) -> ET.Element:
    """The SVG of a figure, with the page's colours and without what a page must not have twice.

    `notes` are texts for each dot of the lines with these ids.
    """
    file = io.BytesIO()
    axes.figure.canvas.print_figure(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = ET.fromstring(file.getvalue())
    svg.remove(svg[0])  # a style sheet, which would apply to the whole page
    del svg.attrib["width"], svg.attrib["height"]
    for element in svg.iter():
        if "style" in element.attrib:
            style = COLOUR.sub(lambda found: CSS_VARIABLES.get(found[0], found[0]), element.attrib["style"])
            element.set("style", style)
        if element.tag == f"{{{SVG}}}image":
            element.set(HREF, _with_palette(element.attrib[HREF]))
        elif element.tag == f"{{{SVG}}}g":
            name = element.attrib.pop("id", "")
            if name in ("line", "playhead", *notes):
                element.set("class", name.partition("-")[0])
            if name in notes:
                for dot, note in zip(element.iter(f"{{{SVG}}}use"), notes[name], strict=True):
                    ET.SubElement(dot, f"{{{SVG}}}title").text = note
    return svg


def _with_palette(uri: str) -> str:
    """The PNG of a `data:` URI with a palette: a third of the bytes of matplotlib's, which stores four channels."""
    from PIL import Image

    file = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    image.convert("RGB").quantize(NUM_SHADES).save(file, "png", optimize=True)
    return data_uri(file.getvalue(), "image/png")
