"""Measure the deviations from the published method: the fidelity table of RESULTS.md.

    python -m benchmarks.fidelity

Needs the reference figures in ../shared/fixtures and the official lists in ../shared/data. Takes about a minute.
"""

import csv
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import torch
from scipy import stats
from torch import Tensor

from ast_core import ASTModel
from ast_core.augment.mixup import MIXUP_BETA, mixup_log_mel, mixup_power
from ast_core.augment.noise_roll import NoiseRoll
from ast_core.augment.spec_augment import SpecAugment
from ast_core.batch import normalise
from ast_core.checkpoints import (
    ModelConfig,
    load_original,
    read_checkpoint,
    save_huggingface,
    save_model,
    save_original,
)
from ast_core.checkpoints.onnx import save_onnx
from ast_core.fbank import fbank
from ast_core.labels import LabelVocabulary, audioset_labels
from ast_core.metrics import tagging_metrics
from ast_core.models.pretrained import from_audioset, from_deit
from ast_core.models.shapes import MODEL_SIZES, Grid, patch_grid
from ast_core.published_inputs import AUDIOSET
from ast_core.recipe import load_recipe
from ast_core.schedule import learning_rate
from ast_core.step import clip_losses, make_optimizer
from jobs.recipe_option import recipe_names, shipped_recipe
from pipeline.train.data.sampling import NO_PARTNER, epoch_order
from pipeline.weights import sample_weights
from tests import reference
from tests.ast_core import ddp, small


@dataclass(frozen=True)
class Row:
    quantity: str
    original: str
    deviation: str
    test: str


def features() -> Iterator[Row]:
    expected = reference.whole_figures("clip_fbank_reference")
    with av.open(str(reference.AUDIOSET / "--BfvyPmVMo_20.000.wav")) as container:
        waveform = torch.from_numpy(np.concatenate([f.to_ndarray() for f in container.decode(audio=0)], axis=1)[0])
    ours = fbank(waveform - waveform.mean())
    theirs = torch.from_numpy(expected["fbank"])
    test = "test_fbank: the_fbank_of_a_real_clip_equals_the_reference_loaders"
    definition = "torchaudio's kaldi.fbank of an AudioSet clip, [998, 128]"
    yield Row("fbank", definition, f"{largest(ours, theirs):.1e} nats", test)
    stored = largest(ours.half().float(), theirs)
    yield Row(
        "fbank as stored",
        "the same in float32; ours is float16",
        f"{stored:.1e} nats",
        "test_shards: the_fbank_is_that_of_the_waveform",
    )
    padded = torch.nn.functional.pad(ours, (0, 0, 0, 1024 - len(ours)))
    normalised = normalise(padded, AUDIOSET.mean, AUDIOSET.std)
    deviation = largest(normalised, torch.from_numpy(expected["normalised"]))
    test = "test_fbank: padding_and_normalising_equal_the_reference_loaders"
    yield Row("network input", "padded to 1024 with 0, (x - mean) / (2 std)", f"{deviation:.1e}", test)


def mixup() -> Iterator[Row]:
    mixed = reference.whole_figures("mixup_reference")
    lam, expected = float(mixed["lam"]), torch.from_numpy(mixed["fbank"])
    a, b = (fbank(torch.from_numpy(mixed[key])) for key in ("waveform_a", "waveform_b"))
    power, linear = ((mix(a, b, lam) - expected).abs().mean().item() for mix in (mixup_power, mixup_log_mel))
    yield Row(
        "mixup",
        "λ a + (1 - λ) b on waveforms, one pair; by design ours adds powers of stored fbanks",
        f"{power:.2f} nats on average (`mixup_domain: log_mel`: {linear:.2f})",
        "test_augment: power_mixup_is_near_mixing_waveforms_and_linear_mixup_is_not",
    )


