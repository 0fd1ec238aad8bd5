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

from collections.abc import Iterable

import torch

from nvfp4.numerics.formats import E2M1, E4M3, SEARCH_CAP, TILE_BLOCK
from nvfp4.numerics.rounding import nearest
from nvfp4.numerics.scaling import base_scale, encode_scale, tree_sum
from nvfp4.quantizers.base import Blocks, Claims, Options, Quantized, Quantizer


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


def search_scales(blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x S, base, global scale) with the cap that leaves room to enlarge a block scale."""
    block_amax = blocks.amax()
    encode = encode_scale(blocks.scaled_by(block_amax), SEARCH_CAP)
    return blocks.values * encode[..., None], base_scale(block_amax, encode), 1 / encode


def rule(blocks: Blocks) -> Quantized:
    """The better of the scales that map the block maximum to 6 and to 4."""
    scaled, base, global_scale = search_scales(blocks)
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
