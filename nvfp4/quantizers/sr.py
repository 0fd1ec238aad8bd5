"""sr: stochastic rounding that never clips, hence unbiased; sr_te: NVIDIA's, slightly biased.

    sr       s = e4m3_up(base)    codes = e2m1_stochastic(x * m)
    sr_te    s = e4m3(base)       codes = e2m1_stochastic(x * m)

base and m as in rtn. Stochastic rounding is right on average as long as nothing is clipped. A scale
rounded up keeps every |x * m| <= 6, so sr is unbiased, to 2^-17 of a step, for every block whose
scale does not underflow. A scale rounded down to nearest clips the maximum of its block by up to
1/17, which makes sr_te slightly biased. The price of sr is a wider step: relative MSE on N(0, 1)
22.22e-3, sr_te 18.87e-3 (rtn 9.05e-3).

Sources: sr is ours; sr_te is TransformerEngine's gradient quantiser (arXiv 2509.25149,
section 4).
"""

from __future__ import annotations

from nvfp4.numerics.formats import E2M1, E4M3, TILE_BLOCK
from nvfp4.numerics.rounding import stochastic, up
from nvfp4.numerics.scaling import base_scale, encode_scale
from nvfp4.quantizers.base import Blocks, Claims, Options, Quantized, Quantizer


def rule(blocks: Blocks) -> Quantized:
    """Block scale rounded up, stochastic codes."""
    block_amax = blocks.amax()
    encode = encode_scale(blocks.scaled_by(block_amax), E4M3.max)

    # up, so that no element is clipped
    block_scale, global_scale = up(base_scale(block_amax, encode), E4M3), 1 / encode
    scaled = blocks.scaled(block_scale, global_scale)
    return stochastic(scaled, E2M1, blocks.element_noise()), block_scale, global_scale


def rule_te(blocks: Blocks) -> Quantized:
    """Nearest block scale, stochastic codes."""
    block_scale, global_scale = blocks.nearest_scales()
    scaled = blocks.scaled(block_scale, global_scale)
    return stochastic(scaled, E2M1, blocks.element_noise()), block_scale, global_scale


def claims(options: Options) -> Claims:
    """A whole gap is at most 2 of 6; a scale rounded up widens it by at most 9/8.

    The MSE on N(0, 1) is as measured.
    """
    return Claims(
        deterministic=False,
        unbiased=True,
        idempotent=False,
        max_error=1 / 3 * 9 / 8,
        relative_mse=26.33e-3 if options.block == TILE_BLOCK else 22.22e-3,
        relative_mse_tolerance=0.1e-3,
    )


def claims_te(options: Options) -> Claims:
    """A whole gap is at most 2 of 6; a scale rounded to nearest widens it by less than 17/16."""
    return Claims(
        deterministic=False,
        unbiased=False,
        idempotent=False,
        max_error=1 / 3 * 17 / 16,
        relative_mse=25.28e-3 if options.block == TILE_BLOCK else 18.87e-3,
        relative_mse_tolerance=0.06e-3,
    )


SR = Quantizer("sr", rule, claims, frozenset({"block", "row_scaled"}))
SR_TE = Quantizer("sr_te", rule_te, claims_te, frozenset({"block", "row_scaled"}))
