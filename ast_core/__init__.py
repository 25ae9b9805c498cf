"""The science: labels, features, model, augmentation, metrics. Imports neither Ray nor anything of `pipeline`."""

from ast_core.model import ASTModel

__all__ = ["ASTModel"]
