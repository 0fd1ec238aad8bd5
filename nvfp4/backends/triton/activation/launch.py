"""Launches the kernels of ``fused_kernels``: an activation to the targets it is quantised into, and its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from nvfp4.backends.triton.activation import kernels as fused_kernels
from nvfp4.backends.triton.activation.arithmetic import Formula
from nvfp4.backends.triton.launch import launch
from nvfp4.backends.triton.quantize.rules import Policy, Tile
from nvfp4.numerics.activations import LANES, SLAB, Activation, RMSNorm, SwiGLU

NORM = Tile(4, LANES, False, 8, 2, 1)
"""A program of ``rms_kernel`` reads 4 rows, few enough to be in the cache when it reads them again."""
GRADIENT = Tile(SLAB, LANES, False, 8, 1, 8)
GATED_GRADIENT = Tile(16, 256, False, 8, 1, 8)
SUMMED = (16, 4)
"""Columns and warps of a program of ``slab_sum_kernel``."""


SeedArguments = tuple[int, int] | tuple[torch.Tensor, None]
"""The halves of a seed, or where on the device it lies."""


class Target(Protocol):
    """A result to fill and what the kernels take beside it; see ``backend.py``."""

    policy: Policy
    scaled_by_amax: bool
    peak: torch.Tensor
    padded: int
    seed: SeedArguments
    signs: SeedArguments

    @property
    def stored(self) -> tuple[torch.Tensor, ...]:
        """peak, codes, block scale, global scale."""


TilesOf = Callable[[Policy, "Policy | None", bool], "tuple[Tile, Tile | None]"]


def formula(activation: Activation) -> Formula:
    """What the kernels are compiled for."""
    first, _ = _inputs(activation)
    return Formula(isinstance(activation, SwiGLU), _name(first.dtype), _name(activation.dtype))


def norm_tiles(columns: Policy | None) -> tuple[Tile, Tile | None]:
    """The rows of a program of ``rms_kernel``: whole rotation groups, if they run down the columns."""
    if columns is None:
        return NORM, None
    height = columns.group
    warps = min(height * LANES // 512, 8)
    return NORM._replace(rows=height, warps=warps), Tile(LANES, height, True, 4, 1, warps)


def fill(activation: Activation, across: Target, down: Target | None, tiles_of: TilesOf) -> None:
    """Quantise the activation along its rows and, if there is a target for it, its transpose.

    tiles_of: tiles by the policies of both and by whether it is SwiGLU.
    """
    first, second = (_rows_contiguous(t) for t in _inputs(activation))
    rows, columns = first.shape
    shape = (rows, columns)
    made = formula(activation)
    strides = (first.stride(0), second.stride(0) if isinstance(activation, SwiGLU) else 0)
    peaks, policies = _peaks(across, down)
    rstd = None
    if isinstance(activation, RMSNorm):
        rstd = torch.empty(rows, dtype=torch.float32, device=first.device)
        norm = norm_tiles(policies[1])
        arguments = (first, second, rstd, *shape, strides[0], activation.eps, *peaks)
        programs = -(-rows // norm[0].rows)
        launch(fused_kernels.rms_kernel, programs, arguments, (*policies, *norm, made), warps=norm[0].warps)
    elif any(policies):
        tiles = tiles_of(across.policy, policies[1], made.gated)
        arguments, constants = (first, second, *shape, *strides, *peaks), (*policies, *tiles, made)
        programs = _programs(shape, tiles[0])
        launch(fused_kernels.activation_amax_kernel, programs, arguments, constants, warps=tiles[0].warps)
    operands = [value for t in (across, down) for value in _operands(t)]
    both = (across.policy, None if down is None else down.policy)
    tiles = tiles_of(*both, made.gated)
    arguments, constants = (first, second, rstd, *shape, *strides, *operands), (*both, *tiles, made)
    programs = _programs(shape, tiles[0])
    launch(fused_kernels.activation_quantize_kernel, programs, arguments, constants, warps=tiles[0].warps)


def _programs(shape: tuple[int, int], tile: Tile) -> int:
    return -(-shape[0] // tile.rows) * -(-shape[1] // tile.columns)


def _peaks(across: Target, down: Target | None) -> tuple[list[Any], tuple[Policy | None, Policy | None]]:
    """Arguments and policies of the kernels that look for an amax; one look serves both if neither is rotated."""
    policies = [None if t is None or not t.scaled_by_amax else t.policy for t in (across, down)]
    if down is not None and all(p is not None and not p.round_scales and not p.row_scaled for p in policies):
        down.peak = across.peak
        policies[1] = None
    arguments: list[Any] = []
    for target, policy in zip((across, down), policies, strict=True):
        arguments += [None, 0, 0] if target is None or policy is None else [target.peak, *target.signs]
    return arguments, (policies[0], policies[1])


def _operands(target: Target | None) -> tuple[Any, ...]:
    if target is None:
        return None, None, None, None, 0, 0, 0, 0, 0
    return *target.stored, target.padded, *target.seed, *target.signs


def gradients(activation: Activation, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``activation.gradients(dy)``."""
    first, second = (_rows_contiguous(t) for t in _inputs(activation))
    rows, columns = first.shape
    dy, made = dy.contiguous(), formula(activation)
    d_first, d_second = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (first, second))
    if isinstance(activation, SwiGLU):
        tile = GATED_GRADIENT
        launch(
            fused_kernels.swiglu_gradient_kernel,
            _programs((rows, columns), tile),
            (first, second, dy, d_first, d_second, rows, columns, first.stride(0), second.stride(0)),
            (tile, made, _name(second.dtype)),
            warps=tile.warps,
        )
        return d_first, d_second
    count, (width, warps) = -(-rows // SLAB), SUMMED
    slabs = torch.empty(count, columns, dtype=torch.float32, device=first.device)
    arguments = (first, second, dy, d_first, slabs, rows, columns, first.stride(0), activation.eps)
    launch(fused_kernels.rms_gradient_kernel, count, arguments, (GRADIENT, made), warps=GRADIENT.warps)
    summed = (slabs, d_second, count, columns), (width, _name(second.dtype))
    launch(fused_kernels.slab_sum_kernel, -(-columns // width), *summed, warps=warps)
    return d_first, d_second


def _inputs(activation: Activation) -> tuple[torch.Tensor, torch.Tensor]:
    return activation[0], activation[1]


def _rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
