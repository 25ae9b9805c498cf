"""Charts and pictures of reports: what is drawn where, and what of it a reader without a mouse or a display gets."""

import base64
import io
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pipeline.html import charts
from pipeline.html.charts import Series
from tests.pages import Page

EDGES = {"x": (charts.LEFT, charts.WIDTH - charts.RIGHT), "y": (charts.HEIGHT - charts.BOTTOM, charts.TOP)}


def points_of(svg: str) -> list[np.ndarray]:
    """`[points, 2]` of each line or histogram."""
    paths = re.findall(r'class="line">\s*<path d="([^"]+)"', svg)
    return [np.array(re.findall(r"([\d.]+) ([\d.]+)", path), float) for path in paths]


def dots_of(svg: str) -> list[tuple[float, float, str]]:
    found = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"[^>]*><title>([^<]*)</title></use>', svg)
    return [(float(x), float(y), note) for x, y, note in found]


def axis_of(svg: str, along: str) -> tuple[list[float], list[str]]:
    """The positions and texts of an axis's ticks."""
    anchor = {"x": "middle", "y": "end"}[along]
    found = re.findall(rf'text-anchor: {anchor};[^>]*rotate\(-0 ([\d.]+) ([\d.]+)\)">([^<]+)</text>', svg)
    found = found[:-1] if along == "x" else found  # the last is the axis's name
    at = [float(x) if along == "x" else float(y) - TEXT_BELOW_TICK for x, y, _ in found]
    return at, [text for _, _, text in found]


TEXT_BELOW_TICK = 4.18
"""CSS pixels from a tick of the y axis to the baseline of its text."""


def test_a_line_matches_its_values_and_ticks():
    x, y = np.array([0.0, 10.0, 40.0]), np.array([0.0, 500.0, 2000.0])
    svg = charts.chart([Series("a", x, y)], title="T", x_label="s", y_label="clips")
    (points,) = points_of(svg)
    at, texts = axis_of(svg, "x")
    assert texts == ["0", "10", "20", "30", "40"]
    np.testing.assert_allclose(points[:, 0], np.interp(x, list(map(float, texts)), at), atol=0.1)
    at, texts = axis_of(svg, "y")
    assert texts == ["0", "500", "1,000", "1,500", "2,000"]
    np.testing.assert_allclose(points[:, 1], np.interp(y, [float(t.replace(",", "")) for t in texts], at), atol=0.1)


def test_a_histogram_has_one_step_a_bin_and_shows_a_count_of_1_on_a_log_axis():
    svg = charts.chart(
        [Series("a", np.array([0, 5, 10, 15]), np.array([1, 10_000, 0]))],
        title="T",
        x_label="s",
        y_label="clips",
        log_y_from=charts.BELOW_ONE,
    )
    (points,) = points_of(svg)
    at, texts = axis_of(svg, "y")
    assert texts == ["1", "10", "100", "1,000", "10 k"]
    np.testing.assert_allclose(points[1:3, 1], at[0], atol=0.1)
    np.testing.assert_allclose(points[3:5, 1], at[-1], atol=0.1)
    np.testing.assert_allclose(points[5:7, 1], EDGES["y"][0], atol=0.1)  # a count of 0 is below 1
    assert "fill-opacity: 0.13" in svg


def test_dots_match_the_log_axis_and_have_notes():
    x, y = np.array([0, 1, 30, 20_000]), np.array([0.0, 0.25, 0.5, 1.0])
    dots = Series("a", x, y, has_line=False, has_dots=True, notes=["none", "<b>one</b> #5d646c", "some", "many"])
    svg = charts.chart([dots], title="T", x_label="clips", y_label="AP", log_x_from=charts.BELOW_ONE)
    at, texts = axis_of(svg, "x")
    assert texts == ["1", "10", "100", "1,000", "10 k"]
    across = [x for x, _, _ in dots_of(svg)]
    assert across[1] == pytest.approx(at[0], abs=0.1)
    np.testing.assert_allclose(np.diff(across[1:]), (at[1] - at[0]) * np.diff(np.log10(x[1:])), atol=0.2)
    assert across[0] == charts.LEFT  # a count of 0 is below 1
    assert [note for _, _, note in dots_of(svg)] == ["none", "&lt;b&gt;one&lt;/b&gt; #5d646c", "some", "many"]
    assert points_of(svg) == []


