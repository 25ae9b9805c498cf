"""RUN/report.html: the course of a run and the quality of its best model, from the files in RUN, at any time.

If a file is missing or damaged, only its part of the page is left out. The module is long because the page has a dozen
parts, each of which is one short function.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

import numpy as np
from markupsafe import Markup

from ast_core.calibration import Reliability, reliability
from ast_core.checksums import without_checksum
from ast_core.errors import DataError
from ast_core.metrics import METRICS, key_metrics, per_class_columns, selection_metrics, selection_order
from ast_core.recipe import EXECUTION_KEYS, Recipe
from pipeline import storage
from pipeline.html import charts, page
from pipeline.html.charts import Series
from pipeline.html.page import Cell, Column, Table
from pipeline.redaction import without_secrets
from pipeline.train.evaluation import analysis
from pipeline.train.evaluation.scores import Scores, read_scores
from pipeline.train.metrics_files import read_records
from pipeline.versions import VERSION

MAX_POINTS = 300
"""Points of a curve. If there are more records, a point is the mean of several."""
NUM_CONFUSIONS = 20
MIN_CONFUSED_CLIPS = 5

REFERENCE_MAP = (0.4153, 0.4349, 0.4476, 0.4490, 0.4486)
REFERENCE_AVERAGED_MAP = 0.4590
"""The reference implementation's mAP on full AudioSet, after each epoch and of its averaged weights.

Source: https://github.com/YuanGongND/ast, egs/audioset/exp/test-full-f10-t10-pTrue-b12-lr1e-5.
"""
REFERENCE_RECIPE = Recipe(label_dim=527, wa_start=1, wa_end=5).to_dict()
"""The recipe of that run. A test compares it with jobs/recipes/audioset-full.yaml."""
FULL_AUDIOSET_KEYS = ("label_dim", "sampling", "loss", "metrics", "audioset_pretrain")
"""The keys by which a run on full AudioSet is recognised: a resolved recipe has no name."""
NOT_COMPARED = {*EXECUTION_KEYS, "precision", "seed", "imagenet_weights", "audioset_weights"}
"""Keys that the comparison ignores: how the same is computed, the seed, and where files are."""

NO_TABLE = Table("", [], [])
Record = Mapping[str, Any]
T = TypeVar("T")


def write_run_report(run: str) -> str:
    """Write RUN/report.html and return its URI.

    Raises:
        DataError: the folder contains no run.
    """
    run = storage.absolute(run)
    if not any(storage.exists(storage.join(run, name)) for name in ("config.json", "metrics.jsonl")):
        raise DataError(f"{run} holds no run: neither config.json nor metrics.jsonl is there")
    uri = storage.join(run, "report.html")
    storage.write_bytes(uri, _page(run).encode())
    return uri


def _page(run: str) -> str:
    gaps: list[str] = []
    config = _read(run, "config.json", _mapping, gaps) or {}
    summary = _read(run, "summary.json", _mapping, gaps)
    records = _records(run, gaps)
    classes = _read(run, "per_class.csv", _classes, gaps) or []
    scores = _scores(run, gaps)
    recipe = config["recipe"] if isinstance(config.get("recipe"), dict) else {}
    steps, epochs = ([one for one in records if one.get("kind") == kind] for kind in ("step", "epoch"))
    best = _best(summary, epochs, recipe)
    now = datetime.now(UTC)
    is_full = all(recipe.get(key) == REFERENCE_RECIPE[key] for key in FULL_AUDIOSET_KEYS)
    return page.render(
        "run_report.html",
        uri=without_secrets(run),
        made=f"Made {now:%Y-%m-%d %H:%M} UTC by ast-ray {VERSION} from the files of the run.",
        title=f"mAP {_figure(best.get('map'))}",
        key_figures=_key_figures(best, summary, epochs),
        state=_state(summary, epochs, recipe),
        gaps=gaps,
        figures=_figures(best, summary, epochs),
        by_epoch=_by_epoch(epochs),
        reference=_reference(epochs, summary) if is_full else NO_TABLE,
        reference_notes=list(_reference_notes(config, recipe)),
        charts=list(_charts(steps, epochs, is_full)),
        chart_note=_chart_note(steps),
        **_class_part(classes),
        **_score_part(scores, classes),
        no_scores="The scores of the best epoch, best/scores.parquet, are missing.",
        min_clips=MIN_CONFUSED_CLIPS,
        configuration=_configuration(config),
    )


# --- files in RUN


def _read(run: str, name: str, parse: Callable[[str], T], gaps: list[str]) -> T | None:
    uri = storage.join(run, name)
    if not storage.exists(uri):
        return None
    try:
        return parse(storage.read_text(uri))
    except (DataError, ValueError, KeyError, TypeError, csv.Error) as err:
        gaps.append(f"{name} cannot be read ({type(err).__name__}: {without_secrets(str(err))}).")
        return None


def _mapping(text: str) -> dict[str, Any]:
    return without_checksum(json.loads(text), origin="the file", remedy="restore it")


def _records(run: str, gaps: list[str]) -> list[dict[str, Any]]:
    try:
        return read_records(run)
    except (ValueError, DataError) as err:
        gaps.append(f"metrics.jsonl cannot be read ({type(err).__name__}: {without_secrets(str(err))}).")
        return []


def _classes(text: str) -> list[dict[str, Any]]:
    """The rows of per_class.csv. An undefined metric is None."""
    return [
        {"name": row["display_name"]}
        | {each.column: float(row[each.column]) if row.get(each.column) else None for each in per_class_columns()}
        | {key: int(row[key]) for key in ("train_clips", "eval_clips")}
        for row in csv.DictReader(io.StringIO(text))
    ]


def _scores(run: str, gaps: list[str]) -> Scores | None:
    try:
        return read_scores(run)
    except DataError as err:
        gaps.append(f"{without_secrets(str(err))}.")
        return None


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


# --- figures


def _best(summary: Record | None, epochs: Sequence[Record], recipe: Record) -> Record:
    """The best epoch's metrics: from the summary, or of the best epoch so far if there is no summary yet."""
    if summary is not None:
        return {"epoch": summary.get("best_epoch")} | {name: summary.get(name) for name in METRICS}
    metrics = selection_metrics()
    selected = metrics.get(str(recipe.get("metrics")), METRICS["map"])
    order = [selection_order(_number(one.get(selected.name)), i, selected) for i, one in enumerate(epochs)]
    return epochs[order.index(max(order))] if epochs else {}


