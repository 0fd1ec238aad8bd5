"""The quantisers by name: one line each.

A new one is a file beside this and a line here. It then works on every device (kernels that do not
know it leave it to the reference), in recipes and in ``convert``, and tests and benchmarks take it
up: the property tests hold it to its claims.
"""

from __future__ import annotations

from nvfp4.quantizers.base import Quantizer
from nvfp4.quantizers.four_over_six import FOUR_OVER_SIX
from nvfp4.quantizers.ms_eden import MS_EDEN
from nvfp4.quantizers.rtn import RTN, RTN_2D
from nvfp4.quantizers.scale_search import SCALE_SEARCH
from nvfp4.quantizers.sr import SR, SR_TE

QUANTIZERS: dict[str, Quantizer] = {
    quantizer.name: quantizer
    for quantizer in (
        RTN,
        RTN_2D,
        SR,
        SR_TE,
        FOUR_OVER_SIX,
        SCALE_SEARCH,
        MS_EDEN,
    )
}


def get_quantizer(name: str) -> Quantizer:
    """The quantiser of that name; ValueError lists the known names."""
    if name not in QUANTIZERS:
        raise ValueError(f"unknown quantizer {name!r}; known: {', '.join(QUANTIZERS)}")
    return QUANTIZERS[name]
