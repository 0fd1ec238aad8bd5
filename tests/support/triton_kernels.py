"""A kernel of the tests: the noise of given draw numbers."""

import torch
import triton
import triton.language as tl

from nvfp4.backends.triton.noise import draw
from nvfp4.backends.triton.operands import halves


@triton.jit(do_not_specialize=("low", "high"))
def _draw_kernel(index, out, low, high, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(out + i, draw(low, high, tl.load(index + i), 1) * 2.0)


def draws(index: torch.Tensor, seed: int) -> torch.Tensor:
    """Uniforms of stream 1 for draw numbers, int64 [n], n a power of two."""
    out = torch.empty(len(index), device=index.device)
    _draw_kernel[(1,)](index, out, *halves(seed), COUNT=len(index))
    return out
