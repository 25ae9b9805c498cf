"""Write docs/options.md, the page of all options and recipe keys, from the jobs' parsers and the groups of recipe keys.

    python docs/make_options.py

`tests/test_docs.py` checks that the page is up to date.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from ast_core.recipe import GROUPS
from jobs import (
    calibrate,
    compare,
    crossval,
    doctor,
    enhance_labels,
    evaluate,
    export,
    prepare_audioset,
    probe,
    search,
    serve,
    tag,
    train,
)
from jobs.recipe_option import described_keys

JOBS = (
    prepare_audioset,
    train,
    compare,
    evaluate,
    calibrate,
    tag,
    serve,
    probe,
    search,
    crossval,
    doctor,
    enhance_labels,
    export,
)
PAGE = Path(__file__).with_name("options.md")
INTRODUCTION = """\
# Options

This page lists the options of the jobs and the recipe keys. `python docs/make_options.py` generates it from the code.
The [glossary](glossary.md) explains the terms.
"""
RECIPE_KEYS = """\
## Recipe keys

Recipes are described in [Training](training.md#recipes). `train.py`, `compare.py` and `crossval.py` take each key as an
option too, for example `--lr 1e-4`; so does `export.py` with `--recipe`. The defaults below apply to keys that a recipe
file does not set.
"""


def page() -> str:
    return "\n".join([INTRODUCTION, *(part for job in JOBS for part in job_section(job)), *recipe_section()])


def job_section(job: ModuleType) -> Iterator[str]:
    parser = job.parser()
    yield f"## {job.__name__.replace('.', '/')}.py\n"
    yield from (f"{text.strip()}\n" for text in parser.description.split("\n\n") if not text.startswith("    "))
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help is not argparse.SUPPRESS]
        rows = [option_row(parser, action) for action in actions if action.dest != "help"]
        if rows:
            if group.title != "options":
                yield heading(group.title)
            yield table(("option", "meaning"), rows)


def option_row(parser: argparse.ArgumentParser, action: argparse.Action) -> tuple[str, str]:
    formatter = parser._get_formatter()
    value = "" if action.nargs == 0 else " " + formatter._format_args(action, action.dest.upper())
    required = " (required)" if action.required else ""
    return f"`{action.option_strings[0]}{value}`{required}", formatter._expand_help(action)


def recipe_section() -> Iterator[str]:
    yield RECIPE_KEYS
    for group in GROUPS:
        yield heading(group.__doc__)
        rows = [
            (f"`{key}`", values, f"`{default}`", meaning) for key, values, default, meaning in described_keys(group)
        ]
        yield table(("key", "values", "default", "meaning"), rows)


def heading(text: str) -> str:
    return f"### {text[0].upper()}{text[1:]}\n"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(cell.replace("|", r"\|") for cell in row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
