"""The CUDA kernels against the reference, equal to the last bit: on a GPU where the extension was
built for it, and always on the processor, where csrc/cuda/simt.h runs the very same sources a block
at a time, threads as fibres.

What a GPU would leave undefined fails there: diverging barriers, incomplete shuffles, shared memory
read before it is written (it holds NaN) or overrun, any address beyond either end of an array.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import cuda_host
import pytest
import torch
from test_native import BOTH, CASES, DTYPES, KINDS, assert_same, data, same

from nvfp4.backends.native import cuda
from nvfp4.backends.native.cuda import CudaBackend, _Target
from nvfp4.backends.reference import ReferenceBackend
from nvfp4.backends.registry import BACKENDS, find_fault
from nvfp4.numerics.hadamard import Rotation
from nvfp4.numerics.layout import swizzle
from nvfp4.numerics.qtensor import QTensor
from nvfp4.numerics.rng import DeviceSeed
from nvfp4.numerics.scaling import spread
from nvfp4.quantizers.registry import QUANTIZERS
from nvfp4.recipes import RECIPES

DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(cuda_host.COMPILER is None, reason="there is no C++ compiler"),
    ),
    pytest.param("cuda", marks=pytest.mark.cuda),
]
SHAPES = [(1, 1), (17, 33), (5, 300), (130, 128), (300, 5), (33, 129), (1, 257)]


@pytest.fixture(params=DEVICES)
def place(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def kernels(place: torch.device, request: pytest.FixtureRequest) -> CudaBackend:
    """The backend there. On the processor half of the tests run blocks and warps backwards: nothing
    may depend on who comes first."""
    if place.type == "cpu":
        native = cuda_host.load()
        native.set_order(len(request.node.name) % 2)
        return CudaBackend(native)
    backend = BACKENDS["cuda"]
    reason = backend.unavailable(place)
    if reason is not None:
        pytest.skip(f"the CUDA backend: {reason}")
    assert isinstance(backend, CudaBackend)
    return backend


def check_quantize(
    kernels, place, name: str, options: dict, x: torch.Tensor, rng: random.Random, note: str
) -> None:
    """Both backends on x under random seeds."""
    quantizer = QUANTIZERS[name]
    checked = quantizer.check(seed=rng.randrange(2**64), sign_seed=rng.randrange(2**64), **options)
    got = kernels.quantize(x.to(place), quantizer, checked)
    assert_same(
        got.to("cpu"),
        quantizer.quantize(x, checked),
        f"{name} {options} {tuple(x.shape)} {x.dtype} {note}",
    )


def accepted(backend: CudaBackend, cases: list) -> list:
    return [
        c
        for c in cases
        if backend.refuses("quantize", QUANTIZERS[c[0]], QUANTIZERS[c[0]].check(seed=0, **c[1]))
        is None
    ]


ACCEPTED = accepted(CudaBackend(None), CASES)


def test_what_is_refused() -> None:
    """All that it does not do: 16x16 blocks rotated in groups beyond a block, and products."""
    refused = [case for case in CASES if case not in ACCEPTED]
    assert refused == [("rtn", {"rotation": Rotation(128, 3, 5), "block": (16, 16)})]
    assert CudaBackend(None).refuses("matmul") is not None
    assert CudaBackend(None).refuses("dequantize") is None


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("name", "options"), ACCEPTED, ids=lambda v: str(v))
def test_quantize_equals_reference(
    kernels, place, name: str, options: dict, transposed: bool
) -> None:
    """Every rule and option in both orientations, over shapes, kinds of data, dtypes and seeds
    drawn at random."""
    rng = random.Random(f"{name}{options}{transposed}")
    for shape in SHAPES:
        kind = rng.choice(KINDS)
        x = data(
            shape[::-1] if transposed else shape, kind, rng.choice(DTYPES), rng.randrange(2**31)
        )
        check_quantize(
            kernels,
            place,
            name,
            options,
            x.t() if transposed else x,
            rng,
            f"{kind} transposed={transposed}",
        )


@pytest.mark.parametrize(("rows", "columns"), BOTH, ids=lambda v: f"{v[0]}{v[1]}")
def test_quantize_both_equals_two_references(kernels, place, rows: tuple, columns: tuple) -> None:
    """x and x^T, from one read where there is such a kernel: each as if it were alone."""
    rng = random.Random(f"{rows}{columns}")
    pairs = [(QUANTIZERS[name], options) for name, options in (rows, columns)]
    for shape in SHAPES:
        kind, dtype, transposed = rng.choice(KINDS), rng.choice(DTYPES), rng.random() < 0.5
        x = data(shape[::-1] if transposed else shape, kind, dtype, rng.randrange(2**31))
        x = x.t() if transposed else x
        checked = [
            (q, q.check(seed=rng.randrange(2**64), sign_seed=rng.randrange(2**64), **o))
            for q, o in pairs
        ]
        got = kernels.quantize_both(x.to(place), *checked)
        want = ReferenceBackend().quantize_both(x, *checked)
        for a, b, pair in zip(got, want, checked, strict=True):
            assert_same(a.to("cpu"), b, f"{shape} {kind} {dtype} transposed={transposed} {pair[1]}")


@pytest.mark.parametrize(
    "saved", [("rtn", {}), ("rtn_2d", {}), ("four_over_six", {"row_scaled": True})], ids=str
)
def test_requantize_equals_decoding_first(kernels, place, saved: tuple[str, dict]) -> None:
    """x-hat^T from codes equals decode in float32, cut, transpose, quantise: padding, tiles, row
    scales, NaN."""
    rng = random.Random(str(saved))
    first = QUANTIZERS[saved[0]]
    again = [
        ("ms_eden", {"rounds": 2}),
        ("ms_eden", {"search": True, "group": 64}),
        ("sr", {"rotation": Rotation(16, 1, 9)}),
        ("rtn", {"row_scaled": True}),
        ("rtn_2d", {}),
    ]
    for shape in ((1, 1), (17, 33), (33, 20), (130, 140), (257, 3)):
        q = first.quantize(
            data(shape, rng.choice(("normal", "wide", "nan")), torch.float32, 7),
            first.check(**saved[1]),
        )
        for name, options in again:
            second = QUANTIZERS[name]
            checked = second.check(
                seed=3, sign_seed=None if "rotation" in options else 4, **options
            )
            got = kernels.requantize(q.to(place), second, checked).to("cpu")
            assert_same(got, second.quantize(q.dequantize().t(), checked), f"{shape} {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_equals_reference(kernels, place, dtype: torch.dtype) -> None:
    """Decoding with the global scale, per tensor and per row, rounded once to the dtype; signs of
    zeros included."""
    for shape in ((1, 1), (17, 33), (40, 64)):
        for kind in KINDS:
            for name, options in (
                ("rtn", {"row_scaled": True}),
                ("rtn_2d", {}),
                ("four_over_six", {}),
            ):
                quantizer = QUANTIZERS[name]
                q = quantizer.quantize(
                    data(shape, kind, torch.float32, 1), quantizer.check(**options)
                )
                assert same(kernels.dequantize(q.to(place), dtype).cpu(), q.dequantize(dtype)), (
                    f"{shape} {kind} {name}"
                )


def test_every_code_and_scale_decodes_to_its_product(kernels, place) -> None:
    """All 16 codes on all 128 scales without the global scale: exact in BF16; the NaN byte decodes
    to NaN. And through
    the tiles of requantize, where a product travels as BF16: quantised again by rows, as the
    reference does."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(128, 1)
    scales = torch.arange(128, dtype=torch.uint8)[:, None].expand(-1, 32).contiguous()
    q = QTensor(codes, scales, torch.ones(1), (1, 16), (128, 512))
    for dtype in DTYPES:
        got = kernels.decode_blocks(q.to(place), dtype).cpu()
        assert same(got, q.decode_blocks().to(dtype))
        assert same(got.float(), q.decode_blocks())
    finite = QTensor(
        codes[:127].contiguous(),
        scales[:127].contiguous(),
        torch.tensor([0.7]),
        (1, 16),
        (127, 512),
    )
    rule = QUANTIZERS["scale_search"]
    got = kernels.requantize(finite.to(place), rule, rule.check()).to("cpu")
    assert_same(got, rule.quantize(finite.dequantize().t(), rule.check()), "requantised")


