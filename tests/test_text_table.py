"""Tables for a terminal show their cells as they are."""

from pipeline.text_table import text_table


def test_names_are_on_the_left_and_figures_on_the_right_as_they_are():
    rows = [["1e5", "0.500", "1,234"], ["a longer name", "–", "7"]]
    assert text_table(["class", "AP", "clips"], rows, "lrr").splitlines() == [
        "class             AP    clips",
        "1e5            0.500    1,234",
        "a longer name      –        7",
    ]


def test_a_table_without_rows_has_its_header():
    assert text_table(["class", "AP"], [], "lr") == "class    AP"
