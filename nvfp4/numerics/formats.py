"""Number formats as data: E2M1 elements, E4M3 block scales, and NVFP4, which is built from them.

    value = e2m1 * block_scale * global_scale

    element         E2M1, 4 bits: 0 .5 1 1.5 2 3 4 6 and signs
    block scale     E4M3, 8 bits, one per 16 elements along the contraction, or per 16x16 tile
    global scale    float32, one per tensor or per row

That is 4.5 bits per element, 4.03 with tiles. A format is a mantissa width, a smallest exponent and
a maximum: grids, rounding and codes are derived from these three and from nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT32_MAX = 3.4028234663852886e38
"""Largest finite float32, (2 - 2^-23) * 2^127 (IEEE 754); encode scales that overflow stop here."""


@dataclass(frozen=True)
class ElementFormat:
    """A signed floating-point format without infinities.

    A value with exponent e lies on a lattice of step ``2 ** (max(e, min_exponent) -
    mantissa_bits)``; everything that rounds or encodes is derived from that one sentence.
    """

    name: str
    bits: int
    mantissa_bits: int
    min_exponent: int
    """Exponent of the smallest normal number; below it the step stays constant (subnormals)."""
    max: float
    """Largest finite magnitude; rounding saturates here."""

    @property
    def bias(self) -> int:
        """The exponent field of a normal value with exponent e holds e + bias."""
        return 1 - self.min_exponent

    @property
    def grid(self) -> tuple[float, ...]:
        """The non-negative finite values in ascending order; the index of a value is its code."""
        # zero and the subnormals
        per_binade = 2**self.mantissa_bits
        values = [
            code * 2.0 ** (self.min_exponent - self.mantissa_bits) for code in range(per_binade)
        ]

        # the normals, binade by binade; the last may end before it is full
        exponent = self.min_exponent
        while values[-1] < self.max:
            step = 2.0 ** (exponent - self.mantissa_bits)
            values += [
                v for v in (2.0**exponent + i * step for i in range(per_binade)) if v <= self.max
            ]
            exponent += 1
        return tuple(values)


E2M1 = ElementFormat("e2m1", bits=4, mantissa_bits=1, min_exponent=0, max=6.0)
"""0, .5, 1, 1.5, 2, 3, 4, 6 with a sign in bit 3 (OCP Microscaling formats v1.0, section 5.3.3)."""

E4M3 = ElementFormat("e4m3fn", bits=8, mantissa_bits=3, min_exponent=-6, max=448.0)
"""FN variant: bias 7, no infinities, NaN is 0x7F (OCP 8-bit floating point, table 1).

Only its unsigned half is used.
"""


@dataclass(frozen=True)
class BlockFormat:
    """Elements that share a scale: value = element * block_scale * global_scale."""

    name: str
    element: ElementFormat
    scale: ElementFormat
    block_size: int
    """Elements along the contraction axis under one block scale."""


NVFP4 = BlockFormat("nvfp4", element=E2M1, scale=E4M3, block_size=16)

SIXTH = float.fromhex("0x1.555556p-3")
"""fl(1/6).

TransformerEngine multiplies by it where one would divide by 6, and the last bit of a scale depends
on that.
"""

ROW_BLOCK = (1, NVFP4.block_size)
"""One scale per 16 consecutive elements of a row, the shape the tensor cores consume."""
TILE_BLOCK = (NVFP4.block_size, NVFP4.block_size)
"""One scale per 16x16 tile, so that a matrix and its transpose share codes and scales."""

SEARCH_CAP = 256.0
"""Largest block scale that quantisers aim at which may enlarge it: 1.5 * 256 = 384 is below 448."""
