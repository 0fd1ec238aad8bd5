"""The launches of the quantising kernels.

    one orientation      amax_kernel -> quantize_kernel -> finish
    both orientations    amax_both_kernel -> quantize_both_kernel -> finish, finish, or as one
                         orientation after the other (``reads_once``)
    decoding             decode_kernel

The first launch is left out where the rule needs no amax (ms_eden) or the caller has it; with a
held one the second looks for the matrix's own as well, so that x is read once. finish is a launch
for ms_eden alone. Both orientations together read x twice, not four times.

A program takes one tile [R, C] of the operand, or a few; ``policy.py`` says which and how many.
What follows an amax goes through the operand backwards: its end is still in the L2 cache.
"""

from __future__ import annotations

import torch

from nvfp4.backends.triton.launch import launch, on
from nvfp4.backends.triton.operands import Source, Target, capability_of, coded_as, programs
from nvfp4.backends.triton.quantize import kernels
from nvfp4.backends.triton.quantize.policy import (
    Coded,
    Tile,
    reads_once,
    tile_along,
    tile_down,
    tile_of_peak,
    tiles_of_both,
)
from nvfp4.numerics.qtensor import QTensor

DECODING = (16, 256, 4)
"""Rows, columns and warps for decoding."""


def quantize(source: Source, coded: Coded | None, target: Target) -> QTensor:
    """One orientation of an operand. coded: the kind of codes it is read from, None for a matrix.

    Launches on the current stream and waits for nothing.
    """
    # a source is read along what is contiguous in memory: of codes, the axis they were contracted
    # along, which is the rows of their transpose
    down = coded is not None or source.stride_row == 1 != source.stride_column
    tile = tile_down(target.policy, coded is not None) if down else tile_along(target.policy)
    shape = (source.rows, source.columns)

    with on(source.x.device):
        if target.scaled_by_amax and not target.amax_known:
            _find_peak(source, coded, target, tile)

        # rules that finish later have no scales to swizzle yet
        swizzled = target.q.swizzled_scale if target.scaled_by_amax else None
        operands = (
            target.seen,
            *target.stored,
            swizzled,
            target.padded,
            *target.seed,
            *target.signs,
        )
        tile = tile.of(target.policy, *shape)
        constants, count = (target.policy, coded, tile), programs(shape, tile)
        launch(kernels.quantize_kernel, count, (*source, *operands), constants, warps=tile.warps)
        return target.finish()


def _find_peak(source: Source, coded: Coded | None, target: Target, tile: Tile) -> None:
    """The amax of an operand. tile: the one that it is rounded in."""
    if coded is None and target.policy.is_bare:
        source = source.along_memory()
        tile = tile_of_peak(target.policy, tile, 8 * source.x.element_size())
    count = programs((source.rows, source.columns), tile)
    constants, peak = (target.policy, coded, tile), (target.peak, *target.signs)
    launch(kernels.amax_kernel, count, (*source, *peak), constants, warps=tile.warps)


def quantize_both(x: torch.Tensor, across: Target, down: Target) -> tuple[QTensor, QTensor]:
    """x [M, K] along K and along M; each launch reads x once for both, where that is quicker."""
    if not reads_once(across.policy.rule, down.policy.rule, capability_of(x.device)):
        rows = quantize(Source.dense(x), None, across)
        return rows, quantize(Source.dense(x.t()), None, down)

    # a program takes the same elements as a tile of x and as one of x^T
    policies = (across.policy, down.policy)
    tiles = tiles_of_both(*policies)
    count, constants = programs(tuple(x.shape), tiles[0]), (*policies, *tiles)
    matrix = (x, *x.shape, *x.stride())

    with on(x.device):
        # without a rule that wants one, x is read once; with two that want the same, twice
        wanting = [t for t in (across, down) if t.scaled_by_amax and not t.amax_known]
        if len(wanting) == 2 and across.policy.is_bare and down.policy.is_bare:
            _find_peak(Source.dense(x), None, across, tiles[0])
            down.peak = across.peak
        elif wanting:
            peaks = (across.peak, *across.signs, down.peak, *down.signs)
            launch(
                kernels.amax_both_kernel, count, (*matrix, *peaks), constants, warps=tiles[0].warps
            )

        operands = [
            v for t in (across, down) for v in (t.seen, *t.stored, t.padded, *t.seed, *t.signs)
        ]
        launch(
            kernels.quantize_both_kernel,
            count,
            (*matrix, *operands),
            constants,
            warps=tiles[0].warps,
        )
        return across.finish(), down.finish()


def decode(q: QTensor, columns: int, dtype: torch.dtype, with_global: bool) -> torch.Tensor:
    """e2m1 * block_scale, times the global scale if asked for: [q.rows, columns] of ``dtype``."""
    codes, block_scale, global_scale = (t.contiguous() for t in q.tensors)
    out = torch.empty(q.rows, columns, dtype=dtype, device=q.device)

    # what is not to be multiplied by is None, which compiles another kernel
    tile_rows, tile_columns, warps = DECODING
    count = programs((q.rows, columns), DECODING)
    tensors = (codes, block_scale, global_scale if with_global else None, out)
    arguments = (*tensors, q.rows, columns, codes.shape[1])
    constants = (coded_as(q), tile_rows, tile_columns)
    with on(q.device):
        launch(kernels.decode_kernel, count, arguments, constants, warps=warps)
    return out
