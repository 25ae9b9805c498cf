"""Write docs/options.md, the page of all options and recipe keys, from the jobs' parsers and the fields of `Recipe`.

    python docs/make_options.py

`tests/test_docs.py` checks that the page is up to date.
"""

import argparse
import ast
import inspect
import itertools
import json
import re
import typing
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType

from ast_core.recipe import Recipe
from jobs import crossval, doctor, evaluate, export, prepare_audioset, train

JOBS = (prepare_audioset, train, evaluate, crossval, doctor, export)
PAGE = Path(__file__).with_name("options.md")
INTRODUCTION = """\
# Options

This page lists the options of the jobs and the recipe keys. `python docs/make_options.py` generates it from the code.
The [glossary](glossary.md) explains the terms.
"""
RECIPE_KEYS = """\
## Recipe keys

Recipes are described in [Training](training.md#recipes). `train.py` and `crossval.py` take each key as an option too,
for example `--lr 1e-4`; so does `export.py` with `--recipe`. The defaults below apply to keys that a recipe file does
not set.
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
    meanings, sections = field_docstrings(Recipe), field_sections(Recipe)
    for section in dict.fromkeys(sections.values()):
        keys = [field for field in fields(Recipe) if sections[field.name] == section]
        rows = [
            (
                f"`{key.name}`",
                values(key.type),
                f"`{json.dumps(key.default)}`".replace('"', ""),
                meanings.get(key.name, ""),
            )
            for key in keys
        ]
        yield heading(section)
        yield table(("key", "values", "default", "meaning"), rows)


def heading(text: str) -> str:
    return f"### {text[0].upper()}{text[1:]}\n"


def field_docstrings(cls: type) -> dict[str, str]:
    """The string after each field of a dataclass, on one line."""
    body = ast.parse(inspect.getsource(cls)).body[0].body
    return {
        field.target.id: " ".join(ast.literal_eval(text.value).split())
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def field_sections(cls: type) -> dict[str, str]:
    """The last `# --- SECTION` comment before each field."""
    found = re.findall(r"^    (?:# --- (.+)|(\w+): )", inspect.getsource(cls), re.MULTILINE)
    section, sections = "", {}
    for comment, name in found:
        section = comment or section
        if name:
            sections[name] = section
    return sections


def values(kind: object) -> str:
    """The allowed values of a type, in YAML's words."""
    if parts := typing.get_args(kind):
        is_literal = typing.get_origin(kind) is typing.Literal
        return ", ".join(f"`{part}`" if is_literal else values(part) for part in parts)
    return {bool: "`true`, `false`", int: "integer", float: "number", str: "text", type(None): "`null`"}[kind]


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(cell.replace("|", r"\|") for cell in row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
