"""What rounding promises, proved on whole sets instead of samples.

nearest: the nearest grid value, ties to the even code, magnitudes saturate, the sign survives (also
of -0), NaN stays.
up: the smallest grid value not below. stochastic: floor(|x| / step + u) steps, so that exactly
representable values never move and everything else is unbiased to 2^-17 of a step, over the 2^16
noise values there are.
"""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from assertions import assert_floats_bitwise, assert_unbiased_by_counting

from nvfp4.numerics.formats import E2M1, E4M3, ElementFormat
from nvfp4.numerics.rounding import nearest, stochastic, up

FORMATS = pytest.mark.parametrize(
    ("fmt", "grid"), [(E2M1, oracle.E2M1), (E4M3, oracle.E4M3)], ids=["e2m1", "e4m3"]
)
ALL_NOISE = (torch.arange(2**16, dtype=torch.float32) + 0.5) / 2**16


def all_bf16() -> torch.Tensor:
    """Every BF16 number but the NaNs, denormals, -0 and both Infs included, as float32."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    return x[~x.isnan()]


def edges(grid: oracle.Grid) -> torch.Tensor:
    """Every value and midpoint of a grid with both float32 neighbours of each: where one bit
    decides."""
    points = np.concatenate([grid.values, grid.midpoints])
    below, above = np.nextafter(points, np.float32(0)), np.nextafter(points, np.float32(np.inf))
    return torch.from_numpy(np.concatenate([points, below, above]))


def random_bits(rng: np.random.Generator, count: int = 2**16) -> torch.Tensor:
    """Uniform float32 bit patterns without NaN: every exponent is as likely as any other."""
    x = torch.from_numpy(rng.integers(0, 2**32, count, dtype=np.uint32).view(np.float32).copy())
    return x[~x.isnan()]


def values_of(grid: oracle.Grid, codes: np.ndarray, x: torch.Tensor) -> torch.Tensor:
    """The signed values of unsigned codes."""
    return torch.from_numpy(grid.values[codes]).copysign(x)


@FORMATS
def test_nearest_on_all_bf16(fmt: ElementFormat, grid: oracle.Grid) -> None:
    """All 65536 BF16 inputs, Inf (which saturates) and -0 (which stays -0) included."""
    x = all_bf16()
    want = values_of(grid, oracle._nearest(grid, x.abs().numpy()), x)
    assert_floats_bitwise(nearest(x, fmt), want, fmt.name)


@FORMATS
def test_nearest_at_every_edge(
    fmt: ElementFormat, grid: oracle.Grid, rng: np.random.Generator
) -> None:
    """Each value and midpoint, one float32 step to either side, both signs, and random bits over
    all exponents."""
    x = torch.cat([edges(grid), -edges(grid), random_bits(rng)])
    want = values_of(grid, oracle._nearest(grid, x.abs().numpy()), x)
    assert_floats_bitwise(nearest(x, fmt), want, fmt.name)


TIES = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}
"""Half way between two E2M1 numbers the one with the even code wins, so not always the larger one,
nor the smaller."""


@pytest.mark.parametrize("sign", [1, -1])
def test_e2m1_ties(sign: int) -> None:
    """The table, both signs."""
    x = torch.tensor(list(TIES)) * sign
    assert_floats_bitwise(nearest(x, E2M1), torch.tensor(list(TIES.values())) * sign, "tie")


@FORMATS
def test_up_is_the_smallest_value_not_below(
    fmt: ElementFormat, grid: oracle.Grid, rng: np.random.Generator
) -> None:
    """All non-negative BF16 inputs, every edge, random bits: never below the input unless that
    exceeds the maximum."""
    x = torch.cat([all_bf16(), edges(grid), random_bits(rng)]).abs()
    codes = np.minimum(grid.values.searchsorted(x.numpy(), "left"), len(grid.values) - 1)
    got = up(x, fmt)
    assert_floats_bitwise(got, grid.values[codes], fmt.name)
    assert ((got >= x) | (x > fmt.max)).all()


@FORMATS
def test_stochastic_is_the_floor_of_the_definition(
    fmt: ElementFormat, grid: oracle.Grid, rng: np.random.Generator
) -> None:
    """Bit for bit on all BF16 inputs, every edge and random bits, under random noise and under the
    extremes of it."""
    x = torch.cat([all_bf16(), edges(grid), -edges(grid), random_bits(rng)])
    for k in (0, 2**16 - 1, rng.integers(0, 2**16, len(x))):
        u = torch.as_tensor(
            (np.broadcast_to(k, len(x)) + np.float32(0.5)) / 2**16, dtype=torch.float32
        )
        want = values_of(grid, oracle._stochastic(grid, x.abs().numpy(), u.numpy()), x)
        assert_floats_bitwise(stochastic(x, fmt, u), want, fmt.name)


@FORMATS
def test_stochastic_is_unbiased_in_every_cell(
    fmt: ElementFormat, grid: oracle.Grid, rng: np.random.Generator
) -> None:
    """Counting, not sampling: of all 65536 noise values, as many round up as the position in the
    cell says.

    17 positions a cell, the ends of the first and the last 2^-17 of it among them, in every cell of
    the grid.
    """
    fractions = np.concatenate([[2**-17, 2**-16, 0.5, 1 - 2**-16], rng.uniform(0, 1, 13)]).astype(
        np.float32
    )
    for low, step in zip(grid.values[:-1], grid.steps[:-1], strict=True):
        x = torch.from_numpy(low + fractions * step)
        rounded = stochastic(x[:, None].expand(-1, 2**16), fmt, ALL_NOISE.expand(len(x), -1))
        is_up = rounded == float(low + step)
        assert (is_up | (rounded == float(low))).all(), f"{fmt.name} {low}: left its cell"
        inside = (x.double() - float(low)) / float(step)
        assert_unbiased_by_counting(is_up.sum(1), inside, f"{fmt.name} cell above {low}")


@FORMATS
def test_stochastic_never_moves_a_grid_value(fmt: ElementFormat, grid: oracle.Grid) -> None:
    """Every grid value under every noise value; beyond the maximum, the maximum."""
    x = torch.from_numpy(np.append(grid.values, np.float32(np.inf)))
    want = x.clamp(max=fmt.max)
    rounded = stochastic(x[:, None].expand(-1, 2**16), fmt, ALL_NOISE.expand(len(x), -1))
    assert torch.equal(rounded, want[:, None].expand_as(rounded))


@FORMATS
def test_nan_stays_nan(fmt: ElementFormat, grid: oracle.Grid) -> None:
    """Nothing hides a NaN; the quantisers rely on having looked for it before."""
    x = torch.full((4,), float("nan"))
    assert nearest(x, fmt).isnan().all()
    assert up(x, fmt).isnan().all()
    assert stochastic(x, fmt, torch.full((4,), 0.5)).isnan().all()


def test_inputs_are_left_alone() -> None:
    """The functions work in place on their own copies only."""
    x, u = torch.tensor([0.3, -7.0, 2.5]), torch.full((3,), 0.25)
    before = x.clone(), u.clone()
    nearest(x, E2M1), up(x.abs(), E2M1), stochastic(x, E2M1, u)
    assert torch.equal(x, before[0])
    assert torch.equal(u, before[1])
