"""The model card of an exported model: README.md for the Hugging Face hub, made from the run that trained it.

What is not known (a checkpoint of another project has no run) is said to be unknown. Nothing in the card names a place
of the machine: of the data set's URI only the last part is shown.
"""

import csv
import io
import math
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from ast_core.bootstrap import basic_interval, resampled_mean
from ast_core.calibration import ModelCalibration
from ast_core.checkpoints import ModelConfig
from ast_core.metrics import METRICS, bootstrap_map, per_class_columns
from ast_core.models.tagger import Tagger
from pipeline import storage
from pipeline.train.evaluation.scores import Scores, read_scores
from pipeline.train.metrics_log import read_summary
from pipeline.versions import VERSION

CARD_FILE = "README.md"

RARE = 10
"""Evaluation clips below which the card points out that a class's figures are uncertain."""

NUM_RESAMPLES = 1000

TASK = "audio-classification"

GOALS = {"f1": "the largest F1", "precision": "a precision of {:g}", "recall": "a recall of {:g}"}


@dataclass(frozen=True)
class Trained:
    """What is recorded about a model's training; empty if it does not lie in a run."""

    weights: str = "from another project, or a copied model folder"
    run: Mapping[str, Any] = field(default_factory=dict)
    """RUN/config.json."""
    figures: Mapping[str, float | None] = field(default_factory=dict)
    """The metrics of these weights."""
    scores: Scores | None = None
    """Scores of the evaluation clips, if they are those of these weights."""
    per_class: tuple[Mapping[str, str], ...] = ()
    """Rows of RUN/per_class.csv, if they are those of these weights."""
    selected_here: bool = False
    """Whether the epoch was selected by these figures."""


def read_trained(uri: str) -> Trained:
    """What the run says of the model at `uri`, which is the result of `models.find`.

    Raises:
        DataError: a file of the run is damaged.
    """
    run, _, folder = uri.rstrip("/").rpartition("/")
    is_run = folder in ("best", "averaged") and storage.exists(storage.join(run, "summary.json"))
    if not is_run:
        return Trained()
    config = storage.read_checked_json(storage.join(run, "config.json"))
    summary = read_summary(run)
    if folder == "averaged":
        return Trained("averaged over epochs", config, summary["averaged"] or {})
    per_class = tuple(csv.DictReader(io.StringIO(storage.read_text(storage.join(run, "per_class.csv")))))
    weights = f"of epoch {summary['best_epoch']}, the best one"
    return Trained(weights, config, summary, read_scores(run), per_class, selected_here=True)


def model_card(
    name: str,
    model: Tagger,
    config: ModelConfig,
    trained: Trained,
    calibration: ModelCalibration | None,
    *,
    use: str,
    library: str | None,
    calibrated_by: str,
) -> str:
    """The text of the card.

    Args:
        name: of the repository, `OWNER/NAME`.
        use: Python that uses the model.
        library: the library that loads it, if there is one.
        calibrated_by: a sentence that says how these files apply the calibration; empty if they do not.
    """
    figures = _figures(trained)
    heads, rows, num_rare = _classes(config, trained, calibration)
    body = _template().render(
        name=name,
        model=config.recipe.model,
        num_classes=f"{len(config.labels):,}",
        version=VERSION,
        input_s=f"{config.features.seconds(config.recipe.input_tdim):g}",
        sample_rate_hz=f"{config.features.sample_rate_hz:,}",
        features=config.features.option,
        num_parameters=f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        weights=trained.weights,
        use=use,
        run=trained.run,
        data=_data_name(trained),
        splits=_splits(trained),
        started_from=_started_from(trained.run),
        figures=[
            (METRICS[metric].title, f"{value:.4f}", "" if bounds is None else f"{bounds[0]:.4f} to {bounds[1]:.4f}")
            for metric, value, bounds in figures
        ],
        figures_of=_figures_of(trained),
        classes=rows,
        class_heads=heads,
        calibration={} if calibration is None else _calibration_values(calibration),
        calibrated_by=calibrated_by,
        selected_here=trained.selected_here,
        num_rare=num_rare,
        rare=RARE,
        recipe=yaml.safe_dump(config.recipe.to_dict(), sort_keys=False, allow_unicode=True).rstrip(),
        versions=", ".join(map(" ".join, trained.run.get("tool_versions", {}).items())),
    )
    return str(ModelCard(f"---\n{_metadata(name, config, trained, figures, library).to_yaml()}\n---\n\n{body}"))


Figures = list[tuple[str, float, tuple[float, float] | None]]
"""Name, value and interval of metrics."""


