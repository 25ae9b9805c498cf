"""From the embeddings of a clip's frames to its logits.

B clips, T frames, D dimensions, C classes. Probabilities are computed in float32 also under autocast: in bf16, those
above 0.998 would be 1. A pooled probability becomes a logit, so that all models have the same loss and outputs.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

SMALLEST = 1e-7
"""Probabilities are clamped to this distance from 0 and 1."""


def logit(prob: Tensor) -> Tensor:
    """The logits of float32 probabilities, clamped to [1e-7, 1 - 1e-7]."""
    clamped = _clamp(prob)
    return clamped.log() - (-clamped).log1p()


def _clamp(prob: Tensor) -> Tensor:
    return prob.clamp(SMALLEST, 1 - SMALLEST)


POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "lin": lambda prob_BTC: prob_BTC.square().sum(dim=1) / prob_BTC.sum(dim=1),
    "exp": lambda prob_BTC: (prob_BTC * prob_BTC.exp()).sum(dim=1) / prob_BTC.exp().sum(dim=1),
    "ave": lambda prob_BTC: prob_BTC.mean(dim=1),
    "max": lambda prob_BTC: prob_BTC.amax(dim=1),
}
"""Poolings of the frames' probabilities without parameters (Wang et al., 2019, https://arxiv.org/abs/1810.09050)."""


class Float32Linear(nn.Linear):
    """A last linear layer that computes in float32 also under autocast.

    A logit in bf16 has 8 significant bits: from 4 to 8 they are multiples of 1/32, so likely classes would tie.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        device = inputs.device.type
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return super().forward(inputs)
        with torch.autocast(device, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(inputs.float(), self.weight.float(), bias)


class Pooling(nn.Module):
    """From the embeddings of the frames `[B, T, D]` to raw logits of the clip `[B, C]`, in float32."""

    def frame_logits(self, frames_BTD: Tensor) -> Tensor:
        """Raw logits of each frame `[B, T, C]`, in float32."""
        raise NotImplementedError


class FramePooling(Pooling):
    """A probability for each frame and class, pooled over time: TALNet's output.

    With `att`, a second linear layer weights the frames by a softmax over time. The others are `POOLINGS`.
    """

    def __init__(self, dim: int, label_dim: int, pooling: str = "att") -> None:
        super().__init__()
        self.pooling = pooling
        self.fc_prob = nn.Linear(dim, label_dim)
        self.fc_att = nn.Linear(dim, label_dim) if pooling == "att" else None
        for layer in (self.fc_prob, self.fc_att):
            if layer is not None:
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def frame_logits(self, frames_BTD: Tensor) -> Tensor:
        return self.fc_prob(frames_BTD).float()

    def forward(self, frames_BTD: Tensor) -> Tensor:
        prob_BTC = _clamp(self.frame_logits(frames_BTD).sigmoid())
        if self.fc_att is None:
            return logit(POOLINGS[self.pooling](prob_BTC))
        weight_BTC = self.fc_att(frames_BTD).float().softmax(dim=1)
        return logit((prob_BTC * weight_BTC).sum(dim=1))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits_BTC: logits_BTC.softmax(dim=2),
}


class AttentionPooling(Pooling):
    """PSLA's output: the frames' probabilities, weighted over time by one or several attention heads.

    Args:
        num_heads: with 0, the mean over time of one linear layer's probabilities.
        activation: what turns the linear layers' outputs into weights and probabilities. With `softmax` over the
            classes the scores of a clip sum to 1, so it cannot have two certain labels; only for weights trained so.
    """

    def __init__(self, dim: int, label_dim: int, num_heads: int, activation: str = "sigmoid") -> None:
        super().__init__()
        self.activate = ACTIVATIONS[activation]
        self.cla = nn.ModuleList(nn.Linear(dim, label_dim) for _ in range(max(1, num_heads)))
        self.att = nn.ModuleList(nn.Linear(dim, label_dim) for _ in range(num_heads))
        # Not [heads]: the first dimension of a head's tensors is that of the classes.
        self.head_weight = nn.Parameter(torch.full((1, num_heads), 1 / num_heads)) if num_heads > 1 else None
        if num_heads < 2:
            for layer in (*self.cla, *self.att):
                bound = math.sqrt(6 / dim)
                nn.init.uniform_(layer.weight, -bound, bound)
                nn.init.zeros_(layer.bias)

    def _prob_of_heads(self, frames_BTD: Tensor) -> list[Tensor]:
        # MeanPooling of the reference has a sigmoid whatever the activation.
        activate = self.activate if self.att else torch.sigmoid
        return [activate(layer(frames_BTD).float()) for layer in self.cla]

    def _mix(self, per_head: list[Tensor]) -> Tensor:
        if self.head_weight is None:
            return per_head[0]
        return (torch.stack(per_head, dim=-1) * self.head_weight[0].float()).sum(dim=-1)

    def frame_logits(self, frames_BTD: Tensor) -> Tensor:
        return logit(self._mix(self._prob_of_heads(frames_BTD)))

    def forward(self, frames_BTD: Tensor) -> Tensor:
        prob = self._prob_of_heads(frames_BTD)
        if not self.att:
            return logit(prob[0].mean(dim=1))
        weights = [_clamp(self.activate(layer(frames_BTD).float())) for layer in self.att]
        return logit(
            self._mix(
                [
                    (weight_BTC / weight_BTC.sum(dim=1, keepdim=True) * prob_BTC).sum(dim=1)
                    for weight_BTC, prob_BTC in zip(weights, prob, strict=True)
                ]
            )
        )


class MeanPooling(Pooling):
    """One linear layer on the mean embedding. Its logits of a clip are the mean of its logits of the frames."""

    def __init__(self, dim: int, label_dim: int) -> None:
        super().__init__()
        self.classifier = Float32Linear(dim, label_dim)

    def frame_logits(self, frames_BTD: Tensor) -> Tensor:
        return self.classifier(frames_BTD)

    def forward(self, frames_BTD: Tensor) -> Tensor:
        return self.classifier(frames_BTD.mean(dim=1))
