"""The native CPU kernels against the reference: equal to the last bit, whatever the instruction
set, the thread count, the orientation, the dtype or the shape; and safe against what a caller may
hand them."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from nvfp4.backends.machine import info
from nvfp4.backends.native.cpu import (
    _MISSING,
    CpuBackend,
    instruction_sets,
    native,
    products,
    use_instruction_set,
)
from nvfp4.backends.reference import ReferenceBackend
from nvfp4.numerics.codec import e4m3_decode
from nvfp4.numerics.formats import E2M1, E4M3
from nvfp4.numerics.hadamard import Rotation
from nvfp4.numerics.layout import swizzled_offset
from nvfp4.numerics.qtensor import QTensor
from nvfp4.numerics.rng import fold_in
from nvfp4.ops import explain
from nvfp4.quantizers.registry import QUANTIZERS

pytestmark = pytest.mark.skipif(
    native is None, reason=f"the native CPU kernels are not built: {_MISSING}"
)

ISAS = native.instruction_sets() if native is not None else []
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [
    ("rtn", {}),
    ("rtn", {"row_scaled": True}),
    ("rtn", {"rotation": Rotation(16, fixed=True)}),
    ("rtn", {"rotation": Rotation(128, 3, 5), "block": (16, 16)}),
    ("rtn_2d", {}),
    ("sr", {}),
    ("sr", {"row_scaled": True}),
    ("sr", {"block": (16, 16)}),
    ("sr", {"rotation": Rotation(16, 1, 77)}),
    ("sr", {"rotation": Rotation(64, 2, 77), "row_scaled": True}),
    ("sr_te", {}),
    ("sr_te", {"rotation": Rotation(16, fixed=True)}),
    *(
        ("four_over_six", {"metric": m, "block": b})
        for m in ("mse", "mae", "abs_max")
        for b in ((1, 16), (16, 16))
    ),
    ("four_over_six", {"row_scaled": True}),
    ("scale_search", {}),
    ("scale_search", {"block": (16, 16)}),
    ("scale_search", {"row_scaled": True}),
    ("scale_search", {"candidates": (5, -8, 0, 8)}),
    ("scale_search", {"candidates": (0, 5), "block": (16, 16)}),
    *(("ms_eden", {"rounds": r, "group": g}) for r in (1, 2, 3) for g in (16, 32, 64, 128)),
    ("ms_eden", {"rounds": 2, "search": True}),
    ("ms_eden", {"rounds": 3, "group": 32, "search": True}),
    ("ms_eden", {"group": 16, "search": True, "factors": (1.5, 1.25, 1.0)}),
    ("ms_eden", {"rounds": 2, "search": True, "factors": (1.0625,)}),
]
SHAPES = [
    (1, 1),
    (16, 16),
    (17, 33),
    (5, 300),
    (130, 128),
    (64, 512),
    (300, 5),
    (33, 129),
    (1, 257),
    (257, 1),
]
KINDS = ("normal", "wide", "rows", "sparse", "zeros", "tiny", "huge", "nan", "inf", "ties")


def data(shape: tuple[int, int], kind: str, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A matrix of one kind of difficulty."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if kind == "wide":
        x *= torch.exp2(torch.randint(-60, 60, shape, generator=generator).float())
    elif kind == "rows":
        x *= torch.exp2(torch.randint(-30, 30, (shape[0], 1), generator=generator).float())
    elif kind == "sparse":
        x *= torch.rand(shape, generator=generator) > 0.9
    elif kind in ("zeros", "tiny", "huge"):
        x *= {"zeros": 0.0, "tiny": 1e-42, "huge": 1e38}[kind]
    elif kind == "ties":
        x = torch.randint(-24, 25, shape, generator=generator) / 4
    elif kind in ("nan", "inf"):
        x.view(-1)[int(torch.randint(x.numel(), (1,), generator=generator))] = float(kind)
    return x.to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shapes, dtypes and values; NaN equals NaN, -0 differs from 0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    nan = a.isnan()
    bits = {4: torch.int32, 2: torch.int16}[a.element_size()]
    zero = torch.zeros((), dtype=a.dtype)
    return torch.equal(nan, b.isnan()) and torch.equal(
        torch.where(nan, zero, a).view(bits), torch.where(nan, zero, b).view(bits)
    )


def assert_same(got: QTensor, want: QTensor, note: str) -> None:
    """Codes, block scales and global scale, bit for bit."""
    for name, a, b in zip(
        ("codes", "block_scale", "global_scale"), got.tensors, want.tensors, strict=True
    ):
        assert same(a, b), f"{name} differ: {note}"


@pytest.fixture(autouse=True)
def restore_threads():
    """Tests here set the number of threads; put it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda v: str(v))