def _averaged(summary: Record | None) -> Record | None:
    averaged = (summary or {}).get("averaged")
    return averaged if isinstance(averaged, dict) else None


def _ensemble(summary: Record | None, epochs: Sequence[Record]) -> Record | None:
    if summary is not None and isinstance(summary.get("running_ensemble"), dict):
        return dict(summary["running_ensemble"])
    of_last = {name: epochs[-1].get(f"running_ensemble_{name}") for name in METRICS} if epochs else {}
    return of_last if any(value is not None for value in of_last.values()) else None


def _key_figures(best: Record, summary: Record | None, epochs: Sequence[Record]) -> list[tuple[str, str]]:
    figures = [("best epoch" if summary else "best epoch so far", str(best.get("epoch") or "–"))]
    figures += [(metric.title, _figure(best.get(metric.name))) for metric in METRICS.values()]
    others = {"averaged weights": _averaged(summary), "running ensemble": _ensemble(summary, epochs)}
    figures += [(f"mAP, {name}", _figure(of.get("map"))) for name, of in others.items() if of is not None]
    if summary is not None and _number(summary.get("clips_per_s")) is not None:
        figures.append(("clips/s", f"{summary['clips_per_s']:,.1f}"))
    if summary is not None and _number(summary.get("data_wait_share")) is not None:
        figures.append(("waiting for data", page.percent(summary["data_wait_share"])))
    return figures


def _state(summary: Record | None, epochs: Sequence[Record], recipe: Record) -> str:
    if summary is not None:
        return f"The run is finished, after {summary.get('epochs', len(epochs))} epochs."
    done = f"{len(epochs):,} of {recipe.get('epochs', '?')} epochs are done"
    return f"summary.json is missing: the run is in progress, or was interrupted; the same command resumes it. {done}."


