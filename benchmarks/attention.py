"""Compare PyTorch's fused attention with plain products: tiny224 on one CPU core, forward and backward.

python -m benchmarks.attention
"""

import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

HEADS, HEAD_DIM = 3, 64


def main() -> int:
    torch.set_num_threads(1)
    print("tokens  dtype     fused ms  plain ms  fused / plain")
    for tokens, clips in ((66, 16), (258, 8), (602, 4), (1214, 2)):
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v = (torch.randn(clips, HEADS, tokens, HEAD_DIM, dtype=dtype, requires_grad=True) for _ in range(3))

            def fused(q=q, k=k, v=v) -> None:
                F.scaled_dot_product_attention(q, k, v).sum().backward()

            def plain(q=q, k=k, v=v) -> None:
                ((q * HEAD_DIM**-0.5 @ k.transpose(-2, -1)).softmax(-1) @ v).sum().backward()

            fused_ms, plain_ms = cpu_ms(fused), cpu_ms(plain)
            name = str(dtype).removeprefix("torch.")
            print(f"{tokens:6}  {name:8}  {fused_ms:8.1f}  {plain_ms:8.1f}  {fused_ms / plain_ms:13.2f}")
    return 0


def cpu_ms(work: Callable[[], None], repeats: int = 8) -> float:
    """CPU milliseconds per call, after one warm-up call."""
    work()
    began_s = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - began_s) / repeats * 1000


if __name__ == "__main__":
    sys.exit(main())
