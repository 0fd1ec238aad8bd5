"""The end of a call whose operands were scaled by amaxes of the call before, in one launch.

    table float32 [3, n]: held, seen, exceeded  ->  held = min(fl(1.75 seen), FLT_MAX), seen = 0

Where nothing finite and positive was seen, what was held stays; see ``Backend.turn_amax``, which is
the same in PyTorch, with eight launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nvfp4.backends.triton.arithmetic import FLOAT32_MAX, INFINITY_BITS, bits
from nvfp4.backends.triton.launch import launch
from nvfp4.backends.triton.variants import KernelVariant
from nvfp4.numerics.scaling import HEADROOM as _HEADROOM

HEADROOM = tl.constexpr(_HEADROOM)
OPERANDS = 6
"""Of a layer: columns of its table."""


@triton.jit
def turn_kernel(table, COUNT: tl.constexpr, SIZE: tl.constexpr) -> None:
    """Turn a table [3, COUNT]; SIZE: COUNT rounded up to a power of two. One program."""
    column = tl.arange(0, SIZE)
    inside = column < COUNT
    held = tl.load(table + column, mask=inside, other=0.0)
    seen = tl.load(table + COUNT + column, mask=inside, other=0.0)
    exceeded = tl.load(table + 2 * COUNT + column, mask=inside, other=0.0)

    # as bits, a positive finite number is above 0 and below Inf
    useful = (bits(seen) > 0) & (bits(seen) < INFINITY_BITS)
    exceeded = tl.where(useful & (seen > held), exceeded + 1.0, exceeded)
    held = tl.where(useful, tl.minimum(seen * HEADROOM, FLOAT32_MAX), held)

    tl.store(table + column, held, mask=inside)
    tl.store(table + COUNT + column, tl.zeros_like(seen), mask=inside)
    tl.store(table + 2 * COUNT + column, exceeded, mask=inside)


def turn(table: torch.Tensor) -> None:
    """End a call, in place; table: float32 [3, n], contiguous."""
    count = table.shape[1]
    launch(turn_kernel, 1, (table,), (count, triton.next_power_of_2(count)), warps=1)


def kernel_variants(capability: int, few: bool) -> list[KernelVariant]:
    """What to compile for a card: the table of a layer."""
    constants = {"COUNT": OPERANDS, "SIZE": triton.next_power_of_2(OPERANDS)}
    return [KernelVariant("turn_kernel", turn_kernel, {"table": "*fp32"}, constants, 1)]
