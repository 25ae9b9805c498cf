"""`ast_core` is usable in a notebook, in a server, on a bare GPU machine: it needs neither Ray nor `pipeline`."""

import json
import pkgutil
import subprocess
import sys

import ast_core

LIST_MODULES = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted(sys.modules)))
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
