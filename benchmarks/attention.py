"""Compare PyTorch's fused attention with plain products: tiny224 on one CPU core, in inference and in training.

python -m benchmarks.attention
"""

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

HEADS, HEAD_DIM = 3, 64


def main() -> int:
    torch.set_num_threads(1)
    print(
        "| tokens | dtype | forward: fused ms | plain ms | fused / plain "
        "| and backward: fused ms | plain ms | fused / plain |"
    )
    print("|---" * 8 + "|")
    for tokens, clips in ((66, 16), (258, 8), (602, 4), (1214, 2)):
        for dtype in (torch.float32, torch.bfloat16):
            qkv = [torch.randn(clips, HEADS, tokens, HEAD_DIM, dtype=dtype, requires_grad=True) for _ in range(3)]
            cells = [f"{tokens}", str(dtype).removeprefix("torch.")]
            for trains in (False, True):
                fused_ms, plain_ms = (cpu_ms(partial(attend, way, qkv, trains)) for way in (fused, plain))
                cells += [f"{fused_ms:.1f}", f"{plain_ms:.1f}", f"{fused_ms / plain_ms:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
    return 0


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q * HEAD_DIM**-0.5 @ k.transpose(-2, -1)).softmax(-1) @ v


def attend(way: Callable[[Tensor, Tensor, Tensor], Tensor], qkv: Sequence[Tensor], trains: bool) -> None:
    with torch.inference_mode(not trains):
        result = way(*qkv)
    if trains:
        result.sum().backward()


def cpu_ms(work: Callable[[], None], repeats: int = 8) -> float:
    """CPU milliseconds per call, after one warm-up call."""
    work()
    began_s = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - began_s) / repeats * 1000


if __name__ == "__main__":
    sys.exit(main())
