"""RMSNorm and SwiGLU straight into codes: which tiles, and the launches.

    RMSNorm   rms_kernel: 1 / rms of each row and, where a rule needs it, the amax of the result
    SwiGLU    activation_amax_kernel, where a rule needs the amax
    both      activation_quantize_kernel: the result again, in registers, then rotated, rounded and
              stored as codes

The activation [M, K] is computed twice and never written; only codes are stored. When two
orientations look for the same amax, they look once. Gradients are kernels of their own, with
partial sums per slab of rows, so that they add in the reference's order.
"""

from __future__ import annotations

from typing import Any

import torch

from nvfp4.backends.triton.activation import kernels
from nvfp4.backends.triton.activation.arithmetic import Formula
from nvfp4.backends.triton.launch import launch
from nvfp4.backends.triton.operands import Target, programs
from nvfp4.backends.triton.quantize.policy import Policy, Tile, tile_along, tiles_of_both
from nvfp4.numerics.activations import LANES, SLAB, Activation, RMSNorm, SwiGLU

NORM = Tile(4, LANES, False, 8, 2, 1)
"""Of ``rms_kernel``: 4 rows, few enough to be in the cache when a program reads them again."""

GRADIENT = Tile(SLAB, LANES, False, 8, 1, 8)
"""Of ``rms_gradient_kernel``: the slab of rows whose part of dweight the definition sums first."""

GATED_GRADIENT = Tile(16, 256, False, 8, 1, 8)
"""Of ``swiglu_gradient_kernel``."""

SUMMED = (16, 4)
"""Columns and warps of a program of ``slab_sum_kernel``."""


def formula(activation: Activation) -> Formula:
    """What the kernels are compiled for."""
    first, _ = _inputs(activation)
    return Formula(isinstance(activation, SwiGLU), _name(first.dtype), _name(activation.dtype))


def norm_tiles(columns: Policy | None) -> tuple[Tile, Tile | None]:
    """The rows of a program of ``rms_kernel``, along and down; columns: the policy of x^T, if any.

    With one, a program holds a whole rotation group of x^T, which is as many rows.
    """
    if columns is None:
        return NORM, None
    height = columns.group
    warps = min(height * LANES // 512, 8)
    return NORM._replace(rows=height, warps=warps), Tile(LANES, height, True, 4, 1, warps)


def tiles_of_activation(
    rows: Policy, columns: Policy | None, gated: bool
) -> tuple[Tile, Tile | None]:
    """``tile_along`` or ``tiles_of_both`` where the elements are computed first; gated: SwiGLU.

    Computing them takes registers, so that both orientations go on four times the warps (SwiGLU: 16
    times), at most the 512 threads that 128 registers each leave room for. x and x^T after SwiGLU
    spill 8 to 32 bytes on one card or another with 4 or 8 times, on none with 16.
    """
    if columns is None:
        return tile_along(rows), None
    across, down = tiles_of_both(rows, columns)
    warps = min(across.warps * (16 if gated else 4), 16)
    return across._replace(warps=warps), down._replace(warps=warps)


def fill(activation: Activation, across: Target, down: Target | None) -> None:
    """Quantise the activation along its rows and, if there is a target for it, its transpose."""
    # rows, columns: of the activation; a weight has no stride between rows
    first, second = (_rows_contiguous(t) for t in _inputs(activation))
    rows, columns = first.shape
    shape = (rows, columns)
    made = formula(activation)
    strides = (first.stride(0), second.stride(0) if isinstance(activation, SwiGLU) else 0)

    # the amax, for the orientations whose rules want one; RMSNorm takes this pass in any case
    peaks, policies = _peaks(across, down)
    rstd = None
    if isinstance(activation, RMSNorm):
        rstd = torch.empty(rows, dtype=torch.float32, device=first.device)
        norm = norm_tiles(policies[1])
        arguments = (first, second, rstd, *shape, strides[0], activation.eps, *peaks)
        count = -(-rows // norm[0].rows)
        launch(kernels.rms_kernel, count, arguments, (*policies, *norm, made), warps=norm[0].warps)
    elif any(policies):
        tiles = tiles_of_activation(across.policy, policies[1], made.gated)
        arguments, constants = (first, second, *shape, *strides, *peaks), (*policies, *tiles, made)
        count = programs(shape, tiles[0])
        launch(kernels.activation_amax_kernel, count, arguments, constants, warps=tiles[0].warps)

    # codes and scales of both orientations
    operands = [value for t in (across, down) for value in _operands(t)]
    both = (across.policy, None if down is None else down.policy)
    tiles = tiles_of_activation(*both, made.gated)
    arguments, constants = (first, second, rstd, *shape, *strides, *operands), (*both, *tiles, made)
    count = programs(shape, tiles[0])
    launch(kernels.activation_quantize_kernel, count, arguments, constants, warps=tiles[0].warps)


def _peaks(
    across: Target, down: Target | None
) -> tuple[list[Any], tuple[Policy | None, Policy | None]]:
    """Arguments and policies of kernels that look for an amax; an orientation of None has none."""
    policies = [None if t is None or not t.scaled_by_amax else t.policy for t in (across, down)]

    # neither rotated nor scaled by rows, both have the same amax: one look serves both
    if down is not None and all(
        p is not None and not p.round_scales and not p.row_scaled for p in policies
    ):
        down.peak = across.peak
        policies[1] = None

    arguments: list[Any] = []
    for target, policy in zip((across, down), policies, strict=True):
        arguments += (
            [None, 0, 0] if target is None or policy is None else [target.peak, *target.signs]
        )
    return arguments, (policies[0], policies[1])


def _operands(target: Target | None) -> tuple[Any, ...]:
    if target is None:
        return None, None, None, None, 0, 0, 0, 0, 0
    return *target.stored, target.padded, *target.seed, *target.signs


def gradients(activation: Activation, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``activation.gradients(dy)``: two matrices, or a matrix and a vector, like its inputs."""
    first, second = (_rows_contiguous(t) for t in _inputs(activation))
    rows, columns = first.shape
    dy, made = dy.contiguous(), formula(activation)

    # contiguous, whatever the strides of the inputs
    d_first, d_second = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (first, second)
    )

    # SwiGLU: every element by itself
    if isinstance(activation, SwiGLU):
        tile = GATED_GRADIENT
        strides = (first.stride(0), second.stride(0))
        matrices = (first, second, dy, d_first, d_second, rows, columns, *strides)
        constants = (tile, made, _name(second.dtype))
        count = programs((rows, columns), tile)
        launch(kernels.swiglu_gradient_kernel, count, matrices, constants, warps=tile.warps)
        return d_first, d_second

    # RMSNorm: a program per slab of rows, and then the slabs' parts of dweight in their order
    count, (width, warps) = -(-rows // SLAB), SUMMED
    slabs = torch.empty(count, columns, dtype=torch.float32, device=first.device)
    arguments = (first, second, dy, d_first, slabs, rows, columns, first.stride(0), activation.eps)
    launch(kernels.rms_gradient_kernel, count, arguments, (GRADIENT, made), warps=GRADIENT.warps)
    summed = (slabs, d_second, count, columns), (width, _name(second.dtype))
    launch(kernels.slab_sum_kernel, -(-columns // width), *summed, warps=warps)
    return d_first, d_second


def _inputs(activation: Activation) -> tuple[torch.Tensor, torch.Tensor]:
    return activation[0], activation[1]


def _rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