def _figures(best: Record, summary: Record | None, epochs: Sequence[Record]) -> Table:
    of = {
        f"best epoch ({best.get('epoch') or '–'})": best or None,
        "averaged weights": _averaged(summary),
        "running ensemble": _ensemble(summary, epochs),
    }
    rows = [
        [Cell(name), *(_cell(figures.get(metric)) for metric in METRICS)]
        for name, figures in of.items()
        if figures is not None
    ]
    caption = "Best epoch, averaged weights and running ensemble"
    titles = [metric.title for metric in METRICS.values()]
    return Table(caption, [Column("model", is_number=False), *map(Column, titles)], rows)


def _by_epoch(epochs: Sequence[Record]) -> Table:
    names = (
        {"loss": "training loss"}
        | {name: metric.title for name, metric in METRICS.items()}
        | {f"running_ensemble_{key}": f"ensemble’s {one.title}" for key, one in METRICS.items() if one.per_class}
    )
    shown = {key: name for key, name in names.items() if any(key in one for one in epochs)}
    rows = [[Cell(str(one.get("epoch", "–"))), *(_cell(one.get(key)) for key in shown)] for one in epochs]
    return Table("Each epoch", [Column("epoch"), *map(Column, shown.values())], rows)


def _reference(epochs: Sequence[Record], summary: Record | None) -> Table:
    ours = {one.get("epoch"): _number(one.get("map")) for one in epochs}
    pairs = [(f"epoch {i}", ours.get(i), theirs) for i, theirs in enumerate(REFERENCE_MAP, start=1)]
    pairs.append(("averaged weights", _number((_averaged(summary) or {}).get("map")), REFERENCE_AVERAGED_MAP))
    rows = [
        [
            Cell(name),
            _cell(mine),
            _cell(theirs),
            Cell("–" if mine is None else f"{mine - theirs:+.4f}".replace("-", "−")),
        ]
        for name, mine, theirs in pairs
    ]
    columns = [Column("", is_number=False), *map(Column, ("mAP of this run", "mAP of the reference", "difference"))]
    return Table("mAP after each epoch on full AudioSet", columns, rows)


def _reference_notes(config: Record, recipe: Record) -> Iterator[str]:
    yield (
        "The reference is the AST authors’ own run on their copy of balanced and unbalanced AudioSet, evaluated on "
        "their copy of the evaluation set."
    )
    splits = config.get("train_splits")
    if isinstance(splits, dict):
        yield f"This run is trained on {', '.join(map(str, splits))}."
    others = [
        f"{key} {recipe.get(key)} for {value}"
        for key, value in REFERENCE_RECIPE.items()
        if key not in NOT_COMPARED and recipe.get(key) != value
    ]
    yield f"Its recipe differs: {', '.join(others)}." if others else "Its recipe is the reference recipe."


# --- curves


def _charts(steps: Sequence[Record], epochs: Sequence[Record], is_full: bool) -> Iterator[Markup]:
    loss = _series(steps, "loss", "loss")
    if loss is not None:
        lowest = float(loss.y.min())
        log_from = lowest / 1.1 if lowest > 0 else None
        y_label = "loss (log scale)" if log_from else "loss"
        yield charts.chart([loss], title="Training loss", x_label="steps", y_label=y_label, log_y_from=log_from)
    rate = _series(steps, "lr", "learning rate")
    if rate is not None:
        highest = float(rate.y.max())
        power = math.floor(math.log10(highest)) if highest > 0 else 0  # a rate that stays 0 must be visible
        scaled = Series(rate.name, rate.x, rate.y / 10.0**power)
        yield charts.chart(
            [scaled], title="Learning rate", x_label="steps", y_label=f"learning rate, 10{_superscript(power)}"
        )
    for metric, label in ((one.name, one.title) for one in key_metrics()):
        lines = [
            _series(epochs, metric, "each epoch"),
            _series(epochs, f"running_ensemble_{metric}", "running ensemble"),
        ]
        if is_full and metric == "map":
            lines.append(
                Series("the reference", np.arange(1, len(REFERENCE_MAP) + 1), np.array(REFERENCE_MAP), has_dots=True)
            )
        there = [line for line in lines if line is not None]
        if lines[0] is not None:
            yield charts.chart(
                there, title=f"{label} on the evaluation set", x_label="epochs", y_label=label, from_zero=False
            )
    for key, title, y_label, scale in (
        ("clips_per_s", "Throughput", "clips/s", 1),
        ("data_wait_share", "Waiting for data", "% of the time", 100),
        ("mfu", "Model FLOPs utilisation", "% of the device’s peak", 100),
        ("memory_gb", "Device memory", "GB", 1),
    ):
        line = _series(steps, key, title)
        if line is not None:
            line = Series(line.name, line.x, scale * line.y)
            yield charts.chart([line], title=title, x_label="steps", y_label=y_label)


