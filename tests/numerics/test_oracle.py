"""The oracle is right: it agrees with every worked case, with the published vectors of Philox, and
with integers.

The worked cases were made from the same text by a program that shares no code with this one, so a
misreading would have to be made twice.
"""

from __future__ import annotations

import ast
import math
from pathlib import Path

import numpy as np
import oracle
import pytest
from assertions import assert_bytes_equal, assert_floats_bitwise, assert_qtensor_equal

FILES = oracle.VECTOR_FILES
CASES = [
    pytest.param(path, case, id=f"{path.stem}-{case}")
    for path in FILES
    for case in oracle.vectors(path).cases
]


def test_the_vector_files_are_there_and_hold_every_rule() -> None:
    """An empty glob would make every parametrised test below pass by not existing."""
    assert len(FILES) == 3
    assert len(CASES) == 23 + 23 + 15
    rules = {
        rule
        for vectors in map(oracle.vectors, FILES)
        for case in vectors.cases
        for rule in vectors.rules(case)
    }
    rotations = {"rotate_1", "rotate_2", "rotate_3", "nvidia_rotate"}
    assert rules == set(oracle.WORKED_CASES) | rotations | {
        "sr_transposed",
        "requantised_transposed",
    }


@pytest.mark.parametrize(("path", "case"), CASES)
def test_oracle_agrees_with_the_worked_case(path: Path, case: str) -> None:
    """Every rule of the case, bit for bit."""
    vectors = oracle.vectors(path)
    x = vectors.x(case)
    seeds = {"seed": vectors.seed, "sign_seed": vectors.sign_seed}
    for rule in vectors.rules(case):
        if rule.startswith("rotate_"):
            y = oracle.rotate(x, vectors.sign_seed, rounds=int(rule[-1]))
            assert_floats_bitwise(y, vectors.arrays[f"{case}/{rule}/y"], rule)
        elif rule == "nvidia_rotate":
            assert_floats_bitwise(oracle.nvidia_rotate(x), vectors.arrays[f"{case}/{rule}/y"], rule)
        elif rule == "sr_transposed":
            q = oracle.quantize(np.ascontiguousarray(x.T), "sr", **seeds)
            assert_qtensor_equal(q, vectors.want(case, rule), rule)
        elif rule == "requantised_transposed":
            saved = oracle.decode(*oracle.quantize(x, "four_over_six"), x.shape[1])
            q = oracle.quantize(np.ascontiguousarray(saved.T), "ms_eden", rounds=2, **seeds)
            assert_qtensor_equal(q, vectors.want(case, rule), rule)
        else:
            name, options = oracle.WORKED_CASES[rule]
            assert_qtensor_equal(
                oracle.quantize(x, name, **options, **seeds), vectors.want(case, rule), rule
            )


@pytest.mark.parametrize("path", FILES[:2], ids=lambda path: path.stem)
def test_oracle_agrees_with_the_worked_seeds_and_offsets(path: Path) -> None:
    """fold_in over three data, and the swizzled offset of every scale of a 200 x 7 matrix."""
    arrays = oracle.vectors(path).arrays
    folded = [oracle.fold_in(*data) for data in arrays["fold_in/data"].tolist()]
    assert folded == arrays["fold_in/out"].tolist()
    rows, columns = arrays["swizzle/rows_cols"].tolist()
    offsets = [[oracle.swizzle_offset(r, c, columns) for c in range(columns)] for r in range(rows)]
    assert_bytes_equal(np.array(offsets, np.int64), arrays["swizzle/offset"], "offset")


# Known-answer vectors of philox4x32 with 10 rounds, published with Random123 (kat_vectors):
# counter, key, output.
PHILOX_KNOWN_ANSWERS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "output"), PHILOX_KNOWN_ANSWERS)
def test_philox_known_answers(counter: tuple, key: tuple, output: tuple) -> None:
    """Zeros, ones and the digits of pi."""
    assert oracle.philox4x32(key, counter) == output


def _nearest_by_integers(x: float, grid: list[float]) -> int:
    """The code at the smallest exact distance, of two the even one; in units of 2^-149 every
    float32 is an integer."""
    distance = [abs(int(math.ldexp(x, 149)) - int(math.ldexp(value, 149))) for value in grid]
    best = [code for code, d in enumerate(distance) if d == min(distance)]
    return best[0] if len(best) == 1 else next(code for code in best if code % 2 == 0)


@pytest.mark.parametrize("grid", [oracle.E2M1, oracle.E4M3], ids=["e2m1", "e4m3"])
def test_nearest_is_the_nearest_in_exact_arithmetic(
    grid: oracle.Grid, rng: np.random.Generator
) -> None:
    """On values, midpoints, their float32 neighbours and random numbers, the search agrees with
    integers."""
    values = grid.values.tolist()
    points = np.concatenate([grid.values, grid.midpoints])
    points = np.concatenate(
        [points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(0))]
    )
    points = np.concatenate([points, rng.uniform(0, values[-1] * 1.1, 200).astype(np.float32)])
    found = oracle._nearest(grid, points).tolist()
    assert found == [_nearest_by_integers(x, values) for x in points.tolist()]


def test_constants() -> None:
    """The quotient 6 / 0.988125 in exact decimal, and the largest E4M3 number."""
    assert float(oracle.EDEN_GRID_MAX).hex() == "0x1.849d640000000p+2"
    assert float(oracle.e4m3_value(126)) == 448.0
    assert len(oracle.E4M3.values) == 127


def test_bf16_rounds_to_nearest_even() -> None:
    """A BF16 number is kept; half way goes to the even mantissa; a carry may reach the exponent."""
    x = np.array(
        [1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 2 - 2**-9, -(1 + 2**-8), -0.0],
        np.float32,
    )
    want = np.array([1.0, 1.0, 1 + 2**-6, 1 + 2**-7, 2.0, -1.0, -0.0], np.float32)
    assert_floats_bitwise(oracle.bf16(x), want, "bf16")


def test_oracle_imports_nothing_it_judges() -> None:
    """Neither nvfp4 nor torch."""
    tree = ast.parse(Path(oracle.__file__).read_text())
    modules = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    ]
    modules += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {module.split(".")[0] for module in modules} == {
        "__future__",
        "functools",
        "math",
        "collections",
        "fractions",
        "pathlib",
        "typing",
        "numpy",
    }
