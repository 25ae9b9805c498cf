"""A comparison of models from its settings to its page: check all, train one after the other, measure, compare."""

import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any, TypeVar

from ray.train.v2.api.exceptions import TrainingFailedError

from ast_core.errors import DataError, UserError
from ast_core.metrics import METRICS, selection_metrics
from pipeline import storage
from pipeline.compare import figures, page
from pipeline.compare.measure import model_costs
from pipeline.compare.plan import PlannedRun
from pipeline.compare.published import audioset_part, published_figures
from pipeline.compare.results import RunResult, read_result
from pipeline.dataset import PreparedDataset
from pipeline.lease import Held, LeaseLostError
from pipeline.redaction import without_secrets
from pipeline.text_table import text_table
from pipeline.train import fit
from pipeline.versions import VERSION

COMPARISON, PAGE = "comparison.json", "comparison.html"

FORMAT_VERSION = 1
"""Version of comparison.json (docs/formats.md). Raise it when the meaning of a key changes, or a key is removed."""

RaySession = Callable[[str, int | None], AbstractContextManager[None]]
T = TypeVar("T")
Failures = dict[str, str]
"""What to say of each model that is not compared."""


def compare(runs: Sequence[PlannedRun], output: str, *, ray_session: RaySession) -> None:
    """Train what is not trained yet, write OUTPUT/comparison.json and OUTPUT/comparison.html, and print the table.

    All runs are checked and claimed before the first is trained. If a model fails, because a run of it does, a file is
    damaged or it cannot be measured, the others are trained and compared before this raises.

    Raises:
        ConfigError, DataError: a run cannot begin (`fit.claim`); the message begins with the model's name.
        DataError: runs were evaluated on different clips.
        UserError: models failed.
    """
    claimed = [(run, _claim(run)) for run in runs]
    with fit.session(*(one for _, one in claimed), ray_session=ray_session) as held:
        failures = _train(claimed, held)
        results, costs = _read(runs, failures, _read_earlier(output))
        if results:
            _write(comparison(results, costs, failures), output)
    if failures:
        others = f"; {storage.join(output, COMPARISON)} has the others" if results else ""
        first = next(iter(failures.values()))
        raise UserError(f"{len(failures)} of {len({run.model for run in runs})} models failed, {first}{others}")


def _train(claimed: Sequence[tuple[PlannedRun, fit.ClaimedRun]], held: Mapping[str, Held]) -> Failures:
    """Train the runs, one after the other. Returns what to say of the models whose runs failed.

    A model needs all of its runs, so after a failure its remaining ones are not trained.
    """
    num_finished = sum(one.is_finished for _, one in claimed)
    print(f"{len(claimed)} runs, {num_finished} of them finished", flush=True)
    failures: Failures = {}
    for number, (run, one) in enumerate(claimed, start=1):
        print(f"\n[{number} of {len(claimed)}] {run.title}", flush=True)
        if run.model in failures:
            state = "not compared" if one.is_finished else "not trained"
            print(f"{state}: another run of this model failed", flush=True)
            continue
        try:
            fit.train_run(one, held)
            continue
        except LeaseLostError:
            raise
        except UserError as err:
            why = without_secrets(str(err))
        except TrainingFailedError as err:  # an unforeseen error in a worker; one in this process ends the comparison
            traceback.print_exc()
            why = without_secrets((str(err).strip().splitlines() or [type(err).__name__])[-1])
        print(f"failed: {why}", flush=True)
        others = [(other, claim) for other, claim in claimed if other.model == run.model and other != run]
        finished = [other.title for other, claim in others if claim.is_finished]
        kept = f" (finished, and kept: {'; '.join(finished)})" if finished else ""
        failures[run.model] = f"{run.title}: {why}{kept}"
    return failures


def _read(
    runs: Sequence[PlannedRun], failures: Failures, earlier: Mapping[str, Any]
) -> tuple[dict[str, list[RunResult]], dict[str, Any]]:
    """The results and the costs of each model that has both. Models that lack one are added to `failures`.

    Args:
        earlier: the content of an earlier comparison.json, from which costs of the same weights are taken.
    """
    models: dict[str, list[PlannedRun]] = {}
    for run in runs:
        if run.model not in failures:
            models.setdefault(run.model, []).append(run)
    if models:
        print("\ncomparing the models", flush=True)
    results = _of_each(models, lambda name: [read_result(run) for run in models[name]], failures)
    figures.check_same_clips([one for of_model in results.values() for one in of_model])
    known = {model["runs"][0]["weights_sha256"]: model["costs"] for model in earlier.get("models", [])}
    costs = _of_each(
        results, lambda name: known.get(results[name][0].weights_sha256) or _costs(results[name][0]), failures
    )
    return {name: results[name] for name in costs}, costs


def _of_each(models: Iterable[str], get: Callable[[str], T], failures: Failures) -> dict[str, T]:
    """What `get` returns for each model. If it raises a UserError, the model is added to `failures` instead."""
    found = {}
    for name in models:
        try:
            found[name] = get(name)
        except UserError as err:
            failures[name] = f"{name}: {without_secrets(str(err))}"
            print(f"failed: {failures[name]}", flush=True)
    return found


