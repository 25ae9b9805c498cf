"""The Audio Spectrogram Transformer (Gong et al., 2021, https://arxiv.org/abs/2104.01778) on timm's DeiT.

B clips, T frames of 10 ms, M mel bins, F × P patches (frequency × time), N = 2 + F·P tokens, D width, C classes.
"""

import copy
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models import checkpoint_seq
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from ast_core.errors import ConfigError, DataError
from ast_core.models.float8 import float8_twin
from ast_core.models.patchout import Patchout
from ast_core.models.pooling import Float32Linear
from ast_core.models.pretrained import IMAGE_HEADS, from_audioset, from_deit, on_grid, to_original
from ast_core.models.shapes import MODEL_SIZES, PATCH_SIZE, check_pretraining, patch_grid
from ast_core.models.tagger import Outputs, Tagger
from ast_core.transfer import to_device
from ast_core.weight_files import fetch_audioset_weights, load_weights, read_weights


class OverlappingPatchEmbed(nn.Module):
    """timm's `PatchEmbed` with a separate stride for each axis."""

    def __init__(
        self, stride: tuple[int, int], img_size: tuple[int, int], in_chans: int, embed_dim: int, **_: Any
    ) -> None:
        super().__init__()
        self.grid_size = patch_grid(*img_size, *stride)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=PATCH_SIZE, stride=stride)

    def forward(self, image_B1MT: Tensor) -> Tensor:
        """Compute `proj` as one matrix product over all patches, several times faster than cuDNN for one channel."""
        rows, columns = self.proj.stride
        patches_BFPHW = image_B1MT.squeeze(1).unfold(1, PATCH_SIZE, rows).unfold(2, PATCH_SIZE, columns)
        return F.linear(patches_BFPHW.flatten(3).flatten(1, 2), self.proj.weight.flatten(1), self.proj.bias)


