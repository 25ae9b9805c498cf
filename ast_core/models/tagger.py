"""What every model offers to the rest of the project.

B clips, T frames, M mel bins, D dimensions, C classes.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ast_core.models.patchout import Patchout
from ast_core.weight_files import load_weights


class Tagger(nn.Module):
    """A network from normalised log-mel `[B, T, M]` to raw logits `[B, C]`.

    A subclass sets the attributes and implements `forward`, `forward_features` and `forward_flops`. The other methods
    have a default that is right for a model without that ability.
    """

    label_dim: int
    """Number of classes C."""
    input_shape: tuple[int, int]
    """Frames T and mel bins M of the input."""
    head: str
    """Prefix of the classifier's parameters in the state dict. Weights from other classes leave them out."""

    def forward(self, fbank_BTM: Tensor, patchout: Patchout | None = None) -> Tensor:
        """Raw logits `[B, C]`. `patchout` is None for a model without patches."""
        raise NotImplementedError

    def forward_features(self, fbank_BTM: Tensor) -> Tensor:
        """The embedding `[B, D]` before the classifier."""
        raise NotImplementedError

    def forward_flops(self, patchout_f: int = 0, patchout_t: int = 0) -> int:
        """Operations for one clip, two for each multiply-add, with that many rows and columns of patches left out."""
        raise NotImplementedError

    def start_from(self, source: "Tagger", head_rows: Sequence[int] | None = None) -> None:
        """Copy the weights of another model of the same kind and size.

        Args:
            source: a model that may have other classes.
            head_rows: for each class of this model, the index of that class in `source`. None: the head does not
                change.

        Raises:
            DataError: `source` has another size.
        """
        weights = self.state_of(source)
        in_head = {key for key in weights if key.startswith(f"{self.head}.")}
        for key in in_head:
            if head_rows is None:
                del weights[key]
            elif len(weights[key]) == source.label_dim:
                weights[key] = weights[key][list(head_rows)]
        load_weights(self, weights, "the model to start from", optional_prefix=None if head_rows else self.head)

    def state_of(self, source: "Tagger") -> dict[str, Tensor]:
        """The state dict of `source`, fitted to this model's input shape."""
        return {key: value.detach().cpu() for key, value in source.state_dict().items()}

    def set_fused_attention(self, fused: bool) -> None:
        """Choose fused (SDPA) or plain attention: the same function up to rounding, at different speeds."""

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Keep fewer activations and compute the rest again for backward: less memory, more time."""

    def compile_parts(self, **how: Any) -> None:
        """Compile what training uses most; `how` is passed to `torch.compile`."""

    def part_to_compile(self) -> tuple[nn.Module, Tensor] | None:
        """A copy of such a part and a small input for it, to see whether it compiles; None if nothing is compiled."""
        return None
