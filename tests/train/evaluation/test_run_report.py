"""RUN/report.html: its numbers, missing parts, hostile names, and sorting in a browser."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ast_core.calibration import reliability
from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary
from ast_core.metrics import tagging_metrics
from ast_core.recipe import Recipe
from jobs.recipe_option import read_recipe
from pipeline import storage
from pipeline.train.evaluation.run_report import FULL_AUDIOSET_KEYS, REFERENCE_RECIPE, write_run_report
from pipeline.train.evaluation.scores import write_scores
from pipeline.train.metrics_log import RunLog, finite_or_null, per_class_csv, write_summary
from tests.browser import browser, needs_browser
from tests.pages import Page
from tests.test_charts import dots_of
from tests.train.evaluation.test_scores import clips_of

HOSTILE = "<script>window.harmed = 1</script>"
NAMES = ["dog", HOSTILE, '"><img src=x onerror="window.harmed = 1">', "rain & wind", "never heard"]
CLASSES = [*NAMES, *(f"class {i}" for i in range(5, 40))]
TRAIN_CLIPS = [0, 7, 12_345, 20, 3, *range(5, 40)]
EPOCHS = 3
BY_CLASS, BY_EPOCH, FIGURES = (
    "Each class, best first",
    "Each epoch",
    "Best epoch, averaged weights and running ensemble",
)
CALIBRATION, CONFUSIONS = "Decisions by score", "Classes and what they are taken for, worst first"
REFERENCE = "mAP after each epoch on full AudioSet"


def made_scores() -> tuple[np.ndarray, list[list[int]]]:
    """Scores and labels in which class 4 has no clip, and class 1 is taken for class 3."""
    rng = np.random.default_rng(1)
    labels = [sorted({int(c) for c in rng.choice([0, 1, 2, 3, *range(5, 40)], 2)}) for _ in range(300)]
    labels += [[1]] * 20
    scores = rng.random((len(labels), len(CLASSES))).astype(np.float32) * 0.4
    for row, clip in zip(scores, labels, strict=True):
        row[clip] += 0.3
        if 1 in clip:
            row[3] = 0.95
    return scores, labels


def write_run(run: Path, *, recipe: Recipe | None = None, finished: bool = True) -> dict[str, Any]:
    """Write the files of a run. Returns its summary."""
    recipe = recipe or Recipe(label_dim=len(CLASSES), epochs=EPOCHS, wa_start=1, wa_end=EPOCHS)
    config = {"recipe": recipe.to_dict(), "train_splits": {"train": "abc"}, "data": "s3://me:hush@bucket/data"}
    storage.write_json(run / "config.json", config | {"num_workers": 2})
    log = RunLog(str(run), 0)
    figures = {"map": 0.4, "mauc": 0.97123, "d_prime": math.inf, "accuracy": 0.5}
    epochs = []
    for epoch in range(1, EPOCHS + 1):
        for step in (1, 2):
            values = {"loss": 0.7 / (2 * epoch + step), "lr": 1e-5 / epoch, "clips_per_s": 40.0 + step, "mfu": 0.41}
            wait = None if step == 1 else 0.0123
            log.step(epoch=epoch, step=2 * epoch - 2 + step, values=values | {"data_wait_share": wait})
        epochs.append({"loss": 0.1 / epoch} | figures | {"map": [0.31234, 0.43218, 0.42][epoch - 1]})
        ensemble = {
            f"running_ensemble_{key}": value for key, value in (figures | {"map": 0.4511 + epoch / 100}).items()
        }
        log.epoch(epoch=epoch, step=2 * epoch, values=epochs[-1] | ensemble)
    log.close()
    scores, labels = made_scores()
    clips = clips_of(labels)
    targets = np.zeros(scores.shape)
    for row, clip in zip(targets, labels, strict=True):
        row[clip] = 1
    vocabulary = LabelVocabulary(tuple(f"/m/{i}" for i in range(len(CLASSES))), tuple(CLASSES))
    text = per_class_csv(
        vocabulary, tagging_metrics(scores, targets), TRAIN_CLIPS, targets.sum(axis=0).astype(int).tolist()
    )
    storage.write_bytes(run / "per_class.csv", text.encode())
    write_scores(str(run), scores, clips)
    summary = {
        "best_epoch": 2,
        "epochs": EPOCHS,
        **finite_or_null({name: epochs[1][name] for name in figures}),
        "averaged": finite_or_null(figures | {"map": 0.4612}),
        "running_ensemble": finite_or_null(figures | {"map": 0.4811}),
        "clips_per_s": 1041.25,
        "data_wait_share": 0.0123,
    }
    if finished:
        write_summary(str(run), summary)
    return summary


def page_of(run: Path) -> Page:
    return Page(storage.read_bytes(write_run_report(str(run))).decode())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("report") / "run"
    write_run(run)
    return run


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    uri = write_run_report(str(run))
    assert uri == f"{run}/report.html"
    return storage.read_bytes(uri).decode()


def test_case_1_a_learning_rate_of_0_has_a_chart(tmp_path: Path):
    write_run(tmp_path)
    log = RunLog(str(tmp_path), 0)
    for step in range(1, 6):
        log.step(epoch=1, step=step, values={"loss": 0.7, "lr": 0.0})
    log.close()
    assert "Learning rate" in Path(write_run_report(str(tmp_path))).read_text()


def test_figures_come_from_the_summary_and_epochs_from_the_records(html: str):
    parsed = Page(html)
    assert parsed.tables[FIGURES][1:] == [
        ["best epoch (2)", "0.4322", "0.9712", "–", "0.5000"],
        ["averaged weights", "0.4612", "0.9712", "–", "0.5000"],
        ["running ensemble", "0.4811", "0.9712", "–", "0.5000"],
    ]
    header, *rows = parsed.tables[BY_EPOCH]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert [row[header.index("mAP")] for row in rows] == ["0.3123", "0.4322", "0.4200"]
    assert [row[header.index("training loss")] for row in rows] == ["0.1000", "0.0500", "0.0333"]
    assert [row[header.index("ensemble’s mAP")] for row in rows] == ["0.4611", "0.4711", "0.4811"]
    for text in ("1,041.2", "1.2 %", "The run is finished, after 3 epochs."):
        assert text in parsed.text
    assert "Left out" not in parsed.text


def test_curves_have_axes_and_units(html: str):
    labels = [attributes["aria-label"] for tag, attributes in Page(html).tags if attributes.get("role") == "img"]
    told = {label.partition(". ")[0]: label for label in labels}
    assert set(told) == {
        *("Training loss", "Learning rate", "Throughput", "Waiting for data", "Model FLOPs utilisation"),
        *("mAP on the evaluation set", "AUC on the evaluation set", "accuracy on the evaluation set"),
        *("AP and training clips of each class", "Reliability"),
    }
    assert "loss (log scale), 0.0875 to 0.2333, over steps, 1 to 6" in told["Training loss"]
    assert "learning rate, 10⁻⁵, 0.3333 to 1, over" in told["Learning rate"]
    assert "% of the time, 1.23 to 1.23, over" in told["Waiting for data"]
    assert "over epochs, 1 to 3; each epoch; running ensemble" in told["mAP on the evaluation set"]


def test_classes_of_per_class_csv_are_listed_best_first_and_drawn_as_dots(html: str, run: Path):
    rows = Page(html).tables[BY_CLASS][1:]
    assert len(rows) == len(CLASSES)
    there = {row.split(",")[0]: row for row in (run / "per_class.csv").read_text().splitlines()[1:]}
    by_name = {row[0]: row for row in rows}
    assert set(by_name) == set(CLASSES)
    for index, name in enumerate(CLASSES):
        *_, ap, auc, train_clips, eval_clips = there[str(index)].split(",")
        expected = [f"{float(figure):.4f}" if figure else "–" for figure in (ap, auc)]
        assert by_name[name][1:] == [*expected, f"{int(train_clips):,}", eval_clips]
    aps = [float(row[1]) for row in rows[:-1]]
    assert aps == sorted(aps, reverse=True)
    assert rows[-1] == ["never heard", "–", "–", "3", "0"]
    dots = dots_of(html[html.index("AP and training clips of each class") :])
    assert len([note for _, _, note in dots if ": AP " in note]) == len(CLASSES) - 1
    assert "dog: AP" in html
    assert "1 of 40 classes have no evaluation clip" in Page(html).text


def test_calibration_and_confusions_match_the_scores(html: str):
    scores, labels = made_scores()
    targets = np.zeros(scores.shape, np.float32)
    for row, clip in zip(targets, labels, strict=True):
        row[clip] = 1
    parsed = Page(html)
    found = reliability(scores.astype(np.float32), targets)
    assert [row[1] for row in parsed.tables[CALIBRATION][1:]] == [f"{count:,}" for count in found.decisions]
    assert f"over decisions: {found.expected_error:.4f}" in parsed.text
    assert f"All {scores.size:,} decisions" in parsed.text
    rows = parsed.tables[CONFUSIONS][1:]
    assert len(rows) == 20
    ours = [clip for clip, of in enumerate(labels) if 1 in of and 3 not in of]
    assert rows[0] == [HOSTILE, "rain & wind", str(len(ours)), "0.950", *rows[0][4:]]
    assert rows[0][4] == f"{scores.astype(np.float16)[ours, 1].astype(float).mean():.3f}"
    assert rows[0][5] == "100.0 %"


def test_page_loads_nothing_escapes_names_and_shows_no_keys(html: str):
    parsed = Page(html)
    assert [uri for uri in parsed.loads if not uri.startswith("#")] == []
    assert len([tag for tag, _ in parsed.tags if tag == "script"]) == 1
    assert not [tag for tag, _ in parsed.tags if tag in ("img", "link", "iframe", "object", "base", "form")]
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    assert HOSTILE not in html
    assert HOSTILE in parsed.text
    assert ["data", "s3://bucket/data"] in parsed.tables["What was run"]
    assert ["recipe.lr", "1e-05"] in parsed.tables["What was run"]
    assert "hush" not in html


def test_report_of_a_run_in_progress_says_so(tmp_path: Path):
    write_run(tmp_path / "run", finished=False)
    parsed = page_of(tmp_path / "run")
    assert "the run is in progress" in parsed.text
    assert "3 of 3 epochs are done" in parsed.text
    assert parsed.tables[FIGURES][1:] == [
        ["best epoch (2)", "0.4322", "0.9712", "–", "0.5000"],
        ["running ensemble", "0.4811", "0.9712", "–", "0.5000"],
    ]
    assert "best epoch so far" in parsed.text


@pytest.mark.parametrize(
    ("name", "said", "gone"),
    [
        ("summary.json", "summary.json is missing: the run is in progress", None),
        ("metrics.jsonl", "There are no records to draw yet", BY_EPOCH),
        ("per_class.csv", "per_class.csv, are missing", BY_CLASS),
        ("best/scores.parquet", "best/scores.parquet, are missing", CALIBRATION),
        ("config.json", "config.json is missing", "What was run"),
    ],
)
@pytest.mark.parametrize("damage", [None, b"", b"{{{\n,,", b"[1]\n", b"\xff\xfe\x00"])
def test_a_missing_or_damaged_file_removes_only_its_part_of_the_page(
    tmp_path: Path, name: str, said: str, gone: str | None, damage: bytes | None
):
    write_run(tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    if damage is not None:
        (tmp_path / "run" / name).write_bytes(damage)
    parsed = page_of(tmp_path / "run")
    assert said in parsed.text
    others = {FIGURES, BY_EPOCH, BY_CLASS, CALIBRATION, CONFUSIONS, "What was run"} - {gone}
    assert others - {CONFUSIONS} <= set(parsed.tables)
    assert gone not in parsed.tables


def test_a_run_without_steps_has_a_report_and_a_folder_without_run_has_none(tmp_path: Path):
    storage.write_json(tmp_path / "run" / "config.json", {"recipe": Recipe().to_dict()})
    assert "No epoch has been evaluated yet." in page_of(tmp_path / "run").text
    with pytest.raises(DataError, match="holds no run"):
        write_run_report(str(tmp_path))


def test_missing_values_of_a_record_are_not_drawn(tmp_path: Path):
    lines = [
        {"kind": "step", "epoch": 1, "step": 20, "loss": None},
        {"kind": "step", "step": 40, "loss": 0.5},
        {"kind": "epoch", "epoch": 1, "step": 40, "map": None, "mauc": None, "d_prime": None, "accuracy": None},
    ]
    storage.write_bytes(tmp_path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    parsed = page_of(tmp_path)
    assert parsed.tables[BY_EPOCH][1] == ["1", "–", "–", "–", "–"]
    assert len(dots_of(Path(tmp_path, "report.html").read_text())) == 1


def test_only_a_run_on_full_audioset_is_compared_with_the_reference(tmp_path: Path, html: str):
    assert REFERENCE not in Page(html).tables
    full = replace(read_recipe("audioset-full", []), label_dim=527)
    assert full.to_dict() == REFERENCE_RECIPE
    balanced = replace(read_recipe("audioset-balanced", []), label_dim=527)
    assert any(getattr(balanced, key) != REFERENCE_RECIPE[key] for key in FULL_AUDIOSET_KEYS)
    write_run(tmp_path / "run", recipe=replace(full, batch_size=128))
    parsed = page_of(tmp_path / "run")
    assert parsed.tables[REFERENCE][1:] == [
        ["epoch 1", "0.3123", "0.4153", "−0.1030"],
        ["epoch 2", "0.4322", "0.4349", "−0.0027"],
        ["epoch 3", "0.4200", "0.4476", "−0.0276"],
        ["epoch 4", "–", "0.4490", "–"],
        ["epoch 5", "–", "0.4486", "–"],
        ["averaged weights", "0.4612", "0.4590", "+0.0022"],
    ]
    assert "Its recipe differs: batch_size 128 for 12." in parsed.text
    assert "This run is trained on train." in parsed.text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "Its recipe is the reference recipe."),
        ({"seed": 1, "micro_batch_size": 4, "precision": "fp32"}, "Its recipe is the reference recipe."),
        ({"patchout_f": 4, "patchout_t": 40}, "Its recipe differs: patchout_f 4 for 0, patchout_t 40 for 0."),
        ({"mixup_domain": "log_mel"}, "Its recipe differs: mixup_domain log_mel for power."),
        ({"norm_stats": "data"}, "Its recipe differs: norm_stats data for recipe."),
        ({"weight_decay": 0.0, "adam_beta1": 0.9}, "Its recipe differs: adam_beta1 0.9 for 0.95, weight_decay 0.0 for"),
        ({"grad_clip": 1.0, "patience": 2}, "Its recipe differs: patience 2 for None, grad_clip 1.0 for None."),
    ],
)
def test_report_lists_differences_from_the_reference_recipe_that_change_results(
    tmp_path: Path, changes: dict[str, Any], said: str
):
    recipe = Recipe(**(REFERENCE_RECIPE | changes))
    storage.write_json(tmp_path / "config.json", {"recipe": recipe.to_dict()})
    assert said in page_of(tmp_path).text


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_sorts_and_searches_the_page_in_both_colour_schemes(
    run: Path, html: str, tmp_path: Path, scheme: str
):
    with browser(tmp_path / "profile") as chromium:
        scheme_is = [{"name": "prefers-color-scheme", "value": scheme}]
        chromium.devtools("Emulation.setEmulatedMedia", features=scheme_is)
        chromium.devtools("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=2, mobile=True)
        chromium.open(f"file://{run}/report.html")
        assert chromium.run("return document.documentElement.scrollWidth") == 390
        column = "[...document.querySelectorAll('#classes tbody tr')].map(row => row.cells[%d].textContent)"
        counts = [text.replace(",", "") for text in chromium.run(f"return {column % 3}")]
        assert [int(count) for count in counts] != sorted(TRAIN_CLIPS, reverse=True)
        # By the keyboard: a header is a button, which Enter presses.
        chromium.run("document.querySelectorAll('#classes thead button')[3].focus()")
        for kind in ("keyDown", "keyUp"):
            key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
            chromium.devtools("Input.dispatchKeyEvent", type=kind, **key)
        counts = [text.replace(",", "") for text in chromium.run(f"return {column % 3}")]
        assert [int(count) for count in counts] == sorted(TRAIN_CLIPS, reverse=True)
        find = (
            "const input = document.querySelector('input'); input.value = 'DOG';"
            "input.dispatchEvent(new Event('input'));"
            "const rows = [...document.querySelectorAll('#classes tbody tr')].filter(row => !row.hidden);"
            "return rows.map(row => row.cells[0].textContent)"
        )
        assert chromium.run(find) == ["dog"]
        light = (
            "const light = of => of.match(/\\d+/g).slice(0, 3).reduce((sum, one) => sum + +one, 0) / 765;"
            "const style = it => getComputedStyle(it);"
            "const dot = document.querySelector('.dots use');"
            "return [light(style(document.body).backgroundColor), light(style(dot).fill),"
            "  light(style(document.querySelector('svg text')).fill)]"
        )
        paper, dot, text = chromium.run(light)
        assert (paper > 0.5) == (scheme == "light")
        assert abs(dot - paper) > 0.3
        assert abs(text - paper) > 0.3
        assert chromium.run("return window.harmed") is None
        assert chromium.console() == []
