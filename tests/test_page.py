"""Parts of a page: numbers, and the policy that allows no other script."""

import base64
import hashlib
import re

import pytest

from pipeline.html import page


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
