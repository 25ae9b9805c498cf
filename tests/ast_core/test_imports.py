"""`ast_core` imports neither Ray nor `pipeline`, so that notebooks and servers can use it without them.

The feed, the doctor and the training benchmarks do not need Ray either.
"""

import json
import pkgutil
import subprocess
import sys

import pytest

import ast_core
from tests.conftest import ROOT
from tests.processes import in_new_process, run_module

LIST_MODULES = """
import importlib, json, sys
for names in map(str.split, sys.argv[1:]):
    for name in names:
        importlib.import_module(name)
    print(json.dumps(sorted(sys.modules)))
"""
FORBIDDEN = {"ray", "pyarrow", "pipeline", "jobs"}
WITHOUT_RAY = (
    *("pipeline.dataset", "pipeline.weights", "pipeline.train.data.sampling", "pipeline.train.data.feed"),
    *("pipeline.inspect.checks", "benchmarks.feed", "benchmarks.feed_memory", "benchmarks.train_step"),
)


@pytest.fixture(scope="module")
def loaded() -> tuple[set[str], set[str]]:
    """The modules loaded by `ast_core`, and then by the other modules that must run without Ray."""
    science = [module.name for module in pkgutil.walk_packages(ast_core.__path__, "ast_core.")]
    command = [sys.executable, "-c", LIST_MODULES, " ".join(science), " ".join(WITHOUT_RAY)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    of_science, of_all = (set(json.loads(line)) for line in lines)
    assert {"ast_core.models.ast", "ast_core.step", "ast_core.checkpoints"} <= set(science) <= of_science
    return of_science, of_all


def test_ast_core_imports_neither_ray_nor_pyarrow_nor_pipeline(loaded: tuple[set[str], set[str]]):
    of_science, _ = loaded
    assert {name.split(".")[0] for name in of_science} & FORBIDDEN == set()


def test_feed_doctor_and_training_benchmarks_import_without_ray(loaded: tuple[set[str], set[str]]):
    _, of_all = loaded
    assert set(WITHOUT_RAY) <= of_all
    assert "ray" not in of_all


def test_the_data_report_imports_without_pytorch():
    """PyTorch and timm would take four seconds of CPU time for one page."""
    command = [sys.executable, "-c", LIST_MODULES, "pipeline.inspect.data_report"]
    loaded = set(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert "pipeline.inspect.checks" in loaded
    assert loaded & {"torch", "ray"} == set()


@pytest.mark.parametrize("module", ["ast_core.recipe", "jobs.recipe_option"])
def test_reading_a_recipe_imports_neither_torch_nor_timm_nor_ray(module: str):
    command = [sys.executable, "-c", LIST_MODULES, module]
    loaded = set(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert module in loaded
    assert loaded & {"torch", "timm", "ray"} == set()


def table_of_step_benchmark(*options: str) -> tuple[str, list[str]]:
    """The header and the only row."""
    small = ["--device", "cpu", "--frames", "64", "--batch-sizes", "2", "--steps", "2", "--threads", "1"]
    printed = in_new_process(run_module, "benchmarks.train_step", [*small, *options], ["ray"])
    head, _, row = [line for line in printed.splitlines() if line.startswith("|")]
    return head, row.strip("| ").split(" | ")


def test_the_benchmark_of_a_step_runs_without_ray():
    head, row = table_of_step_benchmark("--only", "fp32, fused attention")
    assert "clips/s | of the original's | MFU" in head
    assert row[:2] == ["fp32, fused attention", "2"]
    assert float(row[2]) > 0


@pytest.mark.parametrize("given", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["own-shards", "data-set"])
def test_the_benchmark_of_feed_and_step_runs_without_ray(given: bool, tone_data: str):
    options = ["--data", tone_data] if given else ["--clips", "16"]
    head, row = table_of_step_benchmark("--fed", *options)
    assert "clips/s | of the step alone | MFU | data-wait share" in head
    assert float(row[2]) > 0
    assert 0 <= float(row[5].rstrip("%")) <= 100


def test_the_parsers_of_the_jobs_need_neither_ray_nor_pytorch():
    """So `--help` answers in about a second."""
    jobs = [file.stem for file in (ROOT / "jobs").glob("*.py") if "def parser()" in file.read_text()]
    assert {"train", "prepare_audioset", "evaluate", "tag"} <= set(jobs)
    code = f"import sys, importlib\nfor job in {jobs}: importlib.import_module('jobs.' + job).parser()\n"
    code += "print({'ray', 'torch', 'timm'} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
