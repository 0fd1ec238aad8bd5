"""Matrices in groups: each has the codes and the product that it has alone, bit for bit, whatever
its neighbours are and wherever it lies.

Backends that go group by group and those that do it in one call are held to the same: ``ops`` of
one matrix at a time on the reference.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from assertions import assert_floats_bitwise
from test_matmul import exact_operand

from nvfp4 import grouped_ops, ops
from nvfp4.backends.base import options_of
from nvfp4.backends.native.cpu import CpuBackend
from nvfp4.numerics.formats import TILE_BLOCK
from nvfp4.numerics.groups import GroupedQTensor, Groups
from nvfp4.numerics.hadamard import Rotation
from nvfp4.numerics.qtensor import QTensor
from nvfp4.numerics.rng import DeviceSeed
from nvfp4.quantizers.base import Options, Quantizer
from nvfp4.quantizers.registry import get_quantizer

SIZES = {
    "ragged": (5, 0, 33, 1),
    "one": (7,),
    "all on one": (0, 40, 0),
    "none at the ends": (0, 3, 17, 0),
    "none": (0, 0),
}
COLUMNS = 40
CASES = [
    ("rtn", {}),
    ("rtn", {"row_scaled": True}),
    ("rtn", {"rotation": Rotation(16, fixed=True)}),
    ("rtn_2d", {}),
    ("sr", {"rotation": "drawn"}),
    ("sr_te", {"block": TILE_BLOCK}),
    ("four_over_six", {"row_scaled": True}),
    ("scale_search", {}),
    ("ms_eden", {}),
    ("ms_eden", {"group": 16, "search": True, "rounds": 2}),
]
QUANTIZERS = [pytest.param(*case, id="-".join(map(str, (case[0], *case[1])))) for case in CASES]
BACKENDS = [
    "reference",
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            CpuBackend().unavailable(torch.device("cpu")) is not None,
            reason="the native extension was not built",
        ),
    ),
]


def options_for(name: str, given: dict, groups: int) -> tuple[Quantizer, Options]:
    """A quantiser with seeds of its own for every group."""
    quantizer = get_quantizer(name)
    seeds = DeviceSeed(torch.arange(groups, dtype=torch.int64) * 7919 + 3)
    signs = DeviceSeed(torch.arange(groups, dtype=torch.int64) * -104729 - 1)
    if given.get("rotation") == "drawn":
        given = given | {"rotation": Rotation(32, 1, signs)}
    return quantizer, quantizer.check(seed=seeds, sign_seed=signs, **given)


def assert_group(got: QTensor, want: QTensor, what: str) -> None:
    """The same codes and scales; NaN equals NaN."""
    assert (got.rows, got.contraction) == (want.rows, want.contraction), what
    for a, b, name in zip(got.tensors, want.tensors, ("codes", "scales", "global"), strict=True):
        assert a.shape == b.shape, f"{what}: {name}"
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), f"{what}: {name}"


def alone(x: torch.Tensor, how: tuple[Quantizer, Options], e: int) -> QTensor:
    """Group e's matrix as ``ops`` quantises it."""
    return ops.quantize_with(x, how[0], options_of(how[1], e), backend="reference")


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("name", "given"), QUANTIZERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_is_its_matrix_alone(backend, name, given, sizes):
    """Both orientations, each by itself and from one read; in BF16."""
    how = options_for(name, given, len(sizes))
    x, groups = torch.randn(sum(sizes), COLUMNS).bfloat16(), Groups.of(sizes)
    rows = grouped_ops.grouped_quantize(x, groups, *how, backend=backend)
    down = grouped_ops.grouped_quantize(x, groups, *how, transposed=True, backend=backend)
    both = grouped_ops.grouped_quantize_both(x, groups, how, how, backend=backend)
    for e, part in enumerate(x.split(list(sizes))):
        for got in (rows, both[0]):
            assert_group(got.group(e), alone(part, how, e), f"group {e} along K")
        for got in (down, both[1]):
            assert_group(got.group(e), alone(part.t(), how, e), f"group {e} along its rows")


