"""Grid values to codes and back, and the packing of two E2M1 codes into a byte.

    E2M1   0 .5 1 1.5 2 3 4 6 and signs  <->  codes 0..15, bit 3 the sign
           codes [..., K]                <->  bytes [..., K/2], the even column in the low nibble
    E4M3   0 .. 448, unsigned            <->  bytes 0..126; 127 is NaN

Encoding expects values that are on the grid already (``rounding`` puts them there) and then loses
nothing. Decoding looks values up in a table of the format, so that it is exact by construction.
"""

from __future__ import annotations

import torch

from nvfp4.numerics.formats import E2M1, E4M3
from nvfp4.numerics.torch_state import constant

# values by code
_E2M1_VALUES = (*E2M1.grid, *(-value for value in E2M1.grid))
_E4M3_VALUES = (*E4M3.grid, float("nan"))


def e2m1_encode(values: torch.Tensor) -> torch.Tensor:
    """Codes 0..15 of float32 values on the E2M1 grid, uint8 of the same shape.

    Bit 3 is the sign, -0 is code 8. The magnitude code is min(2a, a + 2, a/2 + 4): one line
    each for steps of .5, 1 and 2, and the code is concave in the value, so the least is right.
    Values off the grid are undefined; round first.
    """
    a = values.abs()
    code = torch.minimum(torch.minimum(a * 2, a + 2), a * 0.5 + 4)
    return code.to(torch.uint8).add_(values.signbit(), alpha=8)


def e2m1_decode(codes: torch.Tensor) -> torch.Tensor:
    """Float32 values of codes 0..15 (integers of any shape); code 8 is -0."""
    return constant(_E2M1_VALUES, codes.device)[codes.to(torch.int32)]


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [..., K], K even, to bytes uint8 [..., K/2].

    Byte j holds column 2j in its low nibble and column 2j + 1 in its high one.
    """
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Bytes uint8 [..., K/2] to codes uint8 [..., K]; the inverse of ``pack``."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def e4m3_encode(values: torch.Tensor) -> torch.Tensor:
    """Bytes of non-negative float32 values on the E4M3 grid, uint8 of the same shape.

    Read off the float32 bits, so it also works where the hardware has no FP8: normals keep exponent
    and three mantissa bits with the bias changed, subnormals are a count of steps. Values off the
    grid are undefined; round first.
    """
    # a normal: float32's exponent and its first three mantissa bits, with the bias changed
    bits = values.view(torch.int32)
    normal = (bits >> 20) - ((127 - E4M3.bias) << E4M3.mantissa_bits)

    # a subnormal: how many steps of 2^-9
    subnormal = (values * 2.0 ** (E4M3.mantissa_bits - E4M3.min_exponent)).to(torch.int32)
    return torch.where(values < 2.0**E4M3.min_exponent, subnormal, normal).to(torch.uint8)


def e4m3_decode(codes: torch.Tensor) -> torch.Tensor:
    """Float32 values of E4M3 bytes 0..126 (uint8 of any shape); 127 is NaN.

    NVFP4 does not use the sign bit.
    """
    return constant(_E4M3_VALUES, codes.device)[codes.to(torch.int32)]