class ASTModel(Tagger):
    """`[batch, frames, mel bins]` of normalised log-mel → raw logits `[batch, label_dim]`.

    Args:
        label_dim: number of classes.
        fstride: patch stride along frequency. Below 16, neighbouring patches overlap.
        tstride: patch stride along time.
        input_fdim: mel bins of the input.
        input_tdim: frames of the input.
        imagenet_pretrain: start from distilled DeiT weights for ImageNet, fetched by timm or from `imagenet_weights`.
        audioset_pretrain: start from the published AudioSet AST of 0.4593 mAP, fetched or from `audioset_weights`. Only
            base384 was published. The classifier is initialised.
        model_size: one of `MODEL_SIZES`.
        imagenet_weights: a local `.pth` or `.safetensors` with timm's key names.
        audioset_weights: a local `.pth` of the reference implementation, or Hugging Face's `.safetensors`.

    Raises:
        ConfigError: a shape, stride or size is not allowed.
        DataError: a weight file is missing, or its content does not fit.
    """

    original_constants = tuple(f"{head}{kind}" for head in IMAGE_HEADS for kind in ("weight", "bias"))

    def __init__(
        self,
        label_dim: int = 527,
        fstride: int = 10,
        tstride: int = 10,
        input_fdim: int = 128,
        input_tdim: int = 1024,
        imagenet_pretrain: bool = True,
        audioset_pretrain: bool = False,
        model_size: str = "base384",
        imagenet_weights: str | os.PathLike[str] | None = None,
        audioset_weights: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        self.head = "mlp_head"
        if model_size not in MODEL_SIZES:
            raise ConfigError(f"model_size is {model_size!r}; use one of {', '.join(MODEL_SIZES)}")
        if label_dim < 1:
            raise ConfigError(f"label_dim is {label_dim}; use the number of classes, 1 or more")
        check_pretraining(model_size, imagenet_pretrain, audioset_pretrain)
        timm_name, shape = MODEL_SIZES[model_size]
        self.label_dim = label_dim
        self.input_shape = (input_tdim, input_fdim)
        self.v = VisionTransformerDistilled(
            img_size=(input_fdim, input_tdim),
            patch_size=PATCH_SIZE,
            in_chans=1,
            num_classes=0,
            embed_layer=partial(OverlappingPatchEmbed, (fstride, tstride)),
            **shape,
        )
        self.mlp_head = nn.Sequential(nn.LayerNorm(shape["embed_dim"]), Float32Linear(shape["embed_dim"], label_dim))
        self._training_blocks: Any = ()  # not registered: they share the parameters of `v.blocks`
        grid = self.v.patch_embed.grid_size
        if audioset_pretrain:
            file = fetch_audioset_weights() if audioset_weights is None else audioset_weights
            load_weights(self, from_audioset(read_weights(file), grid), file, optional_prefix="mlp_head")
        elif imagenet_pretrain:
            state = _timm_weights(timm_name) if imagenet_weights is None else read_weights(imagenet_weights)
            load_weights(self.v, from_deit(state, grid), imagenet_weights or timm_name)

    def to_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return to_original(state)

    def state_of(self, source: Tagger) -> dict[str, Tensor]:
        """The state dict of another AST, its positional embedding fitted to this model's patch grid."""
        assert isinstance(source, ASTModel)
        return on_grid(super().state_of(source), source.v.patch_embed.grid_size, self.v.patch_embed.grid_size)

    def set_fused_attention(self, fused: bool) -> None:
        """Choose fused (SDPA) or plain attention: the same function up to rounding, at different speeds."""
        for module in self.v.modules():
            if isinstance(module, Attention):
                module.fused_attn = fused  # type: ignore[misc]  # Final only for TorchScript

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Keep only the inputs of each block and compute the rest again for backward: less memory, more time."""
        self.v.set_grad_checkpointing(enabled)

    def use_float8(self, *, emulate: bool) -> None:
        """Train with float8 products in the linear layers of the blocks. Evaluation uses the blocks as they are.

        The last block, which computes only two tokens, has too few products to gain. The patch embedding and the head
        lie outside the blocks.
        """
        self._training_blocks = [float8_twin(block, emulate=emulate) for block in list(self.v.blocks)[:-1]]

    def compile_parts(self, **how: Any) -> None:
        """Compile the transformer blocks; `how` is passed to `torch.compile`.

        All blocks have the same shape, so they are compiled once. Only training uses the compiled blocks: evaluation
        has other batch shapes, and compiling for them would take longer than it saves. The last block, which computes
        only two tokens, is not compiled.
        """
        blocks = self._training_blocks or list(self.v.blocks)[:-1]
        self._training_blocks = [torch.compile(block, **how) for block in blocks]

    def part_to_compile(self) -> tuple[nn.Module, Tensor]:
        """A copy of a transformer block, and a few tokens `[2, 8, D]` for it."""
        block = (self._training_blocks or self.v.blocks)[0]
        return copy.deepcopy(block), torch.zeros(2, 8, self.v.embed_dim)

    def forward_flops(self, patchout_f: int = 0, patchout_t: int = 0) -> int:
        """Operations of matrix products for one clip, two for each multiply-add."""
        rows, columns = self.v.patch_embed.grid_size
        num_prefix, dim = self.v.num_prefix_tokens, self.v.embed_dim
        num_tokens = num_prefix + (rows - patchout_f) * (columns - patchout_t)

        def block(num_queries: int) -> int:
            # N tokens, D width. Keys and values: 4 N D². For each query: the query and the output projection, 4 D²;
            # the MLP, four times as wide, 16 D²; scores and weighted sums of values, 4 N D.
            return 4 * num_tokens * dim**2 + num_queries * (20 * dim**2 + 4 * num_tokens * dim)

        patch_embedding = 2 * self.v.patch_embed.num_patches * PATCH_SIZE**2 * dim
        blocks = (len(self.v.blocks) - 1) * block(num_tokens) + block(num_prefix)
        return patch_embedding + blocks + 2 * dim * self.label_dim

    def forward_features(self, fbank_BTM: Tensor) -> Tensor:
        """The embedding `[B, D]`: the mean of the class and the distillation token."""
        return self._prefix(fbank_BTM, None).mean(dim=1)

    def outputs(self, fbank_BTM: Tensor) -> Outputs:
        """The results of `forward` and `forward_features`, from one pass."""
        embedding_BD = self.forward_features(fbank_BTM)
        return Outputs(self.mlp_head(embedding_BD), embedding_BD, None)

    def _before_last_block(self, fbank_BTM: Tensor, patchout: Patchout | None) -> Tensor:
        if fbank_BTM.shape[1:] != self.input_shape:
            frames, mel_bins = self.input_shape
            raise ValueError(
                f"input is {tuple(fbank_BTM.shape[1:])} (frames, mel bins); this model takes ({frames}, {mel_bins}): "
                "pad or cut the clips, or build the model with that input_tdim and input_fdim"
            )
        tokens_BND = self.v._pos_embed(self.v.patch_embed(fbank_BTM.transpose(1, 2).unsqueeze(1)))
        if patchout is not None and self.training:
            tokens_BND = self._kept_tokens(tokens_BND, patchout)
        blocks: Any = self._training_blocks if self._training_blocks and self.training else self.v.blocks[:-1]
        if self.v.grad_checkpointing:
            return checkpoint_seq(blocks, tokens_BND)
        for block in blocks:
            tokens_BND = block(tokens_BND)
        return tokens_BND

    def _kept_tokens(self, tokens_BND: Tensor, patchout: Patchout) -> Tensor:
        """The prefix tokens and the kept patches: `[batch, 2 + rows × columns, dim]`."""
        patches = self.v.num_prefix_tokens + patchout.kept_patches(self.v.patch_embed.grid_size[1])
        kept = np.concatenate([np.arange(self.v.num_prefix_tokens), patches])
        return tokens_BND.index_select(1, to_device(kept, tokens_BND.device))

    def _prefix(self, fbank_BTM: Tensor, patchout: Patchout | None) -> Tensor:
        """The normalised prefix tokens `[B, 2, D]`. The last block computes no other tokens: nothing else is read."""
        tokens_BND = self._before_last_block(fbank_BTM, patchout)
        prefix_B2D: Tensor = self.v.norm(first_tokens_after(self.v.blocks[-1], tokens_BND, self.v.num_prefix_tokens))
        return prefix_B2D

    def forward(self, fbank_BTM: Tensor, patchout: Patchout | None = None) -> Tensor:
        """Raw logits `[B, C]`. In training, only the patches that `patchout` keeps go through the blocks."""
        return self.mlp_head(self._prefix(fbank_BTM, patchout).mean(dim=1))


def first_tokens_after(block: Any, tokens_BND: Tensor, num_tokens: int) -> Tensor:
    """`block(tokens_BND)[:, :num_tokens]`. The other tokens are only used as keys and values.

    `block` is a timm `Block` without dropout, layer scale and norms inside attention, as in DeiT.
    """
    attention, dim = block.attn, tokens_BND.shape[2]
    normed_BND = block.norm1(tokens_BND)
    weight_q, weight_kv = attention.qkv.weight.split([dim, 2 * dim])
    bias_q, bias_kv = attention.qkv.bias.split([dim, 2 * dim])
    query = F.linear(normed_BND[:, :num_tokens], weight_q, bias_q).unflatten(2, (attention.num_heads, -1))
    key, value = F.linear(normed_BND, weight_kv, bias_kv).unflatten(2, (2, attention.num_heads, -1)).unbind(2)
    heads = (part.transpose(1, 2) for part in (query, key, value))
    attend = F.scaled_dot_product_attention if attention.fused_attn else plain_attention
    attended_BND = attend(*heads).transpose(1, 2).flatten(2)
    first_BND = tokens_BND[:, :num_tokens] + attention.proj(attended_BND)
    return first_BND + block.mlp(block.norm2(first_BND))


def plain_attention(query_BHQK: Tensor, key_BHNK: Tensor, value_BHNK: Tensor) -> Tensor:
    """`softmax(q kᵀ / √d) v` as two matrix products. H heads, Q queries, K dimensions of a head."""
    scaled_BHQK = query_BHQK * query_BHQK.shape[-1] ** -0.5
    return (scaled_BHQK @ key_BHNK.transpose(-2, -1)).softmax(dim=-1) @ value_BHNK


def _timm_weights(timm_name: str) -> dict[str, Tensor]:
    try:
        return timm.create_model(timm_name, pretrained=True).state_dict()
    except Exception as err:  # timm raises undocumented errors of its hub client
        raise DataError(
            f"could not fetch {timm_name} ({type(err).__name__}: {str(err)[:120]!r}); "
            "give the file as imagenet_weights, or train from scratch with imagenet_pretrain false"
        ) from err