@pytest.mark.parametrize(("name", "given"), QUANTIZERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stack_is_its_matrices(backend, name, given):
    """[E, N, K] in both orientations, also where K runs across memory, and where N is no multiple
    of anything."""
    how = options_for(name, given, 3)
    stack = torch.randn(3, 19, COLUMNS)
    for x in (stack, stack.mT.contiguous().mT, stack[:, :, ::2]):
        rows = grouped_ops.grouped_quantize(x, None, *how, backend=backend)
        down = grouped_ops.grouped_quantize(x, None, *how, transposed=True, backend=backend)
        for e, part in enumerate(x):
            assert_group(rows.group(e), alone(part, how, e), f"matrix {e}")
            assert_group(down.group(e), alone(part.t(), how, e), f"matrix {e}, transposed")


@pytest.mark.parametrize("sizes", [SIZES["ragged"], SIZES["one"], None], ids=str)
@pytest.mark.parametrize(("name", "given"), QUANTIZERS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first", [{}, {"row_scaled": True}, {"block": TILE_BLOCK}], ids=str)
def test_codes_are_quantised_again_group_by_group(backend, name, given, sizes, first):
    """What the codes of each group stand for, transposed: of ragged rows, and of a stack."""
    count = 4 if sizes is None or len(sizes) == 4 else 1
    how, rtn = options_for(name, given, count), get_quantizer("rtn")
    groups = None if sizes is None else Groups.of(sizes)
    x = torch.randn(4, 9, COLUMNS) if sizes is None else torch.randn(sum(sizes), COLUMNS)
    q = grouped_ops.grouped_quantize(x, groups, rtn, rtn.check(**first), backend=backend)
    again = grouped_ops.grouped_requantize(q, *how, backend=backend)
    for e in range(count):
        own = options_of(how[1], e)
        want = ops.requantize_with(q.group(e), how[0], own, backend="reference")
        assert_group(again.group(e), want, f"group {e}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 16, 32), (2, 20, 48), (2, 33, 40)], ids=str)
def test_tile_codes_are_transposed_group_by_group(backend, shape):
    """A stack at once, and ragged rows; other blocks are refused."""
    rule = get_quantizer("rtn_2d")
    x = torch.randn(shape)
    stack = grouped_ops.grouped_quantize(x, None, rule, rule.check(), backend=backend)
    rows = grouped_ops.grouped_quantize(
        x.flatten(0, 1), Groups.of([shape[1]] * shape[0]), rule, rule.check(), backend=backend
    )
    for q in (stack, rows):
        turned = grouped_ops.grouped_transpose(q, backend=backend)
        assert (turned.rows, turned.ragged) == (shape[2], None if q is stack else "contraction")
        for e in range(shape[0]):
            assert_group(turned.group(e), q.group(e).transpose(), f"group {e}")
    rule = get_quantizer("rtn")
    q = grouped_ops.grouped_quantize(x, None, rule, rule.check(), backend=backend)
    with pytest.raises(ValueError, match="unrotated matrix with block"):
        grouped_ops.grouped_transpose(q, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row_scaled", [False, True], ids=["tensor", "rows"])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")], ids=str)
def test_what_is_not_finite_poisons_its_group_alone(backend, row_scaled, bad):
    """All of that group (row-scaled: of that row), and no bit of any other."""
    sizes = (5, 0, 33, 2)
    rule = get_quantizer("scale_search")
    options = rule.check(row_scaled=row_scaled)
    x, groups = torch.randn(40, COLUMNS), Groups.of(sizes)
    clean = grouped_ops.grouped_quantize(x, groups, rule, options, backend=backend)
    x[20, 7] = bad
    q = grouped_ops.grouped_quantize(x, groups, rule, options, backend=backend)
    for e in (0, 1, 3):
        assert_group(q.group(e), clean.group(e), f"group {e}")
    decoded = q.group(2).dequantize()
    assert decoded[15].isnan().all()
    assert decoded.isnan().all(dim=1).sum() == (1 if row_scaled else 33)
    down = grouped_ops.grouped_quantize(
        x, groups, rule, rule.check(), transposed=True, backend=backend
    )
    assert [own.dequantize().isnan().any().item() for own in down.each()] == [
        False,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_is_scaled_by_what_it_is_told(backend):
    """amax [E]: the codes that each group has within a larger matrix of that magnitude."""
    sizes = (5, 0, 33)
    rule = get_quantizer("four_over_six")
    x, amax = torch.randn(38, COLUMNS), torch.tensor([9.0, 3.0, float("inf")])
    q = grouped_ops.grouped_quantize(
        x, Groups.of(sizes), rule, rule.check(), amax=amax, backend=backend
    )
    for e, part in enumerate(x.split(list(sizes))):
        if len(part):
            want = ops.quantize_with(
                part, rule, rule.check(), amax=amax[e : e + 1], backend="reference"
            )
            assert_group(q.group(e), want, f"group {e}")
    assert q.global_scale[1] == 1
    assert q.group(2).dequantize().isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [SIZES["ragged"], SIZES["all on one"], SIZES["one"]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_are_those_of_each_pair(backend, sizes, dtype, rng):
    """fprop's groups, ragged in rows, with and without bias, by rows and tiles of scales; wgrad's,
    ragged in the contraction, with zeros for an empty group. Exact in any order of summation."""
    for row_scaled, block in ((False, (1, 16)), (True, TILE_BLOCK)):
        a = [exact_operand(rng, rows, 72, row_scaled=row_scaled) for rows in sizes]
        b = [exact_operand(rng, 24, 72, block=block) for _ in sizes]
        left, right = GroupedQTensor.of(a, "rows"), GroupedQTensor.of(b, None)
        left = left if left.row_scaled == row_scaled else None
        if left is None:
            continue  # groups of one row have one scale either way
        for bias in (None, torch.randn(len(sizes), 24)):
            y = grouped_ops.grouped_matmul(left, right, dtype, bias=bias, backend=backend)
            assert (y.shape, y.dtype) == ((sum(sizes), 24), dtype)
            for e, part in enumerate(y.split(list(sizes))):
                own = None if bias is None else bias[e]
                want = ops.matmul(a[e], b[e], dtype, bias=own, backend="reference")
                if len(part):
                    assert_floats_bitwise(part.float(), want.float(), f"group {e}")

    a, b = ([exact_operand(rng, rows, size) for size in sizes] for rows in (24, 9))
    left = GroupedQTensor.of(a, "contraction")
    right = GroupedQTensor.of(b, "contraction")
    right = GroupedQTensor(**(vars(right) | {"groups": left.groups}))
    y = grouped_ops.grouped_matmul(left, right, dtype, backend=backend)
    assert y.shape == (len(sizes), 24, 9)
    for e, size in enumerate(sizes):
        want = ops.matmul(a[e], b[e], dtype, backend="reference") if size else torch.zeros(24, 9)
        assert_floats_bitwise(y[e].float(), want.float(), f"group {e}")


def test_rows_are_added_up_group_by_group():
    """In float32, in the order in which torch sums a matrix."""
    x = torch.randn(38, 7).bfloat16()
    got = grouped_ops.grouped_sum(x, Groups.of((5, 0, 33)))
    assert torch.equal(got[0], x[:5].sum(0, dtype=torch.float32))
    assert torch.equal(got[1], torch.zeros(7))
    assert torch.equal(got[2], x[5:].sum(0, dtype=torch.float32))


def test_groups_lie_apart():
    """In units of 1 to 128 no group begins within the one before, and all of them fit."""
    generator = np.random.default_rng(0)
    for unit in (1, 16, 32, 128):
        for _ in range(50):
            sizes = generator.integers(0, 300, generator.integers(1, 9)).tolist()
            groups, end = Groups.of(sizes), 0
            for e, size in enumerate(sizes):
                assert groups.first_unit(e, unit) >= end
                end = groups.first_unit(e, unit) - (-size // unit)
            assert end <= groups.units(unit)


def test_what_does_not_fit_is_named(rng):
    """Ranks, rows, devices, numbers of groups, lengths, rotations, biases, dtypes."""
    rule = get_quantizer("rtn")
    how = (rule, rule.check())
    x, groups = torch.randn(6, 16), Groups.of((2, 4))
    with pytest.raises(ValueError, match=r"a matrix \[S, K\]"):
        grouped_ops.grouped_quantize(x[None], groups, *how)
    with pytest.raises(ValueError, match=r"a stack \[E, R, K\]"):
        grouped_ops.grouped_quantize(x, None, *how)
    with pytest.raises(ValueError, match="do not fit x"):
        grouped_ops.grouped_quantize(x[:5], groups, *how)
    with pytest.raises(TypeError, match="float64"):
        grouped_ops.grouped_quantize(x.double(), groups, *how)
    with pytest.raises(ValueError, match="0 or more"):
        Groups.of((3, -1))
    for offsets in ([0, 4, 3, 6], [0, 2, 5], [1, 6]):
        with pytest.raises(ValueError, match="from 0 to 6"):
            _ = Groups(torch.tensor(offsets, dtype=torch.int32), 6).bounds

    a = grouped_ops.grouped_quantize(x, groups, *how)
    b = grouped_ops.grouped_quantize(torch.randn(2, 8, 16), None, *how)
    down = grouped_ops.grouped_quantize(x, groups, *how, transposed=True)
    other = grouped_ops.grouped_quantize(x, Groups.of((2, 4)), *how, transposed=True)
    more = grouped_ops.grouped_quantize(torch.randn(3, 8, 16), None, *how)
    longer = grouped_ops.grouped_quantize(torch.randn(2, 8, 17), None, *how)
    rotated = grouped_ops.grouped_quantize(
        torch.randn(2, 8, 16), None, rule, rule.check(rotation=Rotation(16, fixed=True))
    )
    for left, right, said in (
        (a, more, "a has 2 groups and b 3"),
        (a, a, "ragged in rows and b in rows"),
        (a, down, "ragged in rows and b in contraction"),
        (down, other, "different groups"),
        (a, longer, "different lengths"),
        (a, rotated, "rotated differently"),
    ):
        with pytest.raises(ValueError, match=said):
            grouped_ops.grouped_matmul(left, right)
    with pytest.raises(ValueError, match="bias must be"):
        grouped_ops.grouped_matmul(a, b, bias=torch.zeros(8))
    with pytest.raises(TypeError, match="float64"):
        grouped_ops.grouped_matmul(a, b, torch.float64)
    with pytest.raises(ValueError, match="its contraction is ragged"):
        grouped_ops.grouped_requantize(down, *how)
