"""The package computes every worked case bit for bit: 3 files, 23 or 15 cases, up to 26 rules each.

Their names: docs/numerics.md, section 9.

The cases hold ragged shapes, NaN, Inf, zero and underflowing scales, denormals, -0, ties, and a
rotation that overflows although its input is finite. A rule that is right here and wrong elsewhere
is looked for in test_quantizers.py.
"""

from __future__ import annotations

from pathlib import Path

import oracle
import pytest
import torch
from assertions import assert_floats_bitwise, assert_qtensor_equal

from nvfp4.numerics.hadamard import nvidia_rotate, rotate
from nvfp4.numerics.layout import swizzled_offset
from nvfp4.numerics.rng import fold_in
from nvfp4.ops import dequantize, quantize

FILES = oracle.VECTOR_FILES
PAIRS = [
    pytest.param(path, rule, id=f"{path.stem}-{rule}")
    for path in FILES
    for rule in sorted(
        {rule for case in oracle.vectors(path).cases for rule in oracle.vectors(path).rules(case)}
    )
]


def pad_to(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """nvidia_rotate leaves padding to its caller."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % multiple))


@pytest.mark.parametrize(("path", "rule"), PAIRS)
def test_package_agrees_with_the_worked_cases(
    path: Path, rule: str, backend: str, device: str
) -> None:
    """One rule over all cases of a file, on every backend."""
    vectors = oracle.vectors(path)
    common = {"seed": vectors.seed, "sign_seed": vectors.sign_seed, "backend": backend}
    cases = [case for case in vectors.cases if rule in vectors.rules(case)]
    assert len(cases) >= len(vectors.cases) - 2, (
        "NaN and Inf cases have no rotation; every other case has every rule"
    )
    for case in cases:
        x = torch.from_numpy(vectors.x(case)).to(device)
        if rule.startswith("rotate_"):
            y = rotate(x, vectors.sign_seed, rounds=int(rule[-1]))
            assert_floats_bitwise(y, vectors.arrays[f"{case}/{rule}/y"], f"{case} {rule}")
            continue
        if rule == "nvidia_rotate":
            y = nvidia_rotate(pad_to(x, 16))
            assert_floats_bitwise(y, vectors.arrays[f"{case}/{rule}/y"], f"{case} {rule}")
            continue
        if rule == "sr_transposed":
            q = quantize(x, "sr", axis=0, **common)
        elif rule == "requantised_transposed":
            saved = quantize(x, "four_over_six", backend=backend)
            q = quantize(dequantize(saved, backend=backend), "ms_eden", axis=0, rounds=2, **common)
        else:
            name, options = oracle.WORKED_CASES[rule]
            q = quantize(x, name, **options, **common)
        assert_qtensor_equal(q, vectors.want(case, rule), f"{case} {rule}")


@pytest.mark.parametrize("path", FILES[:2], ids=lambda path: path.stem)
def test_package_agrees_with_the_worked_seeds_and_offsets(path: Path) -> None:
    """fold_in over three data, and the swizzled offset of every scale of a 200 x 7 matrix."""
    arrays = oracle.vectors(path).arrays
    folded = [fold_in(*data) for data in arrays["fold_in/data"].tolist()]
    assert folded == arrays["fold_in/out"].tolist()
    rows, columns = arrays["swizzle/rows_cols"].tolist()
    offsets = [[swizzled_offset(r, c, columns) for c in range(columns)] for r in range(rows)]
    assert offsets == arrays["swizzle/offset"].tolist()
