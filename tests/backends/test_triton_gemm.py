"""The Triton GEMM under Triton's interpreter, which runs on any machine: the decoding path, and the
native path's indices and masks (its arithmetic is a tensor core's: what it compiles to is in
test_triton_aot.py).

Bits may be asked for only where every order of summation gives the same, see test_matmul.py;
elsewhere the float32 error of a sum bounds the difference. tl.dot adds in chunks of the
contraction, the reference in BLAS's order.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from assertions import assert_floats_bitwise
from test_matmul import exact_operand, oracle_matmul
from triton_interpreter import Interpreter

from nvfp4.backends.reference import ReferenceBackend
from nvfp4.numerics.qtensor import QTensor
from nvfp4.ops import quantize

triton = pytest.importorskip("triton")

from nvfp4.backends.triton.gemm.launch import TILES, family, gemm  # noqa: E402

REFERENCE = ReferenceBackend()
DEVICE = torch.device("cuda")
DECODED, NATIVE = False, True
TILE = (16, 32, 64)
"""m, n, k: small, so that a few tiles are cheap; not square, so that m and n cannot be mixed up."""

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
interpreted = pytest.mark.skipif(
    VERSION < (3, 9), reason="this Triton's interpreter has no place to teach E4M3 scales"
)
both_paths = pytest.mark.parametrize(
    "native",
    [pytest.param(DECODED, id="decoded"), pytest.param(NATIVE, id="native", marks=interpreted)],
)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    if VERSION < (3, 7):
        pytest.skip("the interpreter of Triton 3.6 does not run on today's numpy")
    process = Interpreter()
    yield process
    process.close()


def run(
    interpreter: Interpreter,
    a: QTensor,
    b: QTensor,
    dtype=torch.float32,
    *,
    tile=TILE,
    native=DECODED,
    **extras,
):
    left, right = ((q.tensors, q.record) for q in (a, b))
    return interpreter("gemm", left, right, dtype, tile, native, **extras)


SHAPES = [(1, 1, 1), (3, 5, 16), (17, 9, 100), (40, 70, 272), (100, 33, 64)]


SCALED = [(False, False), (True, False), (False, True), (True, True)]
PRODUCTS = [
    pytest.param(
        *shape,
        scaled,
        marks=() if (i + j) % 2 else pytest.mark.slow,
        id="-".join(map(str, (*shape, scaled))),
    )
    for i, shape in enumerate(SHAPES)
    for j, scaled in enumerate(SCALED)
]


@both_paths
@pytest.mark.parametrize(("m", "n", "k", "row_scaled"), PRODUCTS)
def test_exact_products_agree_bitwise(interpreter, m, n, k, row_scaled, native, rng):
    """Ragged in every direction, one tile and several, each operand with one global scale or one a
    row. Every shape has two of the four pairs of scales, and every pair two of the shapes or three;
    the rest is slow."""
    a = exact_operand(rng, m, k, row_scaled=row_scaled[0])
    b = exact_operand(rng, n, k, row_scaled=row_scaled[1])
    assert_floats_bitwise(
        run(interpreter, a, b, native=native), REFERENCE.matmul(a, b, torch.float32), "y"
    )


def test_the_reference_here_is_the_oracle(interpreter, rng):
    a, b = exact_operand(rng, 17, 100, row_scaled=True), exact_operand(rng, 9, 100)
    assert_floats_bitwise(run(interpreter, a, b), oracle_matmul(a, b), "y")


@both_paths
@pytest.mark.parametrize(
    "blocks", [((1, 16), (16, 16)), ((16, 16), (1, 16)), ((16, 16), (16, 16))], ids=str
)
def test_tiles_are_spread_over_their_rows(interpreter, blocks, native, rng):
    """16x16 scales on either side, the last tile with fewer rows, program tiles that begin within
    the matrix."""
    a, b = (
        exact_operand(rng, rows, 80, block=block)
        for rows, block in zip((37, 70), blocks, strict=True)
    )
    assert_floats_bitwise(
        run(interpreter, a, b, native=native), REFERENCE.matmul(a, b, torch.float32), "y"
    )


def test_every_pair_of_code_and_scale_is_decoded_exactly(interpreter):
    """A row of blocks a code, a block scale byte each, times one: what the decoding path makes of
    all 16 x 127 pairs.

    K = 16 with a single 1 (code 2) in b picks one element; even and odd columns lie in different
    nibbles.
    """
    codes = torch.arange(16, dtype=torch.uint8).repeat_interleave(127)
    scales = torch.arange(127, dtype=torch.uint8).repeat(16)[:, None]
    a = QTensor((codes * 17)[:, None].repeat(1, 8), scales, torch.ones(1), (1, 16), (16 * 127, 16))
    picks = torch.zeros(2, 8, dtype=torch.uint8)
    picks[0, 3], picks[1, 3] = 0x02, 0x20  # the columns 6 and 7
    one = torch.full((2, 1), 0x38, dtype=torch.uint8)
    b = QTensor(picks, one, torch.ones(1), (1, 16), (2, 16))
    got = run(interpreter, a, b, tile=(1024, 16, 32))
    assert torch.equal(got, a.decode_blocks()[:, 6:8])
    assert got.unique().numel() > 300, "too few values to tell"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@both_paths
def test_the_bias_is_added_in_float32_before_the_one_cast(interpreter, dtype, native, rng):
    """The sum is rounded to float32, then once to the output; the bias may have any dtype and
    stride."""
    a, b = exact_operand(rng, 20, 128), exact_operand(rng, 40, 128)
    y = REFERENCE.matmul(a, b, torch.float32)
    bias = torch.from_numpy(rng.standard_normal(40).astype(np.float32) * 100)
    assert torch.equal(run(interpreter, a, b, dtype, native=native), y.to(dtype))
    assert torch.equal(
        run(interpreter, a, b, dtype, native=native, bias=bias), (y + bias).to(dtype)
    )
    spread = bias.bfloat16().repeat_interleave(2)[::2]
    assert torch.equal(
        run(interpreter, a, b, dtype, native=native, bias=spread), (y + spread).to(dtype)
    )
    assert not torch.equal((y + bias).bfloat16(), y.bfloat16() + bias.bfloat16()), "cannot tell"


def test_global_scales_are_applied_one_after_the_other(interpreter, rng):
    """First a's, then b's, each rounded: with a's product denormal and b's large, another order
    gives other bits."""
    a, b = (
        exact_operand(rng, 16, 64, octaves=(-140, -135)),
        exact_operand(rng, 16, 64, octaves=(100, 110)),
    )
    assert_floats_bitwise(run(interpreter, a, b), oracle_matmul(a, b), "y")
    assert_floats_bitwise(run(interpreter, b, a), oracle_matmul(b, a), "y of b and a")
    assert not np.array_equal(oracle_matmul(a, b), oracle_matmul(b, a).T), (
        "these scales cannot tell the order"
    )


@pytest.mark.parametrize(
    "names",
    [("rtn", "rtn_2d"), ("four_over_six", "four_over_six"), ("sr", "scale_search")],
    ids=str,
)
@pytest.mark.parametrize(("m", "n", "k"), [(17, 9, 100), (40, 33, 528)])
def test_real_products_agree_within_float32_summation(interpreter, names, m, n, k, rng):
    """Products are exact, so only additions round: in either order at most Kp - 1 of them, each by
    2^-24 of sum |p|.

    Then two products on each side: |y - reference| <= 2 (Kp - 1 + 2) 2^-24 sum |p| * global_a *
    global_b, and one more unit a side for terms of second order.
    """
    a, b = (
        quantize(torch.from_numpy(rng.standard_normal((rows, k)).astype(np.float32)), name, seed=1)
        for rows, name in zip((m, n), names, strict=True)
    )
    terms = a.decode_blocks().abs().double() @ b.decode_blocks().abs().double().t()
    bound = (
        2
        * (a.padded_contraction + 2)
        * 2**-24
        * terms
        * a.global_scale.double()
        * b.global_scale.double()
    )
    difference = (
        run(interpreter, a, b).double() - REFERENCE.matmul(a, b, torch.float32).double()
    ).abs()
    assert (difference <= bound).all()
    assert (bound < 1e-3 * terms * a.global_scale * b.global_scale).all(), (
        "a bound that allows anything"
    )


@both_paths
@pytest.mark.parametrize("side", [0, 1])
def test_nan_global_scale_poisons_its_output(interpreter, side, native, rng):
    """Even where the sum is 0, as it is for the zero codes of a poisoned operand: all of it, a row
    or a column."""
    whole = [exact_operand(rng, 4, 32), exact_operand(rng, 6, 32)]
    whole[side].global_scale.fill_(float("nan"))
    whole[side].codes.zero_()
    assert run(interpreter, *whole, native=native).isnan().all()
    by_row = [
        exact_operand(rng, 4, 32, row_scaled=True),
        exact_operand(rng, 6, 32, row_scaled=True),
    ]
    by_row[side].global_scale[2] = float("nan")
    by_row[side].codes[2] = 0
    y = run(interpreter, *by_row, torch.bfloat16, native=native)
    y = y if side == 0 else y.t()
    assert y[2].isnan().all()
    assert y[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize(("m", "n", "k"), [(0, 4, 32), (4, 0, 32), (4, 5, 0), (0, 0, 0)])
def test_empty_products(interpreter, m, n, k, rng):
    """No rows give no rows; nothing to contract gives zeros, and NaN where a global scale says
    so."""
    a, b = exact_operand(rng, m, k), exact_operand(rng, n, k)
    assert torch.equal(run(interpreter, a, b), torch.zeros(m, n))
    a.global_scale.fill_(float("nan"))
    assert run(interpreter, a, b).isnan().all()


def test_the_grouped_order_visits_every_tile_once(interpreter, rng):
    """More rows of tiles than a group has, and a last group that is not full: 11 x 3 tiles, GROUP =
    8."""
    a, b = exact_operand(rng, 11 * 16 - 3, 16), exact_operand(rng, 3 * 16 - 3, 16)
    got = run(interpreter, a, b, tile=(16, 16, 32))
    assert_floats_bitwise(got, REFERENCE.matmul(a, b, torch.float32), "y")


def test_offsets_beyond_32_bits(interpreter):
    """Codes [2^26 + 5, 32 bytes] and output [2^26 + 5, 32]: the last tile lies past 2^31 in
    both."""
    tail = (2**26 + 5) % 16
    a, b, got = interpreter("last_tile", 2**26 + 5, 32, 64, tail, 7)
    left, right = (QTensor(*tensors, *record) for tensors, record in (a, b))
    assert torch.equal(got, REFERENCE.matmul(left, right, torch.bfloat16)[:, 16:])
    assert got.unique().numel() > 20


def capability() -> int:
    """Of the card: 90, 120, ..."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


