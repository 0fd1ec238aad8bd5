"""rtn: round to nearest, TransformerEngine's rule; rtn_2d is the same on 16x16 tiles.

    base  = amax_block * S / 6         S brings the largest block scale to 448, the maximum of E4M3
    s     = e4m3(base)                 nearest
    m     = min(1 / (s * global_scale), FLT_MAX)
    codes = e2m1(x * m)                nearest

A block's maximum lands at 6, or up to 1/16 beside it where s was rounded; where s was rounded down,
what exceeds 6 is clipped, by up to 1/17 of itself. Deterministic, biased, cheap; relative MSE on
N(0, 1) 9.05e-3, with tiles 12.39e-3. Tiles make a matrix and its transpose share codes, which is
why weights use them.

Source: TransformerEngine, ``common/cast/nvfp4/core_nvfp4.cuh``; NVIDIA, "Pretraining LLMs with
NVFP4", arXiv 2509.25149.
"""

from __future__ import annotations

from nvfp4.numerics.formats import E2M1, ROW_BLOCK, TILE_BLOCK
from nvfp4.numerics.rounding import nearest
from nvfp4.quantizers.base import Blocks, Claims, Options, Quantized, Quantizer


def rule(blocks: Blocks) -> Quantized:
    """Nearest block scale, nearest codes."""
    block_scale, global_scale = blocks.nearest_scales()
    codes = nearest(blocks.scaled(block_scale, global_scale), E2M1)
    return codes, block_scale, global_scale


def claims(options: Options) -> Claims:
    """Half the widest gap of E2M1 is 1 of 6, which a scale rounded up widens by less than 17/16.

    A scale rounded down clips the maximum by up to 1/17, which is less.
    """
    tiles = options.block == TILE_BLOCK
    return Claims(
        deterministic=True,
        unbiased=False,
        idempotent=True,
        max_error=1 / 6 * 17 / 16,
        relative_mse=12.39e-3 if tiles else 9.05e-3,
        relative_mse_tolerance=0.04e-3 if tiles else 0.03e-3,
    )


RTN = Quantizer("rtn", rule, claims, frozenset({"block", "row_scaled"}), ROW_BLOCK)
RTN_2D = Quantizer("rtn_2d", rule, claims, frozenset(), TILE_BLOCK)
