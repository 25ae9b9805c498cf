"""Our functions equal other implementations, for figures in this repository (see `tests/fixtures/make.py`)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ast_core import ASTModel
from ast_core.augment import mixup_power
from ast_core.checkpoints import load_original
from ast_core.fbank import fbank
from ast_core.features import SMALL64, log_mel
from ast_core.metrics import tagging_metrics
from ast_core.models.pretrained import resize_pos_embed
from tests.reference import draw_all, original_shapes

FILE = Path(__file__).parents[1] / "fixtures" / "own.npz"
with np.load(FILE) as archive:
    FIGURES = dict(archive)

LOGITS_TOLERANCE = 2e-5
"""Relative to the spread of the logits, for float32 rounding in another order of summation."""
NATS_TOLERANCE = 1e-4
"""Largest accepted difference of a mel bin that holds the frame's largest power."""
DB_PER_NAT = 10 / np.log(10)


def waveform(kind: str) -> Tensor:
    return torch.from_numpy(FIGURES[f"waveform_{kind}"] / np.float32(32768))


def test_the_figures_are_below_300_kb():
    assert sum(file.stat().st_size for file in FILE.parent.glob("*_reference.*")) + FILE.stat().st_size < 300_000


@pytest.mark.parametrize("case_index", range(len(FIGURES["model_cases"])))
def test_logits_equal_those_of_transformers(case_index: int):
    fstride, tstride, input_fdim, input_tdim, label_dim, seed = FIGURES["model_cases"][case_index].tolist()
    shape = {"fstride": fstride, "tstride": tstride, "input_fdim": input_fdim, "input_tdim": input_tdim}
    model = ASTModel(label_dim, **shape, imagenet_pretrain=False, model_size="tiny224").eval()
    load_original(model, draw_all(original_shapes(model), "own"))
    rng = np.random.Generator(np.random.PCG64(seed))
    log_mel = rng.standard_normal((2, input_tdim, input_fdim), dtype=np.float32) * 0.5
    with torch.no_grad():
        logits = model(torch.from_numpy(log_mel)).numpy()
    expected = FIGURES[f"logits_{case_index}"]
    assert logits.shape == expected.shape
    assert np.abs(logits - expected).max() < LOGITS_TOLERANCE * expected.std()


KINDS = [key.removeprefix("waveform_") for key in FIGURES if key.startswith("waveform_")]


@pytest.mark.parametrize("kind", KINDS)
def test_fbanks_equal_those_of_torchaudio(kind: str):
    assert_equal_but_for_rounding(fbank(waveform(kind)).numpy(), FIGURES[f"fbank_{kind}"])


@pytest.mark.parametrize("kind", KINDS)
def test_small64_features_equal_those_of_torchaudio(kind: str):
    ours, expected = log_mel(waveform(kind), SMALL64).numpy(), FIGURES[f"small64_{kind}"]
    assert_equal_but_for_rounding(ours / DB_PER_NAT, expected / DB_PER_NAT)


def assert_equal_but_for_rounding(ours: np.ndarray, expected: np.ndarray) -> None:
    """Compare log powers [frames, bins] in nats as exactly as the Fourier transforms of two processors agree.

    A float32 transform has an error of up to about three epsilons of the frame's largest amplitude in each bin. In a
    bin whose amplitude is `ratio` times smaller, this is 3 · `ratio` epsilons.
    """
    assert ours.shape == expected.shape
    ratio = np.exp((expected.max(axis=1, keepdims=True) - expected) / 2)
    assert (np.abs(ours - expected) / (NATS_TOLERANCE + 3 * np.finfo(np.float32).eps * ratio)).max() < 1


def test_power_mixup_is_near_the_fbank_of_the_mixture_and_linear_mixup_is_not():
    a, b = (fbank(waveform(kind) - waveform(kind).mean()) for kind in ("speech", "music"))
    lam, expected = float(FIGURES["mixup_lam"]), torch.from_numpy(FIGURES["mixup_fbank"])
    error = (mixup_power(a, b, lam) - expected).abs().mean()
    # 0.31 nats on average, as harmonics overlap. The error is 0.64 with λ instead of λ², and 1.6 for linear mixing.
    assert error < 0.35
    assert (lam * a + (1 - lam) * b - expected).abs().mean() > 4 * error


def test_metrics_equal_those_of_scikit_learn_and_scipy():
    ours = tagging_metrics(FIGURES["score"], FIGURES["target"])
    np.testing.assert_allclose(ours.ap, FIGURES["ap"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(ours.auc, FIGURES["auc"], rtol=0, atol=1e-9)
    means = [ours.map, ours.mauc, ours.d_prime]
    np.testing.assert_allclose(means, [FIGURES["ap"].mean(), FIGURES["auc"].mean(), FIGURES["d_prime"]], atol=1e-9)


@pytest.mark.parametrize("case_index", range(len(FIGURES["pos_embed_grids"])))
def test_resized_positional_embeddings_equal_those_of_numpy(case_index: int):
    pos_embed, new_grid = torch.from_numpy(FIGURES["pos_embed"]), FIGURES["pos_embed_grids"][case_index]
    resized = resize_pos_embed(pos_embed, (6, 9), tuple(new_grid.tolist()))
    np.testing.assert_allclose(resized.numpy(), FIGURES[f"pos_embed_{case_index}"], rtol=0, atol=1e-6)