def test_quantize_equals_reference(isa: str, name: str, options: dict) -> None:
    """Every rule and option, over shapes, kinds of data, dtypes, orientations and thread counts
    drawn at random."""
    rng = random.Random(f"{name}{options}")
    quantizer, backend = QUANTIZERS[name], CpuBackend(isa)
    for shape in SHAPES:
        kind, dtype, transposed = rng.choice(KINDS), rng.choice(DTYPES), rng.random() < 0.5
        x = data(shape[::-1] if transposed else shape, kind, dtype, rng.randrange(2**31))
        x = x.t() if transposed else x
        checked = quantizer.check(
            seed=rng.randrange(2**64), sign_seed=rng.randrange(2**64), **options
        )
        torch.set_num_threads(rng.choice([1, 2, 3]))
        note = f"{shape} {kind} {dtype} transposed={transposed} isa={isa}"
        assert_same(backend.quantize(x, quantizer, checked), quantizer.quantize(x, checked), note)


BOTH = [
    (("rtn", {}), ("rtn", {"rotation": Rotation(16, fixed=True)})),
    (("sr_te", {}), ("sr_te", {"rotation": Rotation(16, fixed=True)})),
    (("sr", {"rotation": Rotation(16, 1, 7)}), ("sr", {"rotation": Rotation(16, 1, 8)})),
    (("ms_eden", {"rounds": 2}), ("ms_eden", {"rounds": 2, "search": True})),
    (("four_over_six", {}), ("ms_eden", {"group": 16})),
    (("ms_eden", {"group": 64}), ("scale_search", {"rotation": Rotation(32, 2, 3)})),
    (("rtn", {"row_scaled": True}), ("rtn_2d", {})),
    (
        ("scale_search", {"block": (16, 16)}),
        ("sr", {"row_scaled": True, "rotation": Rotation(128, 1, 3)}),
    ),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("rows", "columns"), BOTH, ids=lambda v: f"{v[0]}{v[1]}")
def test_quantize_both_equals_two_references(isa: str, rows: tuple, columns: tuple) -> None:
    """x and x^T in one read: each as if it were alone, over shapes, data, dtypes, orientations and
    thread counts."""
    rng = random.Random(f"{rows}{columns}")
    backend = CpuBackend(isa)
    pairs = [(QUANTIZERS[name], options) for name, options in (rows, columns)]
    for shape in [*SHAPES, (260, 300)]:
        kind, dtype, transposed = rng.choice(KINDS), rng.choice(DTYPES), rng.random() < 0.5
        x = data(shape[::-1] if transposed else shape, kind, dtype, rng.randrange(2**31))
        x = x.t() if transposed else x
        torch.set_num_threads(rng.choice((1, 2, 3)))
        checked = [
            (q, q.check(seed=rng.randrange(2**64), sign_seed=rng.randrange(2**64), **o))
            for q, o in pairs
        ]
        got = backend.quantize_both(x, *checked)
        for q, view, pair in zip(got, (x, x.t()), checked, strict=True):
            assert_same(
                q,
                ReferenceBackend().quantize(view, *pair),
                f"{shape} {kind} {dtype} transposed={transposed} {pair[1]}",
            )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bfloat16_and_float16_input_is_read_exactly(isa: str, dtype: torch.dtype) -> None:
    """All 65536 bit patterns of a 16-bit format, one row each (so that a NaN poisons only
    itself)."""
    if dtype == torch.float32:
        x = (
            torch.arange(2**16, dtype=torch.int64)
            .mul(65537)
            .to(torch.int32)
            .view(torch.float32)[:, None]
        )
    else:
        x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)[:, None]
    quantizer = QUANTIZERS["rtn"]
    checked = quantizer.check(row_scaled=True)
    for operand in (x, x.expand(-1, 16).contiguous()):
        assert_same(
            CpuBackend(isa).quantize(operand, quantizer, checked),
            quantizer.quantize(operand, checked),
            isa,
        )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "saved", [("rtn", {}), ("rtn_2d", {}), ("four_over_six", {"row_scaled": True})], ids=str
)
def test_requantize_equals_decoding_first(isa: str, saved: tuple[str, dict]) -> None:
    """x-hat^T from codes equals decode in float32, cut, transpose, quantise: padding, tiles, row
    scales, NaN."""
    rng = random.Random(1)
    backend = CpuBackend(isa)
    for shape in SHAPES:
        for kind in ("normal", "wide", "nan"):
            first = QUANTIZERS[saved[0]]
            q = first.quantize(
                data(shape, kind, torch.float32, rng.randrange(2**31)), first.check(**saved[1])
            )
            for name, options in (
                ("ms_eden", {"rounds": 2}),
                ("sr", {"rotation": Rotation(16, 1, 9)}),
                ("rtn", {}),
            ):
                second = QUANTIZERS[name]
                checked = second.check(
                    seed=3, sign_seed=None if "rotation" in options else 4, **options
                )
                want = second.quantize(q.dequantize().t(), checked)
                assert_same(
                    backend.requantize(q, second, checked), want, f"{shape} {kind} {name} {isa}"
                )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_equals_reference(isa: str, dtype: torch.dtype) -> None:
    """Decoding with the global scale, per tensor and per row, rounded once to the dtype; signs of
    zeros included."""
    for i, shape in enumerate(SHAPES):
        for kind in KINDS:
            for name, options in (
                ("rtn", {"row_scaled": True}),
                ("rtn_2d", {}),
                ("four_over_six", {}),
            ):
                quantizer = QUANTIZERS[name]
                q = quantizer.quantize(
                    data(shape, kind, torch.float32, i), quantizer.check(**options)
                )
                assert same(CpuBackend(isa).dequantize(q, dtype), q.dequantize(dtype)), (
                    f"{shape} {kind} {name} {isa}"
                )


