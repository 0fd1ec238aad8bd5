"""Which tiles the quantising kernels work in, and their launches.

    one orientation      amax_kernel -> quantize_kernel -> finish
    both orientations    amax_both_kernel -> quantize_both_kernel -> finish, finish
    decoding             decode_kernel

The first launch is left out where the rule needs no amax (ms_eden) or the caller has it; finish is
a launch for ms_eden alone. Both orientations together read x twice, not four times.

Every launch is one program per tile [R, C] of the operand. Tiles are chosen by what they compile
to: registers and spills for eight cards, as ``tools/aot.py`` reports them. A larger tile reads
memory in longer runs, until it spills. No tile was timed on a GPU.
"""

from __future__ import annotations

import torch

from nvfp4.backends.triton.launch import launch
from nvfp4.backends.triton.operands import Source, Target, on, programs
from nvfp4.backends.triton.quantize import kernels
from nvfp4.backends.triton.quantize.rules import SEARCHES, Coded, Policy, Tile
from nvfp4.numerics.qtensor import QTensor

DECODING = (16, 256, 4)
"""Rows, columns and warps for decoding."""

NOISY = ("sr", "sr_te")
"""The rules that draw a number for each element."""


def tile_along(policy: Policy) -> Tile:
    """The tile of operands whose rows are contiguous.

    A thread reads 16 bytes of BF16 at once and holds whole blocks, a quarter of a rotation group of
    128, or one block alone where candidates are compared.
    """
    if policy.search or policy.rule in SEARCHES:
        return Tile(16, 128, False, 8, 2, 4)
    wide = policy.group == 128 and bool(policy.round_scales)
    return Tile(16, 256, False, 32, 4, 4) if wide else Tile(16, 256, False, 8, 2, 4)


def tile_down(policy: Policy, coded: bool = False) -> Tile:
    """The tile of operands whose columns are contiguous, or that are codes.

    A thread holds whole blocks, a warp whole rotation groups.
    """
    if policy.search or policy.rule in SEARCHES:
        return Tile(max(8, policy.tile), 128, True, 2, 1, 2 if policy.tile == 16 else 1)
    if policy.round_scales:
        # with 128 columns, groups of 16 would take 168 registers, and sr of codes spill on sm_100;
        # groups of 128 take half the rows if the source is coded, for the same reason
        small = policy.group == 16
        return Tile(8 if coded and not small else 16, 64 if small else 128, True, 4, 1, 1)
    return Tile(32, 128, True, 4, 1, 2)


def tiles_of_both(rows: Policy, columns: Policy) -> tuple[Tile, Tile]:
    """The same elements as a tile of x and of x^T, holding whole groups and tiles of both."""
    height, width = max(columns.group, 32), max(rows.group, 64)
    along, down = tile_along(rows), tile_down(columns)

    # two groups of 128 go on twice the warps, or they would need 256 registers per thread; and so
    # do two roundings by noise, which with the rotation of one of them spill 48 bytes per thread
    # where Triton 3.6 compiles for sm_90
    crowded = height == width == 128 or (rows.rule in NOISY and columns.rule in NOISY)
    warps = height * width // (32 * 16 * down.run) * (2 if crowded else 1)
    return (
        Tile(height, width, False, min(along.run, width), along.pieces, warps),
        Tile(width, height, True, down.run, 1, warps),
    )


def quantize(source: Source, coded: Coded | None, target: Target) -> QTensor:
    """One orientation of an operand. coded: the kind of codes it is read from, None for a matrix.

    Launches on the current stream and waits for nothing.
    """
    # a source is read along what is contiguous in memory: of codes, the axis they were contracted
    # along, which is the rows of their transpose
    down = coded is not None or source.stride_row == 1 != source.stride_column
    tile = tile_down(target.policy, coded is not None) if down else tile_along(target.policy)
    count = programs((source.rows, source.columns), tile)
    constants = (target.policy, coded, tile)

    with on(source.x.device):
        if target.scaled_by_amax and not target.amax_known:
            peak = (target.peak, *target.signs)
            launch(kernels.amax_kernel, count, (*source, *peak), constants, warps=tile.warps)

        # rules that finish later have no scales to swizzle yet
        swizzled = target.q.swizzled_scale if target.scaled_by_amax else None
        operands = (*target.stored, swizzled, target.padded, *target.seed, *target.signs)
        launch(kernels.quantize_kernel, count, (*source, *operands), constants, warps=tile.warps)
        return target.finish()


def quantize_both(x: torch.Tensor, across: Target, down: Target) -> tuple[QTensor, QTensor]:
    """x [M, K] along K and along M; each launch reads x once for both."""
    # a program takes the same elements as a tile of x and as one of x^T
    policies = (across.policy, down.policy)
    tiles = tiles_of_both(*policies)
    count, constants = programs(tuple(x.shape), tiles[0]), (*policies, *tiles)
    matrix = (x, *x.shape, *x.stride())

    with on(x.device):
        # without a rule that wants one, x is read once
        if across.scaled_by_amax or down.scaled_by_amax:
            peaks = (across.peak, *across.signs, down.peak, *down.signs)
            launch(
                kernels.amax_both_kernel, count, (*matrix, *peaks), constants, warps=tiles[0].warps
            )

        operands = [v for t in (across, down) for v in (*t.stored, t.padded, *t.seed, *t.signs)]
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
    constants = (Coded.of(q), tile_rows, tile_columns)
    with on(q.device):
        launch(kernels.decode_kernel, count, arguments, constants, warps=warps)
    return out
