"""Settings with which every model is small enough for tests."""

from typing import Any

SMALL: dict[str, dict[str, Any]] = {
    "ast": {"model_size": "tiny224"},
    "talnet": {"embedding_size": 128},
    "cnn_transformer": {"embedding_size": 128},
    "efficientnet": {"eff_b": 0},
    "convnext": {"model_size": "atto"},
    "fnet": {"n_layers": 4, "hidden": 32},
}
"""Recipe keys by model. A model that is not here has its defaults."""
