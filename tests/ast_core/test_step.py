"""Training steps have the reference's loss, order and optimiser, and the same update on any number of ranks."""

import copy
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ast_core import execution
from ast_core.augment.augmentation import take
from ast_core.batch import Batch, model_input
from ast_core.errors import ConfigError
from ast_core.execution import for_device, set_execution
from ast_core.features import KALDI128
from ast_core.models.patchout import draw_patchout
from ast_core.recipe import Recipe
from ast_core.step import clip_losses, make_optimizer, make_scaler, predict, train_step
from tests.ast_core import small

SGD_LR = 0.1
LR = 1e-3


class NoStep:
    """An optimizer whose `step` does nothing, so that a test can average the gradients of two ranks first."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def zero_grad(self, set_to_none: bool) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        """Do not change the parameters."""


def share(batch: Batch, positions: list[int], weights: list[float]) -> Batch:
    return replace(small.take(batch, np.array(positions)), weight_B=torch.tensor(weights))


def sgd(model: nn.Module, _: Recipe) -> torch.optim.Optimizer:
    """SGD, which unlike Adam shows a gradient of the wrong size and does not amplify rounding of zero gradients."""
    return torch.optim.SGD(model.parameters(), lr=SGD_LR, momentum=0.9)


def steps_of_one_process(recipe: Recipe, optimizer_of, lr: float, steps: int) -> tuple[nn.Module, list[float]]:
    model = small.model()
    optimizer = optimizer_of(model, recipe)
    losses = []
    for seed in range(steps):
        batch, drawn = small.batch(5, seed=seed, one_label=recipe.loss == "CE"), small.augmentations(5, seed=seed)
        loss = train_step(model, optimizer, batch, drawn, recipe=recipe, norm=small.NORM, lr=lr, num_clips_global=5)
        losses.append(loss.item())
    return model, losses


def steps_of_two_ranks(recipe: Recipe, optimizer_of, lr: float, steps: int) -> tuple[nn.Module, list[float]]:
    """Share five clips between two ranks: 0, 2, 4 and 1, 3, with clip 1 again as padding."""
    shares = [([0, 2, 4], [1.0, 1.0, 1.0]), ([1, 3, 1], [1.0, 1.0, 0.0])]
    models = [small.model(), small.model()]
    optimizers = [optimizer_of(model, recipe) for model in models]
    losses = []
    for seed in range(steps):
        batch, drawn = small.batch(5, seed=seed, one_label=recipe.loss == "CE"), small.augmentations(5, seed=seed)
        parts = [
            train_step(
                model,
                NoStep(optimizer),
                share(batch, positions, weights),
                take(drawn, np.array(positions)),
                recipe=recipe,
                norm=small.NORM,
                lr=lr,
                num_clips_global=5,
                world_size=2,
            )
            for model, optimizer, (positions, weights) in zip(models, optimizers, shares, strict=True)
        ]
        losses.append(sum(part.item() for part in parts))
        for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
            mean = (ours.grad + theirs.grad) / 2
            ours.grad, theirs.grad = mean, mean.clone()
        for optimizer in optimizers:
            optimizer.step()
    return models[0], losses


@pytest.mark.parametrize("loss", ["BCE", "CE"])
def test_two_ranks_make_the_update_of_one_process(loss: str):
    recipe = small.recipe(loss=loss)
    before = small.model().state_dict()
    (single, losses), (shared, shared_losses) = (
        run(recipe, sgd, SGD_LR, 2) for run in (steps_of_one_process, steps_of_two_ranks)
    )
    assert shared_losses == pytest.approx(losses, rel=1e-6)
    for key, value in single.state_dict().items():
        # float32: a thousandth of the parameter's change, or its own rounding.
        moved = (value - before[key]).abs().max()
        assert (shared.state_dict()[key] - value).abs().max() <= 1e-3 * moved + 1e-7, key
        assert moved > 0, key


def test_two_ranks_learn_as_one_with_adam():
    recipe = small.recipe()
    _, single = steps_of_one_process(recipe, make_optimizer, LR, 3)
    _, shared = steps_of_two_ranks(recipe, make_optimizer, LR, 3)
    assert shared == pytest.approx(single, rel=1e-3)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 5, 7])
def test_micro_batches_make_the_update_of_the_whole_batch(micro_batch_size: int):
    recipe = small.recipe()
    before = small.model().state_dict()
    whole, losses = steps_of_one_process(recipe, sgd, SGD_LR, 2)
    parts, part_losses = steps_of_one_process(replace(recipe, micro_batch_size=micro_batch_size), sgd, SGD_LR, 2)
    assert part_losses == pytest.approx(losses, rel=1e-6)
    for key, value in whole.state_dict().items():
        moved = (value - before[key]).abs().max()
        assert (parts.state_dict()[key] - value).abs().max() <= 1e-3 * moved + 1e-7, key


def test_ranks_exchange_gradients_once_a_batch_with_any_micro_batch_size(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        exchanges = []
        for micro_batch_size in (None, 1):
            recipe, model = small.recipe(micro_batch_size=micro_batch_size), DistributedDataParallel(small.model())
            seen: list[int] = []
            model.register_comm_hook(seen, count_bucket)
            args = {"recipe": recipe, "norm": small.NORM, "lr": LR, "num_clips_global": 3}
            train_step(model, sgd(model, recipe), small.batch(3), small.augmentations(3), **args)
            exchanges.append(len(seen))
    finally:
        dist.destroy_process_group()
    assert exchanges[0] == exchanges[1] > 0


def count_bucket(seen: list[int], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    seen.append(bucket.index())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def test_a_step_uses_the_recipes_mixup_domain():
    losses = {}
    for domain in ("power", "log_mel"):
        recipe, model = small.recipe(mixup_domain=domain), small.model()
        drawn = small.augmentations(4, mixup_domain=domain)
        with torch.no_grad():
            logits = model(model_input(small.batch(4), small.NORM, drawn))
        expected = clip_losses(logits, small.batch(4).target_BC, recipe.loss).mean()
        args = {"recipe": recipe, "norm": small.NORM, "lr": LR, "num_clips_global": 4}
        losses[domain] = train_step(model, sgd(model, recipe), small.batch(4), drawn, **args)
        torch.testing.assert_close(losses[domain], expected, rtol=1e-5, atol=0)
    assert losses["power"] != losses["log_mel"]


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="torch.compile needs a C++ compiler on CPUs"
)


@pytest.mark.parametrize(
    "switch",
    [
        {"activation_checkpointing": True},
        pytest.param({"compile": True}, marks=[needs_compiler, pytest.mark.slow]),
        {"attention": "plain"},
    ],
    ids=str,
)
def test_execution_keys_change_gradients_by_rounding_only(switch: dict):
    """Gradients with and without the key differ by float32 rounding."""
    gradients = []
    for recipe in (small.recipe(attention="fused"), small.recipe(**{"attention": "fused"} | switch)):
        model = small.model()
        set_execution(model, torch.device("cpu"), recipe)
        args = {"recipe": recipe, "norm": small.NORM, "lr": 0.0, "num_clips_global": 3}
        loss = train_step(model, sgd(model, recipe), small.batch(3), small.augmentations(3), **args)
        gradients.append([loss] + [parameter.grad for parameter in model.parameters()])
        assert model.state_dict().keys() == small.model().state_dict().keys()
    for without, switched in zip(*gradients, strict=True):
        assert (switched - without).abs().max() <= 1e-4 * without.abs().max() + 1e-8


def test_the_blocks_are_compiled_once_for_each_shape(monkeypatch: pytest.MonkeyPatch):
    """The trial does not count, all blocks have the same shape, and so have all steps with patchout.

    Evaluation is not compiled. Another shape is compiled separately.
    """
    compiled = []

    def records(graph: torch.fx.GraphModule, inputs: list[Tensor | torch.SymInt]):
        compiled.append(any(isinstance(value, torch.SymInt) for value in inputs))
        return graph.forward

    monkeypatch.setattr(execution, "COMPILE_BACKEND", records)
    model = small.model()
    set_execution(model, torch.device("cpu"), small.recipe(compile=True))
    compiled.clear()
    for seed in range(2):
        drawn = draw_patchout((seed,), (8, 4), num_rows=0, num_columns=1)
        model(small.log_mel(3), drawn).sum().backward()
    assert compiled == [False]  # one graph with static sizes
    model.eval()(small.log_mel(3)).sum().backward()
    assert compiled == [False]
    model.train()(small.log_mel(2), drawn).sum().backward()
    assert compiled == [False, False]


def refuses(_graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> None:
    raise RuntimeError("no C++ compiler\nand a page of advice")


def fails_when_it_runs(_graph: torch.fx.GraphModule, _inputs: list[Tensor]):
    def run(*_: Tensor) -> None:
        raise OSError("this card runs no such kernel")

    return run


@pytest.mark.parametrize(
    ("backend", "reason"), [(refuses, "no C++ compiler"), (fails_when_it_runs, "this card runs no such kernel")]
)
def test_if_compiling_fails_a_warning_says_why_and_training_goes_on(
    backend, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(execution, "COMPILE_BACKEND", backend)
    losses = []
    for recipe in (small.recipe(), small.recipe(compile=True)):
        model = small.model()
        with caplog.at_level(logging.INFO, logger="ast_core"):
            set_execution(model, torch.device("cpu"), recipe)
            args = {"recipe": recipe, "norm": small.NORM, "lr": LR, "num_clips_global": 3}
            optimizer = make_optimizer(model, recipe)
            losses.append(
                [train_step(model, optimizer, small.batch(3), small.augmentations(3), **args) for _ in range(2)]
            )
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "training goes on without torch.compile" in record.message
    assert reason in record.message
    assert "\n" not in record.message
    assert losses[0] == losses[1]


def test_execution_keys_take_effect():
    fused = [module.fused_attn for module in attention_of(small.recipe(attention="auto", precision="bf16"))]
    assert fused == [False] * 12
    assert all(module.fused_attn for module in attention_of(small.recipe(attention="fused", precision="bf16")))
    model = small.model()
    ran = []
    model.v.blocks[0].mlp.fc1.register_forward_hook(lambda *_: ran.append(1))
    for enabled, times in ((False, 1), (True, 2)):  # with checkpointing a block runs again for backward
        set_execution(model, torch.device("cpu"), small.recipe(activation_checkpointing=enabled))
        ran.clear()
        model(small.log_mel(1)).sum().backward()
        assert len(ran) == times


def attention_of(recipe: Recipe) -> list[nn.Module]:
    model = small.model()
    set_execution(model, torch.device("cpu"), recipe)
    return [module for module in model.modules() if hasattr(module, "fused_attn")]


def test_the_content_of_a_padding_clip_does_not_matter():
    recipe, drawn = small.recipe(), small.augmentations(3)
    batch = small.batch(3)
    junk = batch.fbank_BTM.clone()
    junk[2] = 30
    gradients = []
    for fbank in (batch.fbank_BTM, junk):
        model = small.model()
        filled = replace(batch, fbank_BTM=fbank, weight_B=torch.tensor([1.0, 1.0, 0.0]))
        args = {"recipe": recipe, "norm": small.NORM, "lr": 0.0, "num_clips_global": 2}
        train_step(model, make_optimizer(model, recipe), filled, drawn, **args)
        gradients.append(model.mlp_head[1].weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("loss", ["BCE", "CE"])
def test_a_step_returns_the_references_loss(loss: str):
    """BCE is averaged over clips and classes. Cross-entropy is that of the class, for clips with one label."""
    recipe, drawn = small.recipe(loss=loss), small.augmentations(4)
    model, batch = small.model(), small.batch(4, one_label=loss == "CE")
    with torch.no_grad():
        logits = model(model_input(batch, small.NORM, drawn))
    target = batch.target_BC
    expected = (
        nn.BCEWithLogitsLoss()(logits, target) if loss == "BCE" else nn.CrossEntropyLoss()(logits, target.argmax(dim=1))
    )
    args = {"recipe": recipe, "norm": small.NORM, "lr": LR, "num_clips_global": 4}
    got = train_step(model, make_optimizer(model, recipe), batch, drawn, **args)
    assert not got.requires_grad
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


def test_losses_are_per_clip():
    logits, target = torch.randn(3, 5), small.batch(3).target_BC
    for loss in ("BCE", "CE"):
        each = [clip_losses(logits[i : i + 1], target[i : i + 1], loss)[0] for i in range(3)]
        torch.testing.assert_close(clip_losses(logits, target, loss), torch.stack(each))


def test_the_loss_of_a_mixed_target_is_the_mixture_of_losses():
    logits, (a, b) = torch.randn(1, 5), F.one_hot(torch.tensor([1, 3]), 5).float()
    for loss in ("BCE", "CE"):
        mixed = clip_losses(logits, (0.3 * a + 0.7 * b).unsqueeze(0), loss)
        each = [clip_losses(logits, target.unsqueeze(0), loss) for target in (a, b)]
        torch.testing.assert_close(mixed, 0.3 * each[0] + 0.7 * each[1])


def test_the_learning_rate_is_that_of_the_step():
    recipe, model, drawn = small.recipe(lr=0.5), small.model(), small.augmentations(2)
    before = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model, recipe)
    args = {"recipe": recipe, "norm": small.NORM, "num_clips_global": 2}
    train_step(model, optimizer, small.batch(2), drawn, lr=0.0, **args)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    train_step(model, optimizer, small.batch(2), drawn, lr=1e-3, **args)
    assert (model.mlp_head[1].bias - before["mlp_head.1.bias"]).abs().max().item() == pytest.approx(1e-3, rel=0.2)


def test_the_optimiser_is_the_references_adam():
    """Weight decay is L2 in the gradient. Decoupled decay or other betas would give different steps."""
    recipe = small.recipe(lr=1e-2, weight_decay=0.1)
    start = torch.randn(20, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.ParameterList([start.clone()]), nn.ParameterList([start.clone()])
    optimizers = [
        make_optimizer(ours, recipe),
        torch.optim.Adam(theirs.parameters(), 1e-2, weight_decay=0.1, betas=(0.95, 0.999)),
    ]
    for _ in range(10):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (parameters[0] ** 2).sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-7)
    assert (Recipe().adam_beta1, Recipe().adam_beta2, Recipe().weight_decay) == (0.95, 0.999, 5e-7)


def test_frozen_parameters_are_not_optimised():
    model = nn.Linear(2, 3)
    model.bias.requires_grad_(False)
    (group,) = make_optimizer(model, small.recipe()).param_groups
    assert group["params"] == [model.weight]


def test_the_input_is_made_in_the_reference_order():
    """The order for one clip is mixup, masks of 0, norm, noise, roll."""
    batch, drawn = small.batch(2), small.augmentations(2, seed=1)
    of = small.values(drawn)
    clip, partner, lam, ended = (
        batch.fbank_BTM[1].numpy(),
        batch.partners.fbank_KTM[0].numpy(),
        0.4,
        small.NUM_FRAMES // 2,
    )
    expected = 2 * np.log(lam) + clip
    expected[:ended] = np.logaddexp(expected[:ended], 2 * np.log(1 - lam) + partner[:ended])
    expected = np.maximum(expected, KALDI128.floor)
    expected[:, of["freq_start"][1] : of["freq_start"][1] + of["freq_width"][1]] = 0
    expected[of["time_start"][1] : of["time_start"][1] + of["time_width"][1]] = 0
    expected = (expected - small.NORM.mean) / (2 * small.NORM.std)
    unrolled = np.roll(model_input(batch, small.NORM, drawn)[1].numpy(), -of["roll_frames"][1], axis=0)
    noise = unrolled - expected
    assert noise.min() > -1e-5
    assert noise.max() < of["noise_gain"][1] + 1e-5
    assert noise.std() == pytest.approx(of["noise_gain"][1] / np.sqrt(12), rel=0.05)
    assert min(of["freq_width"][1], of["time_width"][1], abs(of["roll_frames"][1])) > 0


def test_padding_is_0_before_the_norm():
    fbank = small.log_mel(1)
    fbank[0, 40:] = 0
    batch = replace(small.batch(1), fbank_BTM=fbank, num_frames_B=torch.tensor([40]))
    value = model_input(batch, small.NORM, small.only_mixup(len(batch)))[0, 40:].unique()
    torch.testing.assert_close(value, torch.tensor([4.0 / 9.0]))


def test_stored_float16_is_computed_in_float32():
    batch = small.batch(3)
    partners = replace(batch.partners, fbank_KTM=batch.partners.fbank_KTM.half())
    half = replace(batch, fbank_BTM=batch.fbank_BTM.half(), partners=partners)
    made = model_input(half, small.NORM, small.only_mixup(len(half)))
    assert made.dtype == torch.float32
    # Half the spacing of float16 below 16, divided by twice the std, plus float32 rounding.
    torch.testing.assert_close(
        made, model_input(batch, small.NORM, small.only_mixup(len(batch))), rtol=0, atol=2**-8 / 9 + 1e-6
    )


def test_model_input_does_not_change_the_batch():
    batch, again = small.batch(4), small.batch(4)
    model_input(batch, small.NORM, small.augmentations(4))
    assert torch.equal(batch.fbank_BTM, again.fbank_BTM)
    assert torch.equal(batch.partners.fbank_KTM, again.partners.fbank_KTM)


@pytest.mark.parametrize(("begin", "end"), [(0, 1), (1, 4), (3, 5)])
def test_a_part_of_a_batch_is_mixed_as_in_the_whole_batch(begin: int, end: int):
    batch = small.batch(5)
    part = model_input(batch.part(begin, end), small.NORM, small.only_mixup(end - begin))
    assert torch.equal(part, model_input(batch, small.NORM, small.only_mixup(len(batch)))[begin:end])


def test_a_batch_with_partners_moves_as_a_whole():
    batch = small.batch(4).to(torch.device("meta"))
    tensors = [value for value in (vars(batch) | vars(batch.partners)).values() if isinstance(value, Tensor)]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert len(tensors) == 4 + 3


def test_a_batch_without_partners_moves_as_a_whole():
    batch = replace(small.batch(2), partners=None).to(torch.device("meta"))
    there = {key: value.device.type for key, value in vars(batch).items() if isinstance(value, Tensor)}
    assert there == dict.fromkeys(("fbank_BTM", "num_frames_B", "target_BC", "weight_B"), "meta")


def test_bf16_is_close_to_fp32_and_keeps_parameters_in_float32():
    drawn, batch = small.augmentations(4), small.batch(4)
    losses = {}
    for precision in ("fp32", "bf16"):
        recipe, model = small.recipe(precision=precision), small.model()
        optimizer = make_optimizer(model, recipe)
        args = {"recipe": recipe, "norm": small.NORM, "lr": LR, "num_clips_global": 4}
        seen = []
        model.v.blocks[0].mlp.fc1.register_forward_hook(lambda _module, _in, out, seen=seen: seen.append(out.dtype))
        losses[precision] = [train_step(model, optimizer, batch, drawn, **args) for _ in range(2)]
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert {value.dtype for state in optimizer.state.values() for value in state.values()} == {torch.float32}
        assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float32}
        scores = predict(model, batch, recipe=recipe, norm=small.NORM)
        assert (scores.dtype, scores.shape) == (torch.float32, (4, small.NUM_CLASSES))
    torch.testing.assert_close(*(torch.stack(values) for values in losses.values()), rtol=0.02, atol=0)


@pytest.mark.parametrize("device", [torch.device("cpu"), torch.device("cuda")])
def test_compile_null_means_true_on_a_gpu_only(device: torch.device):
    assert for_device(small.recipe(), device).compile == (device.type == "cuda")
    for given in (False, True):
        assert for_device(small.recipe(compile=given), device).compile is given


def test_fp16_is_refused_on_a_cpu():
    with pytest.raises(ConfigError, match=r"^precision fp16 needs a GPU; use bf16$"):
        for_device(small.recipe(precision="fp16"), torch.device("cpu"))
    assert make_scaler(small.recipe(precision="bf16"), torch.device("cpu")) is None


def test_an_fp16_model_is_scored_on_a_cpu_in_fp32_with_one_warning(caplog: pytest.LogCaptureFixture):
    execution._warn_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="ast_core"):
        for _ in range(2):
            recipe = for_device(small.recipe(precision="fp16"), torch.device("cpu"), trains=False)
            assert recipe == small.recipe(precision="fp32", compile=False, attention="fused")
    assert [record.message for record in caplog.records] == ["precision fp16 needs a GPU: computing in fp32"]
    on_a_gpu = for_device(small.recipe(precision="fp16"), torch.device("cuda"), trains=False)
    assert on_a_gpu.precision == "fp16"


@pytest.mark.parametrize("device", [torch.device("cpu"), torch.device("cuda")])
@pytest.mark.parametrize("has_bf16", [False, True])
def test_emulated_bf16_becomes_fp32_with_one_warning(
    device: torch.device, has_bf16: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The capabilities of the hardware are mocked."""
    capabilities = {"avx2": True, "avx512_bf16": False, "amx_bf16": has_bf16}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16 or including_emulation)
    execution._warn_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="ast_core"):
        for _ in range(2):
            assert for_device(small.recipe(precision="bf16"), device).precision == ("bf16" if has_bf16 else "fp32")
        fp32 = small.recipe(precision="fp32", compile=False)
        assert for_device(fp32, device) == fp32
    warnings = {
        "cpu": "this CPU has no instructions for bf16: computing in fp32",
        "cuda": "this GPU has no instructions for bf16: computing in fp32; precision fp16 is faster on it",
    }
    assert [record.message for record in caplog.records] == [warnings[device.type]] * (not has_bf16)


