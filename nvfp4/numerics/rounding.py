"""Real numbers to grid values: nearest (ties to even code), up, and stochastic from given bits.

One rule for every format: a value with exponent e is rounded on a lattice of
step = 2^(max(e, min_exponent) - mantissa_bits),

    nearest       round(a / step) * step             ties to even
    up            ceil(a / step) * step
    stochastic    floor(a / step + u) * step         u uniform in (0, 1)
    best_candidate                                   of several scales, nearest under the one that
                                                     errs least

For E2M1 the step is .5 below 2, 1 below 4 and 2 up to 6. It doubles exactly where the grid
coarsens, so that rounding to an even multiple of the step is rounding to an even code. a / step and
the product are exact, as the step is a power of two; a result that reaches the next binade is on
its grid too. Magnitudes saturate at ``fmt.max``, signs survive (also of -0), NaN stays NaN.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from nvfp4.numerics.formats import E2M1, ElementFormat
from nvfp4.numerics.scaling import tree_sum

_MANTISSA_BITS = 23  # of float32 (IEEE 754)
_BIAS = 127


def nearest(x: torch.Tensor, fmt: ElementFormat) -> torch.Tensor:
    """The grid value nearest to each float32 of x, ties to the even code; same shape, float32.

    E2M1 ties: .25 -> 0, .75 -> 1, 1.25 -> 1, 1.75 -> 2, 2.5 -> 2, 3.5 -> 4, 5 -> 4. |x| > max gives
    max with the sign of x.
    """
    magnitude = x.abs().clamp_(max=fmt.max)
    step = _step(magnitude, fmt)
    return magnitude.div_(step).round_().mul_(step).copysign_(x)


def up(x: torch.Tensor, fmt: ElementFormat) -> torch.Tensor:
    """The smallest grid value not below each float32 of x >= 0, at most max; same shape."""
    magnitude = x.clamp(max=fmt.max)
    step = _step(magnitude, fmt)
    return magnitude.div_(step).ceil_().mul_(step).clamp_(max=fmt.max)


def stochastic(x: torch.Tensor, fmt: ElementFormat, u: torch.Tensor) -> torch.Tensor:
    """One of the two grid neighbours of each float32 of x, so that E[result] = clamp(x).

    u: float32 of x's shape, uniform in (0, 1) (``rng.uniform``). The farther neighbour comes more
    rarely. An exactly representable value is never moved, and with 16-bit u anything else is
    unbiased to 2^-17 of a step.
    """
    magnitude = x.abs().clamp_(max=fmt.max)
    step = _step(magnitude, fmt)
    return magnitude.div_(step).add_(u).floor_().mul_(step).clamp_(max=fmt.max).copysign_(x)


def _step(magnitude: torch.Tensor, fmt: ElementFormat) -> torch.Tensor:
    """Lattice step at each magnitude >= 0, a power of two made from its exponent field."""
    exponent = magnitude.view(torch.int32) >> _MANTISSA_BITS
    exponent.clamp_(min=fmt.min_exponent + _BIAS).sub_(fmt.mantissa_bits)
    return exponent.bitwise_left_shift_(_MANTISSA_BITS).view(torch.float32)


def block_error(error: torch.Tensor, metric: str) -> torch.Tensor:
    """Error of each block [m, k] from the errors of its elements [m, k, size]."""
    if metric == "mse":
        return tree_sum(error * error)
    return tree_sum(error.abs()) if metric == "mae" else error.abs().amax(dim=-1)


def best_candidate(
    scaled: torch.Tensor, candidates: Iterable[torch.Tensor], metric: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes' values, block scale) of the candidate scale with the smallest error.

    scaled: x S, [m, k, size]; candidates: scales on the E4M3 grid [m, k]. The earlier one wins a
    tie. A zero scale gives signed zero codes.
    """

    def attempt(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inverse = torch.where(scale == 0, 0.0, 1 / scale)
        values = nearest(scaled * inverse[..., None], E2M1)
        return values, block_error(scaled - values * scale[..., None], metric)

    # strictly smaller wins
    first, *others = candidates
    best_scale, (best_values, best_error) = first, attempt(first)
    for scale in others:
        values, error = attempt(scale)
        better = error < best_error
        best_values = torch.where(better[..., None], values, best_values)
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return best_values, best_scale