def test_codes_that_begin_anywhere(kernels, place) -> None:
    """Codes at an address that eight bytes do not divide are read one by one, to the same
    values."""
    quantizer = QUANTIZERS["rtn"]
    q = quantizer.quantize(data((19, 70), "normal", torch.float32, 1), quantizer.check())
    memory = torch.zeros(q.codes.numel() + 9, dtype=torch.uint8).to(place)
    for offset in (0, 1, 4, 8):
        codes = memory[offset : offset + q.codes.numel()].view(q.codes.shape)
        codes.copy_(q.codes)
        moved = QTensor(codes, *(tensor.to(place) for tensor in q.tensors[1:]), *q.record)
        assert same(
            kernels.dequantize(moved, torch.bfloat16).cpu(), q.dequantize(torch.bfloat16)
        ), offset


@pytest.mark.parametrize("name", ["rtn", "rtn_2d", "ms_eden"])
def test_swizzled_scales(kernels, place, name: str, monkeypatch) -> None:
    """Where a GEMM reads them: the scales of each row, in the order of ``layout.swizzle``, padding
    zero; the row-major ones are unchanged. Of x and of both orientations."""
    monkeypatch.setattr(cuda, "reads_swizzled", lambda device: True)
    quantizer = QUANTIZERS[name]
    checked = quantizer.check(seed=5, **({"group": 16} if name == "ms_eden" else {}))
    for shape in ((1, 1), (130, 90), (16, 300)):
        for x in (
            data(shape, "normal", torch.bfloat16, 1),
            data(shape[::-1], "normal", torch.bfloat16, 1).t(),
        ):
            how = (quantizer, checked)
            made = [
                kernels.quantize(x.to(place), *how),
                *kernels.quantize_both(x.to(place), how, how),
            ]
            for q, source in zip(made, (x, x, x.t()), strict=True):
                want = quantizer.quantize(source, checked)
                assert_same(q.to("cpu"), want, f"{shape}")
                assert q.swizzled_scale is not None
                assert torch.equal(
                    q.swizzled_scale.cpu(), swizzle(spread(want.block_scale, want.block, want.rows))
                )


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1])
def test_seeds_by_value_and_in_device_memory(kernels, place, seed: int) -> None:
    """No bit of a seed is lost, and a kernel that reads the seeds where they lie gives the same."""
    x = data((20, 140), "normal", torch.float32, 0)
    for name in ("sr", "ms_eden"):
        quantizer, sign_seed = QUANTIZERS[name], seed ^ 2**63 ^ 2**31
        checked = quantizer.check(seed=seed, sign_seed=sign_seed)
        want = quantizer.quantize(x, checked)
        assert_same(kernels.quantize(x.to(place), quantizer, checked).to("cpu"), want, name)
        signed = [(s + 2**63) % 2**64 - 2**63 for s in (seed, sign_seed)]
        there = [DeviceSeed(bits) for bits in torch.tensor(signed, device=place).unbind()]
        got = kernels.quantize(
            x.to(place), quantizer, quantizer.check(seed=there[0], sign_seed=there[1])
        )
        assert_same(QTensor(*got.to("cpu").tensors, *want.record), want, f"{name} from memory")


