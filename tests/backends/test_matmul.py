"""The GEMM: contraction without the global scales, each global applied once, one cast.

The order in which a backend sums is its own, so bits may be asked for only where every order gives
the same: operands whose products are multiples of one power of two and whose sums stay below 2^24
of it. There every backend must agree with the oracle's exact sum. Elsewhere the float32 error of a
sum of K terms bounds the difference.
"""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from assertions import assert_floats_bitwise

from nvfp4.numerics.codec import e4m3_encode
from nvfp4.numerics.qtensor import QTensor
from nvfp4.ops import matmul, quantize

NARROW = torch.tensor([0.5, 1.0, 2.0])
"""Block scales of the exact check: an element is then 0..48 quarters, a product at most 48 * 48 =
2304 sixteenths, and K = 2^24 / 2304 = 7281 terms fit into float32 exactly, in any order."""

SHAPES = [(1, 1, 1), (3, 5, 16), (17, 9, 100), (32, 48, 512), (130, 20, 240)]


def exact_operand(
    rng: np.random.Generator,
    rows: int,
    k: int,
    *,
    block: tuple[int, int] = (1, 16),
    row_scaled: bool = False,
    octaves: tuple[int, int] = (-3, 4),
) -> QTensor:
    """Any codes, padding zero, block scales from NARROW, global scales with full mantissas."""
    kp = -(-k // 16) * 16
    codes = rng.integers(0, 16, (rows, kp), dtype=np.uint8)
    codes[:, k:] = 0
    scales = e4m3_encode(
        NARROW[torch.from_numpy(rng.integers(0, 3, (-(-rows // block[0]), kp // 16)))]
    )
    count = rows if row_scaled else 1
    globals_ = (rng.uniform(1, 2, count) * 2.0 ** rng.integers(*octaves, count)).astype(np.float32)
    return QTensor(
        torch.from_numpy(oracle.pack(codes)), scales, torch.from_numpy(globals_), block, (rows, k)
    )


def oracle_matmul(a: QTensor, b: QTensor) -> np.ndarray:
    left, right = (oracle.Quantized(*(t.numpy() for t in q.tensors)) for q in (a, b))
    return oracle.matmul(left, right, a.block, b.block)


@pytest.mark.parametrize(
    "row_scaled", [(False, False), (True, False), (False, True), (True, True)], ids=str
)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_exact_products_agree_bitwise(
    m: int,
    n: int,
    k: int,
    row_scaled: tuple[bool, bool],
    backend: str,
    device: str,
    rng: np.random.Generator,
) -> None:
    """y = fl(fl(acc * global_a) * global_b), with one global an operand or one a row (an output
    column for b)."""
    a = exact_operand(rng, m, k, row_scaled=row_scaled[0])
    b = exact_operand(rng, n, k, row_scaled=row_scaled[1])
    assert_floats_bitwise(
        matmul(a.to(device), b.to(device), backend=backend), oracle_matmul(a, b), "y"
    )


@pytest.mark.parametrize(
    "blocks", [((1, 16), (16, 16)), ((16, 16), (1, 16)), ((16, 16), (16, 16))], ids=str
)
def test_tiles_are_spread_over_their_rows(
    blocks: tuple, backend: str, device: str, rng: np.random.Generator
) -> None:
    """16x16 scales on either side, the last tile with fewer rows."""
    a, b = (
        exact_operand(rng, rows, 80, block=block)
        for rows, block in zip((20, 37), blocks, strict=True)
    )
    assert_floats_bitwise(
        matmul(a.to(device), b.to(device), backend=backend), oracle_matmul(a, b), "y"
    )


def test_global_scales_are_applied_one_after_the_other(
    backend: str, device: str, rng: np.random.Generator
) -> None:
    """First a's, then b's, each rounded: with a's product denormal and b's large, any other order
    gives other bits.

    fl(acc * a) loses bits below 2^-149 that fl(acc * b) * a, or acc * fl(a * b), would have kept.
    """
    a, b = (
        exact_operand(rng, 16, 64, octaves=(-140, -135)),
        exact_operand(rng, 16, 64, octaves=(100, 110)),
    )
    y = oracle_matmul(a, b)
    swapped = oracle_matmul(b, a)
    assert not np.array_equal(y, swapped.T), "these scales cannot tell the order"
    a, b = a.to(device), b.to(device)
    assert_floats_bitwise(matmul(a, b, backend=backend), y, "y")
    assert_floats_bitwise(matmul(b, a, backend=backend), swapped, "y of b and a")


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_reduced_float32_matmul_precision_changes_nothing(
    precision: str, rng: np.random.Generator
) -> None:
    """TF32 and BF16 tensor cores hold the decoded operands exactly, so torch's precision setting
    cannot be felt."""
    a, b = exact_operand(rng, 32, 256), exact_operand(rng, 48, 256)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        got = matmul(a, b)
    finally:
        torch.set_float32_matmul_precision(before)
    assert_floats_bitwise(got, oracle_matmul(a, b), "y")


@pytest.mark.parametrize(
    "names",
    [("rtn", "rtn_2d"), ("four_over_six", "four_over_six"), ("sr", "scale_search")],
    ids=str,
)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_real_products_agree_within_float32_summation(
    names: tuple[str, str], m: int, n: int, k: int, rng: np.random.Generator
) -> None:
    """Products are exact, so only additions round: K - 1 of them, each by 2^-24 of at most sum |p|;
    then two products.

    Hence |y - exact| <= (Kp - 1 + 3) 2^-24 sum |p| * global_a * global_b, whatever the order (the
    oracle rounds its exact sum too; second-order terms are covered by the one spare unit).
    """
    a, b = (
        quantize(torch.from_numpy(rng.standard_normal((rows, k)).astype(np.float32)), name, seed=1)
        for rows, name in zip((m, n), names, strict=True)
    )
    terms = a.decode_blocks().abs().double() @ b.decode_blocks().abs().double().t()
    bound = (
        (a.padded_contraction + 3)
        * 2**-24
        * terms
        * a.global_scale.double()
        * b.global_scale.double()
    )
    difference = (matmul(a, b).double() - torch.from_numpy(oracle_matmul(a, b)).double()).abs()
    assert (difference <= bound).all()


@pytest.mark.parametrize("side", [0, 1])
def test_nan_global_scale_poisons_its_output(side: int, rng: np.random.Generator) -> None:
    """Even where the sum is 0, as it is for the zero codes of a poisoned operand: all of it, a row
    or a column."""
    whole = [exact_operand(rng, 4, 32), exact_operand(rng, 6, 32)]
    whole[side].global_scale.fill_(float("nan"))
    whole[side].codes.zero_()
    assert matmul(*whole).isnan().all()
    by_row = [
        exact_operand(rng, 4, 32, row_scaled=True),
        exact_operand(rng, 6, 32, row_scaled=True),
    ]
    by_row[side].global_scale[2] = float("nan")
    by_row[side].codes[2] = 0
    y = matmul(*by_row) if side == 0 else matmul(*by_row).t()
    assert y[2].isnan().all()
    assert y[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_output_is_cast_once(dtype: torch.dtype, rng: np.random.Generator) -> None:
    """The bias is added in float32, then there is one cast: adding it after the cast would round
    twice."""
    a, b = exact_operand(rng, 16, 128), exact_operand(rng, 24, 128)
    bias = torch.from_numpy(rng.standard_normal(24).astype(np.float32) * 100)
    y = torch.from_numpy(oracle_matmul(a, b))
    assert torch.equal(matmul(a, b, dtype), y.to(dtype))
    assert torch.equal(matmul(a, b, dtype, bias=bias), (y + bias).to(dtype))
    narrow = bias.bfloat16()
    assert torch.equal(matmul(a, b, dtype, bias=narrow), (y + narrow.float()).to(dtype))
    if dtype == torch.bfloat16:
        assert not torch.equal((y + bias).to(dtype), y.to(dtype) + bias.to(dtype)), (
            "this bias cannot tell"
        )


def test_leading_axes_are_kept(rng: np.random.Generator) -> None:
    """[2, 3, K] times [5, K] is [2, 3, 5]; an operand contracted along another axis counts its
    remaining ones."""
    x = torch.from_numpy(rng.standard_normal((2, 3, 40)).astype(np.float32))
    w = torch.from_numpy(rng.standard_normal((40, 5)).astype(np.float32))
    y = matmul(quantize(x, "rtn"), quantize(w, "rtn", axis=0))
    flat = matmul(quantize(x.view(6, 40), "rtn"), quantize(w.t().contiguous(), "rtn"))
    assert torch.equal(y, flat.view(2, 3, 5))


@pytest.mark.parametrize(("m", "n", "k"), [(0, 4, 32), (4, 0, 32), (4, 5, 0), (0, 0, 0)])
def test_empty_products(m: int, n: int, k: int) -> None:
    """No rows give no rows; nothing to contract gives zeros."""
    y = matmul(quantize(torch.zeros(m, k), "rtn"), quantize(torch.zeros(n, k), "rtn"))
    assert torch.equal(y, torch.zeros(m, n))


def test_operands_that_do_not_belong_together_are_refused(rng: np.random.Generator) -> None:
    """Other lengths, and other rotations: the product would be a number, and meaningless."""
    x = torch.from_numpy(rng.standard_normal((4, 128)).astype(np.float32))
    with pytest.raises(ValueError, match="contract different lengths"):
        matmul(quantize(x, "rtn"), quantize(x[:, :112], "rtn"))
    with pytest.raises(ValueError, match="contract different lengths"):
        matmul(quantize(x[:, :100], "rtn"), quantize(x[:, :112], "rtn"))
    with pytest.raises(ValueError, match="rotated differently"):
        matmul(quantize(x, "rtn"), quantize(x, "ms_eden", seed=1))
    with pytest.raises(ValueError, match="rotated differently"):
        matmul(quantize(x, "ms_eden", seed=1), quantize(x, "ms_eden", seed=1, sign_seed=2))


def test_a_rotated_product_needs_no_rotation_back(rng: np.random.Generator) -> None:
    """(A R)(B R)^T = A B^T: with the error of two quantised operands, 2 * 9.3e-3 of |A B^T|^2 for
    uncorrelated ones.

    0.0194 measured, from 1e-2 to 3e-2 allowed, to tell it from the 2 that different signs would
    give.
    """
    a, b = (torch.from_numpy(rng.standard_normal((64, 512)).astype(np.float32)) for _ in range(2))
    left, right = (
        quantize(a, "ms_eden", seed=1, sign_seed=7),
        quantize(b, "ms_eden", seed=2, sign_seed=7),
    )
    exact = a.double() @ b.double().t()
    error = (matmul(left, right).double() - exact).square().sum() / exact.square().sum()
    assert 1e-2 < error < 3e-2