def _series(records: Sequence[Record], key: str, name: str) -> Series | None:
    """A curve of one value, over steps as a line or over epochs with dots; None if no record has the value."""
    over = "step" if records and records[0]["kind"] == "step" else "epoch"
    points = [
        (one[over], value)
        for one in records
        if isinstance(one.get(over), int) and (value := _number(one.get(key))) is not None
    ]
    if not points:
        return None
    x, y = (np.array(values) for values in zip(*points, strict=True))
    if len(x) > MAX_POINTS:
        x, y = (np.array([part.mean() for part in np.array_split(values, MAX_POINTS)]) for values in (x, y))
        x = x.round().astype(np.int64)
    return Series(name, x, y, has_dots=over == "epoch" or len(x) == 1)


def _chart_note(steps: Sequence[Record]) -> str:
    note = "A step is one global batch. The axes of mAP, AUC and accuracy need not begin at 0."
    if len(steps) > MAX_POINTS:
        note += f" Each point over steps is the mean of about {len(steps) / MAX_POINTS:.0f} records."
    return note


def _superscript(power: int) -> str:
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


# --- classes


def _class_part(classes: Sequence[Record]) -> dict[str, Any]:
    if not classes:
        return {"by_class": NO_TABLE, "class_note": "", "class_chart": ""}
    first, *others = per_class_columns()
    known = [one for one in classes if one[first.column] is not None]
    order = sorted(classes, key=lambda one: -math.inf if one[first.column] is None else one[first.column], reverse=True)
    rows = [
        [
            Cell(one["name"], one["name"]),
            Cell(_figure(one[first.column]), one[first.column], one[first.column]),
            *(_cell(one[each.column]) for each in others),
            Cell(page.count(one["train_clips"]), one["train_clips"]),
            Cell(page.count(one["eval_clips"]), one["eval_clips"]),
        ]
        for one in order
    ]
    columns = [Column("class", is_number=False), Column(first.title, is_sorted=True)]
    columns += map(Column, (*(each.title for each in others), "training clips", "evaluation clips"))
    without = f"{len(classes) - len(known):,} of {len(classes):,} classes"
    note = f"Metrics of the best epoch. {without} have no evaluation clip, and so no {first.title}."
    chart: Markup | str = ""
    if known:
        dots = Series(
            "class",
            np.array([one["train_clips"] for one in known]),
            np.array([one[first.column] for one in known]),
            has_line=False,
            has_dots=True,
            notes=[
                f"{one['name']}: {first.title} {one[first.column]:.3f}, {one['train_clips']:,} training clips"
                for one in known
            ],
        )
        chart = charts.chart(
            [dots],
            title=f"{first.title} and training clips of each class",
            x_label="training clips (log scale)",
            y_label=first.title,
            log_x_from=charts.BELOW_ONE,
        )
    return {
        "by_class": Table("Each class, best first", columns, rows, id="classes"),
        "class_note": note,
        "class_chart": chart,
    }


# --- scores


