"""The swizzled layout puts each scale where the tensor core reads it, and zeros elsewhere."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from assertions import assert_bytes_equal

from nvfp4.numerics.layout import swizzle, swizzled_offset

SHAPES = [(1, 1), (1, 4), (128, 4), (129, 5), (127, 3), (33, 1), (200, 7), (256, 12), (300, 9)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_swizzle_agrees_with_the_oracle(rows: int, columns: int, rng: np.random.Generator) -> None:
    """Every byte of it, padding included; scales are drawn from 1..126 so that a lost one cannot
    pass for padding."""
    scales = rng.integers(1, 127, (rows, columns), dtype=np.uint8)
    got = swizzle(torch.from_numpy(scales))
    assert got.numel() == 512 * -(-rows // 128) * -(-columns // 4)
    assert_bytes_equal(got, oracle.swizzle(scales), "swizzled")
    assert int((got == 0).sum()) == got.numel() - rows * columns


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_offsets_agree_with_the_oracle_and_are_distinct(rows: int, columns: int) -> None:
    """The formula for one scale and the permutation of all of them are the same map."""
    offsets = [swizzled_offset(r, c, columns) for r in range(rows) for c in range(columns)]
    assert offsets == [
        oracle.swizzle_offset(r, c, columns) for r in range(rows) for c in range(columns)
    ]
    assert len(set(offsets)) == rows * columns


def test_swizzle_takes_a_view(rng: np.random.Generator) -> None:
    """The scales of a transposed weight are a view; strides do not matter."""
    scales = torch.from_numpy(rng.integers(1, 127, (9, 140), dtype=np.uint8))
    assert_bytes_equal(
        swizzle(scales.t()), oracle.swizzle(scales.t().contiguous().numpy()), "swizzled"
    )
