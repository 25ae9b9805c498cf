"""Recipes are YAML 1.2: numbers are what they look like, and repeated keys are refused."""

import math
from pathlib import Path

import pytest

from ast_core.errors import ConfigError
from ast_core.recipe import MAX_SEED, Recipe, load_recipe
from ast_core.recipe_yaml import read_yaml
from jobs.recipe_option import read_recipe


def load(text: str = "", **overrides: str) -> Recipe:
    return load_recipe(text, overrides, origin="test.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("08", 8),
        ("-7", -7),
        ("0o17", 15),
        ("0x1F", 31),
        ("1e-4", 1e-4),
        ("1.5E3", 1500.0),
        (".5", 0.5),
        ("5.", 5.0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("yes", "yes"),
        ("No", "No"),
        ("on", "on"),
        ("off", "off"),
        ("TRUE", True),
        ("false", False),
        ("~", None),
        ("", None),
        ("2026-11-28", "2026-11-28"),
        ("'010'", "010"),
    ],
)
def test_a_scalar_is_read_as_in_yaml_1_2(text: str, value: object):
    """The core schema's table, https://yaml.org/spec/1.2.2/#1032-tag-resolution."""
    read = read_yaml(text, origin="x")
    assert (read, type(read)) == (value, type(value))


def test_case_19_numbers_are_decimal_or_refused():
    assert load(seed="010").seed == load("seed: 010").seed == 10
    with pytest.raises(ConfigError, match=r"^epochs is '1:30'; use a whole number$"):
        load(epochs="1:30")
    with pytest.raises(ConfigError, match=r"^seed is 9{23}; use 0 to 18446744073709551615$"):
        load(seed="9" * 23)
    assert load(seed=str(MAX_SEED)).seed == MAX_SEED
    with pytest.raises(ConfigError, match=r"^--seed: not valid YAML: .*digits"):
        load(seed="9" * 5000)
    with pytest.raises(ConfigError, match=r"^lr is .*; use a number$"):
        load(lr="9" * 400)


@pytest.mark.parametrize("written", ["yes", "no", "on", "off", "y"])
def test_booleans_of_yaml_1_1_are_refused(written: str):
    with pytest.raises(ConfigError, match=rf"^warmup is '{written}'; use true or false$"):
        load(warmup=written)


@pytest.mark.parametrize(
    ("key", "value"),
    [("epochs", "1000000"), ("batch_size", "2000000"), ("input_tdim", "40000"), ("label_dim", "40000")],
)
def test_a_value_above_its_upper_bound_is_refused(key: str, value: str):
    with pytest.raises(ConfigError, match=rf"^{key} is {value}; use 1 to \d+(, or null)?$"):
        load(**{key: value})


@pytest.mark.parametrize("key", ["warmup_steps", "epochs", "lrscheduler_start", "patience"])
def test_a_negative_count_is_refused(key: str):
    with pytest.raises(ConfigError, match=rf"^{key} is -1; use "):
        load(**{key: "-1"})


def test_case_18_a_repeated_key_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"^test\.yaml: the key 'lr' is repeated in line 3; keep one$"):
        load("lr: 1.0e-4\nepochs: 2\nlr: 1.0e-2")
    with pytest.raises(ConfigError, match=r"^--lr is given twice; keep one$"):
        read_recipe("esc10", ["--lr", "1e-4", "--epochs=2", "--lr=1e-2"])
    with pytest.raises(ConfigError, match=r"^--wa_start is given twice; keep one$"):
        read_recipe("esc10", ["--wa-start", "1", "--wa_start", "2"])


@pytest.mark.parametrize("text", ["[" * 5000, "a: &x [*x]\nb: !!python/object:os.system {}", "{lr: 1, ? [a] : 2}"])
def test_hostile_yaml_is_refused_in_one_line(text: str):
    with pytest.raises(ConfigError) as refused:
        load(text)
    assert "\n" not in str(refused.value)


def test_a_recipe_file_of_excessive_size_is_refused():
    with pytest.raises(ConfigError, match=r"^test\.yaml has 200,000 characters; a recipe has at most 100,000$"):
        load("#" * 200_000)
