"""Convolutional networks of timm on the spectrogram as an image, pooled over time.

PSLA (Gong et al., 2021, https://arxiv.org/abs/2102.01243) introduced the first three with attention pooling.
B clips, T frames, M mel bins, T' = T / 32 frames of the output, D channels, C classes.
"""

import os
from collections.abc import Mapping
from typing import Any

import timm
import torch.nn.functional as F
from timm.layers import Conv2dSame
from timm.models import adapt_input_conv
from torch import Tensor, nn

from ast_core.errors import DataError
from ast_core.models.pooling import AttentionPooling, MeanPooling
from ast_core.models.shapes import CONVNEXT_SIZES, check_convnext_size
from ast_core.models.tagger import FrameTagger
from ast_core.weight_files import load_weights, read_weights

WeightFile = str | os.PathLike[str] | None


class ImageTagger(FrameTagger):
    """A network of timm, whose feature maps are averaged over the frequency.

    Args:
        timm_name: the network, and the tag of its ImageNet weights.
        imagenet_pretrain: start from these weights. The first convolution sums the filters of the three colours; the
            reference draws a new one.
        imagenet_weights: a local file with timm's key names, instead of fetching them.
        settings: other arguments of the network.

    Raises:
        DataError: weights cannot be fetched, or do not fit.
    """

    frame_stride = 32
    encoder: Any
    """timm's network; its attributes have no types."""

    def __init__(
        self,
        label_dim: int,
        input_tdim: int,
        input_fdim: int,
        timm_name: str,
        imagenet_pretrain: bool,
        imagenet_weights: WeightFile,
        **settings: Any,
    ) -> None:
        super().__init__(label_dim, input_tdim, input_fdim)
        is_fetched = imagenet_pretrain and imagenet_weights is None
        try:
            self.encoder = timm.create_model(
                timm_name, pretrained=is_fetched, in_chans=1, num_classes=0, global_pool="", **settings
            )
        except Exception as err:  # timm raises undocumented errors of its hub client
            if not is_fetched:
                raise
            raise DataError(
                f"could not fetch {timm_name} ({type(err).__name__}: {str(err)[:120]!r}); "
                "give the file as imagenet_weights, or train from scratch with imagenet_pretrain false"
            ) from err
        if imagenet_pretrain and imagenet_weights is not None:
            _load_image_weights(self.encoder, imagenet_weights)
        self.num_channels: int = self.encoder.num_features

    def prepare(self, fbank_BTM: Tensor) -> Tensor:
        return fbank_BTM.transpose(1, 2).unsqueeze(1)

    def contextualise(self, encoded: Tensor) -> Tensor:
        maps_BDFT = encoded
        return maps_BDFT.mean(dim=2).transpose(1, 2)

    def original_layer(self, layer: str) -> str:
        """The reference's name of a layer of timm's network."""
        raise NotImplementedError

    def to_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """In the reference, the output's linear layers are 1 × 1 convolutions, and a single head has no number."""
        theirs = {}
        for key, value in state.items():
            layer, _, kind = key.rpartition(".")
            if layer.startswith("encoder."):
                theirs[f"{self.original_layer(layer.removeprefix('encoder.'))}.{kind}"] = value
            elif kind == "head_weight":
                theirs["attention.head_weight"] = value[0]
            else:
                name = layer.removeprefix("pooling.")
                if f"pooling.{name[:3]}.1.weight" not in state:
                    name = name.removesuffix(".0")
                theirs[f"attention.{name}.{kind}"] = value[..., None, None] if kind == "weight" else value
        return theirs


def _load_image_weights(encoder: Any, file: str | os.PathLike[str]) -> None:
    """Load timm's weights of a network for colour images, without its classifier."""
    state, names = read_weights(file), encoder.pretrained_cfg
    stem = f"{names['first_conv']}.weight"
    if stem not in state:
        raise DataError(f"{file} does not contain timm's weights of this network: {stem} is missing")
    classifier = f"{names['classifier']}."
    kept = {key: value for key, value in state.items() if not key.startswith(classifier)}
    load_weights(encoder, kept | {stem: adapt_input_conv(1, state[stem])}, file)