def _score_part(scores: Scores | None, classes: Sequence[Record]) -> dict[str, Any]:
    if scores is None or scores.scores.size == 0:
        none = dict.fromkeys(("calibration_note", "calibration_chart", "confusion_note"), "")
        return none | {"calibration": NO_TABLE, "confusions": NO_TABLE}
    num_clips, num_classes = scores.scores.shape
    names = (
        [one["name"] for one in classes] if len(classes) == num_classes else [f"class {c}" for c in range(num_classes)]
    )
    targets = scores.targets()
    found = reliability(scores.scores, targets)
    pairs = analysis.confusions(scores.scores, targets, num=NUM_CONFUSIONS, min_clips=MIN_CONFUSED_CLIPS)
    return {
        "calibration": _calibration_table(found),
        "calibration_note": (
            f"All {num_clips * num_classes:,} decisions, one for each clip and class, by score. If scores are "
            "probabilities, the share of true ones in a bin equals its mean score. Expected calibration error, the "
            f"mean difference of the two over decisions: {_error(found.expected_error)}. It is small because most "
            "decisions are easy negatives."
        ),
        "calibration_chart": _calibration_chart(found),
        "confusions": _confusion_table(pairs, names),
        "confusion_note": (
            "For the clips that have the class and not the one it is taken for: the mean score of the wrong class, by "
            f"which the {NUM_CONFUSIONS} worst pairs are chosen, the mean score of the class itself, and how often the "
            f"wrong one scores higher. Pairs with fewer than {MIN_CONFUSED_CLIPS} such clips are left out. Labels may "
            "be incomplete: classes that occur together are no mistake of the model."
        ),
    }


def _calibration_table(found: Reliability) -> Table:
    last = len(found.decisions) - 1
    rows = [
        [
            Cell(f"{found.edges[i]:.1f} to {'' if i == last else 'below '}{found.edges[i + 1]:.1f}"),
            Cell(page.count(found.decisions[i]), int(found.decisions[i])),
            _cell(found.mean_score[i]),
            _cell(found.share_true[i]),
        ]
        for i in range(last + 1)
    ]
    columns = [Column("score", is_number=False), *map(Column, ("decisions", "mean score", "share of true ones"))]
    return Table("Decisions by score", columns, rows)


def _calibration_chart(found: Reliability) -> Markup:
    some = found.decisions > 0
    notes = [f"{decisions:,} decisions" for decisions in found.decisions[some]]
    ours = Series("this model", found.mean_score[some], found.share_true[some], has_dots=True, notes=notes)
    even = Series("calibrated", np.array([0.0, 1.0]), np.array([0.0, 1.0]))
    return charts.chart([ours, even], title="Reliability", x_label="mean score of a bin", y_label="share of true ones")


def _confusion_table(pairs: Sequence[analysis.Confusion], names: Sequence[str]) -> Table:
    rows = [
        [
            Cell(names[one.true], names[one.true]),
            Cell(names[one.taken_for], names[one.taken_for]),
            Cell(page.count(one.clips), one.clips),
            Cell(_figure(one.mean_score, 3), one.mean_score, one.mean_score),
            Cell(_figure(one.mean_true_score, 3), one.mean_true_score),
            Cell(page.percent(one.share_above), one.share_above),
        ]
        for one in pairs
    ]
    columns = [
        *(Column(name, is_number=False) for name in ("class", "taken for")),
        Column("clips"),
        Column("mean score of the wrong one", is_sorted=True),
        *map(Column, ("mean score of the class", "wrong one is higher")),
    ]
    return Table("Classes and what they are taken for, worst first", columns, rows, id="confusions")


# --- configuration


def _configuration(config: Record) -> Table:
    rows = [[Cell(key), Cell(text)] for name, value in config.items() for key, text in _flat(value, name)]
    return Table("What was run", [Column("key", is_number=False), Column("value", is_number=False)], rows)


def _flat(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}")
    else:
        yield path, without_secrets(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _figure(value: Any, decimals: int = 4) -> str:
    number = _number(value)
    return "–" if number is None else f"{number:.{decimals}f}"


def _error(value: float) -> str:
    return f"{value:.4f}" if value >= 0.001 else f"{value:.1e}"


def _cell(value: Any) -> Cell:
    return Cell(_figure(value), _number(value))