@pytest.mark.parametrize("isa", ISAS)
def test_every_code_and_scale_decodes_to_its_product(isa: str) -> None:
    """All 16 codes on all 127 scales, without the global scale, in BF16: exact, so no tolerance."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(127, 1)  # every pair of codes in every byte
    scales = torch.arange(127, dtype=torch.uint8)[:, None].expand(-1, 32).contiguous()
    q = QTensor(codes, scales, torch.ones(1), (1, 16), (127, 512))
    got = CpuBackend(isa).decode(q, 512, torch.bfloat16, with_global=False)
    assert same(got, q.decode_blocks().to(torch.bfloat16))
    assert same(got.float(), q.decode_blocks())


def test_results_do_not_depend_on_threads() -> None:
    """Noise is a function of the element index, so 1, 2, 3 and 7 threads agree on a tensor large
    enough to be split."""
    x = torch.randn(700, 600).bfloat16()
    for name, options in (
        ("sr", {}),
        ("ms_eden", {"rounds": 2, "search": True}),
        ("rtn", {"row_scaled": True}),
    ):
        quantizer = QUANTIZERS[name]
        checked = quantizer.check(seed=1, sign_seed=2, **options)
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(CpuBackend().quantize(x, quantizer, checked))
        for result in results[1:]:
            assert_same(result, results[0], name)


def test_concurrent_calls_agree() -> None:
    """Eight Python threads in the kernels at once, each with its own tensor: nothing is shared."""
    quantizer = QUANTIZERS["ms_eden"]
    inputs = [torch.randn(190 + i, 300 + i) for i in range(8)]

    def run(i: int) -> QTensor:
        return CpuBackend().quantize(
            inputs[i], quantizer, quantizer.check(seed=i, sign_seed=i, rounds=2)
        )

    alone = [run(i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for i, together in enumerate(pool.map(run, range(8))):
                assert_same(together, alone[i], f"thread {i}")


def test_rows_further_apart_than_32_bits() -> None:
    """Operand rows 2^31 bytes apart in (untouched) memory are read at the right place: indices are
    64-bit."""
    stride = 2**30
    memory = np.zeros(2 * stride + 64, dtype=np.int16)  # pages appear only where they are touched
    x = torch.from_numpy(memory).view(torch.bfloat16).as_strided((3, 64), (stride, 1))
    values = torch.randn(3, 64).bfloat16()
    x.copy_(values)
    quantizer = QUANTIZERS["rtn"]
    assert_same(
        CpuBackend().quantize(x, quantizer, quantizer.check()),
        quantizer.quantize(values, quantizer.check()),
        "far rows",
    )


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("isa", ["", "portable", *products()])
def test_matmul_equals_reference(isa: str, out_dtype: torch.dtype) -> None:
    """Small-integer operands (codes on the grid, block scales powers of two in a narrow range) make
    every partial sum exact in float32, so any order of summation gives the same bits; globals, row
    globals and bias are applied alike."""
    generator = torch.Generator().manual_seed(0)
    for m, n, k in ((1, 1, 16), (14, 32, 16), (15, 33, 48), (113, 129, 1040), (40, 7, 2064)):
        for row_scaled in (False, True):
            a, b = (
                QTensor(
                    torch.randint(256, (rows, k // 2), dtype=torch.uint8, generator=generator),
                    torch.randint(6, 9, (rows, k // 16), dtype=torch.uint8, generator=generator)
                    * 8,
                    torch.rand(rows if row_scaled else 1, generator=generator) + 0.5,
                    (1, 16),
                    (rows, k),
                )
                for rows in (m, n)
            )
            for bias in (None, torch.randn(n, generator=generator)):
                got = CpuBackend(isa).matmul(a, b, out_dtype, bias)
                assert same(got, ReferenceBackend().matmul(a, b, out_dtype, bias)), (
                    f"{m} {n} {k} rows={row_scaled}"
                )


def test_matmul_of_tiles_and_poison() -> None:
    """16x16 scales reach their 16 rows; a NaN global scale makes all of y NaN, or its row alone
    when row-scaled."""
    tiles, rows = QUANTIZERS["rtn_2d"], QUANTIZERS["rtn"]
    x, w = torch.randn(40, 70), torch.randn(50, 70)
    a, b = rows.quantize(x, rows.check(row_scaled=True)), tiles.quantize(w, tiles.check())
    got, want = (
        backend.matmul(a, b, torch.float32) for backend in (CpuBackend(), ReferenceBackend())
    )
    # float32 sums of 80 products in another order: each of the 80 additions errs by at most 2^-24
    # of the running sum
    assert (got - want).abs().max() <= 80 * 2**-24 * (
        a.dequantize().abs() @ b.dequantize().abs().t()
    ).max()
    x[3, 5] = float("nan")
    y = CpuBackend().matmul(rows.quantize(x, rows.check(row_scaled=True)), b, torch.float32)
    assert y[3].isnan().all()
    assert y.isnan().sum() == 50
    assert CpuBackend().matmul(rows.quantize(x, rows.check()), b, torch.float32).isnan().all()


def test_native_tables_equal_the_python_ones() -> None:
    """One table exported by the kernels pins csrc/formats.h to formats.py: decoding is a view of
    it."""
    scales = torch.arange(127, dtype=torch.uint8)[:, None]
    # code 2 is 1.0
    codes = torch.tensor([[0x22] * 8], dtype=torch.uint8).expand(127, -1).contiguous()
    q = QTensor(codes, scales.contiguous(), torch.ones(1), (1, 16), (127, 16))
    got = CpuBackend().decode(q, 1, torch.float32, with_global=False)[:, 0]
    assert got.tolist() == list(E4M3.grid) == e4m3_decode(scales[:, 0]).tolist()
    assert E2M1.grid[2] == 1.0


def test_fold_in_and_swizzle_are_the_same_functions() -> None:
    """philox.h and layout.h against rng.py and layout.py."""
    rng = random.Random(0)
    for _ in range(200):
        seed, datum = rng.randrange(2**64), rng.randrange(2**64)
        assert native.fold_in(seed, [datum, 1]) == fold_in(seed, datum, 1)
        row, column, columns = rng.randrange(1000), rng.randrange(40), 40
        assert native.swizzled_offset(row, column, columns) == swizzled_offset(row, column, columns)


def test_fingerprint_sees_every_change_and_is_the_same_everywhere() -> None:
    """One flipped bit anywhere, all signs flipped, two neighbours or two far words exchanged, one
    byte more: each gives another number; instruction sets and thread counts agree. A collision by
    chance has probability 2^-64."""
    x = torch.randn(3 * 2**17 + 5)
    seen = set()
    for isa in ISAS:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            seen.add(CpuBackend(isa).fingerprint(x))
    assert len(seen) == 1
    variants = [
        x.neg(),
        x.flip(0),
        x.roll(1),
        x.roll(128),
        x.roll(2**14),
        x[:-1].contiguous(),
        x.mul(2),
        x.add(0.5),
    ]
    for at in (0, 1, 127, 128, 2**14 - 1, 2**14, x.numel() - 1):
        for bit in (0, 12, 22, 23, 31):
            one = x.clone()
            one.view(torch.int32)[at] ^= 1 << bit if bit < 31 else -(2**31)
            variants.append(one)
    pair = x.clone()
    pair[[5, 5 + 128]] = x[[5 + 128, 5]]
    values = [CpuBackend().fingerprint(v) for v in (*variants, pair)]
    assert len({*values, *seen}) == len(values) + 1
    assert CpuBackend().fingerprint(torch.randn(4, 4).t()) is None


def test_bad_arguments_raise_and_touch_nothing() -> None:
    """The binding refuses what would read or write out of bounds."""
    x = torch.randn(4, 32)
    source = native.Source(x.data_ptr(), 0, 4, 32, 32, 1)
    nothing = native.Trials([], [])
    options = native.Options(0, 0, False, False, False, nothing, 0, 0, 1, 0, True)
    with pytest.raises(ValueError, match="padded_columns"):
        native.QuantizeArgs(source, options, 48, 1, 1, 1, 0, 0, 1)
    with pytest.raises(ValueError, match="stride"):
        native.Source(x.data_ptr(), 0, 4, 16, 32, 2)
    with pytest.raises(ValueError, match="empty"):
        native.Source(x.data_ptr(), 0, 0, 16, 32, 1)
    with pytest.raises(ValueError, match="instruction set"):
        native.quantize(native.QuantizeArgs(source, options, 32, 1, 1, 1, 0, 0, 1), "sse9")
    with pytest.raises(ValueError, match="scratch"):
        native.QuantizeArgs(
            source,
            native.Options(5, 0, False, False, False, nothing, 0, 16, 1, 0, False),
            32,
            1,
            1,
            1,
            0,
            0,
            1,
        )
    for rule, search in ((4, False), (5, True)):
        with pytest.raises(ValueError, match="has to try something"):
            native.Options(rule, 0, False, False, search, nothing, 0, 16, 1, 0, False)
    for values, inverses in (([0.0] * 17, [0.0] * 17), ([0.0], [])):
        with pytest.raises(ValueError, match="at most 16"):
            native.Trials(values, inverses)
    args = native.QuantizeArgs(source, options, 32, 1, 1, 1, 0, 0, 1)
    with pytest.raises(ValueError, match="one matrix and its transpose"):
        native.quantize_both(args, args, "")


def test_it_is_chosen_on_the_cpu_and_explained() -> None:
    """``explain`` names it as chosen for every operation, and the reference as available."""
    for operation in ("quantize", "dequantize", "matmul"):
        assert explain(operation, "cpu").splitlines()[-3::2] == [
            "cpu: chosen",
            "reference: available",
        ]
    assert "not on cuda" in explain("matmul", "cuda")


def test_a_process_can_be_held_to_an_instruction_set() -> None:
    """From then on nothing better is offered or accepted, by the quantisers and by the products,
    until it is let go. The bytes are the same on each. A name that this processor lacks changes
    nothing."""
    everything, all_products = instruction_sets(), products()
    x = torch.randn(33, 70).bfloat16()
    quantizer = QUANTIZERS["ms_eden"]
    options = quantizer.check(seed=1, sign_seed=2)
    want = quantizer.quantize(x, options)
    try:
        for i, isa in enumerate(everything):
            use_instruction_set(isa)
            assert instruction_sets() == everything[i:]
            assert products() == tuple(
                p for p in all_products if p.removesuffix("bf16") in everything[i:]
            )
            assert f"kernels on cpu {isa}" in " ".join(info().split())
            assert_same(CpuBackend().quantize(x, quantizer, options), want, isa)
            for better in everything[:i]:
                with pytest.raises(ValueError, match=f"better than the {isa}"):
                    CpuBackend(better).quantize(x, quantizer, options)
        with pytest.raises(ValueError, match="'sse9' is unknown"):
            use_instruction_set("sse9")
        assert instruction_sets() == everything[-1:]
    finally:
        use_instruction_set(everything[0])
    assert instruction_sets() == everything
