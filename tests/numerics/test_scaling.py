"""Blocks, sums and scales, each against the oracle's one-block version of it."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from assertions import assert_floats_bitwise

from nvfp4.numerics.formats import FLOAT32_MAX
from nvfp4.numerics.scaling import (
    base_scale,
    encode_scale,
    from_blocks,
    spread,
    tensor_amax,
    to_blocks,
    tree_sum,
)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 32])
def test_tiles_are_row_major_and_filled_with_zeros(rows: int, rng: np.random.Generator) -> None:
    """Tile (i, j) holds rows 16 i ... 16 i + 15 and columns 16 j ... 16 j + 15, row by row; missing
    rows are 0."""
    x = rng.standard_normal((rows, 48)).astype(np.float32)
    blocks = to_blocks(torch.from_numpy(x), (16, 16))
    padded = np.zeros((-(-rows // 16) * 16, 48), np.float32)
    padded[:rows] = x
    for i in range(padded.shape[0] // 16):
        for j in range(3):
            tile = padded[16 * i : 16 * i + 16, 16 * j : 16 * j + 16]
            assert_floats_bitwise(blocks[i, j], tile.ravel(), f"tile {i}, {j}")
    assert_floats_bitwise(from_blocks(blocks, (16, 16), rows), x, "x")


def test_row_blocks_round_trip(rng: np.random.Generator) -> None:
    """1x16 blocks are the row itself."""
    x = torch.from_numpy(rng.standard_normal((5, 64)).astype(np.float32))
    blocks = to_blocks(x, (1, 16))
    assert_floats_bitwise(blocks[3, 2], x[3, 32:48], "block")
    assert_floats_bitwise(from_blocks(blocks, (1, 16), 5), x, "x")


@pytest.mark.parametrize("n", [16, 256])
def test_tree_sum_adds_in_the_defined_order(n: int, rng: np.random.Generator) -> None:
    """Bit for bit, on numbers whose sum depends on the order: another pairing gives another result
    (checked)."""
    x = (rng.standard_normal((200, n)) * 2.0 ** rng.integers(-12, 12, (200, n))).astype(np.float32)
    want = np.array([oracle.tree(row) for row in x])
    assert_floats_bitwise(tree_sum(torch.from_numpy(x)), want, "tree")
    neighbours = x
    while neighbours.shape[1] > 1:
        neighbours = neighbours[:, 0::2] + neighbours[:, 1::2]
    assert (neighbours[:, 0] != want).any(), "these numbers cannot tell one order from another"


@pytest.mark.parametrize("cap", [448, 256])
def test_scales_agree_with_the_oracle(cap: int, rng: np.random.Generator) -> None:
    """S, 1/S and base over every exponent of float32: denormal maxima (S clamped), the largest
    ones, and 0 (S = 1)."""
    bits = rng.integers(0, 0x7F800000, 4000, dtype=np.uint32)
    amax = np.concatenate(
        [bits.view(np.float32), np.array([0, 2**-149, 2**-126, 2**-116.5, FLOAT32_MAX], np.float32)]
    )
    with np.errstate(over="ignore", divide="ignore"):
        want = np.array([oracle.encode_scale(a, cap) for a in amax])
        inverse = np.float32(1) / want
        blocks = [
            oracle.Block(np.array([a]), amax.copy, s, s) for a, s in zip(amax, want, strict=True)
        ]
        base = np.array([block.base for block in blocks])
    got = encode_scale(torch.from_numpy(amax), cap)
    assert_floats_bitwise(got, want, "S")
    assert_floats_bitwise(1 / got, inverse, "global scale")
    assert_floats_bitwise(base_scale(torch.from_numpy(amax), got), base, "base")


def test_base_of_a_block_far_above_its_tensor_saturates() -> None:
    """Not reachable from data, where no block exceeds its tensor; but no scale may become Inf."""
    assert base_scale(torch.tensor([3e38]), torch.tensor([3e38])).item() == FLOAT32_MAX


def test_tensor_amax_of_tensor_and_rows() -> None:
    """One number for the tensor, one for each row when row-scaled; either broadcasts over the
    blocks."""
    block_amax = torch.tensor([[1.0, 5.0], [3.0, 2.0]])
    assert tensor_amax(block_amax, row_scaled=False).tolist() == [[5.0]]
    assert tensor_amax(block_amax, row_scaled=True).tolist() == [[5.0], [3.0]]


def test_spread_repeats_tile_scales_to_rows() -> None:
    """Row r reads the scale of tile row r div 16, a last tile may have fewer rows; 1x16 scales stay
    as they are."""
    scales = torch.arange(6, dtype=torch.uint8).view(2, 3)
    got = spread(scales, (16, 16), 20)
    assert torch.equal(got[:16], scales[:1].expand(16, 3))
    assert torch.equal(got[16:], scales[1:].expand(4, 3))
    assert torch.equal(spread(scales, (1, 16), 2), scales)