@pytest.mark.cuda
@pytest.mark.parametrize("native", [DECODED, NATIVE], ids=["decoded", "native"])
@pytest.mark.parametrize(("m", "n", "k"), [*SHAPES, (300, 520, 1040), (2049, 1000, 4096)])
def test_on_a_gpu_every_tile_gives_the_exact_product(m, n, k, native, rng):
    """Compiled, each tile of this card, with everything the epilogue can add: the same bits as the
    interpreter's."""
    kind = family(capability(), native)
    if native and kind not in ("tcgen05", "mma_fp4"):
        pytest.skip(f"no FP4 tensor cores on sm_{capability()}")
    a, b = exact_operand(rng, m, k, row_scaled=m > 1), exact_operand(rng, n, k, block=(16, 16))
    bias = torch.randn(n)
    y = REFERENCE.matmul(a, b, torch.float32)
    for tile in TILES[kind]:
        for dtype in (torch.float32, torch.bfloat16):
            got = gemm(a.to(DEVICE), b.to(DEVICE), dtype, tile=tile, native=native)
            assert torch.equal(got.cpu(), y.to(dtype)), tile
        got = gemm(
            a.to(DEVICE), b.to(DEVICE), torch.float16, bias.to(DEVICE), tile=tile, native=native
        )
        assert torch.equal(got.cpu(), (y + bias).to(torch.float16)), tile