def test_pytorch_reports_bf16_among_cpu_capabilities():
    assert any(name.endswith("bf16") for name in torch.cpu.get_capabilities())


@pytest.mark.parametrize("grad_clip", [None, 1e-2])
def test_a_scaled_loss_makes_the_same_update(grad_clip: float | None):
    """Clipping uses the unscaled gradient."""
    ends = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        recipe, model = small.recipe(grad_clip=grad_clip, micro_batch_size=2), small.model()
        args = {"recipe": recipe, "norm": small.NORM, "lr": SGD_LR, "num_clips_global": 3, "scaler": scaler}
        loss = train_step(model, sgd(model, recipe), small.batch(3), small.augmentations(3), **args)
        ends.append([loss, *model.state_dict().values()])
    for plain, scaled in zip(*ends, strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-7)


def test_an_fp16_overflow_skips_the_update_and_lowers_the_scale():
    recipe, model = small.recipe(precision="fp16", grad_clip=1.0), small.model()
    optimizer, scaler = make_optimizer(model, recipe), torch.amp.GradScaler("cpu", init_scale=2.0**40)
    args = {"recipe": recipe, "norm": small.NORM, "lr": LR, "num_clips_global": 2, "scaler": scaler}
    before = copy.deepcopy(model.state_dict())
    loss = train_step(model, optimizer, small.batch(2), small.augmentations(2), **args)
    assert torch.isfinite(loss)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert scaler.get_scale() == 2.0**39
    scaler.update(256.0)
    train_step(model, optimizer, small.batch(2), small.augmentations(2), **args)
    assert not torch.equal(model.mlp_head[1].bias, before["mlp_head.1.bias"])


