"""The formats are what their documents say, and the one fact on which all emulation stands is
checked exhaustively."""

from __future__ import annotations

import oracle
import pytest
import torch
from assertions import assert_floats_bitwise

from nvfp4.numerics.formats import (
    E2M1,
    E4M3,
    FLOAT32_MAX,
    NVFP4,
    ROW_BLOCK,
    SEARCH_CAP,
    TILE_BLOCK,
    ElementFormat,
)


@pytest.mark.parametrize(
    ("fmt", "grid"), [(E2M1, oracle.E2M1), (E4M3, oracle.E4M3)], ids=["e2m1", "e4m3"]
)
def test_grid_holds_every_value_in_code_order(fmt: ElementFormat, grid: oracle.Grid) -> None:
    """The grid derived from (mantissa bits, smallest exponent, maximum) is the grid enumerated code
    by code."""
    assert_floats_bitwise(torch.tensor(fmt.grid), grid.values, fmt.name)
    assert fmt.max == fmt.grid[-1]


def test_e4m3_grid_is_torch_float8() -> None:
    """A third opinion, which neither the package nor the oracle wrote: torch's own
    float8_e4m3fn."""
    bytes_ = torch.arange(127, dtype=torch.uint8)
    assert_floats_bitwise(torch.tensor(E4M3.grid), bytes_.view(torch.float8_e4m3fn).float(), "e4m3")


@pytest.mark.parametrize("fmt", [E2M1, E4M3], ids=lambda fmt: fmt.name)
def test_format_fields_fit_together(fmt: ElementFormat) -> None:
    """bits = sign + exponent + mantissa, and the exponent bias follows from the smallest normal
    number."""
    exponent_bits = fmt.bits - 1 - fmt.mantissa_bits
    assert fmt.bias == 2 ** (exponent_bits - 1) - 1
    assert fmt.grid[1] == 2.0 ** (fmt.min_exponent - fmt.mantissa_bits)
    assert fmt.grid[2**fmt.mantissa_bits] == 2.0**fmt.min_exponent


def test_block_format() -> None:
    """16 elements share a scale; a tile spans as many rows; the search cap leaves room for a scale
    1.5 times larger."""
    assert (NVFP4.element, NVFP4.scale, NVFP4.block_size) == (E2M1, E4M3, 16)
    assert ROW_BLOCK == (1, 16)
    assert TILE_BLOCK == (16, 16)
    assert E4M3.max >= 1.5 * SEARCH_CAP
    assert torch.finfo(torch.float32).max == FLOAT32_MAX


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_element_times_every_scale_is_exact(dtype: torch.dtype) -> None:
    """All 16 x 127 products survive BF16 and FP16, so a 16-bit GEMM with float32 accumulation *is*
    the FP4 GEMM.

    The product is computed in double (4 + 2 significant bits), converted, and required to come back
    unchanged; the product computed *in* the narrow type must be the same number.
    """
    elements = torch.from_numpy(oracle.e2m1_value(torch.arange(16, dtype=torch.uint8).numpy()))
    scales = torch.from_numpy(oracle.E4M3.values)
    exact = elements.double()[:, None] * scales.double()[None, :]
    assert exact.shape == (16, 127)
    assert torch.equal(exact.to(dtype).double(), exact)
    assert torch.equal((elements.to(dtype)[:, None] * scales.to(dtype)[None, :]).double(), exact)
