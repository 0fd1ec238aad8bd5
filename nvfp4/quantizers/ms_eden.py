"""ms_eden: rotate, round to nearest, repair each block's length in a stochastic scale.

    y = rotate(x)
    per block    a = max |y|, z = y / a                 the block with its maximum at 1
                 v = z c, c = (6 / 0.988125) / k        scaled to the elements
                 q = e2m1(v)                            nearest
                 S = <v, v> / <v, q>                    so that <S q, v> = <v, v>: EDEN's correction
                                                        (not the S of rtn, an encode scale)
                 r = a S / c                            the scale the block wants
    global_scale = max r / 448                          known only now: the post-hoc range
    block_scale  = e4m3_stochastic(r / global_scale)
    value        = q * block_scale * global_scale

Elements are rounded to nearest, with less than half the squared error of sr (9.33e-3 and 22.22e-3
on N(0, 1)). For one vector that is biased; over random rotations, with the length corrected and the
scale rounded stochastically, the average is right, how nearly is said below.

Source: MS-EDEN, Quartet II, arXiv 2601.22813, section 3.2 and its post-hoc range kernel; here with
the correction per 16 elements, scales in float32 and stochastic over all of E4M3. ``search=True``
(ours) also tries k = .875, 1.125, ..., 1.5, or the ``factors`` that are given, and keeps the
smallest error.

What is and is not unbiased (per operand, over signs and rounding, |bias|^2 / |x|^2): one round
leaves up to 1e-2 on groups with 2 active entries (e0 + 0.1 e1 becomes (101/102, 101/510) whatever
the signs) and about 1e-3 on average there; two rounds 3e-6 on average and 1.6e-4 at worst (with
search 2e-5 and 4.3e-4, less with fewer factors); three below 1e-7; dense rows below 1e-6 always.
Sparse groups are what masked losses give wgrad. The product of two ms_eden operands under the same
signs carries E[eA eB^T] as well: +0.5 to 0.8 % for parallel rows, nothing measurable for
uncorrelated ones.
"""

from __future__ import annotations

import torch

from nvfp4.numerics.formats import E2M1, E4M3
from nvfp4.numerics.rounding import nearest, stochastic
from nvfp4.numerics.scaling import SEARCH_FACTORS, SMALLEST_AMAX, element_scale, tree_sum
from nvfp4.quantizers.base import Blocks, Claims, Options, Quantized, Quantizer


def _candidate(unit: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes' values q [m, k, 16], t [m, k]) for one factor; q * t approximates ``unit``.

    unit: blocks of maximum 1. t = S / c.
    """
    c, inverse = element_scale(factor)
    v = unit * c
    q = nearest(v, E2M1)

    # EDEN's correction; a block of zeros has none
    numerator, denominator = tree_sum(v * v), tree_sum(v * q)
    correction = torch.where(denominator == 0, 1.0, numerator / denominator)
    return q, correction * inverse


def rule(blocks: Blocks) -> Quantized:
    """Blocks come rotated; see the head of this file."""
    # blocks of maximum 1, or of signed zeros
    amax = blocks.amax()
    amax = torch.where(amax < SMALLEST_AMAX, 0.0, amax)
    inverse = torch.where(amax == 0, 0.0, 1 / amax)
    unit = blocks.values * inverse[..., None]
    if blocks.options.search:
        values, length = _search(unit, blocks.options.factors)
    else:
        values, length = _candidate(unit, 1.0)

    # the largest scale becomes 448; a tensor of zeros has the global scale 1
    scale = amax * length
    peak = scale.amax().view(1, 1)
    # by a tensor: dividing by a number, torch multiplies by its reciprocal on GPUs
    global_scale = torch.where(peak == 0, 1.0, peak / torch.full_like(peak, E4M3.max))
    return values, stochastic(scale / global_scale, E4M3, blocks.scale_noise()), global_scale


def _search(unit: torch.Tensor, factors: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The (values, t) of the factor with the smallest squared error; the first of equals wins."""

    def error(q: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        e = unit - q * t[..., None]
        return tree_sum(e * e)

    # the error of the whole approximation q t, so that all factors compare alike
    values, length = _candidate(unit, factors[0])
    best = error(values, length)
    for factor in factors[1:]:
        q, t = _candidate(unit, factor)
        candidate = error(q, t)
        better = candidate < best
        values = torch.where(better[..., None], q, values)
        length = torch.where(better, t, length)
        best = torch.where(better, candidate, best)
    return values, length


RELATIVE_MSE: dict[tuple[float, ...], float] = {
    SEARCH_FACTORS: 7.75e-3,
    (1.0, 0.9375, 1.4375, 1.5625): 7.69e-3,
    (1.0, 0.9375, 1.5): 7.83e-3,
    (1.0, 1.5): 8.08e-3,
}
"""On N(0, 1), of a search, by factors; within 0.1 % of the best four, three and two sixteenths."""


def claims(options: Options) -> Claims:
    """Unbiased in the sense of the head of this file.

    No bound for one element: errors spread over the group of the rotation.
    """
    return Claims(
        deterministic=False,
        unbiased=True,
        idempotent=False,
        max_error=None,
        relative_mse=RELATIVE_MSE.get(options.factors) if options.search else 9.33e-3,
        relative_mse_tolerance=0.06e-3,
    )


MS_EDEN = Quantizer(
    "ms_eden",
    rule,
    claims,
    frozenset({"rounds", "search", "factors", "group", "summation"}),
    rotates=True,
)
