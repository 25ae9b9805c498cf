"""OUTPUT/comparison.html, from the content of comparison.json alone: models, costs, curves, pairs and classes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from ast_core.metrics import METRICS
from pipeline.compare.figures import RESAMPLED
from pipeline.html import charts, page
from pipeline.html.charts import Series
from pipeline.html.page import Cell, Column, Table
from pipeline.redaction import without_secrets

CLASSES_SHOWN = 3
"""Classes in which a pair of models differs most, of the first and of the second model."""

Record = Mapping[str, Any]


def comparison_page(found: Record, uri: str) -> str:
    """The HTML of a comparison, `found`, in the folder `uri`."""
    models = by_metric(found)
    return page.render(
        "comparison.html",
        uri=without_secrets(uri),
        made=f"Made {found['made'].replace('T', ' ').replace('Z', ' UTC')} by {found['made_by']}.",
        about=_about(found),
        key_figures=_key_figures(found, models),
        failed=found["failed"],
        models=_models(found, models),
        model_notes=list(_model_notes(found)),
        charts=[*_trade_offs(found, models), *_curves(found, models)],
        costs=_costs(models),
        cost_note=_cost_note(models),
        pairs=_pairs(found),
        ensembles=_ensembles(found),
        differences=_differences(found),
        classes=_classes(found, models),
        recipes=_recipes(models),
    )


def by_metric(found: Record) -> list[Record]:
    """The models, best first by the comparison's metric."""
    sign = -1 if METRICS[found["metric"]].higher_is_better else 1

    def key(model: Record) -> float:
        value = model[found["metric"]]
        return math.inf if value is None else sign * value

    return sorted(found["models"], key=key)


def _about(found: Record) -> str:
    data = found["data"]
    trained = f"trained on {_counted(data['train_clips'], 'clip')}, evaluated on {_counted(data['eval_clips'], 'clip')}"
    if data["folds"]:
        folds = ", ".join(data["folds"])
        trained = f"each fold evaluated by models trained on all other splits ({folds}): {trained} in the first fold"
    else:
        trained += f" of {', '.join(data['eval_splits'])}"
    kind = data["features"]
    return (
        f"Data: {data['uri']}, {len(data['classes'])} classes; {trained}; features {kind['kind']}, "
        f"{kind['num_mel_bins']} mel bins every {kind['frame_shift_ms']:g} ms."
    )


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _key_figures(found: Record, models: Sequence[Record]) -> list[tuple[str, str]]:
    best, title = models[0], METRICS[found["metric"]].title
    cheapest = min(models, key=lambda model: model["costs"]["multiply_adds"])
    return [
        ("models", str(len(models))),
        (f"best {title}: {best['name']}", _figure(best[found["metric"]])),
        (f"{title} of the cheapest: {cheapest['name']}", _figure(cheapest[found["metric"]])),
    ]


# --- models


def _models(found: Record, models: Sequence[Record]) -> Table:
    metric, is_audioset = found["metric"], found["data"]["audioset"] is not None
    columns = [Column("model", is_number=False)]
    columns += [Column(one.title, is_sorted=name == metric) for name, one in METRICS.items()]
    columns += [Column(f"{METRICS[metric].title}, last 5 epochs"), Column("averaged weights")]
    if is_audioset:
        columns += [Column("published mAP"), Column("as the comparison’s authors got it")]
    rows = []
    for model in models:
        row = [Cell(model["name"], model["name"], note=_runs(model))]
        row += [_with_interval(model, name) for name in METRICS]
        row += [_cell(model["last_epochs"][metric]), _cell((model["averaged"] or {}).get(metric))]
        if is_audioset:
            known = model["published"] or {"map": None, "comparison_map": None, "note": ""}
            row += [Cell(_figure(known["map"]), known["map"], note=known["note"]), _cell(known["comparison_map"])]
        rows.append(row)
    return Table("Models, best first", columns, rows, id="models")


def _runs(model: Record) -> str:
    seeds = len({run["seed"] for run in model["runs"]})
    return f"{seeds} seeds" if seeds > 1 else ""


def _with_interval(model: Record, name: str) -> Cell:
    note = []
    if interval := model.get(f"{name}_interval"):
        note.append(f"{_figure(interval[0], 3)} to {_figure(interval[1], 3)}")
    if (spread := model.get(f"{name}_std_over_seeds")) is not None:
        note.append(f"± {spread:.3f} over seeds")
    return Cell(_figure(model[name]), model[name], note="; ".join(note))


def _model_notes(found: Record) -> list[str]:
    how = found["bootstrap"]
    notes = [
        "Figures are those of each run’s best epoch. It is chosen on the evaluation clips, so they are somewhat too "
        "good, for all models alike; the mean of the last five epochs involves no choice.",
        f"The range below a figure is a {100 * how['confidence']:.0f} % interval by {how['resamples']:,} bootstrap "
        "resamples of the evaluation clips. It says how much other clips would change the figure, and nothing of "
        "another seed of the training: give several seeds for that.",
    ]
    if any(len(model["runs"]) > 1 for model in found["models"]):
        notes.append("A model has several runs: figures are means over them.")
    if part := found["data"]["audioset"]:
        which = {"full": "balanced and unbalanced", "balanced": "balanced"}[part]
        notes.append(
            f"By its classes and numbers of clips, this is AudioSet ({which} training clips). Published figures are of "
            "other copies of it. Clips that a copy lacks change a figure, so they need not be reached here."
        )
    return notes


