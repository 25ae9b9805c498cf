"""The science: labels, features, model, augmentation, metrics. Imports neither Ray nor `pipeline`.

Models, checkpoints and augmentation are packages. The other modules are in one folder because each is a subject of its
own, of one file: others import them by these names.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ast_core.models.ast import ASTModel

__all__ = ["ASTModel"]


def __getattr__(name: str) -> Any:
    """Import `ASTModel`, and with it PyTorch and timm, on first use: a process that decodes audio needs neither."""
    if name != "ASTModel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ast_core.models.ast import ASTModel

    return ASTModel
