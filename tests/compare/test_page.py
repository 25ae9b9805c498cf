"""The page of a comparison, made from the content of comparison.json alone."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ast_core.metrics import METRICS
from pipeline.compare.figures import class_differences
from pipeline.compare.page import comparison_page
from tests.browser import browser, needs_browser
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


def test_rates_that_were_measured_in_different_ways_say_so():
    models = [model("here", 0.2), model("there", 0.4)]
    page = page_of(comparison(models))
    assert [row[4] for row in page.tables["What each model costs"][1:]] == ["20.0", "20.0"]
    assert "Inference: CPU, 1 thread, batches of 8, bf16; random features" in page.text
    models[1]["costs"]["inference"] |= {"device": "NVIDIA H200", "batch_clips": 64}
    page = page_of(comparison(models))
    rates = [row[4] for row in page.tables["What each model costs"][1:]]
    assert rates == ["20.0\nNVIDIA H200, 1 thread, batches of 64, bf16", "20.0\nCPU, 1 thread, batches of 8, bf16"]
    assert "Inference: in different ways, which are said below each figure;" in page.text


def test_the_numbers_of_clips_are_said_to_be_those_of_the_first_fold():
    found = comparison([model("a", 0.2)])
    assert "; trained on 1,900,000 clips, evaluated on 20,000 clips of eval;" in page_of(found).text
    found["data"]["folds"] = ["red", "blue"]
    counts = "trained on 1,900,000 clips, evaluated on 20,000 clips in the first fold;"
    assert f"models trained on all other splits (red, blue): {counts}" in page_of(found).text


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


@needs_browser
def test_a_browser_sorts_and_searches_the_page_on_a_phone_in_both_colour_schemes(tmp_path: Path):
    found = comparison([model(f"model {i}", i / 20) for i in range(7)])
    classes = [f"class {i}" for i in range(40)]
    found["data"]["classes"] = [{"mid": name, "name": name} for name in classes]
    for one in found["models"]:
        one["ap"] = [one["map"] * i / 40 for i in range(40)]
    (tmp_path / "comparison.html").write_text(comparison_page(found, "out"))
    with browser(tmp_path / "profile") as chromium:
        chromium.devtools("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=2, mobile=True)
        for scheme in ("light", "dark"):
            preference = [{"name": "prefers-color-scheme", "value": scheme}]
            chromium.devtools("Emulation.setEmulatedMedia", features=preference)
            chromium.open(f"file://{tmp_path}/comparison.html")
            assert chromium.run("return document.documentElement.scrollWidth") == 390
            first = "return document.querySelector('#%s tbody tr').cells[0].textContent.trim()"
            assert chromium.run(first % "classes") == "class 39"
            chromium.run("document.querySelectorAll('#costs thead button')[0].click()")
            assert chromium.run(first % "costs") == "model 0"
            find = (
                "const input = document.querySelector('input'); input.value = 'CLASS 7';"
                "input.dispatchEvent(new Event('input'));"
                "const rows = [...document.querySelectorAll('#classes tbody tr')].filter(row => !row.hidden);"
                "return rows.map(row => row.cells[0].textContent.trim())"
            )
            assert chromium.run(find) == ["class 7"]
            paper = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
            assert (chromium.run(paper) > 127) == (scheme == "light")
            assert chromium.console() == []


def test_more_models_than_colours_are_drawn():
    page = page_of(comparison([model(f"model {i}", i / 20) for i in range(9)]))
    assert len(page.tables["Models, best first"]) == 10
    assert len(page.tables["Differences between models, largest first"]) == 37