def test_a_missing_scaler_or_patchout_draw_fails_an_assertion():
    for recipe in (small.recipe(precision="fp16"), small.recipe(patchout_f=1)):
        model = small.model()
        args = {"recipe": recipe, "norm": small.NORM, "lr": LR, "num_clips_global": 2}
        with pytest.raises(AssertionError):
            train_step(model, sgd(model, recipe), small.batch(2), small.augmentations(2), **args)


@pytest.mark.parametrize("micro_batch_size", [None, 1, 2])
def test_grad_clip_scales_a_long_gradient_and_keeps_a_short_one(micro_batch_size: int | None):
    def gradients(grad_clip: float | None, parts: int | None) -> Tensor:
        recipe, model = small.recipe(grad_clip=grad_clip, micro_batch_size=parts), small.model()
        args = {"recipe": recipe, "norm": small.NORM, "lr": 0.0, "num_clips_global": 5}
        train_step(model, sgd(model, recipe), small.batch(5), small.augmentations(5), **args)
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    whole = gradients(None, None)
    norm = whole.norm().item()
    torch.testing.assert_close(gradients(norm / 4, micro_batch_size), whole / 4, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(gradients(norm * 2, micro_batch_size), whole, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("loss", ["BCE", "CE"])
def test_scores_are_the_sigmoid_of_the_logits_with_either_loss(loss: str):
    model = small.model().eval()
    batch = replace(small.batch(3), partners=None)
    with torch.no_grad():
        logits: Tensor = model((batch.fbank_BTM + 4.0) / 9.0)
    scores = predict(model, batch, recipe=small.recipe(loss=loss), norm=small.NORM)
    torch.testing.assert_close(scores, 1 / (1 + torch.exp(-logits)))
    assert not scores.requires_grad
