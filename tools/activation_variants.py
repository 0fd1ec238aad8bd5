"""The fused RMSNorm and SwiGLU kernels in the forms in which recipes launch them, for ``aot``.

    PAIRS x FORMULAS -> amax (or RMSNorm's rstd and amax), then quantise x and x^T
    and once each: the gradients of both, and the sum of partial gradients

A kernel's form is its ``constexpr`` arguments: the policies of rows and columns, the tiles, the
formula. A type that is listed wrongly would compile a kernel that nobody launches, so the names are
looked up in the kernel's own signature.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nvfp4.backends.triton.activation import kernels as fused_kernels
from nvfp4.backends.triton.activation.arithmetic import Formula
from nvfp4.backends.triton.activation.launch import (
    GATED_GRADIENT,
    GRADIENT,
    SUMMED,
    norm_tiles,
    tiles_of_activation,
)
from nvfp4.backends.triton.quantize.policy import Policy, Tile
from nvfp4.backends.triton.variants import KernelVariant
from tools.quantize_variants import policies

FORMULAS = {
    "rms": Formula(False, "bfloat16", "bfloat16"),
    "swiglu": Formula(True, "bfloat16", "bfloat16"),
}
PAIRS = (
    ("rtn", None),
    ("four_over_six", None),
    ("four_over_six_row_scaled=True", None),
    ("scale_search", None),
    ("rtn", "rtn"),
    ("rtn", "rtn_rotation=nvidia"),
    ("four_over_six", "rtn_rotation=nvidia"),
)
"""x and x^T of the named recipes, as their forward quantises them."""

FEW = ("activation_quantize_kernel: swiglu", "rms_gradient_kernel")

_BF16 = ("first", "second", "x", "weight", "gate", "up", "dy", "dx", "dgate", "dup", "out")
_FLOAT = ("rstd", "slabs", "global_scale_rows", "global_scale_columns")
_TYPES = dict.fromkeys(_BF16, "*bf16") | dict.fromkeys(_FLOAT, "*fp32") | {"eps": "fp32"}
for _side in ("rows", "columns"):
    _TYPES |= {f"peak_{_side}": "*i32", f"codes_{_side}": "*i32", f"block_scale_{_side}": "*u8"}


def kernel_variants(capability: int, few: bool) -> list[KernelVariant]:
    """What ``aot`` compiles: each pair of ``PAIRS`` after both formulas, and the gradients.

    All in BF16. few: the few that the tests compile.
    """
    table = policies(capability)
    variants: list[KernelVariant] = []
    for rows, columns in PAIRS[:1] if few else PAIRS:
        for label, formula in FORMULAS.items():
            down = None if columns is None else table[columns]
            name = f"{label} {rows}" + ("" if columns is None else f" and {columns}^T")
            variants += _quantising(name, formula, table[rows], down)
    variants += _gradients()
    return [v for v in variants if v.name.startswith(FEW)] if few else variants


def _quantising(
    name: str, formula: Formula, rows: Policy, columns: Policy | None
) -> Iterator[KernelVariant]:
    constants: dict[str, Any] = {"F": formula, "P_ROWS": rows}
    # a rotated x^T holds other numbers and needs an amax of its own; else one serves both
    looks = columns if columns is not None and columns.round_scales else None
    if formula.gated:
        constants |= {"rstd": None}
        kernel, tiles = fused_kernels.activation_amax_kernel, tiles_of_activation(rows, looks, True)
    else:
        kernel, tiles = fused_kernels.rms_kernel, norm_tiles(looks)
    yield _variant(name, kernel, tiles[0], constants | _sides(looks, tiles))

    # The second pass computes the activation once more and writes codes.
    tiles = tiles_of_activation(rows, columns, formula.gated)
    kernel = fused_kernels.activation_quantize_kernel
    yield _variant(name, kernel, tiles[0], constants | _sides(columns, tiles))


def _sides(columns: Policy | None, tiles: tuple[Tile, Tile | None]) -> dict[str, Any]:
    return {"P_COLUMNS": columns, "T_ROWS": tiles[0], "T_COLUMNS": tiles[1]}


def _gradients() -> Iterator[KernelVariant]:
    constants = {"F": FORMULAS["swiglu"], "T": GATED_GRADIENT, "UP": "bfloat16"}
    yield _variant("bfloat16", fused_kernels.swiglu_gradient_kernel, GATED_GRADIENT, constants)
    constants = {"F": FORMULAS["rms"], "T": GRADIENT}
    yield _variant("bfloat16", fused_kernels.rms_gradient_kernel, GRADIENT, constants)
    width, warps = SUMMED
    summed = {"C": width, "DTYPE": "bfloat16"}
    yield _variant(
        "bfloat16", fused_kernels.slab_sum_kernel, Tile(1, width, False, 1, 1, warps), summed
    )


def _variant(name: str, kernel: Any, tile: Tile, constants: dict[str, Any]) -> KernelVariant:
    names = kernel.arg_names
    known = {key: value for key, value in constants.items() if key in names}
    if known.get("P_COLUMNS", "") is None:  # the arguments of an orientation that is not made
        sides = [
            key for key in names if key.endswith("_columns") and _TYPES.get(key, "")[:1] == "*"
        ]
        known |= dict.fromkeys(sides)

    # The rest are pointers by name, else 32-bit numbers.
    types = {key: _TYPES.get(key, "i32") for key in names if key not in known}
    return KernelVariant(
        f"{kernel.__name__}: {name}", kernel, types, known, tile.warps, divides=True
    )
