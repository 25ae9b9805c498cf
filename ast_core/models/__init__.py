"""The models. `create_model` makes one by its name; only this package knows what is inside."""

from ast_core.models.registry import MODELS, ModelKind, create_model

__all__ = ["MODELS", "ModelKind", "create_model"]