# --- costs and charts


def _costs(models: Sequence[Record]) -> Table:
    columns = [
        Column("model", is_number=False),
        Column("parameters, millions"),
        Column("multiply-adds of a clip, 10⁹"),
        Column("clips/s in training"),
        Column("clips/s in inference"),
        Column("peak memory, GB"),
        Column("time trained"),
        Column("epochs, best"),
    ]
    setups = {model["name"]: _setup(model) for model in models}
    where = setups if len(set(setups.values())) > 1 else dict.fromkeys(setups, "")
    rows = []
    for model in models:
        costs, training = model["costs"], model["training"]
        epochs = [f"{run['epochs']}, {run['best_epoch']}" for run in model["runs"]]
        rows.append(
            [
                Cell(model["name"], model["name"]),
                _cell(costs["parameters"] / 1e6, 2),
                _cell(costs["multiply_adds"] / 1e9, 3),
                _cell(training["clips_per_s"], 1),
                Cell(_figure(rate := costs["inference"]["clips_per_s"], 1), rate, note=where[model["name"]]),
                _cell(training["memory_gb"], 2),
                Cell(_time(training["hours"]), training["hours"]),
                Cell("; ".join(epochs[:4]) + ("; …" if len(epochs) > 4 else ""), model["runs"][0]["best_epoch"]),
            ]
        )
    return Table("What each model costs", columns, rows, id="costs")


def _time(hours: float) -> str:
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s"
    return f"{60 * hours:.1f} min" if hours < 1 else f"{hours:,.1f} h"


def _setup(model: Record) -> str:
    """How the inference of a model was measured."""
    how = model["costs"]["inference"]
    device, threads = how["device"].replace("cpu", "CPU"), _counted(how["threads"], "thread")
    return f"{device}, {threads}, batches of {how['batch_clips']}, {how['precision']}"


def _cost_note(models: Sequence[Record]) -> str:
    setups = {_setup(model) for model in models}
    devices = sorted({device for model in models for device in model["training"]["devices"]})
    workers = sorted({number for model in models for number in model["training"]["workers"]})
    how = setups.pop() if len(setups) == 1 else "in different ways, which are said below each figure"
    return (
        f"Inference: {how}; random features, without reading or decoding, measured once for each model when it was "
        f"first compared. Training: on {', '.join(devices)}, with {' or '.join(map(str, workers))} "
        f"worker{'s' if workers != [1] else ''}, reading included; times are of all runs of a model together, "
        "without evaluation. Memory is that of the device; on a CPU, of the whole process of a worker."
    )


def _trade_offs(found: Record, models: Sequence[Record]) -> list[Markup]:
    """The comparison's metric over operations, and over clips/s in inference, a dot for each model."""
    metric = METRICS[found["metric"]]
    known = [model for model in models if model[metric.name] is not None]
    drawn = []
    for title, x_label, get in (
        ("operations", "multiply-adds of a clip, 10⁹ (log scale)", lambda one: one["costs"]["multiply_adds"] / 1e9),
        ("speed", "clips/s in inference (log scale)", lambda one: one["costs"]["inference"]["clips_per_s"]),
    ):
        dots = [_dot(model["name"], get(model), model[metric.name]) for model in known]
        if dots:
            lowest = min(float(dot.x[0]) for dot in dots)
            drawn.append(
                charts.chart(
                    dots,
                    title=f"{metric.title} and {title}",
                    x_label=x_label,
                    y_label=metric.title,
                    log_x_from=lowest / 1.5,
                    from_zero=False,
                )
            )
    return drawn


def _dot(name: str, x: float, y: float) -> Series:
    return Series(name, np.array([x]), np.array([y]), has_line=False, has_dots=True, notes=[f"{name}: {y:.4f}"])


def _curves(found: Record, models: Sequence[Record]) -> list[Markup]:
    metric = METRICS[found["metric"]]
    drawn = []
    for key, title, y_label in (
        (metric.name, f"{metric.title} after each epoch", metric.title),
        ("loss", "Training loss", "loss"),
    ):
        lines = []
        for model in models:
            points = [
                (epoch, value)
                for epoch, value in zip(model["curves"]["epoch"], model["curves"][key], strict=True)
                if value is not None
            ]
            if points:
                x, y = (np.array(values) for values in zip(*points, strict=True))
                lines.append(Series(model["name"], x, y, has_dots=len(x) == 1))
        if lines:
            drawn.append(charts.chart(lines, title=title, x_label="epochs", y_label=y_label, from_zero=key == "loss"))
    return drawn


# --- pairs


def _paired_metric(found: Record) -> str:
    return found["metric"] if found["metric"] in RESAMPLED else "map"


