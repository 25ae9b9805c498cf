"""TALNet (Wang et al., 2019, https://arxiv.org/abs/1810.09050): a CRNN with attention pooling over time.

B clips, T frames, M mel bins, T' frames after pooling, E embedding size, C classes.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from ast_core.models.pooling import FramePooling
from ast_core.models.shapes import Convolution, convolutions
from ast_core.models.tagger import FrameTagger


class ConvBlock(nn.Module):
    """A 3 × 3 convolution, BatchNorm, ReLU, and max-pooling where the layer has one."""

    def __init__(self, num_inputs: int, layer: Convolution) -> None:
        super().__init__()
        # BatchNorm makes the bias superfluous. The reference has it, by accident, and so do its weights.
        self.conv = nn.Conv2d(num_inputs, layer.num_channels, kernel_size=3, padding=1)
        self.bn = nn.BatchNorm2d(layer.num_channels)
        self.pool = layer.pool
        nn.init.xavier_uniform_(self.conv.weight)

    def forward(self, maps: Tensor) -> Tensor:
        activated = F.relu(self.bn(self.conv(maps)))
        return F.max_pool2d(activated, self.pool) if self.pool else activated


class ConvEncoder(nn.Sequential):
    """`[B, T, M]` → `[B, T', E]`: convolutions that halve the frequency, and twice the time, as channels double."""

    def __init__(self, layers: list[Convolution]) -> None:
        num_inputs = [1, *(layer.num_channels for layer in layers[:-1])]
        super().__init__(*map(ConvBlock, num_inputs, layers))

    def forward(self, fbank_BTM: Tensor) -> Tensor:
        maps_BKTM: Tensor = super().forward(fbank_BTM.unsqueeze(1))
        return maps_BKTM.transpose(1, 2).flatten(2)


class ConvTagger(FrameTagger):
    """What TALNet and the CNN+Transformer share: the convolutions and the pooling.

    Args:
        embedding_size: E. None: 16 for each mel bin, as in the published recipes.
        pooling: `att`, or one of `POOLINGS`.

    Raises:
        ConfigError: the convolutions do not fit the input or the embedding size.
    """

    def __init__(
        self,
        label_dim: int,
        input_tdim: int,
        input_fdim: int,
        embedding_size: int | None,
        n_conv_layers: int,
        n_pool_layers: int,
        pooling: str,
    ) -> None:
        super().__init__(label_dim, input_tdim, input_fdim)
        layers = convolutions(input_tdim, input_fdim, embedding_size, n_conv_layers, n_pool_layers)
        self.encoder = ConvEncoder(layers)
        self.embedding_size = layers[-1].num_channels * (input_fdim >> n_pool_layers)
        self.frame_stride = 2 ** min(2, n_pool_layers)
        self.pooling = FramePooling(self.embedding_size, label_dim, pooling)

    def to_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The reference has each convolution under two names: `conv1` and `conv.0`."""
        theirs = {}
        for key, value in state.items():
            place, _, rest = key.partition(".")
            if place == "encoder":
                number, _, rest = rest.partition(".")
                theirs[f"conv{int(number) + 1}.{rest}"] = theirs[f"conv.{number}.{rest}"] = value
            else:
                theirs[rest if place == "pooling" else key] = value
        return theirs


class TALNet(ConvTagger):
    """`[batch, frames, mel bins]` of normalised log-mel → raw logits `[batch, label_dim]`. See `ConvTagger`."""

    def __init__(
        self,
        label_dim: int = 527,
        input_tdim: int = 1024,
        input_fdim: int = 128,
        embedding_size: int | None = None,
        n_conv_layers: int = 10,
        n_pool_layers: int = 5,
        pooling: str = "att",
    ) -> None:
        super().__init__(label_dim, input_tdim, input_fdim, embedding_size, n_conv_layers, n_pool_layers, pooling)
        size = self.embedding_size
        self.gru = nn.GRU(size, size // 2, batch_first=True, bidirectional=True)
        for name, parameter in self.gru.named_parameters():
            (nn.init.orthogonal_ if name.startswith("weight") else nn.init.zeros_)(parameter)

    def contextualise(self, encoded: Tensor) -> Tensor:
        frames_BTE, _ = self.gru(encoded)
        return frames_BTE
