"""The runs of a comparison: each model with every seed, on every fold. Imports neither PyTorch nor Ray."""

import itertools
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from ast_core.errors import ConfigError
from ast_core.recipe import MAX_SEED, SYNONYMS, Recipe
from pipeline import storage
from pipeline.dataset import PreparedDataset
from pipeline.train.settings import TrainSettings

MAX_SEEDS = 100
MAX_VARIANTS = 1_000
"""Upper bounds, far above what anybody trains."""

IN_A_NAME = re.compile(r"[^\w.+-]+")
"""What a model's name, which is a folder's too, has a dash for."""


@dataclass(frozen=True)
class PlannedRun:
    """One training run of a comparison."""

    model: str
    """Name of the model, unique in the comparison."""
    seed: int
    fold: str | None
    """The split that is evaluated, of a comparison over folds."""
    settings: TrainSettings

    @property
    def title(self) -> str:
        return ", ".join([self.model, f"seed {self.seed}", *([self.fold] if self.fold else [])])


def model_name(recipe: str, variant: Mapping[str, str]) -> str:
    """The name of a model: that of its recipe, and the keys and values of its variant."""
    stem = re.sub(r"\.ya?ml$", "", posixpath.basename(recipe))
    words = (f"{key}-{value}" for key, value in variant.items())
    return IN_A_NAME.sub("-", "-".join([stem, *words])).strip("-.")


def variants(vary: Sequence[str]) -> list[dict[str, str]]:
    """All combinations of the values in `KEY=VALUE,VALUE` texts. Without any, the one variant that changes nothing.

    Raises:
        ConfigError: a text has no value or no recipe key, or a key or a value is given twice.
    """
    recipe_keys = [field.name for field in fields(Recipe)]
    values: dict[str, list[str]] = {}
    for text in vary:
        key, _, listed = text.partition("=")
        key, given = key.strip().replace("-", "_"), [value.strip() for value in listed.split(",")]
        if not key or not all(given):
            raise ConfigError(f"--vary is {text}; use KEY=VALUE,VALUE, for example lr=1e-5,3e-5")
        if key not in recipe_keys:  # it could be an option of jobs/train.py, such as --output
            hint = f"did you mean {SYNONYMS[key]}?" if key in SYNONYMS else "`jobs/train.py --help` lists the keys"
            raise ConfigError(f"--vary {text}: {key} is no recipe key; {hint}")
        if key == "seed":
            raise ConfigError("--vary seed: seeds are repetitions of one model; give --seeds N")
        if key in values or len(set(given)) < len(given):
            raise ConfigError(f"--vary {text}: {key} or one of its values is given twice; keep one")
        values[key] = given
    combinations = itertools.product(*values.values())
    found = [
        dict(zip(values, combination, strict=True)) for combination in itertools.islice(combinations, MAX_VARIANTS + 1)
    ]
    if len(found) > MAX_VARIANTS:
        raise ConfigError(f"--vary gives more than {MAX_VARIANTS:,} variants; vary fewer keys at once")
    return found


def named(models: Iterable[tuple[str, str, TrainSettings]]) -> dict[str, TrainSettings]:
    """The settings by name, from the name, the recipe and the settings of each model.

    Raises:
        ConfigError: two have one name.
    """
    found: dict[str, TrainSettings] = {}
    recipes: dict[str, str] = {}
    for name, recipe, settings in models:
        if name in found:
            twice = recipes[name] == recipe
            raise ConfigError(
                f"recipe {recipe} is given twice; keep one, and give --seeds 2 for two runs of it"
                if twice
                else f"{recipes[name]} and {recipe} are both called {name}; rename one of the files"
            )
        found[name], recipes[name] = settings, recipe
    return found


def folds(data: str, names: Sequence[str]) -> dict[str, tuple[list[str], list[str]]]:
    """For each fold the splits to train on, all others of the data set, and to evaluate on: the fold.

    Raises:
        ConfigError: nothing is left to train on, or a fold is given twice.
        DataError: the data set or a fold does not exist.
    """
    dataset = PreparedDataset.open(data)
    dataset.clips(names)  # refuses missing splits, and one that is given twice
    if len(dataset.splits) < 2:
        raise ConfigError(f"{dataset.uri} has the one split {dataset.splits[0]}; --folds needs two or more")
    return {fold: ([other for other in dataset.splits if other != fold], [fold]) for fold in names}


def planned_runs(
    models: Mapping[str, TrainSettings],
    output: str,
    *,
    num_seeds: int = 1,
    folds: Mapping[str, tuple[list[str], list[str]]] | None = None,
) -> list[PlannedRun]:
    """All runs, model by model. A run is OUTPUT/MODEL/seed-SEED; with folds it is OUTPUT/MODEL/seed-SEED/FOLD.

    Args:
        models: settings by name; splits and output are set here for each run.
        output: absolute URI of the comparison.
        num_seeds: runs of each model, with the recipe's seed and those that follow it.
        folds: splits to train on and to evaluate on, by fold.

    Raises:
        ConfigError: the number of seeds is not allowed.
    """
    if not 1 <= num_seeds <= MAX_SEEDS:
        raise ConfigError(f"--seeds is {num_seeds}; use 1 to {MAX_SEEDS}")
    runs = []
    for name, settings in models.items():
        first = settings.recipe.seed
        if first + num_seeds - 1 > MAX_SEED:
            raise ConfigError(f"seed is {first}; use {MAX_SEED - num_seeds + 1} or less, for {num_seeds} seeds")
        for seed, fold in itertools.product(range(first, first + num_seeds), folds or [None]):
            uri = storage.join(output, name, f"seed-{seed}", *([fold] if fold else []))
            of_run = replace(settings, recipe=replace(settings.recipe, seed=seed), output=uri)
            if folds and fold:
                train, evaluation = folds[fold]
                of_run = replace(of_run, train_splits=train, eval_splits=evaluation)
            runs.append(PlannedRun(name, seed, fold, of_run))
    return runs
