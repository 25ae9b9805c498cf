"""Augmentation has the reference's distributions and order, and is the same in a batch and in a rank's share."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchaudio
from scipy import stats
from torch import Tensor

from ast_core.augment import mixup_power
from ast_core.augment.augmentation import Augmentation, Drawn, frames_mask, take
from ast_core.augment.mixup import mixup_batch
from ast_core.augment.noise_roll import NoiseRoll
from ast_core.augment.spec_augment import SpecAugment
from ast_core.batch import Batch, Norm, model_input, normalise
from ast_core.fbank import POWER_FLOOR, fbank
from ast_core.features import KALDI128, KINDS, FeatureSettings, LogScale
from ast_core.models.patchout import draw_patchout
from ast_core.recipe import MixupDomain
from tests.ast_core import small
from tests.reference import needs_shared, whole_figures

SIGNIFICANCE = 1e-3
"""A correct implementation fails for one seed in a thousand. The seeds are fixed and were not selected."""

FBANK_TOLERANCE = 1e-3
SILENCE = math.log(POWER_FLOOR)
NUM_MEL_BINS, NUM_FRAMES = 128, 1024
NOISE = NoiseRoll(noise=True)


def draw(augmentation: Augmentation, num_clips: int, *seed: int) -> dict[str, np.ndarray]:
    return dict(augmentation.draw(seed, num_clips, NUM_FRAMES, NUM_MEL_BINS))


def apply(augmentation: Augmentation, clips: Tensor, drawn: dict[str, np.ndarray]) -> Tensor:
    frames = torch.full((len(clips),), clips.shape[1])
    return augmentation.apply(clips.clone(), drawn, Batch(clips, frames, torch.zeros(0), torch.zeros(0)))


# --- mixup


@needs_shared
def test_power_mixup_is_near_mixing_waveforms_and_linear_mixup_is_not():
    mixed = whole_figures("mixup_reference")
    lam = float(mixed["lam"])
    a, b = (fbank(torch.from_numpy(mixed[key])) for key in ("waveform_a", "waveform_b"))
    expected = torch.from_numpy(mixed["fbank"])

    def error(fbank_TM: Tensor) -> float:
        return (fbank_TM - expected).abs().mean().item()

    # 0.14 nats on average over 42 pairs (README of the fixtures), 0.15 for this pair.
    assert error(mixup_power(a, b, lam)) < 0.2
    assert error(lam * a + (1 - lam) * b) > 4 * error(mixup_power(a, b, lam))


def test_mixup_is_exact_for_clips_that_share_no_frequency():
    t = torch.arange(16_000) / 16_000
    low, high = (0.5 * torch.sin(2 * torch.pi * freq_hz * t) for freq_hz in (500, 4000))
    mixed, expected = mixup_power(fbank(low), fbank(high), 0.3), fbank(0.3 * low + 0.7 * high)
    loud = expected > 0  # only the two peaks; elsewhere side lobes of the window overlap
    assert loud.sum() > 2 * len(expected)
    torch.testing.assert_close(mixed[loud], expected[loud], rtol=0, atol=0.01)


@pytest.mark.parametrize("partner", [0.0, -15.9, -torch.inf], ids=["loud", "silent", "ended"])
def test_lambda_1_does_not_change_the_clip(partner: float):
    clips = small.log_mel(2)
    assert torch.equal(mixup_power(clips, torch.full_like(clips, partner), 1.0), clips)


def test_mixup_is_symmetric():
    a, b = small.log_mel(2)
    torch.testing.assert_close(mixup_power(a, b, 0.3), mixup_power(b, a, 0.7))


def test_lambda_may_differ_between_clips():
    a, b = small.log_mel(2), small.log_mel(2, seed=1)
    lam = torch.tensor([0.2, 0.9])
    each = torch.stack([mixup_power(a[i], b[i], lam[i].item()) for i in range(2)])
    torch.testing.assert_close(mixup_power(a, b, lam.view(-1, 1, 1)), each)


def padded(fbank_TM: Tensor, num_frames: int) -> Tensor:
    return torch.nn.functional.pad(fbank_TM[:num_frames], (0, 0, 0, max(0, num_frames - len(fbank_TM))))


@pytest.mark.parametrize(("clip_s", "partner_s"), [(0.5, 0.3), (0.3, 0.5), (0.4, 0.4), (0.9, 0.2), (0.2, 0.9)])
def test_a_mixture_has_the_length_of_the_clip_for_any_partner(clip_s: float, partner_s: float):
    """The reference implementation cuts the partner's waveform to the clip's length, or pads it with silence."""
    generator = torch.Generator().manual_seed(0)
    lam, num_frames = 0.4, 64  # 0.9 s is cut, shorter clips are padded
    clip, partner = (0.1 * torch.randn(int(s * 16_000), generator=generator) for s in (clip_s, partner_s))
    fbanks = [fbank(waveform) for waveform in (clip, partner)]
    clip_frames, partner_frames = (min(len(each), num_frames) for each in fbanks)
    mixed = mixup_batch(
        padded(fbanks[0], num_frames).unsqueeze(0),
        torch.tensor([clip_frames]),
        padded(fbanks[1], num_frames).unsqueeze(0),
        torch.tensor([partner_frames]),
        torch.tensor([lam]),
    )[0]
    assert not mixed[clip_frames:].any()
    fitted = torch.zeros_like(clip)
    fitted[: len(partner)] = partner[: len(clip)]
    of_waveforms = padded(fbank(lam * clip + (1 - lam) * fitted), num_frames)
    error = (mixed - of_waveforms).masked_fill(of_waveforms < SILENCE + 1e-3, 0)  # one mel filter is empty at 16 kHz
    both = min(clip_frames, partner_frames)
    # After the partner's end, which two frames overlap, only the gain remains, which is exact.
    assert torch.all(error[both + 2 : clip_frames].abs() < FBANK_TOLERANCE)
    # Before it there are two noises, for which the average over hundreds of values is right.
    assert abs(error[:both].mean().item()) < 0.2


def test_mixup_in_log_mel_weights_values_and_takes_silence_after_the_partner():
    clip, partner = small.log_mel(2).split(1)
    frames, ended = torch.tensor([small.NUM_FRAMES]), torch.tensor([40])
    mixed = mixup_batch(clip, frames, partner, ended, torch.tensor([0.3]), "log_mel")
    torch.testing.assert_close(mixed[:, :40], 0.3 * clip[:, :40] + 0.7 * partner[:, :40])
    torch.testing.assert_close(mixed[:, 40:], 0.3 * clip[:, 40:] + 0.7 * KALDI128.floor)


def test_mixup_adds_powers_in_decibels_too(monkeypatch: pytest.MonkeyPatch):
    nats_per_db = math.log(10) / 10
    in_decibels = replace(KINDS["kaldi_fbank"], log_scale=LogScale("decibels", "dB", nats_per_db))
    monkeypatch.setitem(KINDS, "in_decibels", in_decibels)
    clip, partner = small.log_mel(2).split(1)
    lengths = torch.tensor([small.NUM_FRAMES]), torch.tensor([40])
    natural = mixup_batch(clip, lengths[0], partner, lengths[1], torch.tensor([0.3]))
    features = FeatureSettings(kind="in_decibels")
    decibels = mixup_batch(
        clip / nats_per_db, lengths[0], partner / nats_per_db, lengths[1], torch.tensor([0.3]), features=features
    )
    torch.testing.assert_close(decibels, natural / nats_per_db, atol=features.floor * -1e-3, rtol=1e-5)
    batch = small.batch(2)
    partners = replace(batch.partners, fbank_KTM=batch.partners.fbank_KTM / nats_per_db)
    loud = replace(batch, fbank_BTM=batch.fbank_BTM / nats_per_db, partners=partners, features=features)
    norm = Norm(small.NORM.mean / nats_per_db, small.NORM.std / nats_per_db)
    natural_input, input_of_decibels = (
        model_input(one, by, small.only_mixup(2)) for one, by in ((batch, small.NORM), (loud, norm))
    )
    torch.testing.assert_close(input_of_decibels, natural_input, atol=0.02, rtol=0)  # the floors differ
    torch.testing.assert_close(
        mixup_power(clip / nats_per_db, partner / nats_per_db, 0.3, nats_per_db),
        mixup_power(clip, partner, 0.3) / nats_per_db,
    )


@pytest.mark.parametrize("domain", ["power", "log_mel"])
def test_only_clips_with_a_partner_change(domain: MixupDomain):
    clips, junk = small.log_mel(3), torch.full((3, small.NUM_FRAMES, small.NUM_MEL_BINS), 50.0)
    frames = torch.full((3,), small.NUM_FRAMES)
    mixed = mixup_batch(clips, frames, junk, torch.tensor([0, 64, 64]), torch.tensor([1.0, 0.5, 1.0]), domain)
    assert torch.equal(mixed[[0, 2]], clips[[0, 2]])
    assert (mixed[1] > clips[1] + 10).all()


def test_frames_mask_is_true_for_the_frames_of_a_clip():
    assert frames_mask(torch.tensor([0, 2, 3, 5]), 3).tolist() == [
        [False, False, False],
        [True, True, False],
        [True, True, True],
        [True, True, True],
    ]


# --- SpecAugment


def masks_of_draw(size: int, longest: int, num: int) -> tuple[np.ndarray, np.ndarray]:
    if size == NUM_MEL_BINS:
        drawn = draw(SpecAugment(freqm=longest, timem=192), num, 11)
        return drawn["freq_start"], drawn["freq_width"]
    drawn = draw(SpecAugment(freqm=48, timem=longest), num, 11)
    return drawn["time_start"], drawn["time_width"]


def masks_of_torchaudio(size: int, longest: int, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and widths of the masks of torchaudio's transforms, which the reference implementation uses."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        masked = torch.stack(
            [torchaudio.transforms.FrequencyMasking(longest)(torch.ones(1, size, 1)) for _ in range(num)]
        )
    set_to_0 = (masked.view(num, size) == 0).numpy()
    return set_to_0.argmax(axis=1), set_to_0.sum(axis=1)


def start_probabilities(size: int, longest: int) -> np.ndarray:
    """P(start = s) for a start floor(U'·(size - v)), integrated over real widths v = U·longest of at least 1."""
    v = 1 + (np.arange(20_000) + 0.5) / 20_000 * (longest - 1)
    s = np.arange(size).reshape(-1, 1)
    return (np.clip(size - v - s, 0, 1) / (size - v)).mean(axis=1)


def p_value(observed: np.ndarray, probability: np.ndarray) -> float:
    """Chi-square test of counts. Neighbouring values are merged until about 20 are expected in each cell."""
    expected = probability * observed.sum()
    cell = np.minimum(np.cumsum(expected) / 20, observed.sum() / 20 - 1).astype(int)
    _, cell = np.unique(cell, return_inverse=True)
    return stats.chisquare(*(np.bincount(cell, weights=counts) for counts in (observed, expected))).pvalue


@pytest.mark.parametrize(("size", "longest"), [(NUM_MEL_BINS, 48), (NUM_FRAMES, 192), (NUM_MEL_BINS, 128)])
@pytest.mark.parametrize("masks", [masks_of_draw, masks_of_torchaudio])
def test_mask_widths_and_starts_are_distributed_as_in_torchaudio(masks: Callable, size: int, longest: int):
    """Our masks and torchaudio's both agree with the distribution of `start_probabilities`."""
    num = 40_000 if masks is masks_of_draw else 8_000
    start, width = masks(size, longest, num)
    assert p_value(np.bincount(width, minlength=longest), np.full(longest, 1 / longest)) > SIGNIFICANCE
    seen = width > 0  # the start of an empty torchaudio mask is not visible
    assert p_value(np.bincount(start[seen], minlength=size), start_probabilities(size, longest)) > SIGNIFICANCE
    assert np.all(start + width <= size)


def test_masks_in_time_and_in_frequency_are_independent():
    drawn = draw(SpecAugment(freqm=48, timem=192), 5000, 5) | draw(NOISE, 5000, 5)
    values = [numbers for name, numbers in drawn.items() if name != "freq_start" and name != "time_start"]
    correlation = np.corrcoef(values) - np.eye(len(values))
    # Six values have 15 pairs. Chance exceeds the limit for one seed in a thousand.
    assert np.abs(correlation).max() < stats.norm.isf(SIGNIFICANCE / 30) / math.sqrt(5000)


def test_masked_blocks_are_0_and_the_rest_is_unchanged():
    clips, masks = small.log_mel(16), SpecAugment(freqm=24, timem=24)
    drawn = dict(masks.draw((0,), 16, small.NUM_FRAMES, small.NUM_MEL_BINS))
    masked = apply(masks, clips, drawn)
    for i, clip in enumerate(clips):
        expected = clip.clone()
        expected[:, drawn["freq_start"][i] : drawn["freq_start"][i] + drawn["freq_width"][i]] = 0
        expected[drawn["time_start"][i] : drawn["time_start"][i] + drawn["time_width"][i]] = 0
        assert torch.equal(masked[i], expected)
    assert (masked == 0).any()


def test_a_mask_of_width_0_does_not_change_the_clips():
    clips, masks = small.log_mel(8), SpecAugment(freqm=0, timem=1)  # a time mask is narrower than timem
    assert torch.equal(apply(masks, clips, draw(masks, 8, 0)), clips)


@pytest.mark.parametrize(
    ("changes", "rest"),
    [
        ({"freqm": 0, "timem": 0}, ["Mixup", "NoiseRoll"]),
        ({"timem": 0}, ["Mixup", "SpecAugment", "NoiseRoll"]),
        ({"noise": False}, ["Mixup", "SpecAugment"]),
        ({"mixup": 0.0}, ["SpecAugment", "NoiseRoll"]),
        ({"augmentations": ["noise_roll"], "freqm": 0, "timem": 0}, ["NoiseRoll"]),
        ({"augmentations": [], "freqm": 0, "timem": 0, "noise": False}, []),
    ],
    ids=str,
)
def test_only_augmentations_that_are_listed_and_on_are_drawn(changes: dict, rest: list[str]):
    drawn = small.augmentations(3, **changes)
    assert [type(one.augmentation).__name__ for one in drawn] == rest


# --- normalising, noise, roll


def test_normalising_divides_by_twice_the_std():
    assert normalise(torch.tensor([3.0, -1.0]), mean=-1.0, std=2.0).tolist() == [1.0, 0.0]


def test_noise_gains_and_rolls_are_uniform():
    drawn = draw(NOISE, 20_000, 3)
    assert stats.kstest(drawn["noise_gain"], stats.uniform(0, 0.1).cdf).pvalue > SIGNIFICANCE
    assert (drawn["roll_frames"].min(), drawn["roll_frames"].max()) == (-10, 9)
    assert stats.chisquare(np.bincount(drawn["roll_frames"] + 10)).pvalue > SIGNIFICANCE
    assert len(np.unique(drawn["noise_seed"])) == 20_000


def test_noise_is_uniform_below_its_gain_and_the_roll_is_along_time():
    drawn = draw(NOISE, 4, 0)
    zeros = torch.zeros(4, small.NUM_FRAMES, small.NUM_MEL_BINS)
    noise = apply(NOISE, zeros, drawn).numpy()
    for clip, gain in zip(noise, drawn["noise_gain"], strict=True):
        assert stats.kstest(clip.ravel(), stats.uniform(0, gain).cdf).pvalue > SIGNIFICANCE
    ramp = torch.arange(small.NUM_FRAMES).float().mul(100).view(1, -1, 1).expand_as(zeros)
    for clip, roll in zip(apply(NOISE, ramp, drawn), drawn["roll_frames"], strict=True):
        frames = np.roll(np.arange(small.NUM_FRAMES), roll)
        assert (clip.div(100).floor() == torch.from_numpy(frames).unsqueeze(1)).all()
    assert len(set(drawn["roll_frames"])) > 1


def test_every_clip_has_independent_noise():
    drawn = draw(NOISE, 3, 0)
    noise = apply(NOISE, torch.zeros(3, small.NUM_FRAMES, small.NUM_MEL_BINS), drawn).numpy()
    unrolled = [np.roll(clip, -roll, axis=0).ravel() for clip, roll in zip(noise, drawn["roll_frames"], strict=True)]
    assert np.abs(np.corrcoef(unrolled) - np.eye(3)).max() < 0.05  # about 4.5 σ of 8,192 values


def test_each_augmentation_draws_independently_of_the_others():
    """Each kind has its own generator, so switching one off does not change the others."""
    usual = small.values(small.augmentations(50, seed=2))
    for changes in ({"freqm": 0}, {"timem": 0}, {"noise": False}):
        other = small.values(small.augmentations(50, seed=2, **changes))
        differ = {name for name, values in usual.items() if name not in other or (values != other[name]).any()}
        (changed,) = changes
        kind = {"freqm": {"freq_start", "freq_width"}, "timem": {"time_start", "time_width"}}
        assert differ <= kind.get(changed, {"noise_gain", "noise_seed", "roll_frames"})
        assert differ
    assert (small.values(small.augmentations(50, seed=3))["freq_width"] != usual["freq_width"]).any()


def test_patchout_draws_uniform_rows_and_columns():
    grid, dropped = (12, 101), {"num_rows": 4, "num_columns": 40}
    rows, columns = np.zeros(12), np.zeros(101)
    for seed in range(300):
        drawn = draw_patchout((0, 1, seed), grid, **dropped)
        assert (len(set(drawn.rows)), len(set(drawn.columns))) == (8, 61)
        assert (np.sort(drawn.rows) == drawn.rows).all()
        assert (np.sort(drawn.columns) == drawn.columns).all()
        rows[drawn.rows] += 1
        columns[drawn.columns] += 1
    # Five standard deviations of the binomial distribution, 0.027 each.
    assert np.abs(rows / 300 - 8 / 12).max() < 0.14
    assert np.abs(columns / 300 - 61 / 101).max() < 0.14


def test_patchout_depends_only_on_the_seed():
    grid = (12, 101)
    first, again, other = (draw_patchout((7, 2, i), grid, num_rows=4, num_columns=40) for i in (5, 5, 6))
    assert (first.rows == again.rows).all()
    assert (first.columns == again.columns).all()
    assert set(first.columns) != set(other.columns)
    # The draw for one axis does not depend on the other axis.
    assert (draw_patchout((7, 2, 5), grid, num_rows=0, num_columns=40).columns == first.columns).all()
    assert len(draw_patchout((7, 2, 5), grid, num_rows=4, num_columns=0).columns) == 101
    assert draw_patchout((7, 2, 5), grid, num_rows=0, num_columns=0) is None


def everything(clips: Tensor, drawn: Sequence[Drawn]) -> Tensor:
    frames = torch.full((len(clips),), clips.shape[1])
    return model_input(Batch(clips, frames, torch.zeros(0), torch.zeros(0)), small.NORM, drawn)


def test_one_seed_gives_one_augmentation():
    clips = small.log_mel(6)
    first, again, other = (everything(clips, small.augmentations(6, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("positions", [[0], [5, 2], [1, 3, 5], [0, 1, 2, 3, 4, 5]])
def test_a_share_is_augmented_as_in_the_whole_batch(positions: list[int]):
    clips, drawn = small.log_mel(6), small.augmentations(6)
    whole = everything(clips, drawn)
    assert torch.equal(everything(clips[positions], take(drawn, np.array(positions))), whole[positions])
