"""How a model is computed: settings of the machine that must not change the result."""

import json
import os
import subprocess
import sys

PRODUCT = """
import json
import torch
from ast_core.execution import autocast
from ast_core.recipe import Recipe

torch.manual_seed(0)
layer, x = torch.nn.Linear(768, 3072), torch.randn(8, 512, 768)
torch.set_num_threads(2)
expected = layer(x)
with torch.no_grad(), autocast(torch.device("cpu"), Recipe(precision="bf16")):
    found = layer(x).float()
print(json.dumps([torch.get_num_threads(), ((found - expected).abs().max() / expected.std()).item()]))
"""


def test_products_in_bf16_are_whole_if_the_environment_limits_threads():
    """On CPUs with instructions for bf16, half of the product was missing."""
    env = os.environ | {"OMP_THREAD_LIMIT": "1"}
    printed = subprocess.check_output([sys.executable, "-c", PRODUCT], env=env, text=True)
    num_threads, difference = json.loads(printed)
    assert num_threads == 1
    assert difference < 0.05
