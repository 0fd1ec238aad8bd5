"""RMSNorm and SwiGLU on tiles of float32: twin of ``numerics/activations.py``.

    RMSNorm   rstd = 1 / sqrt(mean + eps) per row, y = round_out(round_x(x rstd) w)
    SwiGLU    y = round_out(round_gate(silu(gate)) up), silu by ``exp_negative``
    sums      LANES columns side by side, then ``lane_sum`` by halves: the reference's order

A tile [R, C] holds float32 that were loaded from other dtypes, and ``rounded`` gives it the numbers
of one again; so the roundings stand where the reference has them, whatever the inputs are.
``load_activation`` and its transposed twin take the place of ``load_dense``: to a quantising kernel
an activation is an operand that is computed instead of read.

What is added to is a ``product``, never a bare a * b: for Blackwell, Triton 3.6 would round both at
once.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from nvfp4.backends.triton.arithmetic import (
    bits,
    from_bits,
    log2,
    product,
    reciprocal,
    round_to_bf16,
)
from nvfp4.backends.triton.quantize.tiles import load_dense, positions
from nvfp4.numerics.activations import EXP_FLOOR as _EXP_FLOOR
from nvfp4.numerics.activations import EXP_TERMS as _EXP_TERMS
from nvfp4.numerics.activations import LANES as _LANES
from nvfp4.numerics.activations import LN2_HIGH as _LN2_HIGH
from nvfp4.numerics.activations import LN2_LOW as _LN2_LOW
from nvfp4.numerics.activations import LOG2_E as _LOG2_E
from nvfp4.numerics.activations import ROUNDER as _ROUNDER
from nvfp4.numerics.activations import SLAB as _SLAB

LANES = tl.constexpr(_LANES)
SLAB = tl.constexpr(_SLAB)
LOG2_E = tl.constexpr(_LOG2_E)
LN2_HIGH = tl.constexpr(_LN2_HIGH)
LN2_LOW = tl.constexpr(_LN2_LOW)
EXP_TERMS = tl.constexpr(_EXP_TERMS)
TERM_COUNT = tl.constexpr(len(_EXP_TERMS))
EXP_FLOOR = tl.constexpr(_EXP_FLOOR)
ROUNDER = tl.constexpr(_ROUNDER)
SIGN = tl.constexpr(-(1 << 31))


class Formula(NamedTuple):
    """What is computed of (first, second), as a constant that kernels are compiled for.

    gated: SwiGLU of gate and up, otherwise RMSNorm of x and weight. inner: the dtype of ``first``,
    to which the normalised x and silu(gate) are rounded. outer: the dtype of the result.

    In Triton 3.6 an attribute of a constant tuple is a bare Python value, which no other function
    under ``triton.jit`` takes (30 of 93 kernels did not compile): kernels hand on
    ``INNER: tl.constexpr = F.inner``, and write ``tl.full((T.rows, LANES), 0.0, tl.float32)``,
    because ``tl.zeros`` is such a function. 3.9 takes both.
    """

    gated: bool
    inner: str
    outer: str


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x rounded to a dtype, as float32."""
    if DTYPE == "bfloat16":
        return round_to_bf16(x)  # the interpreter's own cast truncates
    elif DTYPE == "float16":
        return x.to(tl.float16).to(tl.float32)
    else:
        return x


@triton.jit
def exp_negative(x):
    """e^-|x| = 2^n e^r, within two units in the last place."""
    # n: the nearest integer to t / ln 2; r: what is left, at most ln(2) / 2
    t = tl.maximum(from_bits(bits(x) | SIGN), EXP_FLOOR)
    n = (product(t, LOG2_E) + ROUNDER) - ROUNDER
    r = (t - product(n, LN2_HIGH)) - product(n, LN2_LOW)

    # the series of e^r, from its last term
    total = tl.full(r.shape, EXP_TERMS[TERM_COUNT - 1], tl.float32)
    for k in tl.static_range(TERM_COUNT - 1):
        total = product(total, r) + EXP_TERMS[TERM_COUNT - 2 - k]

    # 2^n in two factors, since 2^-150 is below every float32
    exponent = n.to(tl.int32)
    half = exponent >> 1
    return total * from_bits((half + 127) << 23) * from_bits((exponent - half + 127) << 23)