def chance() -> Iterator[Row]:
    """p-values against the reference distributions. They are uniform between 0 and 1 if ours are equal."""
    shape = {"num_clips": 50_000, "num_frames": 1024, "num_mel_bins": 128}
    masks, noise = (one.draw((0,), **shape) for one in (SpecAugment(freqm=48, timem=192), NoiseRoll(noise=True)))
    widths = [np.bincount(width, minlength=n) for width, n in ((masks["freq_width"], 48), (masks["time_width"], 192))]
    p = ", ".join(f"{stats.chisquare(counts).pvalue:.2f}" for counts in widths)
    test = "test_augment: mask_widths_and_starts_are_distributed_as_in_torchaudio"
    yield Row("SpecAugment", "torchaudio's masks, widths uniform below freqm and timem", f"χ² p {p}", test)
    gain, roll = stats.kstest(noise["noise_gain"], stats.uniform(0, 0.1).cdf), np.bincount(noise["roll_frames"] + 10)
    p = f"KS p {gain.pvalue:.2f}, χ² p {stats.chisquare(roll).pvalue:.2f}"
    test = "test_augment: noise_gains_and_rolls_are_uniform"
    yield Row("noise, time roll", "gain uniform below 0.1; roll uniform over -10 … 9", p, test)
    weight, row_group = np.random.default_rng(0).pareto(1.5, 500) + 0.1, np.arange(500) // 16
    orders = [
        epoch_order(
            seed=1,
            epoch=epoch,
            num_clips=500,
            weight=weight,
            mixup=0.5,
            mixup_beta=MIXUP_BETA,
            row_group=row_group,
        )
        for epoch in range(100)
    ]
    mixed = [order.partner != NO_PARTNER for order in orders]
    clips = np.bincount(np.concatenate([order.clip for order in orders]), minlength=500)
    partners = np.concatenate([order.partner[m] for order, m in zip(orders, mixed, strict=True)])
    lam = np.concatenate([order.lam[m] for order, m in zip(orders, mixed, strict=True)])
    p_value = stats.chisquare(clips, weight / weight.sum() * clips.sum()).pvalue
    what = "N draws an epoch with replacement, by sample weight; 100 epochs of 500 clips"
    test = "test_sampling: weighted_sampling_draws_in_proportion_to_the_weights"
    yield Row("sampling", what, f"χ² p {p_value:.2f}", test)
    uniform, beta = stats.chisquare(np.bincount(partners, minlength=500)), stats.kstest(lam, stats.beta(10, 10).cdf)
    test = "test_sampling: partners_are_drawn_uniformly_when_clips_are_drawn_by_weight"
    what = "partners uniform over the data set, λ ~ Beta(10, 10)"
    yield Row("mixup's draws", what, f"χ² p {uniform.pvalue:.2f}, KS p {beta.pvalue:.2f}", test)


def network() -> Iterator[Row]:
    described, figures = reference.described(), reference.whole_figures("ast_reference")
    by_precision = {"fp32": 0.0, "bf16": 0.0}
    for i, case in enumerate(described["logits"]):
        model = case_model(case).eval()
        weights = reference.draw_all(reference.original_shapes(model), described["salt"])
        load_original(model, {f"module.{key}": value for key, value in weights.items()})
        rng = np.random.Generator(np.random.PCG64(case["input_seed"]))
        shape = (2, case["input_tdim"], case["input_fdim"])
        clips = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32) * case["input_scale"])
        expected = torch.from_numpy(figures[f"logits_{i}"])
        for precision in by_precision:
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                off = largest(model(clips).float(), expected) / expected.std(correction=0).item()
            by_precision[precision] = max(by_precision[precision], off)
    test = "test_ast: logits_parameters_and_tokens_equal_the_references"
    what = "logits of eight models, all sizes and strides, drawn weights, float32"
    yield Row("logits", what, f"{by_precision['fp32']:.1e} of their spread", test)
    what = "the same float32; ours under bf16 autocast, the default of training (the original's: fp16)"
    test = "test_step: bf16_is_close_to_fp32_and_keeps_parameters_in_float32, which bounds the loss"
    yield Row("logits in bf16", what, f"{by_precision['bf16']:.1e} of their spread", test)


