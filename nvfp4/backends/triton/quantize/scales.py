"""Numbers of a whole operand: its amax, which programs agree on, and the scales that follow.

raise_peak       an amax, or the largest r of ms_eden, by an atomic maximum
global_scales    the amax -> whether all is finite, encode scale, global scale
store_global, raise_global, store_scales
finite_blocks    what a held amax, which is older than x, cannot say
"""

import triton
import triton.language as tl

from nvfp4.backends.triton.arithmetic import (
    INFINITY_BITS,
    MAGNITUDE,
    NAN_BITS,
    bits,
    encode_scale,
    from_bits,
    reciprocal,
)


@triton.jit
def raise_peak(peak, largest):
    """Raise the number at ``peak`` to ``largest``, by an atomic only where that changes something.

    Of a large matrix 16 to 65 thousand programs would queue at one address; after the first few,
    hardly any of them has something to add. What is read may be old, but then it is smaller, so
    nothing is lost. The read goes to L2 (volatile), where the peak is raised: a line in L1 would
    stay as it was when it first came in.
    """
    tl.atomic_max(peak, largest, mask=largest > tl.load(peak, volatile=True), sem="relaxed")


@triton.jit
def global_scales(peak, row, rows, CAP: tl.constexpr, P: tl.constexpr):
    """(whether all is finite, encode scale, global scale) from the amax, [R, 1] or [1, 1].

    CAP: the largest block scale that the rule aims at.
    """
    # a caller's own amax may have its sign set; a NaN that has would pass for a number below all
    if P.row_scaled:
        largest = tl.load(peak + row, mask=row < rows, other=0)[:, None] & MAGNITUDE
    else:
        largest = tl.load(peak + tl.arange(0, 1))[:, None] & MAGNITUDE

    # where not all is finite the amax counts as zero, so that no code depends on a NaN
    finite = largest < INFINITY_BITS
    encode = encode_scale(from_bits(tl.where(finite, largest, 0)), CAP)
    return finite, encode, reciprocal(encode)


@triton.jit
def store_global(global_scale, value, finite, row, row_tile, column_tile, rows, P: tl.constexpr):
    """Store the global scales [M] or [1], NaN where not all is finite.

    Every program has them; the first of each row of tiles, or of all, stores.
    """
    value = tl.where(finite, value, from_bits(tl.full(value.shape, NAN_BITS, tl.int32)))
    if P.row_scaled:
        inside = (row < rows) & (tl.arange(0, 1) == column_tile)
        tl.store(global_scale + row, tl.reshape(value, (row.shape[0],)), mask=inside)
    else:
        first = tl.arange(0, 1) == row_tile + column_tile
        tl.store(global_scale + tl.arange(0, 1), tl.reshape(value, (1,)), mask=first)


@triton.jit
def finite_blocks(largest, seen):
    """Whether all is finite, [1, 1], and each block [m, k], of ``block_bits``; raises ``seen``.

    For a held amax: nobody has looked at x before, so this pass finds what is not finite.
    """
    of_tile = tl.max(tl.max(largest, axis=1), axis=0)
    if seen is not None:
        raise_peak(seen, of_tile)
    return tl.full((1, 1), 0, tl.int32) + of_tile < INFINITY_BITS, largest < INFINITY_BITS


@triton.jit
def raise_global(global_scale, value, finite, row_tile, column_tile):
    """Store the global scale [1], which starts at 0, NaN if any tile is not finite.

    The first program has the value, those with a NaN or Inf raise it to NaN, in any order: as bits
    a NaN is above every scale.
    """
    number = tl.reshape(tl.where(finite, bits(value), NAN_BITS), (1,))
    place = global_scale.to(tl.pointer_type(tl.int32)) + tl.arange(0, 1)
    first = tl.arange(0, 1) == row_tile + column_tile
    says = first | (tl.reshape(finite, (1,)) == 0)
    tl.atomic_max(place, number, mask=says, sem="relaxed")
