"""Operations equal PyTorch's count; peaks are known only for listed cards."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ast_core import ASTModel
from ast_core.flops import peak_flops, peak_flops_of, training_flops, utilisation
from ast_core.models.patchout import draw_patchout
from ast_core.recipe import Recipe
from tests.ast_core import small


@pytest.mark.parametrize("dropped", [(0, 0), (3, 1)])
def test_forward_flops_equal_pytorchs_count(dropped: tuple[int, int]):
    model = small.model()
    model.set_fused_attention(False)
    patchout = draw_patchout((0,), (8, 4), num_rows=dropped[0], num_columns=dropped[1])
    # PyTorch does not count the fused CPU kernel
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(small.log_mel(2), patchout)
    assert 2 * model.forward_flops(*dropped) == counter.get_total_flops()


def test_a_clip_of_the_default_recipe_takes_0_73_tflop_and_a_third_with_patchout():
    with torch.device("meta"):
        model = ASTModel(imagenet_pretrain=False)
    whole = training_flops(model, Recipe())
    # 0.78 for all tokens, minus what the last block does not compute
    assert whole == pytest.approx(0.727e12, rel=0.01)
    assert training_flops(model, Recipe(patchout_f=4, patchout_t=40)) / whole == pytest.approx(0.35, abs=0.01)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", None),
        ("Quadro K620", None),
    ],
)
def test_the_peak_is_known_for_listed_cards_only(name: str, tera: int | None):
    assert peak_flops_of(name, "bf16") == peak_flops_of(name, "fp16") == (None if tera is None else tera * 1e12)


def test_the_peak_depends_on_the_precision():
    for name, tera in {"NVIDIA H100 80GB HBM3": 67, "NVIDIA A100-SXM4-80GB": 19.5, "NVIDIA A10G": 35}.items():
        assert peak_flops_of(name, "fp32") == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(("precision", "peak"), [("bf16", 989e12), ("fp32", 67e12)])
def test_the_utilisation_is_the_share_of_the_peak_of_all_devices(
    precision: str, peak: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H100 80GB HBM3")
    model, recipe = small.model(), small.recipe(precision=precision)
    rate = peak / training_flops(model, recipe)
    assert utilisation(rate, model, recipe, torch.device("cuda"), 2) == pytest.approx(0.5)


def test_a_cpu_has_no_peak():
    assert peak_flops(torch.device("cpu"), "bf16") is None
    assert utilisation(1.0, small.model(), small.recipe(), torch.device("cpu")) is None
