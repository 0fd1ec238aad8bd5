"""Blocks, their maxima, and the scales made from them.

    x [M, Kp]  -> to_blocks    -> [ceil(M/rows), Kp/16, rows * 16], rows 1 or 16
    amax       -> encode_scale -> S = 6 cap / amax: brings the largest block scale to ``cap``
    block amax -> base_scale   -> amax S / 6: the block scale before it is rounded to E4M3

S multiplies while a tensor is quantised and is local to that. What is stored are decode scales:
block scales on the E4M3 grid, and 1 / S as the global scale. So an element is x S / block_scale,
which is at most 6 where the block scale is not rounded down.

Sums over blocks are ``tree_sum``: one order of additions, which every backend follows, since the
last bit of an error decides between candidate scales. The constants of the two searches stand here
because the reference and the kernels both read them; what a search tries is an option of its
quantiser, of which they are the defaults and the limits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nvfp4.numerics.formats import E2M1, FLOAT32_MAX, SIXTH

MOST_TRIALS = 16
"""How many scales a search may try per block."""

BYTE_STEPS = (0, -2, -1, 1, 2, 3, 4, 5, 6)
"""scale_search: steps from byte(s0), in the order of trial, unless it is given others.

The steps from -4 to 9 take less than 0.001 % more off the MSE on N(0, 1).
"""

FURTHEST_STEP = 8
"""scale_search: the largest step there may be, eight bytes being a factor of 2."""

_FULL_SCALE = float.fromhex("0x1.849d64p+2")
"""fl(6 / 0.988125), where the maximum of a block lands.

0.988125 = 17/16 * 0.93 minimises the MSE on N(0, 1) (arXiv 2601.22813).
"""

SEARCH_FACTORS = (1.0, 0.875, 1.125, 1.25, 1.375, 1.5)
"""ms_eden: k of its formula, in the order of trial: above 1 the maximum lands lower on the grid.

The ``factors`` of its search unless others are given; without a search k is 1.
"""

FACTOR_RANGE = (0.5, 2.0)
FACTOR_UNIT = 1 / 64
"""ms_eden: factors are multiples of this in that range, so that each is a float32 number."""

HEADROOM = 1.75
"""A held amax is this many times what was seen: 448 / 256.

So a tensor may grow by as much before its largest block scale leaves the cap.
"""

SMALLEST_AMAX = 2.0**-120
"""ms_eden: blocks below are zeros: keeps 1/a and a/448 finite and non-zero in float32."""


def to_blocks(x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Matrix [M, Kp] to its blocks [ceil(M/rows), Kp/columns, rows * columns], each row-major.

    block: (rows, columns). M is filled up with zero rows; Kp must be a multiple of columns.
    """
    rows, columns = block
    padded = F.pad(x, (0, 0, 0, -x.shape[0] % rows)) if rows > 1 else x
    m, k = padded.shape[0] // rows, padded.shape[1] // columns

    # one row is its blocks already; of tiles the rows of a block have to come together
    if rows == 1:
        return padded.reshape(m, k, columns)
    return padded.view(m, rows, k, columns).transpose(1, 2).reshape(m, k, rows * columns)


def from_blocks(blocks: torch.Tensor, block: tuple[int, int], rows: int) -> torch.Tensor:
    """The inverse of ``to_blocks``: [m, k, size] back to a matrix with its first ``rows`` rows."""
    m, k, _ = blocks.shape
    return blocks.view(m, k, *block).transpose(1, 2).reshape(m * block[0], k * block[1])[:rows]


def spread(block_scale: torch.Tensor, block: tuple[int, int], rows: int) -> torch.Tensor:
    """One scale per block to one per row and 16 columns: [ceil(M/tile), Kp/16] to [M, Kp/16].

    rows: M. With blocks of one row nothing changes.
    """
    return block_scale.repeat_interleave(block[0], dim=0)[:rows] if block[0] > 1 else block_scale


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last axis (a power of two), by halves: x[i] + x[i + n/2] until one is left."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def tensor_amax(block_amax: torch.Tensor, row_scaled: bool) -> torch.Tensor:
    """Largest of the block maxima [m, k]: [1, 1] for the tensor, or [m, 1] for each row."""
    return block_amax.amax(dim=1, keepdim=True) if row_scaled else block_amax.amax().view(1, 1)


def encode_scale(amax: torch.Tensor, cap: float) -> torch.Tensor:
    """S = min(fl(6 cap / amax), FLT_MAX), 1 where amax is 0.

    It brings the block scale of the largest element to ``cap``.
    """
    # below about 2^-116 the quotient is Inf: the largest float32 instead, so that 0 stays 0
    scale = torch.div(E2M1.max * cap, amax).clamp_(max=FLOAT32_MAX)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def with_headroom(amax: torch.Tensor) -> torch.Tensor:
    """What is held for the next time of an amax: fl(1.75 amax), at most FLT_MAX."""
    return (amax * HEADROOM).clamp(max=FLOAT32_MAX)


def base_scale(block_amax: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """fl(block_amax * fl(S * fl(1/6))), at most FLT_MAX: the block scale before E4M3 rounding.

    block_amax: [m, k]; scale: the encode scale S, [1, 1] or [m, 1].
    """
    return (block_amax * (scale * SIXTH)).clamp_(max=FLOAT32_MAX)


def element_scale(factor: float) -> tuple[float, float]:
    """(c, fl(1 / c)): c = fl(6/0.988125 / factor) brings a block of maximum 1 to E2M1's range."""
    c = torch.tensor(_FULL_SCALE, dtype=torch.float32, device="cpu") / factor
    return c.item(), (1 / c).item()


def magnitude(x: torch.Tensor, row_scaled: bool = False) -> torch.Tensor:
    """Largest magnitude of x [M, K], float32 [1], or of each row, [M]; of nothing 0.

    No copy of x is made.
    """
    if x.numel() == 0:
        return torch.zeros(x.shape[0] if row_scaled else 1, dtype=torch.float32, device=x.device)
    low, high = x.aminmax(dim=1) if row_scaled else x.aminmax()
    return torch.maximum(low.abs(), high.abs()).to(torch.float32).view(-1)
