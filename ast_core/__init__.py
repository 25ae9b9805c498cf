"""The science: labels, features, model, augmentation, metrics. Imports neither Ray nor anything of `pipeline`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ast_core.models.ast import ASTModel

__all__ = ["ASTModel"]


def __getattr__(name: str) -> Any:
    """PyTorch and timm come with the model, not with the package: a process that decodes audio needs neither."""
    if name != "ASTModel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ast_core.models.ast import ASTModel

    return ASTModel