def test_strides_of_neither_kind(kernels, place) -> None:
    """Every second column, rows of a view, one row broadcast, rows that no 16 bytes divide."""
    rng = random.Random(0)
    for dtype in DTYPES:
        x = torch.randn(40, 160).to(dtype)
        views = (
            x[:, ::2],
            x[::3, 1::2],
            x[:1].expand(5, 160),
            x.t()[::2, ::2],
            x[:, 1:],
            x[1:, 3:150],
            x.t()[5:, 1:],
        )
        for view in views:
            check_quantize(kernels, place, "rtn", {}, view, rng, f"strides {view.stride()}")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("rtn", {"row_scaled": scaled}) for scaled in (False, True)),
        *((name, {}) for name in ("sr", "sr_te", "scale_search")),
        *(("four_over_six", {"metric": metric}) for metric in ("mse", "mae", "abs_max")),
        ("four_over_six", {"row_scaled": True}),
    ],
    ids=lambda v: str(v),
)
def test_rows_of_whole_blocks(kernels, place, name: str, options: dict, monkeypatch) -> None:
    """What is read without a tile: rows that begin on 16 bytes and end with a block, in fewer and
    in more blocks of threads than a grid has, with gaps between them, and not finite."""
    monkeypatch.setattr(cuda, "reads_swizzled", lambda device: True)
    rng = random.Random(f"{name}{options}")
    quantizer = QUANTIZERS[name]
    for rows, columns in ((1, 16), (37, 48), (3, 2080), (515, 32)):
        for kind in KINDS:
            dtype = rng.choice((torch.bfloat16, torch.float32))
            whole = data((rows, columns + 16), kind, dtype, rng.randrange(2**31))
            for x in (whole[:, 16:], whole[:, :columns].clone()):
                checked = quantizer.check(seed=rng.randrange(2**64), **options)
                got = kernels.quantize(x.to(place), quantizer, checked)
                want = quantizer.quantize(x, checked)
                assert_same(got.to("cpu"), want, f"{name} {tuple(x.shape)} {dtype} {kind}")
                assert got.swizzled_scale is not None
                assert torch.equal(got.swizzled_scale.cpu(), swizzle(want.block_scale))


