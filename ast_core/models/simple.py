"""The comparison's floors: linear layers on each frame, and FNet, which mixes frames by a Fourier transform.

B clips, T frames, M mel bins, D dimensions, C classes.
"""

from collections import OrderedDict
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ast_core.models.pooling import FramePooling
from ast_core.models.tagger import FrameTagger

DROPOUT = 0.1
FNET_EPS = 1e-12
"""Epsilon of FNet's LayerNorms, as in the TensorFlow implementation."""


class LinearTagger(FrameTagger):
    """Linear layers and norms on each frame, without an activation, and attention pooling. Raw logits `[B, C]`.

    Args:
        n_layers: layers after the first.
        hidden: D.
    """

    frame_stride = 1

    def __init__(
        self,
        label_dim: int = 527,
        input_tdim: int = 1024,
        input_fdim: int = 128,
        n_layers: int = 3,
        hidden: int = 128,
    ) -> None:
        super().__init__(label_dim, input_tdim, input_fdim)
        layers: list[nn.Module] = [nn.Linear(input_fdim, hidden)]
        for _ in range(n_layers):
            layers += [nn.LayerNorm(hidden), nn.Linear(hidden, hidden)]
        self.encoder = nn.Sequential(*(nn.Sequential(nn.Dropout(DROPOUT), layer) for layer in layers))
        self.pooling = FramePooling(hidden, label_dim)

    def to_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {_original_of_linear(key): value for key, value in state.items()}


def _original_of_linear(key: str) -> str:
    place, _, rest = key.partition(".")
    if place == "pooling":
        return rest
    number, _, kind = rest.split(".")
    return f"linear.{number}.{kind}"


class FNetLayer(nn.Module):
    """A Fourier transform over dimensions and frames, of which the real part is kept, and a feed-forward network."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mixing_layer_norm = nn.LayerNorm(dim, eps=FNET_EPS)
        self.feed_forward = nn.Linear(dim, 2 * dim)
        self.output_dense = nn.Linear(2 * dim, dim)
        self.dropout = nn.Dropout(DROPOUT)
        self.output_layer_norm = nn.LayerNorm(dim, eps=FNET_EPS)

    def forward(self, frames_BTD: Tensor) -> Tensor:
        # cuFFT has no bf16, and fp16 for powers of two only.
        fourier_BTD = torch.fft.fft2(frames_BTD.float()).real
        mixed_BTD = self.mixing_layer_norm(fourier_BTD + frames_BTD)
        outputs_BTD = self.dropout(self.output_dense(F.gelu(self.feed_forward(mixed_BTD))))
        return self.output_layer_norm(outputs_BTD + mixed_BTD)


class FNetTagger(FrameTagger):
    """FNet (Lee-Thorp et al., 2022, https://arxiv.org/abs/2105.03824) with attention pooling. Raw logits `[B, C]`.

    A frame's probability is a sigmoid. The reference clamps a linear layer to [0, 1] instead, so a frame outside has no
    gradient.

    Args:
        n_layers: number of layers.
        hidden: D.
    """

    frame_stride = 1

    def __init__(
        self,
        label_dim: int = 527,
        input_tdim: int = 1024,
        input_fdim: int = 128,
        n_layers: int = 50,
        hidden: int = 256,
    ) -> None:
        super().__init__(label_dim, input_tdim, input_fdim)
        parts: dict[str, nn.Module] = {
            "layer_norm": nn.LayerNorm(input_fdim, eps=FNET_EPS),
            "hidden_mapping": nn.Linear(input_fdim, hidden),
            "dropout": nn.Dropout(DROPOUT),
            "layer": nn.Sequential(*(FNetLayer(hidden) for _ in range(n_layers))),
        }
        self.encoder = nn.Sequential(OrderedDict(parts))
        self.pooling = FramePooling(hidden, label_dim)

    def to_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {_original_of_fnet(key): value for key, value in state.items()}


def _original_of_fnet(key: str) -> str:
    place, _, rest = key.partition(".")
    if place == "pooling":
        return f"pooler.{rest.replace('fc_prob', 'fc').replace('fc_att', 'att')}"
    return key if rest.startswith("layer.") else f"input.{rest}"
