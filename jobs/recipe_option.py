"""The option `--recipe`, and recipe keys on the command line."""

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import fields
from importlib.resources import files
from importlib.resources.abc import Traversable
from itertools import chain
from pathlib import Path

from ast_core.errors import ConfigError
from ast_core.models.registry import MODELS
from ast_core.recipe import GROUPS, Recipe, load_recipe
from ast_core.settings import bounds_of, descriptions, type_of
from pipeline import storage

RECIPES = files("jobs") / "recipes"


def recipe_names() -> list[str]:
    return sorted(_shipped_files())


def shipped_recipe(name: str) -> str:
    """The YAML text of a shipped recipe."""
    return _shipped_files()[name].read_text(encoding="utf-8")


def _shipped_files() -> dict[str, Traversable]:
    """Shipped recipes by name, the experimental ones included."""
    in_folders = (folder.iterdir() for folder in (RECIPES, RECIPES / "experimental"))
    return {Path(file.name).stem: file for file in chain(*in_folders) if file.name.endswith(".yaml")}


def described_keys(group: type) -> Iterator[tuple[str, str, str, str]]:
    """Name, allowed values, default and meaning of each recipe key of a group."""
    meanings = descriptions(group)
    for field in fields(group):
        values = ", ".join(filter(None, (type_of(group, field.name), bounds_of(group, field.name))))
        yield field.name, values, json.dumps(field.default).replace('"', ""), meanings[field.name]


def help_on_keys() -> str:
    """All recipe keys by group, for `--help`."""
    lines = []
    for group in GROUPS:
        lines.append(f"\nrecipe keys, {str(group.__doc__).lower()}:")
        for key, values, default, meaning in described_keys(group):
            lines.append(f"  --{key}  {values} (default {default})")
            lines += textwrap.wrap(
                meaning, initial_indent=" " * 6, subsequent_indent=" " * 6, width=100, break_on_hyphens=False
            )
    return "\n".join(lines).lstrip()


def read_recipe(name: str, rest: Sequence[str]) -> Recipe:
    """Read a shipped recipe by name, or a YAML file. `rest` has the recipe keys of the command line."""
    if name in recipe_names():
        text = shipped_recipe(name)
    elif storage.exists(name):
        text = storage.read_text(name)
    else:
        hint = f"; {name} is a model, which --model {name} trains with any recipe" if name in MODELS else ""
        raise ConfigError(f"no recipe {name!r}; use {', '.join(recipe_names())} or the path of a YAML file{hint}")
    return load_recipe(text, overridden(rest), origin=name)


def overridden(rest: Sequence[str]) -> dict[str, str]:
    """Recipe keys and their values as typed: `--key value` or `--key=value`. Dashes are read as underscores."""
    overrides = {}
    words = iter(rest)
    for word in words:
        if not word.startswith("--"):
            raise ConfigError(f"{word!r} is not an option; set a recipe key by --KEY VALUE, for example --lr 1e-5")
        key, equals, value = word[2:].partition("=")
        given = value if equals else next(words, None)
        if given is None or (given.startswith("--") and not equals):
            raise ConfigError(f"--{key} has no value; every recipe key takes one, for example --warmup false")
        key = key.replace("-", "_")
        if key in overrides:
            raise ConfigError(f"--{key} is given twice; keep one")
        overrides[key] = given
    return overrides
