"""The rotation is the defined one bit for bit, and it is a rotation."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from assertions import assert_floats_bitwise

from nvfp4.numerics.hadamard import (
    GROUPS,
    NVIDIA_SIGNS,
    Rotation,
    fwht,
    nvidia_rotate,
    rotate,
    rotation_signs,
)

ALL = pytest.mark.parametrize(
    ("group", "rounds"), [(group, rounds) for group in GROUPS for rounds in (1, 2, 3)]
)


@pytest.mark.parametrize("group", GROUPS)
def test_signs_agree_with_the_oracle(group: int, seed: int) -> None:
    """The first bits of 128, bit 1 is minus; a round has its own."""
    for round_index in range(3):
        got = rotation_signs(seed, round_index, group)
        assert_floats_bitwise(got, oracle.signs(seed, round_index, group), f"round {round_index}")
    assert not torch.equal(rotation_signs(seed, 0, group), rotation_signs(seed, 1, group))


def test_nvidia_signs() -> None:
    """The fixed vector, as published."""
    assert list(NVIDIA_SIGNS) == oracle.NVIDIA_SIGNS.tolist()


@pytest.mark.parametrize("n", [16, 128])
def test_fwht_is_the_hadamard_matrix(n: int, rng: np.random.Generator) -> None:
    """Entry (i, j) is (-1)^popcount(i & j): Sylvester's matrix. Exact, since small integers are."""
    matrix = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)])
    x = torch.from_numpy(rng.integers(-100, 100, (5, n)).astype(np.float32))
    assert torch.equal(fwht(x), x @ matrix)


@ALL
def test_rotate_agrees_with_the_oracle(
    group: int, rounds: int, rng: np.random.Generator, seed: int
) -> None:
    """Bit for bit, with a length that is no multiple of the group, over all magnitudes.

    Where sums are denormal or overflow, one sees which of two rounds multiplies by which power of
    two. On a GPU whose sums run on tensor cores a rotation may differ in its last bits; those
    backends have a measured share of their own. Nothing here does.
    """
    x = (
        rng.uniform(-1, 1, (6, 2 * group + 5))
        * 2.0 ** np.array([[-146], [-140], [-20], [20], [120], [127]])
    ).astype(np.float32)
    got = rotate(torch.from_numpy(x), seed, rounds=rounds, group=group)
    assert_floats_bitwise(got, oracle.rotate(x, seed, rounds=rounds, group=group), "y")


@ALL
def test_rotation_is_orthonormal(group: int, rounds: int, seed: int) -> None:
    """R R^T = 1, the property that lets (A R)(B R)^T = A B^T stand in for A B^T.

    Exact where all factors are powers of two: an even number of rounds, or group = 2^p with p even.
    Then entries are multiples of 1/group and their products sum exactly. Otherwise the last factor
    is fl(2^(-p/2)), a relative error of 2^-24 in each row, 2^-23 in its square, and the sums of the
    butterflies may add 7 times 2^-24.
    """
    rotation = rotate(torch.eye(group), seed, rounds=rounds, group=group)
    product = (rotation.double() @ rotation.double().t()).float()
    exact = rounds % 2 == 0 or (group.bit_length() - 1) % 2 == 0
    assert (product - torch.eye(group)).abs().max() <= (0 if exact else 9 * 2**-24)


@ALL
def test_invert_undoes_apply(group: int, rounds: int, rng: np.random.Generator, seed: int) -> None:
    """On small integers: exactly where the factors are powers of two, else to the rounding of that
    one factor.

    fl(2^(-p/2)) is used forth and its reciprocal back; two float32 roundings of values that the
    butterflies add up
    log2(128) times: 16 * 2^-24 of the largest value covers them.
    """
    x = torch.from_numpy(rng.integers(-8, 9, (4, 2 * group)).astype(np.float32))
    rotation = Rotation(group, rounds, seed)
    back = rotation.invert(rotation.apply(x))
    exact = rounds % 2 == 0 or (group.bit_length() - 1) % 2 == 0
    assert (back - x).abs().max() <= (0 if exact else 8 * 16 * 2**-24)


def test_nvidia_rotation_agrees_with_the_oracle(rng: np.random.Generator) -> None:
    """Input and result rounded to BF16, times 1/4, fixed signs."""
    x = (rng.standard_normal((7, 48)) * 2.0 ** rng.integers(-20, 20, (7, 1))).astype(np.float32)
    assert_floats_bitwise(nvidia_rotate(torch.from_numpy(x)), oracle.nvidia_rotate(x), "y")
    assert_floats_bitwise(
        Rotation(16, fixed=True).apply(torch.from_numpy(x)), oracle.nvidia_rotate(x), "y"
    )


def test_nvidia_rotation_inverts(rng: np.random.Generator) -> None:
    """Small integers pass through BF16 unharmed, so its inverse is exact on them."""
    x = torch.from_numpy(rng.integers(-2, 3, (4, 32)).astype(np.float32))
    rotation = Rotation(16, fixed=True)
    assert torch.equal(rotation.invert(rotation.apply(x)), x)


def test_rotate_works_on_any_axis_and_rank(rng: np.random.Generator, seed: int) -> None:
    """The named axis is rotated and padded; the others keep their places."""
    x = torch.from_numpy(rng.standard_normal((3, 20, 4)).astype(np.float32))
    got = rotate(x, seed, group=16, axis=1)
    assert got.shape == (3, 32, 4)
    flat = x.movedim(1, -1).reshape(12, 20).contiguous().numpy()
    want = torch.from_numpy(oracle.rotate(flat, seed, group=16)).view(3, 4, 32).movedim(-1, 1)
    assert_floats_bitwise(got, want, "y")


def test_groups_do_not_touch_each_other(rng: np.random.Generator, seed: int) -> None:
    """A NaN, or the overflow of huge values, stays in its group of its row."""
    x = rng.standard_normal((3, 384)).astype(np.float32)
    x[0, 130] = np.nan
    x[2, 256:] = 3e38
    y = rotate(torch.from_numpy(x), seed).view(3, 3, 128)
    assert y[0, 1].isnan().all()
    assert not y[2, 2].isfinite().all()
    y[0, 1], y[2, 2] = 0, 0
    assert y.isfinite().all()


def test_bad_arguments_are_refused() -> None:
    """Groups, rounds and seeds outside what is defined."""
    x = torch.zeros(2, 128)
    with pytest.raises(ValueError, match="group must be one of"):
        rotate(x, 0, group=256)
    with pytest.raises(ValueError, match="rounds must be"):
        rotate(x, 0, rounds=4)
    with pytest.raises(ValueError, match="sign_seed must be an integer"):
        rotate(x, -1)
    with pytest.raises(ValueError, match="fixed rotation"):
        Rotation(128, fixed=True)
    with pytest.raises(ValueError, match="give it a sign_seed"):
        Rotation(128).apply(x)
