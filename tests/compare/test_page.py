"""The page of a comparison, made from the content of comparison.json alone."""

import itertools
from typing import Any

import numpy as np
import pytest

from ast_core.metrics import METRICS
from pipeline.compare.figures import class_differences
from pipeline.compare.page import comparison_page
from tests.pages import Page

CLASSES = ["dog", "cat", "<b>rain</b>"]


def model(name: str, figure: float | None, **more: Any) -> dict[str, Any]:
    """A model of comparison.json whose metrics are all `figure`."""
    metrics = dict.fromkeys(METRICS, figure)
    shape = {"epoch": [1, 2], "loss": [0.5, None]} | {metric: [0.1, figure] for metric in METRICS}
    run = {"seed": 0, "fold": None, "epochs": 2, "best_epoch": 2}
    return {
        "name": name,
        "recipe": {"model": name, "epochs": 2},
        **metrics,
        "map_interval": None if figure is None else [figure - 0.1, figure + 0.1],
        "accuracy_interval": None,
        "map_std_over_seeds": None,
        "accuracy_std_over_seeds": None,
        "last_epochs": metrics,
        "averaged": None,
        "training": {"clips_per_s": 10.0, "hours": 2.5, "memory_gb": None, "devices": ["cpu"], "workers": [2]},
        "costs": {
            "parameters": 2_500_000,
            "multiply_adds": 3_000_000,
            "inference": {
                "clips_per_s": 20.0,
                "device": "cpu",
                "precision": "bf16",
                "batch_clips": 8,
                "threads": 1,
            },
        },
        "runs": [run],
        "curves": shape,
        "ap": [figure, 0.5, None],
        "published": None,
    } | more


def pair(first: str, second: str, difference: float | None) -> dict[str, Any]:
    of_metric = {"difference": difference, "interval": None, "p": 0.0004, "p_holm": 0.5}
    ap = np.array([difference or np.nan, -0.1, np.nan])
    return {
        "models": [first, second],
        "map": of_metric,
        "accuracy": of_metric,
        "ensemble": dict.fromkeys(METRICS, 0.9),
        "classes": class_differences(ap, CLASSES),
    }


def comparison(models: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    names = [(one["name"], one["map"]) for one in models]
    pairs = [
        pair(a, b, None if x is None or y is None else x - y) for (a, x), (b, y) in itertools.combinations(names, 2)
    ]
    data = {
        "uri": "data",
        "train_splits": ["train"],
        "eval_splits": ["eval"],
        "folds": [],
        "train_clips": 1_900_000,
        "eval_clips": 20_000,
        "features": {"kind": "kaldi_fbank", "num_mel_bins": 128, "frame_shift_ms": 10.0},
        "classes": [{"mid": name, "name": name} for name in CLASSES],
        "audioset": None,
    }
    return {
        "version": 1,
        "made": "2026-01-02T03:04:05Z",
        "made_by": "ast-ray 1",
        "data": data,
        "metric": "map",
        "bootstrap": {"resamples": 1000, "seed": 0, "confidence": 0.95},
        "models": models,
        "pairs": pairs,
        "failed": [],
    } | more


def page_of(found: dict[str, Any]) -> Page:
    return Page(comparison_page(found, "out"))


def test_models_are_sorted_and_differences_are_positive():
    page = page_of(comparison([model("a", 0.25), model("b", 0.75), model("unknown", None)]))
    assert [row[0] for row in page.tables["Models, best first"][1:]] == ["b", "a", "unknown"]
    first = page.tables["Differences between models, largest first"][1]
    assert first[:3] == ["b", "a", "+0.5000"]
    assert first[4] == "< 0.001"
    assert page.tables["Where each pair differs most"][1] == ["b", "a", "dog (+0.50), cat (+0.10)"]
    by_class = page.tables["AP of each class by model"]
    assert by_class[1] == ["dog", "0.750", "0.250", "–", "0.500", "b"]
    assert by_class[2] == ["cat", "0.500", "0.500", "0.500", "0.000", "all"]
    assert page.tables["Ensembles of two"][1][1:] == ["0.9000", "+0.1500"]


@pytest.mark.parametrize("part", ["full", "balanced"])
def test_published_figures_are_shown_on_audioset_only(part: str):
    known = {"map": 0.449, "comparison_map": 0.43, "note": "with a note"}
    models = [model("ast", 0.44, published=known), model("other", 0.4)]
    without = page_of(comparison(models)).tables["Models, best first"]
    assert "published mAP" not in without[0]
    found = comparison(models)
    found["data"]["audioset"] = part
    page = page_of(found)
    columns, ast, other = page.tables["Models, best first"]
    assert columns[-2:] == ["published mAP", "as the comparison’s authors got it"]
    assert ast[-2:] == ["0.4490\nwith a note", "0.4300"]
    assert other[-2:] == ["–", "–"]
    assert "this is AudioSet" in page.text


def test_names_of_classes_and_errors_are_escaped():
    found = comparison([model("a", 0.2), model("b", 0.4)], failed=[{"name": "c", "error": "c: <script>bad</script>"}])
    html = comparison_page(found, "out")
    assert "<script>bad" not in html
    assert "Failed:" in html
    assert "<b>rain</b>" not in html


def test_one_model_has_a_page_without_pairs():
    page = page_of(comparison([model("only", 0.5)]))
    assert "Differences between models, largest first" not in page.tables
    assert "Recipe keys in which the models differ" not in page.tables


def test_more_models_than_colours_are_drawn():
    page = page_of(comparison([model(f"model {i}", i / 20) for i in range(9)]))
    assert len(page.tables["Models, best first"]) == 10
    assert len(page.tables["Differences between models, largest first"]) == 37
