"""four_over_six: per block, map the maximum to 6 or to 4, whichever decodes closer to the input.

    s6 = e4m3(base), s4 = e4m3(1.5 * base)       scales aim at 256 at most, so that 1.5x still fits
    of a candidate s:  codes = e2m1(x S / s)
                       err   = sum (x S - codes * s)^2
    s  = s4 where err4 < err6, else s6

E2M1 has nothing between 4 and 6, so elements near 5/6 of the maximum fare badly on the usual scale;
with the maximum at 4 no step is wider than 1. It takes 16 % off rtn's squared error on N(0, 1).

``metric``: mse (default), mae (sum |e|) or abs_max (max |e|). Source: "Four Over Six", arXiv
2512.02010. ``best_candidate`` serves ``scale_search`` too, with more candidates.
"""

from __future__ import annotations

from nvfp4.numerics.formats import E4M3, TILE_BLOCK
from nvfp4.numerics.rounding import best_candidate, nearest
from nvfp4.quantizers.base import Blocks, Claims, Options, Quantized, Quantizer


def rule(blocks: Blocks) -> Quantized:
    """The better of the scales that map the block maximum to 6 and to 4."""
    scaled, base, global_scale = blocks.search_scales()
    candidates = (nearest(base, E4M3), nearest(1.5 * base, E4M3))
    values, block_scale = best_candidate(scaled, candidates, blocks.options.metric)
    return values, block_scale, global_scale


_RELATIVE_MSE = {"mse": 7.56e-3, "mae": 7.80e-3, "abs_max": 7.99e-3}
_RELATIVE_MSE_OF_TILES = {"mse": 12.37e-3, "mae": 12.40e-3, "abs_max": 15.39e-3}


def claims(options: Options) -> Claims:
    """No bound for one element: a smaller error of the block may cost one of its elements more."""
    table = _RELATIVE_MSE_OF_TILES if options.block == TILE_BLOCK else _RELATIVE_MSE
    return Claims(
        deterministic=True,
        unbiased=False,
        idempotent=False,
        max_error=None,
        relative_mse=table[options.metric],
        relative_mse_tolerance=0.06e-3 if options.metric == "abs_max" else 0.03e-3,
    )


FOUR_OVER_SIX = Quantizer(
    "four_over_six", rule, claims, frozenset({"block", "row_scaled", "metric"})
)