def _metadata(name: str, config: ModelConfig, trained: Trained, figures: Figures, library: str | None) -> ModelCardData:
    """What the hub reads: the kind of model, and its results."""
    data = _data_name(trained)
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=re.sub(r"[^\w.-]", "-", data),
            dataset_name=data,
            dataset_split=", ".join(trained.run.get("eval_splits", ())),
            metric_type=metric,
            metric_name=METRICS[metric].title,
            metric_value=round(value, 6),
        )
        for metric, value, _ in figures
    ]
    return ModelCardData(
        library_name=library,
        pipeline_tag=TASK,
        tags=["audio-tagging", config.recipe.model],
        model_name=name.rpartition("/")[2],
        eval_results=results or None,
    )


def _data_name(trained: Trained) -> str:
    return posixpath.basename(str(trained.run.get("data", "")).rstrip("/")) or "unknown"


def _splits(trained: Trained) -> list[tuple[str, str, str]]:
    """Use, name and fingerprint of each split."""
    return [
        (use, split, fingerprint)
        for use, key in (("training", "train_splits"), ("evaluation", "eval_splits"))
        for split, fingerprint in trained.run.get(key, {}).items()
    ]


def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("pipeline.train"),
        autoescape=False,  # Markdown; `plain` escapes what comes from lists and names
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = plain
    return environment.get_template("model_card.md")


def plain(text: object) -> str:
    """A text in a cell of a Markdown table: one line, without meaning to Markdown or HTML."""
    one_line = " ".join(str(text).split())
    return re.sub(r"([\\`*_\[\]<>|#&~$])", lambda found: f"&#{ord(found[1])};", one_line)


def _figures(trained: Trained) -> Figures:
    """The metrics that are known and finite."""
    intervals = {}
    if trained.scores is not None:
        scores, targets = trained.scores.scores.astype(np.float32), trained.scores.targets()
        hits = scores.argmax(axis=1) == targets.argmax(axis=1)
        intervals["map"] = bootstrap_map(scores, targets, num_resamples=NUM_RESAMPLES)
        intervals["accuracy"] = basic_interval(float(hits.mean()), resampled_mean(hits, num_resamples=NUM_RESAMPLES))
    known = [(name, trained.figures.get(name)) for name in METRICS]
    return [(name, value, _within_0_and_1(intervals.get(name))) for name, value in known if value is not None]


def _within_0_and_1(bounds: tuple[float, float] | None) -> tuple[float, float] | None:
    if bounds is None or not all(map(math.isfinite, bounds)):
        return None
    return max(0.0, bounds[0]), min(1.0, bounds[1])


def _figures_of(trained: Trained) -> str:
    splits = ", ".join(trained.run.get("eval_splits", ())) or "unknown splits"
    number = "" if trained.scores is None else f"{len(trained.scores.clip_id):,} clips of "
    return f"On {number}{splits}."


def _started_from(run: Mapping[str, Any]) -> str:
    recipe = run.get("recipe", {})
    if "init_from" in run:
        return "another trained model: " + posixpath.basename(str(run["init_from"]["model"]).rstrip("/"))
    if recipe.get("audioset_pretrain"):
        return "published AudioSet weights"
    return "ImageNet weights" if recipe.get("imagenet_pretrain") else ""


def _classes(
    config: ModelConfig, trained: Trained, calibration: ModelCalibration | None
) -> tuple[list[str], list[list[str]], int]:
    """Heads and rows of the table of classes, and the number of classes with few evaluation clips."""
    if not trained.per_class and calibration is None:
        return [], [], 0
    known = trained.per_class or ({},) * len(config.labels)
    columns = [(each.title, each.column) for each in per_class_columns()]
    columns += [("training clips", "train_clips"), ("evaluation clips", "eval_clips")]
    columns = [column for column in columns if column[1] in known[0]]
    heads = ["class", *(title for title, _ in columns)]
    if calibration is not None:
        heads += ["threshold", "precision", "recall"]
    rows = []
    for c, (name, row) in enumerate(zip(config.labels.names, known, strict=True)):
        cells = [name, *(_short(row[column]) for _, column in columns)]
        if calibration is not None:
            threshold = calibration.classes[c].threshold
            cells += [f"{value:.3f}" for value in (threshold.value, threshold.precision, threshold.recall)]
        rows.append(cells)
    num_rare = sum("eval_clips" in row and int(row["eval_clips"]) < RARE for row in known)
    return heads, rows, num_rare


def _short(figure: str) -> str:
    """A value of per_class.csv, with three decimals."""
    if not figure:
        return "–"
    return f"{float(figure):.3f}" if "." in figure else f"{int(figure):,}"


def _calibration_values(calibration: ModelCalibration) -> dict[str, str]:
    facts = calibration.facts
    goal = GOALS[facts.get("goal", "f1")].format(facts.get("value", 0.0))
    return {
        "goal": goal,
        "clips": f"{facts.get('clips', 0):,}",
        "error_before": f"{calibration.error_before:.4f}",
        "error_after": f"{calibration.error_after:.4f}",
        "num_borrowed": f"{sum(not one.is_own for one in calibration.classes):,}",
    }