class EfficientNetTagger(ImageTagger):
    """EfficientNet with attention pooling. Raw logits `[B, C]`.

    Args:
        eff_b: size, 0 to 7.
        att_head: number of attention heads; 0 is the mean of the frames' probabilities.
        att_activation: `sigmoid`, or `softmax` for weights that were trained so (see `AttentionPooling`).

    See `ImageTagger` for the others.
    """

    original_constants = ("effnet._fc.weight", "effnet._fc.bias")
    """ImageNet's classifier, which some of PSLA's files contain."""

    def __init__(
        self,
        label_dim: int = 527,
        input_tdim: int = 1056,
        input_fdim: int = 128,
        eff_b: int = 2,
        att_head: int = 4,
        att_activation: str = "sigmoid",
        imagenet_pretrain: bool = True,
        imagenet_weights: WeightFile = None,
    ) -> None:
        # The reference's: stochastic depth, and the momentum of BatchNorm's running statistics.
        settings = {"drop_path_rate": 0.2, "bn_momentum": 0.01}
        name = f"tf_efficientnet_b{eff_b}.aa_in1k"
        super().__init__(label_dim, input_tdim, input_fdim, name, imagenet_pretrain, imagenet_weights, **settings)
        _pad_as_for_images(self.encoder, IMAGE_SIDES[eff_b])
        self.pooling = AttentionPooling(self.num_channels, label_dim, att_head, att_activation)

    def original_layer(self, layer: str) -> str:
        if not layer.startswith("blocks."):
            return f"effnet.{_EFFICIENTNET_ENDS[layer]}"
        block, rest = _flat_block(self.encoder, layer)
        names = _EFFICIENTNET_FIRST if block < len(self.encoder.blocks[0]) else _EFFICIENTNET_BLOCK
        return f"effnet._blocks.{block}.{names[rest]}"


IMAGE_SIDES = (224, 240, 260, 300, 380, 456, 528, 600)
"""Pixels of the images for which EfficientNet b0 to b7 were made."""

_EFFICIENTNET_ENDS = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}
_SQUEEZE = {"se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"}
_EFFICIENTNET_FIRST = _SQUEEZE | {
    "conv_dw": "_depthwise_conv",
    "bn1": "_bn1",
    "conv_pw": "_project_conv",
    "bn2": "_bn2",
}
_EFFICIENTNET_BLOCK = _SQUEEZE | {
    "conv_pw": "_expand_conv",
    "bn1": "_bn0",
    "conv_dw": "_depthwise_conv",
    "bn2": "_bn1",
    "conv_pwl": "_project_conv",
    "bn3": "_bn2",
}


def _flat_block(encoder: Any, layer: str) -> tuple[int, str]:
    """The number of a block, counted over all stages, and the rest of the name: `blocks.2.1.bn1` → 4, `bn1`."""
    _, stage, block, rest = layer.split(".", 3)
    return sum(len(earlier) for earlier in encoder.blocks[: int(stage)]) + int(block), rest


class PaddedConv2d(nn.Conv2d):
    """A convolution whose padding before and after may differ, alike along both axes."""

    def __init__(self, like: nn.Conv2d, before: int, after: int) -> None:
        size: Any = like.kernel_size  # a pair; PyTorch's types say a tuple of any length
        stride: Any = like.stride
        super().__init__(like.in_channels, like.out_channels, size, stride, groups=like.groups, bias=False)
        self.weight = like.weight
        self.sides = (before, after, before, after)

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(F.pad(maps, self.sides))


