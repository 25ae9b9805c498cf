"""Small runs of the benchmarks that no other test uses, so that their figures can still be reproduced."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ast_core.recipe import load_recipe
from benchmarks import compare, quick
from benchmarks.against import figures
from benchmarks.compare_esc10 import COMMON, MODELS, table
from tests.conftest import ROOT


@pytest.mark.slow
def test_benchmark_of_preparation_prints_its_row():
    command = [sys.executable, "-m", "benchmarks.prepare", "--clips", "16", "--scale", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    figures = [float(number) for number in re.findall(r"[0-9.]+", done.stdout.splitlines()[-1])]
    num_clips, alone_ms, _, workers_ms, of_alone = figures[:5]
    assert num_clips == 16
    assert of_alone == pytest.approx(workers_ms / alone_ms, abs=0.01, rel=0.01)
    assert of_alone > 1  # with so few clips, the start of the workers dominates


@pytest.mark.slow
def test_benchmark_of_driver_memory_prints_its_figure():
    command = [sys.executable, "-m", "benchmarks.driver_memory", "--rows", "600", "--to-do", "300"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    found = re.search(r"600 rows, 600 of them in the failures table; driver: (\d+) MB at most", done.stdout)
    assert found
    assert int(found[1]) > 100


@pytest.mark.slow
def test_case_26_ctrl_c_ends_each_job_with_one_line():
    command = [sys.executable, "-m", "benchmarks.interrupts", "--presses", "4", "--clips", "16", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_figures_are_read_from_printed_tables():
    printed = """Said before.
| | clips/s of one core's time | of the original's |
|---|---|---|
| feed, on the CPU | 1,264 | 11.3 |

| clips | floor ms: alone, two at once | failed |
|---|---|---|
| 2000 | 52.5, 59.6 | none |
"""
    assert figures(printed) == {
        ("feed, on the CPU", "clips/s of one core's time"): 1264,
        ("feed, on the CPU", "of the original's"): 11.3,
        ("2000", "floor ms: alone, two at once"): 52.5,
    }


def test_rows_of_one_name_are_told_apart_by_the_next_cells():
    printed = """| model | M parameters | work | clips/s (ratio) |
|---|---|---|---|
| ast | 87.3 | training, fp32 | 1.5 |
| ast | 87.3 | inference, fp32 | 4.5 (1.20) |
"""
    assert figures(printed) == {
        ("ast, 87.3, training, fp32", "M parameters"): 87.3,
        ("ast, 87.3, training, fp32", "clips/s (ratio)"): 1.5,
        ("ast, 87.3, inference, fp32", "M parameters"): 87.3,
        ("ast, 87.3, inference, fp32", "clips/s (ratio)"): 4.5,
    }


@pytest.mark.parametrize("name", MODELS)
def test_recipes_of_the_comparison_on_esc10_are_valid(name: str):
    recipe = load_recipe(json.dumps(COMMON | MODELS[name]), {}, origin=name)
    assert recipe.features == "small64"
    assert recipe.imagenet_pretrain is False or "imagenet_pretrain" not in recipe.initial_weights()


def test_the_table_of_the_comparison_on_esc10_has_a_row_a_model_best_first():
    def model(name: str, *of_seeds: list[float]) -> dict[str, object]:
        mean = sum(sum(accuracies) for accuracies in of_seeds) / (2 * len(of_seeds))
        runs = [
            {"fold": f"fold{i}", "seed": seed, "last_epochs": {"accuracy": accuracy}}
            for seed, accuracies in enumerate(of_seeds)
            for i, accuracy in enumerate(accuracies, start=1)
        ]
        costs = {"parameters": 2e6, "multiply_adds": 3e6, "inference": {"clips_per_s": 5.0}}
        return {
            "name": name,
            "runs": runs,
            "accuracy": mean,
            "accuracy_interval": [0.1, 0.9],
            "last_epochs": {"accuracy": mean},
            "averaged": {"accuracy": 0.5},
            "costs": costs,
            "training": {"clips_per_s": 4.0},
        }

    models = [model("worse", [0.3, 0.5], [0.4, 0.6]), model("better", [0.6, 0.8])]
    found = {"data": {"folds": ["fold1", "fold2"]}, "models": models}
    head, _, first, second = table(found).splitlines()
    assert head.startswith("| model | fold1, last 5 | fold2, last 5 | mean, last 5 |")
    assert first == "| better | 0.600 | 0.800 | 0.700 | 0.700 [0.100, 0.900] | 0.500 | 2.00 | 3 | 4, 5 |"
    assert second.startswith("| worse | 0.350 | 0.550 | 0.450 ± 0.071 over 2 seeds |")


def test_comparing_two_runs_finds_what_is_worse_beyond_the_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def write(name: str, rate: float, cost: float, **more: float) -> str:
        found = {"rate": {"value": rate, "higher_is_better": True}, "cost": {"value": cost, "higher_is_better": False}}
        found |= {title: {"value": value, "higher_is_better": True} for title, value in more.items()}
        (tmp_path / name).write_text(json.dumps(found))
        return str(tmp_path / name)

    old = write("old", 10.0, 2.0)
    assert compare.main([old, write("noise", 8.5, 2.3, other=1.0)]) == 0
    assert "WORSE" not in capsys.readouterr().out
    for slower in (write("rate", 7.0, 2.0), write("cost", 10.0, 3.0)):
        assert compare.main([old, slower]) == 1
        assert capsys.readouterr().out.count("WORSE") == 1
    assert compare.main([old, write("rate", 7.0, 2.0), "--noise", "1.5"]) == 0
    with_more = write("more", 10.0, 2.0, other=1.0)
    assert compare.main([old, with_more]) == 0
    assert compare.main([with_more, old]) == 1
    assert "MISSING" in capsys.readouterr().out


def test_a_figure_in_seconds_is_worse_if_it_misses_its_limit_now(tmp_path: Path):
    def write(value: float) -> str:
        path = tmp_path / f"{value}.json"
        path.write_text(json.dumps({"start, s": {"value": value, "higher_is_better": False, "limit": 6.0}}))
        return str(path)

    assert compare.main([write(2.0), write(5.9)]) == 0  # another machine
    assert compare.main([write(2.0), write(6.1)]) == 1
    assert compare.main([write(7.0), write(9.0)]) == 0  # it was missed before


def test_the_quick_page_names_cells_that_its_benchmarks_print():
    """Every column is in the text of its benchmark, and every row too, up to values that are filled in."""
    for benchmark in quick.QUICK:
        text = (ROOT / "benchmarks" / f"{benchmark.words[0]}.py").read_text()
        for ratio in benchmark.ratios:
            assert ratio.column in text, ratio
            assert all(word.strip(",") in text for word in ratio.row.split()), ratio


@pytest.mark.slow
def test_the_model_of_many_machines_prints_its_tables():
    command = [sys.executable, "-m", "benchmarks.scale_model", "--small"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^ *1,000 ", done.stdout, re.M)) == 5  # a table for each preparation and for tagging
