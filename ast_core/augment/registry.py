"""The augmentations by name, and which recipe keys belong to each. Imports no PyTorch, like the registry of models."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from ast_core.errors import ConfigError

if TYPE_CHECKING:
    from ast_core.augment.augmentation import Augmentation

ActsOn = Literal["raw", "normalised"]
"""raw: on raw log-mel, padded or cut. normalised: on the normalised input."""
Entry = str | dict[str, dict[str, Any]]
"""An entry of the recipe key `augmentations`: a name, or a mapping from the name to settings."""


def _accept(recipe: Any) -> None:
    """Every recipe fits."""


def _check_masks(recipe: Any) -> None:
    for key, size in (("freqm", "input_fdim"), ("timem", "input_tdim")):
        if getattr(recipe, key) > getattr(recipe, size):
            problem = f"{key} is {getattr(recipe, key)}, but {size} is {getattr(recipe, size)}"
            raise ConfigError(f"{problem}; set {key} and {size} together, with {key} at most {size}")


@dataclass(frozen=True)
class AugmentationKind:
    """An augmentation that recipes can list. `docs/extending.md` shows how to add one."""

    builder: str
    """`module:class` of an `Augmentation`. It takes the keys below, and settings of its own, by name."""
    acts_on: ActsOn
    keys: tuple[str, ...] = ()
    """Recipe keys that are its settings. Others stand in the list: `NAME: {SETTING: VALUE}`."""
    check: Callable[[Any], None] = _accept
    """Raises ConfigError for a recipe that lists it and whose keys do not fit each other."""


AUGMENTATIONS: dict[str, AugmentationKind] = {
    "mixup": AugmentationKind("ast_core.augment.mixup:Mixup", "raw", keys=("mixup", "mixup_domain")),
    "spec_augment": AugmentationKind(
        "ast_core.augment.spec_augment:SpecAugment", "raw", keys=("freqm", "timem"), check=_check_masks
    ),
    "noise_roll": AugmentationKind("ast_core.augment.noise_roll:NoiseRoll", "normalised", keys=("noise",)),
}


def create_augmentations(recipe: Any) -> list[tuple[ActsOn, "Augmentation"]]:
    """The augmentations that a recipe lists, in order and with what they act on, without those that are off."""
    created = [(name, _create(name, own, recipe)) for name, own in map(_name_and_settings, recipe.augmentations)]
    return [(AUGMENTATIONS[name].acts_on, one) for name, one in created if not one.is_off]


def parse_augmentations(value: Any) -> tuple[Entry, ...]:
    """The value of the recipe key `augmentations`, from YAML or JSON.

    Raises:
        ConfigError: it is not a list of names and of mappings from one name to its settings, or a name is unknown.
    """
    if not isinstance(value, list | tuple):
        raise ConfigError(f"augmentations is {value!r}; use a list, for example [{', '.join(AUGMENTATIONS)}]")
    for entry in value:
        is_mapping = isinstance(entry, dict) and len(entry) == 1 and isinstance(next(iter(entry.values())), dict)
        if not isinstance(entry, str) and not is_mapping:
            raise ConfigError(f"augmentations has {entry!r}; use NAME, or NAME: {{SETTING: VALUE}}")
        name, _ = _name_and_settings(entry)
        if name not in AUGMENTATIONS:
            raise ConfigError(f"augmentations has {name!r}; use {' or '.join(AUGMENTATIONS)}")
    return tuple(value)


def check_augmentations(recipe: Any, changed_keys: Collection[str]) -> None:
    """Check the list of a recipe, and its keys that differ from their defaults.

    An augmentation with settings in the list is created to check them, which imports PyTorch.

    Raises:
        ConfigError: the list does not have the order in which augmentations act, or a setting is not allowed.
    """
    listed = [_name_and_settings(entry) for entry in recipe.augmentations]
    names = [name for name, _ in listed]
    for name, own in listed:
        if names.count(name) > 1:
            raise ConfigError(f"augmentations lists {name} twice; keep one")
        AUGMENTATIONS[name].check(recipe)
        if own:
            _create(name, own, recipe)
    in_order = sorted(names, key=lambda name: AUGMENTATIONS[name].acts_on == "normalised")
    if names != in_order:
        raise ConfigError(
            f"augmentations is [{', '.join(names)}], but raw log-mel is augmented before it is normalised; "
            f"use [{', '.join(in_order)}]"
        )
    for name, kind in AUGMENTATIONS.items():
        for key in kind.keys:
            if name not in names and key in changed_keys and getattr(recipe, key):
                problem = f"{key} is a setting of {name}, which augmentations does not list"
                raise ConfigError(f"{problem}; list {name}, leave {key} out, or turn it off")


def _name_and_settings(entry: Entry) -> tuple[str, Mapping[str, Any]]:
    return (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))


def _create(name: str, own: Mapping[str, Any], recipe: Any) -> "Augmentation":
    """`own` are the settings that stand in the list."""
    kind = AUGMENTATIONS[name]
    if keys := [key for key in own if key in kind.keys]:
        raise ConfigError(f"{name} in augmentations: {keys[0]} is a recipe key; set it outside of the list")
    module, _, builder = kind.builder.partition(":")
    build = getattr(import_module(module), builder)
    try:
        return build(**{key: getattr(recipe, key) for key in kind.keys}, **own)
    except ConfigError as err:
        raise ConfigError(f"{name} in augmentations: {err}") from None
