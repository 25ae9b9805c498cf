"""Classes of settings that pydantic checks: strict types, bounds beside the fields, and errors of one line."""

import ast
import inspect
import itertools
import types
import typing
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Annotated, Any, Literal, TypeVar, Union, dataclass_transform

from pydantic import ConfigDict, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from ast_core.errors import ConfigError

C = TypeVar("C", bound=type)

# Strict: text is no number and 1 is not true. Only a whole number for a float key is converted.
_CONFIG = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
_LIMITS = {"gt": "more than {:.15g}", "ge": "{:.15g} or more", "lt": "less than {:.15g}", "le": "{:.15g} or less"}


@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings(cls: C) -> C:
    """A frozen dataclass with keyword arguments. Creating one with values that are not allowed raises ConfigError."""
    refuse = model_validator(mode="wrap")(classmethod(_refuse_in_one_line))  # type: ignore[arg-type]
    cls._refuse_in_one_line = refuse  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True, config=_CONFIG)(cls)  # type: ignore[return-value]


def _refuse_in_one_line(cls: type, values: Any, validate: Callable[[Any], Any]) -> Any:
    try:
        return validate(values)
    except ValidationError as err:
        raise ConfigError(_one_line(err, cls)) from None


def descriptions(cls: type) -> dict[str, str]:
    """The string after each field in the source of a dataclass, on one line."""
    (parsed,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(parsed, ast.ClassDef)
    return {
        field.target.id: " ".join(ast.literal_eval(text.value).split())
        for field, text in itertools.pairwise(parsed.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr)
    }


def type_of(cls: type, key: str) -> str:
    """The type of a field, in YAML's words, such as `a whole number or null`."""
    return _type(_kinds(cls)[key])


def bounds_of(cls: type, key: str) -> str:
    """The bounds of a field, such as `1 to 512` or `more than 0`. Empty if it has none."""
    return _bounds(_kinds(cls)[key])


def _one_line(err: ValidationError, cls: type) -> str:
    """What is wrong with the first invalid field of a class of settings, and what is allowed."""
    first = err.errors(include_url=False)[0]
    key, kind = str(first["loc"][0]), first["type"]
    if key not in _kinds(cls):
        return f"no setting {key!r}; use {' or '.join(_kinds(cls))}"
    allowed = type_of(cls, key)
    if kind == "missing_argument":
        return f"{key} is not set; use {allowed}"
    if kind == "finite_number":
        allowed = "a finite number"
    elif kind.startswith(("greater_than", "less_than")):
        allowed = bounds_of(cls, key) + (", or null" if allowed.endswith(" or null") else "")
    return f"{key} is {first['input']!r}; use {allowed}"


def _kinds(cls: type) -> dict[str, Any]:
    return {field.name: field.type for field in fields(cls)}


def _type(kind: Any) -> str:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _type(parts[0])
    if origin is tuple:
        return "a list"
    if origin is Literal:
        return " or ".join(map(str, parts))
    return " or ".join(map(_type, parts)) if origin in (Union, types.UnionType) else _NAMES[kind]


def _bounds(kind: Any) -> str:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return next(filter(None, map(_bounds, parts)), "")
    if origin is not Annotated:
        return ""
    limits = {name: limit for limits in parts[1].metadata for name, limit in asdict(limits).items()}
    if limits.keys() == {"ge", "le"}:
        return f"{limits['ge']} to {limits['le']}"
    return ", and ".join(_LIMITS[name].format(limit) for name, limit in limits.items())