@pytest.mark.parametrize("row_scaled", [False, True])
def test_a_supplied_amax_is_used(kernels, place, row_scaled: bool) -> None:
    """The scales of a tensor with one larger element come out if its amax is given, and none is
    looked for."""
    quantizer = QUANTIZERS["four_over_six"]
    checked = quantizer.check(row_scaled=row_scaled)
    x = data((20, 80), "normal", torch.bfloat16, 3)
    larger = torch.cat([x, torch.full((20, 16), 100.0, dtype=x.dtype)], dim=1)
    want = quantizer.quantize(larger, checked)
    count = 20 if row_scaled else 1
    every_third = (
        torch.full((3 * count,), 7.0)
        .index_fill_(0, torch.arange(0, 3 * count, 3), 100.0)
        .to(place)[::3]
    )
    for amax in (torch.full((count,), 100.0, device=place), every_third):
        got = kernels.quantize_with_amax(x.to(place), quantizer, checked, amax).to("cpu")
        assert same(got.codes, want.codes[:, :40])
        assert same(got.block_scale, want.block_scale[:, :5])
        assert same(got.global_scale, want.global_scale)


@pytest.mark.parametrize("row_scaled", [False, True])
def test_a_supplied_amax_with_its_sign_set(kernels, place, row_scaled: bool) -> None:
    """NaN is not finite whatever its sign bit, and a negative number stands for its magnitude: as
    the reference."""
    quantizer = QUANTIZERS["rtn"]
    checked = quantizer.check(row_scaled=row_scaled)
    x = data((20, 80), "normal", torch.bfloat16, 3)
    for value in (float("nan"), 50.0, float("inf")):
        amax = -torch.full((20 if row_scaled else 1,), value)
        assert amax.signbit().all()
        got = kernels.quantize_with_amax(x.to(place), quantizer, checked, amax.to(place)).to("cpu")
        want = ReferenceBackend().quantize_with_amax(x, quantizer, checked, amax)
        assert_same(got, want, f"amax -{value}")


@pytest.mark.parametrize("name", [*QUANTIZERS])
def test_the_self_check_accepts_it(kernels, place, name: str) -> None:
    """What the registry asks on the first use."""
    assert find_fault(kernels, "quantize", place, QUANTIZERS[name]) is None
    assert find_fault(kernels, "dequantize", place, None) is None


def test_order_does_not_matter() -> None:
    """Blocks and warps forwards and backwards, on a tensor of many tiles: the same bytes."""
    native = cuda_host.load()
    backend, x = CudaBackend(native), torch.randn(300, 520).bfloat16()
    pair = [
        (QUANTIZERS["ms_eden"], QUANTIZERS["ms_eden"].check(seed=s, sign_seed=2)) for s in (1, 3)
    ]
    results = []
    for order in (0, 1):
        native.set_order(order)
        results.append(backend.quantize_both(x, *pair))
    for one, other, want in zip(*results, ReferenceBackend().quantize_both(x, *pair), strict=True):
        assert_same(one, other, "backwards")
        assert_same(one, want, "many tiles")


def test_fused_pairs_are_those_of_the_recipes() -> None:
    """Both operands of x or dy that a recipe makes from one tensor come from one kernel."""
    native = cuda_host.load()
    fused = {}
    for recipe in RECIPES.values():
        operands = (
            ("x", recipe.fprop.left, recipe.wgrad.right),
            ("dy", recipe.dgrad.left, recipe.wgrad.left),
        )
        for name, left, right in operands:
            if all(o.quantizer is not None and o.source == "tensor" for o in (left, right)):
                pair = [_operand(native, o) for o in (left, right)]
                fused[recipe.name, name] = native.fused(*pair)
    assert ("search_eden", "dy") in fused
    assert len(fused) > 5
    assert all(fused.values()), fused


