"""The quantisers as rules on blocks: twin of ``quantizers/*.py``, where the formulas stand.

    plain       rtn, sr, sr_te                 one candidate scale per block
    searched    four_over_six, scale_search    the candidate whose block decodes closest wins
    ms_eden     ms_eden                        the scale that repairs the block's length; with a
                                               search the best of several

Each takes float32 blocks x [m, rows, k, 16] (rows is 1, or 16 for 16x16 blocks) and their amax
[m, k], and gives back x in units of its scale, which ``store_codes`` rounds to codes (to nearest;
drawn values are on the grid already), and the scales [m, k]: E4M3 bytes as int32, or the lengths r
as float32 for ms_eden.

What differs between quantisers, options and cards is decided while a kernel is compiled: ``Policy``
(P) is a constant tuple, so a kernel holds the instructions of its own rule alone. ``Tile`` and
``Coded`` are the other two constants of every kernel here.

Cards that convert to E2M1 themselves (``P.converts``) round and pack in one instruction, others by
sums and minima. Both roads give the same bits.
"""

import triton
import triton.language as tl

from nvfp4.backends.triton.arithmetic import (
    E2M1,
    E4M3,
    FLOAT32_MAX,
    FUSES,
    MAGNITUDE,
    SIXTH,
    bits,
    converted_value,
    decode,
    drawn_value,
    from_bits,
    guarded_reciprocal,
    largest_bits,
    magnitude_bits,
    nearest,
    nearest_value,
    over_elements,
    product,
    reciprocal,
    tree_sum,
    up,
)
from nvfp4.backends.triton.quantize.policy import SEARCHES
from nvfp4.numerics.formats import E4M3 as _E4M3
from nvfp4.numerics.formats import SEARCH_CAP
from nvfp4.numerics.scaling import SMALLEST_AMAX as _SMALLEST_AMAX

SMALLEST_AMAX = tl.constexpr(_SMALLEST_AMAX)
LARGEST_BYTE = tl.constexpr(len(_E4M3.grid) - 1)


@triton.constexpr_function
def cap(rule: str) -> float:
    """The largest block scale a rule aims at."""
    return SEARCH_CAP if rule in SEARCHES else _E4M3.max


@triton.constexpr_function
def scaled_by_amax(rule: str) -> bool:
    """Whether a rule has to know the amax first; ms_eden finds its range afterwards."""
    return rule != "ms_eden"


@triton.jit
def block_bits(x):
    """Bits of the largest magnitude of each block of x [m, rows, k, 16]: [m, k]."""
    return tl.max(largest_bits(x, 3), axis=1)


@triton.jit
def base_scale(amax, encode):
    """fl(amax * fl(S * fl(1/6))), at most FLT_MAX."""
    return tl.minimum(amax * (encode * SIXTH), FLOAT32_MAX)


@triton.jit
def clamped(x):
    """min(|x|, 6)."""
    return tl.minimum(from_bits(magnitude_bits(x)), E2M1[2])


@triton.jit
def with_sign(a, x):
    """a >= 0 with the sign of x, also that of zero: E2M1 has a -0."""
    return from_bits(bits(a) | (bits(x) & ~MAGNITUDE))


@triton.jit
def grid_value(a, P: tl.constexpr, CLAMPED: tl.constexpr):
    """E2M1's value nearest to a >= 0, at most 6. CLAMPED: a may be 7 or more."""
    if P.converts:
        return converted_value(a)
    elif CLAMPED:
        return nearest_value(tl.minimum(a, E2M1[2]))
    else:
        return nearest_value(a)


@triton.jit
def plain(x, amax, encode, global_scale, noise, P: tl.constexpr):
    """rtn, sr, sr_te: (values, scale bytes). noise: u / 2 like x; rtn reads none."""
    base = tl.minimum(base_scale(amax, encode), E4M3[2])

    # sr rounds its scale up, so that no element exceeds 6 and none is clipped: that is unbiased
    if P.rule == "sr":
        byte = up(base, E4M3)
    else:
        byte, _ = nearest(base, E4M3)

    # a scale of 0 makes this Inf, hence the limit: such a block stores +-6 and decodes to 0
    multiplier = tl.minimum(reciprocal(decode(byte, E4M3) * global_scale), FLOAT32_MAX)
    scaled = x * over_elements(multiplier)
    if P.rule == "rtn":
        return scaled, byte
    else:
        return with_sign(drawn_value(clamped(scaled), noise), scaled), byte


@triton.jit
def candidate_error(scaled, scale, P: tl.constexpr):
    """Error [m, k] of blocks |x| S on a candidate scale [m, k]; signs change no error."""
    value = grid_value(scaled * over_elements(guarded_reciprocal(scale)), P, True)
    error = scaled - product(value, over_elements(scale))  # the product is exact
    if P.metric == "mse":
        return tree_sum(product(error, error))
    elif P.metric == "mae":
        return tree_sum(from_bits(magnitude_bits(error)))
    else:
        return from_bits(block_bits(error))


