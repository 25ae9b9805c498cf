"""`ast_core` is usable in a notebook, in a server, on a bare GPU machine: it needs neither Ray nor `pipeline`.

Nor do the benchmarks of training need Ray.
"""

import json
import pkgutil
import subprocess
import sys

import pytest

import ast_core

LIST_MODULES = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted(sys.modules)))
"""
RUN_WITHOUT_RAY = """
import runpy, sys
sys.modules["ray"] = None  # importing it is an error
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""
FORBIDDEN = {"ray", "pyarrow", "pipeline", "jobs"}


def loaded_after_importing(*names: str) -> set[str]:
    run = subprocess.run([sys.executable, "-c", LIST_MODULES, *names], capture_output=True, text=True, check=True)
    return set(json.loads(run.stdout))


def test_all_of_ast_core_imports_without_ray_pyarrow_or_the_pipeline():
    names = [f"ast_core.{module.name}" for module in pkgutil.iter_modules(ast_core.__path__)]
    assert {"ast_core.model", "ast_core.step", "ast_core.checkpoints"} <= set(names)
    loaded = loaded_after_importing(*names)
    assert set(names) <= loaded
    assert {name.split(".")[0] for name in loaded} & FORBIDDEN == set()


def table_of_step_benchmark(*options: str) -> tuple[str, list[str]]:
    """The head and the only row."""
    small = ["--device", "cpu", "--frames", "64", "--batch-sizes", "2", "--steps", "2", "--threads", "1"]
    command = [sys.executable, "-c", RUN_WITHOUT_RAY, "benchmarks.train_step", *small, *options]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    head, _, row = [line for line in run.stdout.splitlines() if line.startswith("|")]
    return head, row.strip("| ").split(" | ")


def test_the_benchmark_of_a_step_runs_without_ray():
    head, row = table_of_step_benchmark("--only", "fp32, fused attention")
    assert "clips/s | of the original's | MFU" in head
    assert row[:2] == ["fp32, fused attention", "2"]
    assert float(row[2]) > 0


@pytest.mark.parametrize("given", [False, True], ids=["shards that it makes", "a data set"])
def test_the_benchmark_of_feed_and_step_runs_without_ray(given: bool, tone_data: str):
    options = ["--data", tone_data] if given else ["--clips", "16"]
    head, row = table_of_step_benchmark("--fed", *options)
    assert "clips/s | of the step alone | MFU | data-wait share" in head
    assert float(row[2]) > 0
    assert 0 <= float(row[5].rstrip("%")) <= 100


def test_the_other_benchmarks_of_training_import_without_ray():
    loaded = loaded_after_importing("benchmarks.feed", "benchmarks.feed_memory", "benchmarks.train_step")
    assert "ray" not in loaded