def starts() -> Iterator[Row]:
    """Position embeddings on other grids, for the channels in the reference figures, and the patch projection."""
    described, figures = reference.described(), reference.whole_figures("ast_reference")
    worst = {"deit": 0.0, "as": 0.0}
    for i, case in enumerate(described["deit_adaptation"]):
        dim, side = MODEL_SIZES[case["model_size"]][1]["embed_dim"], 24 if case["model_size"] == "base384" else 14
        shapes = {"pos_embed": (1, 2 + side**2, dim), "patch_embed.proj.weight": (dim, 3, 16, 16)}
        shapes |= {"cls_token": (1, 1, dim), "dist_token": (1, 1, dim)}
        ours = from_deit(reference.draw_all(shapes, "public-deit"), case_grid(case))
        projection = torch.from_numpy(figures[f"deit_proj_{i}"])
        off = largest(ours["patch_embed.proj.weight"][: len(projection)], projection)
        worst["deit"] = max(worst["deit"], off, pos_embed_off(ours["pos_embed"], figures[f"deit_pos_embed_{i}"]))
    published = reference.draw("v.pos_embed", (1, 2 + 12 * 101, 768), "public-as")
    for i, case in enumerate(described["audioset_adaptation"]):
        ours = from_audioset({"v.pos_embed": published}, case_grid(case))
        worst["as"] = max(worst["as"], pos_embed_off(ours["v.pos_embed"], figures[f"as_pos_embed_{i}"]))
    what = "DeiT's weights: colours summed, embedding cut or stretched, seven shapes"
    test = "test_ast: deit_weights_are_adapted_as_in_the_reference"
    yield Row("ImageNet start", what, f"{worst['deit']:.1e}", test)
    what = "the published checkpoint's embedding on four other grids"
    test = "test_ast: an_audioset_checkpoint_is_adapted_as_in_the_reference"
    yield Row("AudioSet start", what, f"{worst['as']:.1e}", test)


def case_grid(case: dict) -> Grid:
    return patch_grid(case["input_fdim"], case["input_tdim"], case["fstride"], case["tstride"])


def pos_embed_off(ours: Tensor, expected: np.ndarray) -> float:
    return largest(ours[0, :, : expected.shape[1]], torch.from_numpy(expected))


def case_model(case: dict) -> ASTModel:
    shape = {key: case[key] for key in ("fstride", "tstride", "input_fdim", "input_tdim", "model_size")}
    return ASTModel(case["label_dim"], **shape, imagenet_pretrain=False)


def round_trip() -> Iterator[Row]:
    """Weights without image heads: reference → ours → Hugging Face → ours → reference; logits of each format."""
    labels = LabelVocabulary.from_names("abcde")
    config = ModelConfig(small.recipe(), small.NORM, labels)
    drawn = reference.draw_all(reference.original_shapes(small.model()), "round trip")
    original = {f"module.{key}": value for key, value in drawn.items()}
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        folder = Path(name)
        torch.save(original, folder / "a.pth")
        model, _ = read_checkpoint(folder / "a.pth", recipe=config.recipe, labels=labels)
        save_model(folder / "ours", model.state_dict(), config)
        save_huggingface(folder / "hf", read_checkpoint(folder / "ours")[0].state_dict(), config)
        back, _ = read_checkpoint(folder / "hf")
        save_original(folder / "b.pth", back.state_dict())
        again = torch.load(folder / "b.pth", weights_only=True)
        differ = [k for k in original if ".head" not in k and not torch.equal(original[k], again[k])]
        clips = 0.5 * torch.randn(2, small.NUM_FRAMES, small.NUM_MEL_BINS, generator=torch.Generator().manual_seed(0))
        logits = model(clips)
        from transformers import ASTForAudioClassification

        hugging = ASTForAudioClassification.from_pretrained(folder / "hf")(clips).logits
        onnx = save_onnx(folder / "model.onnx", back, config)
    test = "test_huggingface: a_round_trip_through_all_formats_changes_no_bit"
    what = "every tensor that takes part: original → ours → Hugging Face → ours → original"
    yield Row("checkpoints", what, f"{len(differ)} tensors differ by a bit", test)
    off = largest(hugging, logits) / logits.std().item()
    test = "test_huggingface: transformers_loads_our_folder_strictly_and_gives_our_logits"
    what = "logits of `transformers` on our folder; it has one epsilon for all norms"
    yield Row("Hugging Face's model", what, f"{off:.1e} of their spread", test)
    yield Row(
        "ONNX",
        "logits of ONNX Runtime",
        f"{onnx:.1e} of their spread",
        "test_onnx: onnx_runtime_gives_the_models_logits_for_any_batch_size",
    )