@triton.jit
def neighbour(first, step):
    """Scale bytes [m, k] a step from ``first``, within [1, 126]; a zero scale stays zero."""
    moved = tl.minimum(tl.maximum(first + step, 1), LARGEST_BYTE)
    return tl.where(first == 0, 0, moved)


@triton.jit
def searched(x, amax, encode, P: tl.constexpr):
    """four_over_six, scale_search: (values, scale bytes) on the scale of the smallest error.

    The first of equals wins. Only errors are compared in the loop; codes are made once, from the
    winner.
    """
    scaled = x * over_elements(encode)
    size = from_bits(magnitude_bits(scaled))
    base = base_scale(amax, encode)
    first, value = nearest(tl.minimum(base, E4M3[2]), E4M3)

    if P.rule == "four_over_six":
        # the maximum at 4 instead of 6
        byte, four = nearest(tl.minimum(1.5 * base, E4M3[2]), E4M3)
        better = candidate_error(size, four, P) < candidate_error(size, value, P)
        best = tl.where(better, byte, first)
    else:
        best = neighbour(first, P.steps[0])
        best_error = candidate_error(size, decode(best, E4M3), P)
        for i in tl.static_range(1, len(P.steps)):
            byte = neighbour(first, P.steps[i])
            error = candidate_error(size, decode(byte, E4M3), P)
            best = tl.where(error < best_error, byte, best)
            best_error = tl.where(error < best_error, error, best_error)

    return scaled * over_elements(guarded_reciprocal(decode(best, E4M3))), best


@triton.jit
def element_scale_of(k, P: tl.constexpr):
    """(c, fl(1 / c)) number k, known only at run time: a constant tuple takes no such index."""
    c, inverse = P.scales[0][0], P.scales[0][1]
    for j in tl.static_range(1, len(P.scales)):
        c = tl.where(k == j, P.scales[j][0], c)
        inverse = tl.where(k == j, P.scales[j][1], inverse)
    return c, inverse


@triton.jit
def scaled_size(unit, c, P: tl.constexpr):
    """|unit| c: by the product that becomes codes, unless an older Triton spills for it."""
    if FUSES and P.converts:
        return from_bits(magnitude_bits(unit)) * c
    else:
        return from_bits(magnitude_bits(unit * c))


@triton.jit
def candidate_length(unit, c, inverse, P: tl.constexpr):
    """t = fl(fl(<v, v> / <v, q>) fl(1 / c)), [m, k], of blocks z that c scales to v; by magnitudes.

    With q = e2m1(v), the vector q t has the projection on z that z itself has.
    """
    BEYOND: tl.constexpr = len(P.scales) > 1 or P.scales[0][0] >= 6.99  # v, as 7 rounds to 8
    v = scaled_size(unit, c, P)
    q = grid_value(v, P, BEYOND)
    numerator, denominator = tree_sum(product(v, v)), tree_sum(product(v, q))
    correction = tl.where(denominator == 0.0, 1.0, tl.math.div_rn(numerator, denominator))
    return correction * inverse


@triton.jit
def length_error(unit, length, c, P: tl.constexpr):
    """Sum of (|z| - q t)^2, [m, k], of blocks z that c scales to the elements."""
    q = grid_value(scaled_size(unit, c, P), P, True)
    error = from_bits(magnitude_bits(unit)) - product(q, over_elements(length))
    return tree_sum(product(error, error))


@triton.jit
def ms_eden(y, amax, P: tl.constexpr):
    """(values, block scales r as float32) of rotated blocks y."""
    # z = y / amax; blocks below 2^-120 count as zeros
    amax = tl.where(amax < SMALLEST_AMAX, 0.0, amax)
    unit = y * over_elements(guarded_reciprocal(amax))

    best_length = candidate_length(unit, P.scales[0][0], P.scales[0][1], P)
    best_scale = tl.full(amax.shape, P.scales[0][0], tl.float32)
    if len(P.scales) > 1:
        best_error = length_error(unit, best_length, P.scales[0][0], P)

        # a real loop: unrolled, it needs more registers than there are
        for k in tl.range(1, len(P.scales)):
            c, inverse = element_scale_of(k, P)
            length = candidate_length(unit, c, inverse, P)
            error = length_error(unit, length, c, P)
            better = error < best_error
            best_scale = tl.where(better, c, best_scale)
            best_length = tl.where(better, length, best_length)
            best_error = tl.where(better, error, best_error)

    # r = amax t; ``finish_kernel`` rounds it to E4M3 once the largest r of all is known
    return unit * over_elements(best_scale), amax * best_length
