"""What it takes to compile one kernel ahead of time, as data.

A kernel under ``triton.jit`` is compiled at its first call, on a card. ``tools/aot.py`` compiles
without one: for every card, from the types and constants that a call would have. The modules of
products and transposes list theirs beside the kernels (``kernel_variants``); of the quantising and
activation kernels, which are many more, the lists are in ``tools/``. What compilers say decides
which tiles are used: registers, spills, the tensor core instruction, no product fused with a sum.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class KernelVariant:
    """One specialisation of a Triton kernel.

    name: for the table. kernel: the function under ``triton.jit``. types: Triton's type of every
    argument that is not constant ("*u8", "i32", ...), by name. constants: the value of every other
    argument. instruction: a regular expression that the PTX must match, or None. exact: whether
    float32 products and sums must stay apart (no FMA). divides: whether it divides, for which ptxas
    uses FMAs of its own, so that only the PTX can tell.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    instruction: str | None = None
    exact: bool = True
    divides: bool = False