@triton.jit
def silu(gate, e, F: tl.constexpr):
    """silu(gate) rounded to the gate's dtype; e = ``exp_negative(gate)``."""
    INNER: tl.constexpr = F.inner
    return rounded(tl.math.div_rn(tl.where(gate >= 0.0, gate, gate * e), 1.0 + e), INNER)


@triton.jit
def sigmoid(gate, e):
    """1 / (1 + e^-gate)."""
    return tl.math.div_rn(tl.where(gate >= 0.0, 1.0, e), 1.0 + e)


@triton.jit
def swiglu(gate, up, F: tl.constexpr):
    """silu(gate) up."""
    OUTER: tl.constexpr = F.outer
    return rounded(silu(gate, exp_negative(gate), F) * up, OUTER)


@triton.jit
def normalized(x, rstd, weight, F: tl.constexpr):
    """x over its root mean square, times the weight; rstd and weight broadcast."""
    INNER: tl.constexpr = F.inner
    OUTER: tl.constexpr = F.outer
    return rounded(rounded(x * rstd, INNER) * weight, OUTER)


@triton.jit
def load_vector(values, index, count):
    """Elements of a vector as float32, zero outside."""
    return tl.load(values + index, mask=index < count, other=0.0).to(tl.float32)


@triton.jit
def lane_sum(lanes):
    """Sum of each row of [n, LANES] by halves: [n].

    Each ``tl.sum`` adds two elements, so its order cannot matter.
    """
    N: tl.constexpr = lanes.shape[0]
    for s in tl.static_range(log2(LANES)):
        lanes = tl.sum(tl.reshape(lanes, (N, 2, LANES >> (s + 1))), axis=1)
    return tl.reshape(lanes, (N,))


@triton.jit
def row_tree(x):
    """Sum of each column of [R, C] by halves: [C]."""
    R: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    for s in tl.static_range(log2(R)):
        x = tl.sum(tl.reshape(x, (2, R >> (s + 1), C)), axis=0)
    return tl.reshape(x, (C,))


@triton.jit
def over(x, count):
    """x / count; by the time it gets here a count of 1 is a Python integer, without ``.to``."""
    return tl.math.div_rn(x, tl.zeros(x.shape, tl.float32) + tl.cast(count, tl.float32))


@triton.jit
def inverse_rms(squares, columns, eps):
    """1 / sqrt(mean + eps) from the sum of squares of ``columns`` elements."""
    return reciprocal(tl.math.sqrt_rn(over(squares, columns) + eps))


@triton.jit
def load_activation(
    first, second, rstd, row_tile, column_tile, rows, columns, first_row, second_row,
    T: tl.constexpr, F: tl.constexpr
):  # fmt: skip
    """Tile [R, C] of the activation [rows, columns], zero outside.

    Its inputs have contiguous rows, ``first_row`` and ``second_row`` elements apart; of RMSNorm
    rstd [rows] is known and ``second`` is the weight [columns].
    """
    # zero outside: of SwiGLU because silu(0) is 0, of RMSNorm because x is
    tile = load_dense(first, row_tile, column_tile, rows, columns, first_row, 1, T)
    if F.gated:
        return swiglu(
            tile, load_dense(second, row_tile, column_tile, rows, columns, second_row, 1, T), F
        )
    else:
        scale = load_vector(rstd, positions(row_tile, T.rows), rows)
        weight = load_vector(second, positions(column_tile, T.columns), columns)
        return normalized(tile, scale[:, None], weight[None, :], F)


@triton.jit
def load_activation_transposed(
    first, second, rstd, row_tile, column_tile, rows, columns, first_row, second_row,
    T: tl.constexpr, F: tl.constexpr
):  # fmt: skip
    """Tile [R, C] of the transpose [rows, columns] of that activation, zero outside.

    Columns are the rows of its inputs.
    """
    tile = load_dense(first, row_tile, column_tile, rows, columns, 1, first_row, T)
    if F.gated:
        return swiglu(
            tile, load_dense(second, row_tile, column_tile, rows, columns, 1, second_row, T), F
        )
    else:
        column = positions(column_tile, T.columns)
        weight = load_vector(second, positions(row_tile, T.rows), rows)
        values = normalized(tile, load_vector(rstd, column, columns)[None, :], weight[:, None], F)
        # a negative weight would make it -0
        return tl.where(column[None, :] < columns, values, 0.0)
