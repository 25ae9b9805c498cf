"""CNN+Transformer (Li et al., 2022, https://arxiv.org/abs/2203.13448): TALNet's convolutions and self-attention.

B clips, T frames, M mel bins, T' frames after pooling, E embedding size.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ast_core.models.crnn import ConvTagger
from ast_core.models.shapes import NUM_ATTENTION_HEADS, check_attention

INPUT_SCALE = 8
"""Factor of the input when positions, whose values lie in [-1, 1], are added to it."""


class CNNTransformer(ConvTagger):
    """`[batch, frames, mel bins]` of normalised log-mel → raw logits `[batch, label_dim]`.

    Args:
        n_trans_layers: how often the one encoder layer is applied. Its weights are shared, as in the published results.
        addpos: add sinusoidal positions of the frames to the input.
        transformer_dropout: dropout of attention weights and of both sublayers' outputs.

    See `ConvTagger` for the others.
    """

    original_constants = ("positional_encoding.pe",)

    def __init__(
        self,
        label_dim: int = 527,
        input_tdim: int = 1024,
        input_fdim: int = 128,
        embedding_size: int | None = None,
        n_conv_layers: int = 10,
        n_pool_layers: int = 5,
        pooling: str = "att",
        n_trans_layers: int = 2,
        addpos: bool = True,
        transformer_dropout: float = 0.25,
    ) -> None:
        super().__init__(label_dim, input_tdim, input_fdim, embedding_size, n_conv_layers, n_pool_layers, pooling)
        size = self.embedding_size
        check_attention(size)
        self.n_trans_layers, self.addpos = n_trans_layers, addpos
        self.enc_layer = nn.TransformerEncoderLayer(
            size, NUM_ATTENTION_HEADS, dim_feedforward=size, dropout=transformer_dropout, batch_first=True
        )
        self.enc_layer.dropout.p = 0.0  # inside the feed-forward layer, where the reference has none
        attention = self.enc_layer.self_attn
        for weight in (*attention.in_proj_weight.chunk(3), attention.out_proj.weight):
            nn.init.xavier_uniform_(weight)
        for layer in (self.enc_layer.linear1, self.enc_layer.linear2):
            nn.init.xavier_uniform_(layer.weight)

    def prepare(self, fbank_BTM: Tensor) -> Tensor:
        if not self.addpos:
            return fbank_BTM
        _, num_frames, num_mel_bins = fbank_BTM.shape
        return fbank_BTM * INPUT_SCALE + positions(num_frames, num_mel_bins, fbank_BTM.device)

    def contextualise(self, encoded: Tensor) -> Tensor:
        frames_BTE = encoded
        for _ in range(self.n_trans_layers):
            frames_BTE = self.enc_layer(frames_BTE)
        return frames_BTE

    def to_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The reference has separate tensors for query, key and value, and stores the positions."""
        theirs = super().to_original(state)
        for kind in ("weight", "bias"):
            parts = theirs.pop(f"enc_layer.self_attn.in_proj_{kind}").chunk(3)
            theirs |= {f"enc_layer.slf_attn.w_{part}s.{kind}": value for part, value in zip("qkv", parts, strict=True)}
            for ours, name in LAYER_NAMES.items():
                theirs[f"enc_layer.{name}.{kind}"] = theirs.pop(f"enc_layer.{ours}.{kind}")
        if self.addpos:
            theirs["positional_encoding.pe"] = positions(*self.input_shape)[None]
        return theirs


LAYER_NAMES = {
    "self_attn.out_proj": "slf_attn.fc",
    "norm1": "slf_attn.layer_norm",
    "linear1": "pos_ffn.w_1",
    "linear2": "pos_ffn.w_2",
    "norm2": "pos_ffn.layer_norm",
}
"""PyTorch's names in an encoder layer → the reference's."""


def positions(num_frames: int, num_mel_bins: int, device: torch.device | None = None) -> Tensor:
    """Sinusoidal positions `[T, M]`: sine in even bins, cosine in odd ones, at wavelengths of 2π to 20,000π frames."""
    frame_T1 = torch.arange(num_frames, dtype=torch.float32, device=device).unsqueeze(1)
    even_bin = torch.arange(0, num_mel_bins, 2, dtype=torch.float32, device=device)
    angle = frame_T1 * torch.exp(even_bin * (-math.log(10_000) / num_mel_bins))
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)[:, :num_mel_bins]