def _pad_as_for_images(encoder: nn.Module, image_side: int) -> None:
    """Give EfficientNet's strided convolutions the padding that they have for images of `image_side` pixels.

    TensorFlow pads the side after more if the input's size is even. timm decides by the input; the reference decides by
    the image size of the network, whatever the input is.
    """
    side = image_side
    for name, conv in [(name, conv) for name, conv in encoder.named_modules() if isinstance(conv, Conv2dSame)]:
        total = conv.kernel_size[0] - (2 if side % 2 == 0 else 1)
        encoder.set_submodule(name, PaddedConv2d(conv, total // 2, total - total // 2))
        side = -(-side // 2)


class ResNet50Tagger(ImageTagger):
    """ResNet-50 with attention pooling. Raw logits `[B, C]`.

    Args:
        att_head: number of attention heads; 0 is the mean of the frames' probabilities.

    See `ImageTagger` for the others.
    """

    def __init__(
        self,
        label_dim: int = 527,
        input_tdim: int = 1024,
        input_fdim: int = 128,
        att_head: int = 1,
        imagenet_pretrain: bool = True,
        imagenet_weights: WeightFile = None,
    ) -> None:
        name = "resnet50.tv_in1k"
        super().__init__(label_dim, input_tdim, input_fdim, name, imagenet_pretrain, imagenet_weights)
        self.pooling = AttentionPooling(self.num_channels, label_dim, att_head)

    def original_layer(self, layer: str) -> str:
        return f"model.{layer}"


class MobileNetV2Tagger(ImageTagger):
    """MobileNetV2. Raw logits `[B, C]`.

    Args:
        att_head: number of attention heads; 0 is one linear layer on the mean over time, as in the reference.

    See `ImageTagger` for the others.
    """

    def __init__(
        self,
        label_dim: int = 527,
        input_tdim: int = 1024,
        input_fdim: int = 128,
        att_head: int = 0,
        imagenet_pretrain: bool = True,
        imagenet_weights: WeightFile = None,
    ) -> None:
        name = "mobilenetv2_100.ra_in1k"
        super().__init__(label_dim, input_tdim, input_fdim, name, imagenet_pretrain, imagenet_weights)
        if att_head:
            self.pooling = AttentionPooling(self.num_channels, label_dim, att_head)
        else:
            self.pooling = MeanPooling(self.num_channels, label_dim)

    def original_layer(self, layer: str) -> str:
        if not layer.startswith("blocks."):
            return f"model.features.{_MOBILENET_ENDS[layer]}"
        block, rest = _flat_block(self.encoder, layer)
        names = _MOBILENET_FIRST if block == 0 else _MOBILENET_BLOCK
        return f"model.features.{block + 1}.conv.{names[rest]}"

    def to_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        encoder = {key: value for key, value in state.items() if key.startswith("encoder.")}
        classifier = {key.replace("pooling", "model"): state[key] for key in state.keys() - encoder.keys()}
        return super().to_original(encoder) | classifier


_MOBILENET_ENDS = {"conv_stem": "0.0", "bn1": "0.1", "conv_head": "18.0", "bn2": "18.1"}
_MOBILENET_FIRST = {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "1", "bn2": "2"}
_MOBILENET_BLOCK = {"conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0", "bn2": "1.1", "conv_pwl": "2", "bn3": "3"}


class ConvNeXtTagger(ImageTagger):
    """ConvNeXt with one linear layer on the mean over time. Raw logits `[B, C]`.

    Args:
        model_size: one of `CONVNEXT_SIZES`.

    See `ImageTagger` for the others.
    """

    def __init__(
        self,
        label_dim: int = 527,
        input_tdim: int = 1024,
        input_fdim: int = 128,
        model_size: str = "tiny",
        imagenet_pretrain: bool = True,
        imagenet_weights: WeightFile = None,
    ) -> None:
        check_convnext_size(model_size)
        name = f"convnext_{model_size}.{CONVNEXT_SIZES[model_size]}"
        super().__init__(label_dim, input_tdim, input_fdim, name, imagenet_pretrain, imagenet_weights)
        self.pooling = MeanPooling(self.num_channels, label_dim)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        self.encoder.set_grad_checkpointing(enabled)

    def to_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return super(ImageTagger, self).to_original(state)  # the comparison has no ConvNeXt
