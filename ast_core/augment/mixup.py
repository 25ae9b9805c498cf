"""Mixup: the weighted sum of a clip and its partner.

B clips, K of them mixed, T frames, M mel bins.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ast_core.augment.augmentation import Augmentation, Values, frames_mask
from ast_core.features import KALDI128, FeatureSettings
from ast_core.recipe import MixupDomain
from ast_core.settings import settings
from ast_core.transfer import to_device

if TYPE_CHECKING:
    from ast_core.batch import Batch

MIXUP_BETA = 10.0
"""λ ~ Beta(10, 10), as in the dataloader of `YuanGongND/ast`."""


@settings
class Mixup(Augmentation):
    """Mix the clips that have a partner with it. The feed reads the partners and mixes the labels."""

    mixup: float
    mixup_domain: MixupDomain

    @property
    def is_off(self) -> bool:
        return self.mixup == 0

    @property
    def partner_share(self) -> float:
        return self.mixup

    def apply(self, fbank_BTM: Tensor, values: Values, batch: "Batch") -> Tensor:
        partners = batch.partners
        if partners is None or not len(partners.position):
            return fbank_BTM
        mixed_K = to_device(partners.position, fbank_BTM.device)
        fbank_BTM[mixed_K] = mixup_batch(
            fbank_BTM[mixed_K],
            batch.num_frames_B[mixed_K],
            partners.fbank_KTM.float(),
            partners.num_frames_K,
            partners.lam_K,
            self.mixup_domain,
            batch.features,
        )
        return fbank_BTM


def mixup_power(a: Tensor, b: Tensor, lam: Tensor | float, nats_per_unit: float = 1.0) -> Tensor:
    """Log-mel of the mixture `λ a + (1 - λ) b` of two uncorrelated waveforms: powers add, weighted λ² and (1 - λ)².

    `a` and `b` are raw log-mel of one shape, `[..., frames, mel bins]`; `lam` in [0, 1] broadcasts against them.
    `b` may be -inf after the end of the second clip. λ = 1 gives `a` exactly, in natural logarithms. `nats_per_unit` is
    that of the features' log scale: 1 for natural logarithms, ln(10) / 10 for decibels.
    """
    lam = torch.as_tensor(lam, dtype=a.dtype, device=a.device)
    mixed = torch.logaddexp(2 * lam.log() + nats_per_unit * a, 2 * torch.log1p(-lam) + nats_per_unit * b)
    return mixed / nats_per_unit


def mixup_log_mel(a: Tensor, b: Tensor, lam: Tensor | float) -> Tensor:
    """`λ a + (1 - λ) b` of the raw log-mel values, as in image recipes. The result is not the log-mel of a mixture."""
    return torch.lerp(b, a, torch.as_tensor(lam, dtype=a.dtype, device=a.device))


def mixup_batch(
    fbank_BTM: Tensor,
    num_frames_B: Tensor,
    partner_BTM: Tensor,
    partner_frames_B: Tensor,
    lam_B: Tensor,
    domain: MixupDomain = "power",
    features: FeatureSettings = KALDI128,
) -> Tensor:
    """Mix each clip with its partner. The result has the clip's length and is 0 after it.

    λ = 1 leaves a clip unchanged. A partner is silent after its end. All values stay at or above the features' floor,
    as those of a real mixture do.
    """
    nats = features.log_scale.nats_per_unit if domain == "power" else 1.0
    lam_B11, ended_BT1 = lam_B.view(-1, 1, 1), ~frames_mask(partner_frames_B, partner_BTM.shape[1]).unsqueeze(2)
    if domain == "power":
        # As mixup_power. After the partner's end, -inf takes the place of 2 log(1 - λ).
        gain_BT1 = (2 * torch.log1p(-lam_B11)).expand(ended_BT1.shape).masked_fill(ended_BT1, -torch.inf)
        mixed = torch.add(2 * lam_B11.log(), fbank_BTM, alpha=nats)
        torch.logaddexp(mixed, torch.add(gain_BT1, partner_BTM, alpha=nats), out=mixed)
    else:
        mixed = mixup_log_mel(fbank_BTM, partner_BTM.masked_fill(ended_BT1, features.floor), lam_B11)
    return mixed.clamp_min_(nats * features.floor).mul_(
        frames_mask(num_frames_B, fbank_BTM.shape[1]).unsqueeze(2) / nats
    )