def guarded(shape, dtype: torch.dtype, at_end: bool) -> torch.Tensor:
    """Memory of its own between two pages that nobody may touch, at the end of its pages or at
    their start."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    page, count = mmap.PAGESIZE, math.prod(shape)
    size = count * dtype.itemsize
    inner = -(-size // page) * page
    area = mmap.mmap(-1, inner + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    libc = ctypes.CDLL(None, use_errno=True)
    for fence in (start, start + page + inner):
        assert libc.mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(page), 0) == 0
    offset = page + (inner - size if at_end else 0)
    return torch.frombuffer(area, dtype=dtype, count=count, offset=offset).view(shape)


@pytest.mark.skipif(cuda_host.COMPILER is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("at_end", [False, True])
def test_no_address_outside_of_any_array(monkeypatch: pytest.MonkeyPatch, at_end: bool) -> None:
    """Inputs, results and scratch each lie between two forbidden pages: one byte beyond ends the
    process."""
    kernels = CudaBackend(cuda_host.load())
    made = [
        ("rtn", {}),
        ("sr", {"row_scaled": True}),
        ("rtn_2d", {}),
        ("ms_eden", {"group": 32}),
        ("scale_search", {}),
    ]
    for shape in ((17, 33), (130, 20), (1, 128)):
        for dtype in DTYPES:
            x = guarded(shape, dtype, at_end).copy_(torch.randn(shape))
            plain = x.clone()
            with monkeypatch.context() as patched:
                patched.setattr(
                    torch,
                    "empty",
                    lambda *size, dtype, device=None: guarded(_size(size), dtype, at_end),
                )
                for name, options in made:
                    quantizer = QUANTIZERS[name]
                    checked = quantizer.check(seed=1, **options)
                    for view, same_view in ((x, plain), (x.t(), plain.t())):
                        q = kernels.quantize(view, quantizer, checked)
                        assert_same(
                            q, quantizer.quantize(same_view, checked), f"{shape} {dtype} {name}"
                        )
                    if q.rotation is None:
                        again = QUANTIZERS["rtn"]
                        kernels.requantize(q, again, again.check())
                        assert same(kernels.dequantize(q, dtype), q.dequantize(dtype))


def _size(size: tuple) -> tuple[int, ...]:
    return tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size


def _operand(native, spec) -> object:
    return _Target(
        native, (16, 128), spec.rule, spec.options_for(1, 2), torch.device("cpu")
    ).operand


@pytest.fixture(scope="module")
def simt_faults(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], int]:
    """``run_kernel`` of simt_faults.cpp, compiled once: a launch keeps nothing of the one
    before."""
    root = Path(__file__).parents[2]
    library = tmp_path_factory.mktemp("simt") / "faults.so"
    sources = [
        str(root / "tests" / "support" / "simt_faults.cpp"),
        str(root / "csrc" / "cuda" / "simt.cpp"),
    ]
    flags = [*cuda_host.FLAGS, "-fvisibility=default", "-shared"]
    subprocess.run([str(cuda_host.COMPILER), *flags, *sources, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library)).run_kernel


@pytest.mark.parametrize(
    "fault", ["half_a_barrier", "half_a_shuffle", "early_exit", "overrun", "unwritten"]
)
def test_the_driver_finds_faults(fault: str, simt_faults: Callable[[bytes], int]) -> None:
    """The rules themselves, on kernels that break one each; what is right is accepted before and
    after."""
    assert [simt_faults(name) for name in (b"right", fault.encode(), b"right")] == [0, 1, 0]


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("name", "options"), [("sr", {}), ("ms_eden", {"rounds": 2}), ("rtn", {"row_scaled": True})]
)
def test_nothing_waits_and_a_graph_replays(kernels, place, name: str, options: dict) -> None:
    """No synchronisation, and a captured graph reads the new contents of x, NaN included."""
    if place.type != "cuda":
        pytest.skip("graphs are a matter of GPUs")
    quantizer = QUANTIZERS[name]
    checked = quantizer.check(seed=1, **options)
    x = torch.randn(130, 260, device="cuda")
    kernels.quantize(x, quantizer, checked)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = kernels.quantize(x, quantizer, checked)
    for kind in ("normal", "nan", "wide"):
        fresh = data((130, 260), kind, torch.float32, 3)
        x.copy_(fresh)
        graph.replay()
        assert_same(q.to("cpu"), quantizer.quantize(fresh, checked), kind)
