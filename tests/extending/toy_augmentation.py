"""A toy augmentation, as docs/extending.md describes: a random gain, which in log-mel is a sum."""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field
from torch import Tensor

from ast_core.augment.augmentation import Augmentation, Values, frames_mask
from ast_core.batch import Batch
from ast_core.seeds import rng_for
from ast_core.settings import settings
from ast_core.transfer import to_device


@settings
class RandomGain(Augmentation):
    """Make each clip louder or softer by up to `max_nats`."""

    max_nats: Annotated[float, Field(ge=0)] = 0.7

    @property
    def is_off(self) -> bool:
        return self.max_nats == 0

    def draw(self, seed: Sequence[int], num_clips: int, num_frames: int, num_mel_bins: int) -> Values:
        gain = rng_for("random gain", seed).uniform(-self.max_nats, self.max_nats, num_clips)
        return {"gain_nats": gain.astype(np.float32)}

    def apply(self, fbank_BTM: Tensor, values: Values, batch: Batch) -> Tensor:
        gain_B1 = to_device(values["gain_nats"], fbank_BTM.device).unsqueeze(1)
        gain_BT = gain_B1 * frames_mask(batch.num_frames_B, fbank_BTM.shape[1])
        return fbank_BTM.add_(gain_BT.unsqueeze(2))