def test_a_log_axis_of_few_powers_has_ticks_between_them():
    svg = charts.chart(
        [Series("a", np.arange(3), np.array([0.7, 0.05, 0.013]))],
        title="T",
        x_label="s",
        y_label="loss",
        log_y_from=0.01,
    )
    at, texts = axis_of(svg, "y")
    assert texts == ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5"]
    (points,) = points_of(svg)
    np.testing.assert_allclose(points[1, 1], at[2], atol=0.1)
    narrow = [Series("a", np.arange(2), np.array([0.013, 0.012]))]
    svg = charts.chart(narrow, title="T", x_label="s", y_label="loss", log_y_from=0.0115)
    assert {"0.012", "0.014", "0.016"} <= set(axis_of(svg, "y")[1])


def test_an_axis_not_starting_at_0_shows_small_differences():
    lines = [Series("a", np.arange(1, 4), np.array([0.41, 0.43, 0.45]))]
    svg = charts.chart(lines, title="T", x_label="epochs", y_label="mAP", from_zero=False)
    assert axis_of(svg, "y")[1] == ["0.41", "0.42", "0.43", "0.44", "0.45"]
    assert axis_of(svg, "x")[1] == ["1", "2", "3"]


def test_a_long_line_keeps_its_ends_and_a_flat_one_is_drawn():
    svg = charts.chart([Series("a", np.arange(1e6), np.arange(1e6) % 7)], title="T", x_label="s", y_label="clips")
    (points,) = points_of(svg)
    assert len(points) <= charts.MAX_POINTS
    assert len(svg) < 40_000
    assert (points[0, 0], points[-1, 0]) == EDGES["x"]
    assert axis_of(svg, "x")[1][1] == "200 k"
    svg = charts.chart([Series("a", np.zeros(2), np.zeros(2))], title="T", x_label="s", y_label="clips")
    assert np.isfinite(points_of(svg)[0]).all()


def test_a_chart_has_a_text_description_and_a_legend():
    lines = [Series(name, np.arange(2), np.arange(2)) for name in ("a", "<b>")]
    svg = charts.chart(lines, title="T <i>", x_label="s", y_label="clips")
    parsed = Page(str(svg))
    (label,) = [attributes["aria-label"] for tag, attributes in parsed.tags if attributes.get("role") == "img"]
    assert label == "T <i>. clips, 0 to 1, over s, 0 to 1; a; <b>"
    assert "T <i>" in parsed.text
    assert "a\n" in parsed.text
    assert "<b>\n" in parsed.text


def test_the_same_data_give_the_same_chart_in_the_pages_colours_without_ids_of_two_charts():
    lines = [Series(str(i), np.arange(3), np.arange(3) + i, has_dots=True) for i in range(8)]
    drawn = [charts.chart(lines, title=title, x_label="s", y_label="clips") for title in ("T", "T", "U")]
    assert drawn[0] == drawn[1]
    assert re.findall(r"#[0-9a-f]{6}\b", drawn[0]) == []
    assert {"var(--c0)", "var(--c5)", "var(--soft)", "var(--rule)"} <= set(re.findall(r"var\(--\w+\)", drawn[0]))
    assert "stroke-dasharray" in drawn[0]
    assert "<style" not in drawn[0]
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in drawn]
    assert not ids[0] & ids[2]


def test_a_picture_has_its_first_row_at_the_bottom_and_low_values_dark():
    values = np.zeros((3, 4), np.float16)
    values[0, 1] = 1
    values[2, 3] = np.nan
    html = charts.picture(
        values, low=0, high=1, title="T", x_max=4, x_label="s", y_ticks=[(0, "0"), (1, "8")], y_label="kHz"
    )
    (uri,) = [uri for uri in Page(html).loads if not uri.startswith("#")]
    assert uri.startswith("data:image/png;base64,")
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("L")
    assert image.size == (4, 3)
    shades = np.array(image)
    assert np.argwhere(shades > 200).tolist() == [[0, 1]]
    assert shades[2, 3] < 10
    (matrix,) = re.findall(r'<image[^>]* transform="matrix\(([^)]+)\)"', html)
    *_, down, _, top = map(float, matrix.split())
    assert (top, top + 3 * down) == pytest.approx(EDGES["y"])  # the image's first row is drawn at the bottom
    assert axis_of(html, "y")[1] == ["0", "8"]
    assert 'class="playhead"' in html


def test_charts_are_imported_without_matplotlib_and_drawn_without_pyplot():
    code = (
        "import sys; import numpy as np; from pipeline.html import charts; assert 'matplotlib' not in sys.modules;"
        "charts.chart([charts.Series('a', np.arange(2), np.arange(2))], title='', x_label='', y_label='');"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