def _pairs(found: Record) -> Table:
    metric = _paired_metric(found)
    other = next(name for name in RESAMPLED if name != metric)
    columns = [Column(name, is_number=False) for name in ("model", "minus model")]
    columns += [Column(f"{METRICS[metric].title} difference", is_sorted=True), Column("95 % interval"), Column("p")]
    columns += [Column("p, Holm"), Column(f"{METRICS[other].title} difference"), Column("p of it")]
    rows = []
    for pair in found["pairs"]:
        sign = -1 if (pair[metric]["difference"] or 0) < 0 else 1
        first, second = pair["models"][::sign]
        row = [Cell(first, first), Cell(second, second), _signed(pair[metric]["difference"], sign)]
        row += [Cell(_range(pair[metric]["interval"], sign)), _p(pair[metric]["p"]), _p(pair[metric]["p_holm"])]
        row += [_signed(pair[other]["difference"], sign), _p(pair[other]["p"])]
        rows.append(row)
    return Table("Differences between models, largest first", columns, _falling(rows, 2), id="pairs")


def _falling(rows: list[list[Cell]], column: int) -> list[list[Cell]]:
    """Rows by the value in a column, highest first, unknown ones last."""

    def key(row: list[Cell]) -> float:
        value = row[column].sort
        return -value if isinstance(value, float) else math.inf

    return sorted(rows, key=key)


def _range(interval: Sequence[float] | None, sign: int) -> str:
    if interval is None:
        return "–"
    low, high = sorted(sign * bound for bound in interval)
    return f"{_plus(low)} to {_plus(high)}"


def _p(value: float | None) -> Cell:
    return Cell("–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}", value)


def _signed(value: float | None, sign: int = 1) -> Cell:
    return Cell("–") if value is None else Cell(_plus(sign * value, 4), sign * value)


def _plus(value: float, decimals: int = 3) -> str:
    return f"{value:+.{decimals}f}".replace("-", "−")


def _ensembles(found: Record) -> Table:
    metric = _paired_metric(found)
    alone = {model["name"]: model[metric] for model in found["models"]}
    rows = []
    for pair in found["pairs"]:
        together, known = pair["ensemble"][metric], [alone[name] for name in pair["models"] if alone[name] is not None]
        gain = None if together is None or not known else together - max(known)
        names = " + ".join(pair["models"])
        rows.append([Cell(names, names), _cell(together), _signed(gain)])
    columns = [Column("models", is_number=False), Column(METRICS[metric].title, is_sorted=True)]
    columns += [Column("more than the better one alone")]
    return Table("Ensembles of two", columns, _falling(rows, 1), id="ensembles")


# --- classes


def _differences(found: Record) -> Table:
    rows = []
    for pair in found["pairs"]:
        first, second = pair["models"]
        better = [one for one in pair["classes"] if one["difference"] > 0][:CLASSES_SHOWN]
        worse = [one for one in pair["classes"] if one["difference"] < 0][:CLASSES_SHOWN]
        for one, other, classes in ((first, second, better), (second, first, worse)):
            if classes:
                listed = ", ".join(f"{each['name']} ({_plus(abs(each['difference']), 2)})" for each in classes)
                rows.append([Cell(one), Cell(other), Cell(listed)])
    columns = [Column(name, is_number=False) for name in ("model", "is better than", "in the classes (by AP)")]
    return Table("Where each pair differs most", columns, rows)


def _classes(found: Record, models: Sequence[Record]) -> Table:
    """The AP of each class by model; classes in which models differ most come first."""
    rows = []
    for index, one in enumerate(found["data"]["classes"]):
        values = [model["ap"][index] for model in models]
        known = [value for value in values if value is not None]
        if known:
            best = [model["name"] for model, value in zip(models, values, strict=True) if value == max(known)]
            spread = max(known) - min(known)
            rows.append(
                [
                    Cell(one["name"], one["name"]),
                    *(_cell(value, 3) for value in values),
                    _cell(spread, 3),
                    Cell("all" if len(best) == len(known) > 1 else ", ".join(best), best[0]),
                ]
            )
    columns = [Column("class", is_number=False), *(Column(model["name"]) for model in models)]
    columns += [Column("best minus worst", is_sorted=True), Column("best", is_number=False)]
    return Table("AP of each class by model", columns, _falling(rows, -2), id="classes")


def _recipes(models: Sequence[Record]) -> Table:
    """The recipe keys in which the models differ."""
    keys = [
        key for key in models[0]["recipe"] if any(one["recipe"].get(key) != models[0]["recipe"][key] for one in models)
    ]
    rows = [[Cell(key), *(Cell(_value(model["recipe"].get(key))) for model in models)] for key in keys]
    return Table(
        "Recipe keys in which the models differ",
        [Column(name, is_number=False) for name in ("key", *(model["name"] for model in models))],
        rows,
    )


def _value(value: Any) -> str:
    return "–" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"


def _figure(value: float | None, decimals: int = 4) -> str:
    return "–" if value is None else f"{value:,.{decimals}f}"


def _cell(value: float | None, decimals: int = 4) -> Cell:
    return Cell(_figure(value, decimals), value)
