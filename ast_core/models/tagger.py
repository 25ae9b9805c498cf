"""What every model offers to the rest of the project.

B clips, T frames, M mel bins, T' frames of the model's output, D dimensions, C classes.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from ast_core.errors import ConfigError
from ast_core.features import FeatureSettings
from ast_core.models.patchout import Patchout
from ast_core.models.pooling import Pooling
from ast_core.weight_files import load_weights

SHORT_CLIP_FRAMES = 64
"""Frames of a clip that is long enough for every encoder, and short enough for a quick try."""


class Outputs(NamedTuple):
    """All that a tagger computes for a batch."""

    logits_BC: Tensor
    embedding_BD: Tensor
    frame_logits_BTC: Tensor | None
    """None for a model without scores of frames."""


class Tagger(nn.Module):
    """A network from normalised log-mel `[B, T, M]` to raw logits `[B, C]`.

    A subclass sets the attributes and implements `forward`, `forward_features` and `forward_flops`. The other methods
    have a default that is right for a model without that ability.
    """

    label_dim: int
    """Number of classes C."""
    input_shape: tuple[int, int]
    """Frames T and mel bins M of the input."""
    takes_any_length: ClassVar[bool] = False
    """Whether the input may have another number of frames than `input_shape` says."""
    head: str
    """Prefix of the classifier's parameters in the state dict. Weights from other classes leave them out."""
    original_constants: ClassVar[tuple[str, ...]] = ()
    """Keys of the reference's state dict that do not affect its output, or that its code computes."""

    def forward(self, fbank_BTM: Tensor, patchout: Patchout | None = None) -> Tensor:
        """Raw logits `[B, C]`. `patchout` is None for a model without patches."""
        raise NotImplementedError

    def forward_features(self, fbank_BTM: Tensor) -> Tensor:
        """The embedding `[B, D]` before the classifier."""
        raise NotImplementedError

    def outputs(self, fbank_BTM: Tensor) -> Outputs:
        """The results of `forward` and `forward_features`, and the scores of frames of a model that has them.

        A subclass may compute what they share once.
        """
        return Outputs(self(fbank_BTM), self.forward_features(fbank_BTM), None)

    def seconds_per_frame(self, features: FeatureSettings) -> float | None:
        """Seconds from one frame of `frame_logits` to the next; None for a model without scores of frames."""
        return None

    def forward_flops(self, patchout_f: int = 0, patchout_t: int = 0) -> int:
        """Operations for one clip, two for each multiply-add, with that many rows and columns of patches left out."""
        raise NotImplementedError

    def to_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of this model's state dict under the names and shapes of the reference's, without `module.`.

        All of them are views of the tensors in `state`, apart from `original_constants`, which may be missing here and
        in files. A tensor that the reference has under several names is here under all of them.

        Raises:
            ConfigError: the model has no reference implementation.
        """
        raise ConfigError(f"{type(self).__name__} has no reference implementation; use our own format")

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
            elif len(weights[key]) == source.label_dim and not self._is_norm(key):
                weights[key] = weights[key][list(head_rows)]
        load_weights(self, weights, "the model to start from", optional_prefix=None if head_rows else self.head)

    def _is_norm(self, key: str) -> bool:
        """Whether a tensor belongs to a LayerNorm, whose width may be the number of classes."""
        return isinstance(self.get_submodule(key.rpartition(".")[0]), nn.LayerNorm)

    def state_of(self, source: "Tagger") -> dict[str, Tensor]:
        """The state dict of `source`, fitted to this model's input shape."""
        return {key: value.detach().cpu() for key, value in source.state_dict().items()}

    def set_fused_attention(self, fused: bool) -> None:
        """Choose fused (SDPA) or plain attention: the same function up to rounding, at different speeds."""

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Keep fewer activations and compute the rest again for backward: less memory, more time."""

    def use_float8(self, *, emulate: bool) -> None:
        """Train with float8 products in large linear layers; `emulate` computes them on a device without float8."""

    def compile_parts(self, **how: Any) -> None:
        """Compile what training uses most; `how` is passed to `torch.compile`."""

    def part_to_compile(self) -> tuple[nn.Module, Tensor] | None:
        """A copy of such a part and a small input for it, to see whether it compiles; None if nothing is compiled."""
        return None


class FrameTagger(Tagger):
    """A tagger that computes an embedding of each of T' frames, and scores of the clip from all of them.

    A subclass creates `encoder`, which may be compiled, and `pooling` (see `pooling.py`), sets `frame_stride`, and may
    override `prepare` and `contextualise`. The number of input frames is free.
    """

    takes_any_length = True
    head = "pooling"
    frame_stride: int
    """Input frames from one frame of the output to the next."""
    encoder: nn.Module
    pooling: Pooling

    def __init__(self, label_dim: int, input_tdim: int, input_fdim: int) -> None:
        super().__init__()
        self.label_dim, self.input_shape = label_dim, (input_tdim, input_fdim)
        self._compiled_encoder: Any = ()  # in a tuple, so that its parameters are not registered twice

    def prepare(self, fbank_BTM: Tensor) -> Tensor:
        """The input of `encoder`."""
        return fbank_BTM

    def contextualise(self, encoded: Tensor) -> Tensor:
        """The embeddings of the frames `[B, T', D]` from the output of `encoder`."""
        return encoded

    def frames(self, fbank_BTM: Tensor) -> Tensor:
        """The embeddings of the frames `[B, T', D]`."""
        encode = self._compiled_encoder[0] if self._compiled_encoder and self.training else self.encoder
        return self.contextualise(encode(self.prepare(fbank_BTM)))

    def forward(self, fbank_BTM: Tensor, patchout: Patchout | None = None) -> Tensor:
        """Raw logits `[B, C]` in float32."""
        assert patchout is None, "this model has no patches"
        logits_BC: Tensor = self.pooling(self.frames(fbank_BTM))
        return logits_BC

    def forward_features(self, fbank_BTM: Tensor) -> Tensor:
        """The embedding `[B, D]`: the mean over frames."""
        return self.frames(fbank_BTM).mean(dim=1)

    def outputs(self, fbank_BTM: Tensor) -> Outputs:
        """The results of `forward`, `forward_features` and `frame_logits`, from one pass of the encoder."""
        frames_BTD = self.frames(fbank_BTM)
        return Outputs(self.pooling(frames_BTD), frames_BTD.mean(dim=1), self.pooling.frame_logits(frames_BTD))

    def frame_logits(self, fbank_BTM: Tensor) -> Tensor:
        """Raw logits of each frame `[B, T', C]`. Frame i is about the input around frame `i * frame_stride`."""
        return self.pooling.frame_logits(self.frames(fbank_BTM))

    def seconds_per_frame(self, features: FeatureSettings) -> float:
        """Seconds from one frame of `frame_logits` to the next, for input with these feature settings."""
        return features.seconds(self.frame_stride)

    def forward_flops(self, patchout_f: int = 0, patchout_t: int = 0) -> int:
        """Operations of convolutions and matrix products for one clip, two for each multiply-add."""
        return self._clip_flops

    @cached_property
    def _clip_flops(self) -> int:
        """PyTorch counts the operations of a forward pass on tensors without data."""
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        without_data = {name: tensor.to("meta") for name, tensor in tensors.items()}
        was_training = self.training
        try:
            with FlopCounterMode(display=False) as counter, torch.enable_grad():  # else fused layers are not counted
                functional_call(self.eval(), without_data, (torch.empty(1, *self.input_shape, device="meta"),))
        finally:
            self.train(was_training)
        return counter.get_total_flops()

    def compile_parts(self, **how: Any) -> None:
        """Compile the encoder, for training only; `how` is passed to `torch.compile`."""
        self._compiled_encoder = (torch.compile(self.encoder, **how),)

    def part_to_compile(self) -> tuple[nn.Module, Tensor]:
        """A copy of the encoder and its input for two short clips."""
        num_frames, num_mel_bins = self.input_shape
        short = torch.zeros(2, min(SHORT_CLIP_FRAMES, num_frames), num_mel_bins)
        return copy.deepcopy(self.encoder), self.prepare(short)