def _write(found: Mapping[str, Any], output: str) -> None:
    figures_uri, page_uri = storage.join(output, COMPARISON), storage.join(output, PAGE)
    storage.write_json(figures_uri, found)
    storage.write_bytes(page_uri, page.comparison_page(found, output).encode())
    print(f"\n{table(found)}\nfigures: {figures_uri}   page: {page_uri}", flush=True)


def _claim(run: PlannedRun) -> fit.ClaimedRun:
    try:
        return fit.claim(run.settings)
    except UserError as err:
        raise type(err)(f"{run.title}: {err}") from err


def comparison(
    results: Mapping[str, Sequence[RunResult]], costs: Mapping[str, Any], failures: Mapping[str, str]
) -> dict[str, Any]:
    """The content of comparison.json.

    Args:
        results: the runs of each model.
        costs: of each model (`model_costs`).
        failures: what to say of the models that failed.
    """
    everything = [one for of_model in results.values() for one in of_model]
    data = _data(everything)
    class_names = [one["name"] for one in data["classes"]]
    scored = {name: figures.scored(of_model) for name, of_model in results.items()}
    return {
        "version": FORMAT_VERSION,
        "made": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "made_by": f"ast-ray {VERSION}",
        "data": data,
        "metric": _common_metric(everything),
        "bootstrap": {
            "resamples": figures.NUM_RESAMPLES,
            "seed": figures.SEED,
            "confidence": figures.CONFIDENCE,
        },
        "models": [
            {"name": name, "recipe": _recipe(of_model[0])}
            | figures.model_figures(of_model, scored[name])
            | {"costs": costs[name]}
            | {"published": _published(data["audioset"], of_model[0])}
            for name, of_model in results.items()
        ],
        "pairs": figures.pair_figures(scored, results, class_names),
        "failed": [{"name": name, "error": error} for name, error in failures.items()],
    }


def _data(results: Sequence[RunResult]) -> dict[str, Any]:
    settings = results[0].planned.settings
    dataset = PreparedDataset.open(settings.data)
    num_train, num_eval = (len(dataset.clips(of)) for of in (settings.train_splits, settings.eval_splits))
    labels = zip(dataset.labels.mids, dataset.labels.names, strict=True)
    return {
        "uri": without_secrets(dataset.uri),
        "train_splits": list(settings.train_splits),
        "eval_splits": list(settings.eval_splits),
        "folds": list(dict.fromkeys(one.planned.fold for one in results if one.planned.fold)),
        "train_clips": num_train,
        "eval_clips": num_eval,
        "features": dataset.features.to_dict(),
        "classes": [{"mid": mid, "name": name} for mid, name in labels],
        "audioset": audioset_part(dataset.labels, num_train, num_eval),
    }


def _common_metric(results: Sequence[RunResult]) -> str:
    """The name of the metric that selects the best epoch in all runs; mAP if they differ."""
    selected = {selection_metrics()[one.config["recipe"]["metrics"]].name for one in results}
    return selected.pop() if len(selected) == 1 else "map"


def _recipe(result: RunResult) -> dict[str, Any]:
    """The resolved recipe, without the seed, in which the runs of a model differ."""
    return {key: value for key, value in result.config["recipe"].items() if key != "seed"}


def _costs(result: RunResult) -> dict[str, Any]:
    print(f"measuring {result.planned.model}", flush=True)
    return model_costs(result.best_model, result.planned.settings)


def _published(part: str | None, result: RunResult) -> dict[str, Any] | None:
    starts_elsewhere = "init_from" in result.config
    found = None if starts_elsewhere else published_figures(part, result.config["recipe"])
    return None if found is None else {"map": found.published, "comparison_map": found.comparison, "note": found.note}


def _read_earlier(output: str) -> dict[str, Any]:
    """An earlier comparison.json; empty if there is none that can be read: what it had is measured again."""
    try:
        earlier = storage.read_json(storage.join(output, COMPARISON))
    except DataError:
        return {}
    return earlier if isinstance(earlier, dict) and earlier.get("version") == FORMAT_VERSION else {}


def table(found: Mapping[str, Any]) -> str:
    """The models as a text table, best first."""
    metric = found["metric"]
    heads = [
        "model",
        *(one.title for one in METRICS.values()),
        f"{METRICS[metric].title}, 95 %",
        "last 5",
        "M params",
        "clips/s",
    ]
    rows = [
        [
            model["name"],
            *(shown(model[name]) for name in METRICS),
            " to ".join(map(shown, model.get(f"{metric}_interval") or [None])),
            shown(model["last_epochs"][metric]),
            f"{model['costs']['parameters'] / 1e6:.2f}",
            f"{model['costs']['inference']['clips_per_s']:.1f}",
        ]
        for model in page.by_metric(found)
    ]
    return text_table(heads, rows, "l" + "r" * (len(heads) - 1))


def shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