def test_codes_at_an_odd_address_are_moved(monkeypatch):
    """The kernel reads words of codes, and a GPU faults on a word that begins between two."""
    from nvfp4.backends.triton.gemm import launch as module

    launched = []

    monkeypatch.setattr(
        module, "launch", lambda kernel, programs, args, constants, **how: launched.append(args)
    )
    q = quantize(torch.randn(8, 64), "rtn")
    codes = (
        torch.empty(q.codes.numel() + 1, dtype=torch.uint8)[1:].view(q.codes.shape).copy_(q.codes)
    )
    assert codes.data_ptr() % 4
    module.gemm(QTensor(codes, *q.tensors[1:], *q.record), q, torch.float32)
    (args,) = launched
    assert all(t.data_ptr() % 16 == 0 for t in args[:6])
    assert torch.equal(args[0], q.codes)
    assert args[3].data_ptr() == q.codes.data_ptr(), "what lies well is not copied"


def test_what_does_not_fit_is_refused(interpreter, rng):
    a, b = exact_operand(rng, 4, 32), exact_operand(rng, 6, 32)
    for message, arguments in (
        ("out_dtype must be", {"dtype": torch.float64}),
        ("bias must have shape", {"bias": torch.zeros(4)}),
    ):
        with pytest.raises(RuntimeError, match=f"ValueError: {message}"):
            run(interpreter, a, b, **arguments)
    with pytest.raises(RuntimeError, match="ValueError: a contracts 32 columns and b 48"):
        run(interpreter, a, exact_operand(rng, 6, 48))
