"""Scores of one waveform, the same that preparation and evaluation compute for a clip.

N samples, T frames, M mel bins, C classes.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ast_core.batch import normalise
from ast_core.checkpoints import ModelConfig
from ast_core.features import MAX_PEAK, log_mel
from ast_core.models.tagger import Tagger


def model_input_of(waveform: np.ndarray | Tensor, config: ModelConfig) -> Tensor:
    """The network's input `[1, T, M]` for a waveform `[N]`, mono, in [-1, 1], at `config.features.sample_rate_hz`.

    The mean of the waveform is subtracted. The log-mel is padded with 0 or cut to the model's `input_tdim` frames, and
    normalised by `config.norm`. Everything after the model's input length is ignored, so pass a long recording in
    windows.

    Raises:
        ValueError: the waveform has more than one channel, is shorter than a frame, or has integer samples or others
            that are far outside [-1, 1].
    """
    given = torch.as_tensor(waveform)
    if not given.is_floating_point():
        raise ValueError(f"the samples are {given.dtype}; give floats in [-1, 1], such as int16 divided by 32768")
    samples_N = given.to(torch.float32)
    if samples_N.ndim != 1:
        raise ValueError(f"the waveform has shape {tuple(samples_N.shape)}; give one channel, [samples]")
    if not (samples_N.abs() <= MAX_PEAK).all():
        raise ValueError(f"the samples are not all numbers in about [-1, 1]: up to {samples_N.abs().max():,.0f}")
    samples_N = samples_N.clamp(-1, 1)
    fbank_TM = log_mel(samples_N - samples_N.mean(), config.features)
    num_frames = config.recipe.input_tdim
    fitted_TM = F.pad(fbank_TM[:num_frames], (0, 0, 0, max(0, num_frames - len(fbank_TM))))
    return normalise(fitted_TM[None], config.norm.mean, config.norm.std, config.norm.divisor)


@torch.no_grad()
def tag(model: Tagger, config: ModelConfig, waveform: np.ndarray | Tensor) -> Tensor:
    """Sigmoid scores `[C]` on the CPU for a waveform `[N]` as `model_input_of` takes it.

    Class i is `config.labels.names[i]`. `model` is in evaluation mode, as `load_model` returns it.
    """
    device = next(model.parameters()).device
    return model(model_input_of(waveform, config).to(device)).sigmoid()[0].cpu()