def weights_and_metrics() -> Iterator[Row]:
    index_of = audioset_labels().index_of
    with open(reference.AUDIOSET / "balanced_train_segments.csv", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file, skipinitialspace=True) if not row[0].startswith("#")]
    labels = pa.array([[index_of[mid] for mid in row[3].split(",")] for row in rows], pa.list_(pa.int16()))
    expected = reference.whole_figures("balanced_train_weights")["weight"]
    off = np.abs(sample_weights(labels, 527) / expected - 1).max()
    what = "1000 / (count + 0.01) summed over labels, balanced list"
    yield Row(
        "sample weights", what, f"{off:.1e} relative", "test_weights: the_balanced_lists_weights_are_the_originals"
    )
    figures = reference.whole_figures("metrics_reference")
    ours = tagging_metrics(figures["score"], figures["target"])
    off = max(np.abs(ours.ap - figures["ap"]).max(), np.abs(ours.auc - figures["auc"]).max())
    what = "scikit-learn's AP and ROC AUC by class, with ties"
    yield Row("AP, AUC", what, f"{off:.1e}", "test_metrics: metrics_equal_the_references")
    off = max(abs(ours.accuracy - float(figures["acc"])), abs(ours.d_prime - float(figures["d_prime"])))
    yield Row("accuracy, d′", "argmax on the first label; √2 Φ⁻¹(mean AUC)", f"{off:.1e}", "the same")


def training() -> Iterator[Row]:
    worst = 0.0
    for name in recipe_names():
        recipe = load_recipe(shipped_recipe(name), {}, origin=name)
        for steps_per_epoch in (25, 61, 333, 2500):
            for step, rate in enumerate(reference.learning_rates(recipe, steps_per_epoch)):
                ours = learning_rate(recipe, step, steps_per_epoch=steps_per_epoch)
                worst = max(worst, abs(ours - rate) / max(rate, 1e-30) if rate else abs(ours))
    what = "MultiStepLR and warm-up in steps of 50, every recipe at 25 to 2,500 steps an epoch"
    yield Row(
        "learning rate",
        what,
        f"{worst:.1e} relative",
        "test_schedule: every_rate_of_a_run_on_the_official_lists_equals_the_references",
    )
    what = "Adam 0.95/0.999, L2 5e-7 within the gradient; ours is fused; 50 steps of lr 1e-3"
    yield Row("optimiser", what, f"{optimiser_off():.1e}", "test_step: the_optimiser_is_the_references_adam")
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(12, 527, generator=generator), torch.randint(527, (12,), generator=generator)
    one_hot = torch.nn.functional.one_hot(target, 527).float()
    for name, criterion, wanted in (
        ("BCE", torch.nn.BCEWithLogitsLoss(), one_hot),
        ("CE", torch.nn.CrossEntropyLoss(), target),
    ):
        off = abs(clip_losses(logits, one_hot, name).mean() / criterion(logits, wanted) - 1).item()
        what = f"torch's {type(criterion).__name__} over a batch"
        yield Row(f"loss {name}", what, f"{off:.1e} relative", "test_step: a_step_returns_the_references_loss")
    alone = ddp.train(small.recipe(lr=1e-4), 50)
    with tempfile.TemporaryDirectory() as folder:
        runs = [(small.recipe(lr=1e-4, micro_batch_size=2), 50)]
        (ranks,) = ddp.train_on_ranks(runs, world_size=2, folder=Path(folder))
    off = max(abs(a / b - 1) for a, b in zip(ranks["losses"], alone["losses"], strict=True))
    what = "50 losses of one process; ours on two ranks, in micro-batches"
    yield Row("DDP", what, f"{off:.1e} relative", "test_ddp: fifty_losses_on_two_ranks_equal_those_of_one_process")


def optimiser_off() -> float:
    recipe, start = small.recipe(lr=1e-3), torch.randn(1000, generator=torch.Generator().manual_seed(0))
    ours, theirs = torch.nn.ParameterList([start.clone()]), torch.nn.ParameterList([start.clone()])
    original = torch.optim.Adam(theirs.parameters(), 1e-3, weight_decay=5e-7, betas=(0.95, 0.999))
    for parameters, optimizer in ((ours, make_optimizer(ours, recipe)), (theirs, original)):
        for _ in range(50):
            optimizer.zero_grad()
            (parameters[0] ** 2).sum().backward()
            optimizer.step()
    return largest(ours[0], theirs[0])


def largest(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().max().item()


PARTS: tuple[Callable[[], Iterator[Row]], ...] = (
    features,
    mixup,
    chance,
    network,
    starts,
    round_trip,
    weights_and_metrics,
    training,
)


def main() -> int:
    if not reference.WHOLE.is_dir():
        print(f"error: the reference figures are not at {reference.WHOLE}", file=sys.stderr)
        return 2
    print("| quantity | the reference's definition | our deviation | the test that checks it |\n|---|---|---|---|")
    for part in PARTS:
        for row in part():
            print(f"| {row.quantity} | {row.original} | {row.deviation} | {row.test} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
