"""YAML for recipes: the scalars of YAML 1.2's core schema. Repeated keys are refused.

PyYAML reads YAML 1.1, where 010 is 8, 1:30 is 90, `no` is false and 1e-5 is text. Authors of recipes expect YAML 1.2:
010 is 10, 1e-5 is a number, and 1:30, 1_000, yes, no, on and off are text, which keys for numbers or switches refuse.
"""

import re
from collections.abc import Hashable
from typing import Any

import yaml

from ast_core.errors import ConfigError

MAX_CHARACTERS = 100_000
"""Length of the longest accepted text. A recipe has about a thousand characters."""

_CORE_SCHEMA = {
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
"""Tag → pattern of its plain scalars, and their first characters. A scalar that matches no pattern is text."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2. It refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    line = key_node.start_mark.line + 1
                    raise ConfigError(f"the key {key_node.value!r} is repeated in line {line}; keep one")
                seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


def _whole_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text, base)


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan"))


_Loader.yaml_implicit_resolvers = {}
for _tag, (_pattern, _first) in _CORE_SCHEMA.items():
    # An empty scalar has no first character; PyYAML looks it up under "".
    _characters = [*_first, ""] if _tag == "null" else list(_first)
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _characters)
_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)


def read_yaml(text: str, *, origin: str) -> Any:
    """The value of the YAML `text`.

    Raises:
        ConfigError: `text` is too long or not valid. The message is one line and names `origin`.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"{origin} has {len(text):,} characters; a recipe has at most {MAX_CHARACTERS:,}")
    try:
        return yaml.load(text, Loader=_Loader)
    except ConfigError as err:
        raise ConfigError(f"{origin}: {err}") from err
    except (yaml.YAMLError, ValueError, RecursionError) as err:  # ValueError: a number of thousands of digits
        message = " ".join(str(err).split())
        raise ConfigError(f"{origin}: not valid YAML: {message}") from err
