"""The line that registers the toy model. Ray's workers run it too, and it needs no PyTorch."""

from ast_core.models import MODELS, ModelKind


def register() -> None:
    MODELS["mean_over_time"] = ModelKind("tests.extending.toy_model:MeanOverTime")
