"""Parts of a page: numbers, charts, pictures, and the policy that allows no other script."""

import base64
import hashlib
import io
import re

import numpy as np
import pytest
from PIL import Image

from pipeline.html import page
from pipeline.html.page import Series
from tests.pages import Page


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (0, "0.0 %"),
        (1e-9, "< 0.1 %"),
        (0.0512, "5.1 %"),
        (0.99999, "> 99.9 %"),
        (1, "100.0 %"),
    ],
)
def test_shares_close_to_0_or_100_percent_are_not_shown_as_such(share: float | None, text: str):
    assert page.percent(share) == text


def points_of(svg: str) -> list[np.ndarray]:
    return [
        np.array([list(map(float, point.split(","))) for point in points.split()])
        for points in re.findall(r' points="([\d., -]+\d)"><title>', svg)
    ]


def axis_of(svg: str, along: str) -> tuple[list[float], list[str]]:
    """The positions and texts of an axis's ticks."""
    wanted = 'text-anchor="middle"' if along == "x" else 'text-anchor="end"'
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" ' + wanted + r">([^<]+)</text>", svg)
    found = found[:-1] if along == "x" else found  # the last is the axis' name
    return [float(x) if along == "x" else float(y) - 4 for x, y, _ in found], [text for _, _, text in found]


def test_a_line_matches_its_values_and_ticks():
    x, y = np.array([0.0, 10.0, 40.0]), np.array([0.0, 500.0, 2000.0])
    svg = page.chart([Series("a", x, y)], title="T", x_label="s", y_label="clips")
    (points,) = points_of(svg)
    at, texts = axis_of(svg, "x")
    assert texts == ["0", "10", "20", "30", "40"]
    np.testing.assert_allclose(points[:, 0], np.interp(x, list(map(float, texts)), at), atol=0.1)
    at, texts = axis_of(svg, "y")
    assert texts == ["0", "500", "1,000", "1,500", "2,000"]
    np.testing.assert_allclose(points[:, 1], np.interp(y, [float(t.replace(",", "")) for t in texts], at), atol=0.1)


def test_a_histogram_has_one_step_a_bin_and_shows_a_count_of_1_on_a_log_axis():
    svg = page.chart(
        [Series("a", np.array([0, 5, 10]), np.array([1, 10_000]))],
        title="T",
        x_label="s",
        y_label="clips",
        log_y_from=page.BELOW_ONE,
    )
    (points,) = points_of(svg)
    at, texts = axis_of(svg, "y")
    assert texts == ["1", "10", "100", "1,000", "10 k"]
    np.testing.assert_allclose(points[1:3, 1], at[0], atol=0.1)
    np.testing.assert_allclose(points[3:5, 1], at[-1], atol=0.1)
    assert points[0, 1] > at[0]  # a count of 0 is below 1


def test_dots_match_the_log_axis_and_have_notes():
    x, y = np.array([0, 1, 30, 20_000]), np.array([0.0, 0.25, 0.5, 1.0])
    dots = Series("a", x, y, has_line=False, has_dots=True, notes=["none", "<b>one</b>", "some", "many"])
    svg = page.chart([dots], title="T", x_label="clips", y_label="AP", log_x_from=page.BELOW_ONE)
    at, texts = axis_of(svg, "x")
    assert texts == ["1", "10", "100", "1,000", "10 k"]
    found = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="2.5"><title>([^<]*)</title>', svg)
    across = [float(x) for x, _, _ in found]
    assert across[1] == pytest.approx(at[0], abs=0.1)
    np.testing.assert_allclose(np.diff(across[1:]), (at[1] - at[0]) * np.diff(np.log10(x[1:])), atol=0.2)
    assert across[0] == page.LEFT  # a count of 0 is below 1
    assert [note for _, _, note in found] == ["none", "&lt;b&gt;one&lt;/b&gt;", "some", "many"]
    assert points_of(svg) == []


def test_a_log_axis_of_few_powers_has_ticks_between_them():
    svg = page.chart(
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
    svg = page.chart(narrow, title="T", x_label="s", y_label="loss", log_y_from=0.0115)
    assert axis_of(svg, "y")[1] == ["0.012", "0.014", "0.016"]


def test_an_axis_not_starting_at_0_shows_small_differences():
    lines = [Series("a", np.arange(1, 4), np.array([0.41, 0.43, 0.45]))]
    svg = page.chart(lines, title="T", x_label="epochs", y_label="mAP", from_zero=False)
    assert axis_of(svg, "y")[1] == ["0.41", "0.42", "0.43", "0.44", "0.45"]
    assert axis_of(svg, "x")[1] == ["1", "2", "3"]


def test_a_long_line_keeps_its_ends_and_a_flat_one_is_drawn():
    svg = page.chart([Series("a", np.arange(1e6), np.arange(1e6))], title="T", x_label="s", y_label="clips")
    (points,) = points_of(svg)
    assert len(points) <= page.MAX_POINTS
    assert len(svg) < 20_000
    assert points[0, 0] == page.LEFT
    assert points[-1, 0] == page.WIDTH - page.RIGHT
    assert axis_of(svg, "x")[1][1] == "200 k"
    svg = page.chart([Series("a", np.zeros(2), np.zeros(2))], title="T", x_label="s", y_label="clips")
    assert np.isfinite(points_of(svg)[0]).all()


def test_a_chart_has_a_text_description_and_a_legend():
    lines = [Series(name, np.arange(2), np.arange(2)) for name in ("a", "<b>")]
    svg = page.chart(lines, title="T <i>", x_label="s", y_label="clips")
    parsed = Page(str(svg))
    (label,) = [attributes["aria-label"] for tag, attributes in parsed.tags if attributes.get("role") == "img"]
    assert label == "T <i>. clips, 0 to 1, over s, 0 to 1; a, <b>"
    assert not [tag for tag, _ in parsed.tags if tag == "i"]
    assert "a\n" in parsed.text
    assert "<b>\n" in parsed.text


def test_a_picture_has_its_first_row_at_the_bottom_and_low_values_dark():
    values = np.zeros((3, 4), np.float16)
    values[0, 1] = 1
    values[2, 3] = np.nan
    html = page.picture(
        values, low=0, high=1, title="T", x_max=4, x_label="s", y_ticks=[(0, "0"), (1, "8")], y_label="kHz"
    )
    (uri,) = Page(html).loads
    assert uri.startswith("data:image/png;base64,")
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("L")
    assert image.size == (4, 3)
    shades = np.array(image)
    assert np.argwhere(shades > 200).tolist() == [[2, 1]]
    assert shades[0, 3] < 10


def test_the_only_script_of_a_page_is_the_one_its_policy_allows():
    html = page.render(
        "data_report.html",
        **dict.fromkeys(
            ("uri", "made", "serious", "chart_note", "again", "sample_note", "findings_summary"), "<script>"
        ),
        **{name: [] for name in ("key_figures", "split_notes", "charts", "class_notes", "samples", "findings")},
        **{name: page.Table("", [], []) for name in ("by_split", "silence", "clipping", "by_reason", "by_class")},
        num_asked=1,
        num_got=1,
    )
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert (
        f"default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
        in html
    )
    assert "&lt;script&gt;" in html
