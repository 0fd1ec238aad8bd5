"""quantize, requantize, transpose and matmul of matrices in groups: ``ops`` for stacked experts.

    x [S, K], Groups          --grouped_quantize-->    GroupedQTensor: x along K, or x^T along the
                                                       tokens of each group
    w [E, N, K]               --grouped_quantize-->    a stack: w along K, or w^T along N
    GroupedQTensor            --grouped_requantize-->  what its groups stand for, transposed
    two of them               --grouped_matmul-->      y [S, N], or [E, N, K]

Each group's codes and products are those that ``ops`` gives of its matrix alone; how they lie in
memory is told in ``numerics/groups.py``. Nothing here reads how many rows a group has: torch's
grouped GEMM (``scaled_mm``) finds that on the device; other backends read it, where it costs
nothing (CPU) or makes the host wait once per ``Groups`` (GPUs).
"""

from __future__ import annotations

import torch

from nvfp4.backends.registry import AUTO, select
from nvfp4.numerics.groups import GroupedQTensor, Groups
from nvfp4.numerics.torch_state import without_autocast, without_dispatch_modes
from nvfp4.ops import INPUT_DTYPES, checked_input
from nvfp4.quantizers.base import Options, Quantizer


def grouped_quantize(
    x: torch.Tensor,
    groups: Groups | None,
    quantizer: Quantizer,
    options: Options,
    *,
    transposed: bool = False,
    amax: torch.Tensor | None = None,
    backend: str = AUTO,
) -> GroupedQTensor:
    """Every group's matrix along its last axis, or along its rows if ``transposed``.

    x: float32, bfloat16 or float16 of any strides, [S, K] with groups of its rows or, without
    groups, [E, R, K]. options: checked; seeds, if there are some, ``DeviceSeed`` of int64 [E], one
    for each group. amax: float32 [E], what to scale the groups by, as in ``ops.quantize_with``; an
    empty group's global scale is 1 either way. ValueError where x and groups do not fit.
    """
    x = _checked(x, groups)
    with without_dispatch_modes():
        chosen = select(backend, "grouped_quantize", x.device, quantizer, options)
        return chosen.grouped_quantize(x, groups, quantizer, options, transposed, amax)


def grouped_quantize_both(
    x: torch.Tensor,
    groups: Groups,
    rows: tuple[Quantizer, Options],
    columns: tuple[Quantizer, Options],
    *,
    backend: str = AUTO,
) -> tuple[GroupedQTensor, GroupedQTensor]:
    """x [S, K] along K, and its transpose along the rows of each group, by quantisers of their own.

    Equal to two calls of ``grouped_quantize``; a backend may read x only once.
    """
    x = _checked(x, groups)
    with without_dispatch_modes():
        chosen = select(backend, "grouped_quantize", x.device, *rows)
        if chosen is select(backend, "grouped_quantize", x.device, *columns):
            return chosen.grouped_quantize_both(x, groups, rows, columns)
    return (
        grouped_quantize(x, groups, *rows, backend=backend),
        grouped_quantize(x, groups, *columns, transposed=True, backend=backend),
    )


def _checked(x: torch.Tensor, groups: Groups | None) -> torch.Tensor:
    """x, detached and in memory; ValueError where the groups are not of its rows."""
    x = checked_input(x)
    if x.dim() != (3 if groups is None else 2):
        kind = "a stack [E, R, K]" if groups is None else "a matrix [S, K]"
        raise ValueError(f"x must be {kind}, got shape {tuple(x.shape)}")
    if groups is not None and (groups.rows != x.shape[0] or groups.offsets.device != x.device):
        raise ValueError(
            f"groups of {groups.rows} rows on {groups.offsets.device} do not fit x "
            f"{tuple(x.shape)} on {x.device}"
        )
    return x


def grouped_requantize(
    q: GroupedQTensor, quantizer: Quantizer, options: Options, *, backend: str = AUTO
) -> GroupedQTensor:
    """What every group [m, K] stands for, in float32, transposed: [K, m], contracted along m."""
    if q.ragged == "contraction":
        raise ValueError("q must be ragged in its rows or a stack: its contraction is ragged")
    with without_dispatch_modes():
        chosen = select(backend, "grouped_quantize", q.device, quantizer, options)
        return chosen.grouped_requantize(q, quantizer, options)


def grouped_transpose(q: GroupedQTensor, *, backend: str = AUTO) -> GroupedQTensor:
    """Codes of 16x16 blocks, rows and contraction of every group exchanged."""
    with without_dispatch_modes():
        return select(backend, "transpose", q.device).grouped_transpose(q)


def grouped_matmul(
    a: GroupedQTensor,
    b: GroupedQTensor,
    out_dtype: torch.dtype = torch.float32,
    *,
    bias: torch.Tensor | None = None,
    backend: str = AUTO,
) -> torch.Tensor:
    """a b^T of every group, each as ``ops.matmul`` defines it, in one launch where there is one.

    a ragged in its rows and b a stack give y [S, N] (fprop, dgrad); two that are ragged in their
    contraction, by the same groups, give [E, a.rows, b.rows] (wgrad), zeros for an empty group.
    bias: [E, b.rows], added as in ``ops.matmul``. ValueError for operands that do not fit,
    TypeError for another dtype than float32, bfloat16 and float16.
    """
    _check_product(a, b, out_dtype)
    if bias is not None and (tuple(bias.shape) != (b.count, b.rows) or bias.device != b.device):
        raise ValueError(
            f"bias must be [{b.count}, {b.rows}] on {b.device}, got {tuple(bias.shape)} on "
            f"{bias.device}"
        )
    with without_dispatch_modes(), without_autocast(a.device):
        return select(backend, "grouped_matmul", a.device).grouped_matmul(a, b, out_dtype, bias)


def grouped_sum(x: torch.Tensor, groups: Groups, *, backend: str = AUTO) -> torch.Tensor:
    """The rows of x [S, N] added up in float32, group by group: [E, N]."""
    with without_dispatch_modes():
        return select(backend, "grouped_quantize", x.device).grouped_sum(x, groups)


def _check_product(a: GroupedQTensor, b: GroupedQTensor, out_dtype: torch.dtype) -> None:
    """ValueError or TypeError if a product of these operands has no meaning."""
    if a.count != b.count:
        raise ValueError(f"a has {a.count} groups and b {b.count}")
    if b.ragged == "rows" or (a.ragged == "contraction") != (b.ragged == "contraction"):
        raise ValueError(
            f"a is ragged in {a.ragged} and b in {b.ragged}: a's rows may be, or the contraction "
            "of both"
        )
    if a.ragged == "contraction" and a.groups is not b.groups:
        raise ValueError("a and b contract different groups")
    if (a.contraction, a.unit) != (b.contraction, b.unit):
        raise ValueError(
            f"operands contract different lengths: {a.contraction} in units of {a.unit} and "
            f"{b.contraction} in units of {b.unit}"
        )
    if a.rotation != b.rotation:
        raise ValueError(
            f"operands were rotated differently, so their product is meaningless: {a.rotation} "
            f"and {b.rotation}"
        )
    if a.device != b.device:
        raise ValueError(f"operands are on different devices: {a.device} and {b.device}")
    if out_dtype not in INPUT_DTYPES:
        raise TypeError(f"out_dtype must be float32, bfloat16 or float16, got {out_dtype}")
