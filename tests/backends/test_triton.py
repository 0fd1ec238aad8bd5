"""The Triton kernels against the reference: equal to the last bit, over quantisers, options,
dtypes, orientations and difficult data; and what the compiler makes of them.

The kernels run on a GPU where there is one. Everywhere else Triton's interpreter runs them, in a
process of its own (``interpreting.py``), because a kernel is interpreted or compiled from its
definition on.
"""

from __future__ import annotations

import random
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interpreting import interpreted
from test_capturable import calls, no_host_read, pair
from test_linear import CUSTOM, tokens
from test_linear import same as same_results
from test_matmul import exact_operand
from test_native import BOTH, CASES, DTYPES, KINDS, assert_same, data, same

import nvfp4
from nvfp4.backends import registry
from nvfp4.backends.reference import ReferenceBackend
from nvfp4.backends.registry import BACKENDS, BackendUnavailable, select
from nvfp4.backends.triton.backend import _MISSING, INTERPRETED, TritonBackend
from nvfp4.numerics.hadamard import Rotation
from nvfp4.numerics.layout import swizzle
from nvfp4.numerics.qtensor import QTensor
from nvfp4.numerics.rng import ELEMENT_STREAM, philox
from nvfp4.numerics.scaling import spread
from nvfp4.ops import explain
from nvfp4.quantizers.registry import QUANTIZERS

pytestmark = pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING))

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
ON_GPU = torch.cuda.is_available() and not INTERPRETED
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
BACKEND = TritonBackend()
SHAPES = [(17, 33), (5, 270), (33, 20), (20, 130)]
RECIPES = ("nvidia", "quartet2")
CONVERTED = [
    ("rtn", {}),
    ("four_over_six", {}),
    ("four_over_six", {"block": (16, 16)}),
    ("scale_search", {}),
    ("ms_eden", {"group": 16, "search": True}),
]


@pytest.fixture(autouse=True)
def quiet_interpreter() -> Iterator[None]:
    """The interpreter is numpy, which warns of the infinities that the rules clamp."""
    with np.errstate(all="ignore"):
        yield


def check_quantize(
    name: str, options: dict, x: torch.Tensor, rng: random.Random, note: str
) -> None:
    """Both backends on x under random seeds."""
    quantizer = QUANTIZERS[name]
    checked = quantizer.check(seed=rng.randrange(2**64), sign_seed=rng.randrange(2**64), **options)
    got = BACKEND.quantize(x.to(DEVICE), quantizer, checked)
    assert_same(
        got.to("cpu"),
        quantizer.quantize(x.cpu(), checked),
        f"{name} {options} {tuple(x.shape)} {x.dtype} {note}",
    )


def orientations() -> Iterator[Any]:
    """Every case with both orientations; those of a rule's many options are slow where each pair of
    an option and an
    orientation has a case already: rounds and groups of ms_eden, metrics and blocks of
    four_over_six."""
    for name, options in CASES:
        turns = options.get("rounds", 1) + options.get("group", 16).bit_length()
        turns += ("mse", "mae", "abs_max").index(options.get("metric", "mse")) + options.get(
            "block", (1, 16)
        )[0] // 16
        many = options.keys() in ({"rounds", "group"}, {"metric", "block"})
        for transposed in (False, True):
            again = many and turns % 2 == transposed
            yield pytest.param(name, options, transposed, marks=pytest.mark.slow if again else ())


@interpreted
@pytest.mark.parametrize(("name", "options", "transposed"), orientations(), ids=lambda v: str(v))
def test_quantize_equals_reference(name: str, options: dict, transposed: bool) -> None:
    """Every rule and option in both orientations, over shapes, kinds of data, dtypes and seeds
    drawn at random."""
    rng = random.Random(f"{name}{options}{transposed}")
    shape, kind = rng.choice(SHAPES), rng.choice(("normal", "wide", "rows", "sparse"))
    x = data(shape[::-1] if transposed else shape, kind, rng.choice(DTYPES), rng.randrange(2**31))
    check_quantize(
        name, options, x.t() if transposed else x, rng, f"{kind} transposed={transposed}"
    )


@interpreted
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*QUANTIZERS, "row_scaled", "tiles", "rotated"])
def test_difficult_data(name: str, kind: str) -> None:
    """Zeros, denormals, overflow, NaN, Inf and ties under every rule; what a single element may be,
    as one too."""
    variants = {
        "row_scaled": ("sr", {"row_scaled": True}),
        "tiles": ("four_over_six", {"block": (16, 16)}),
        "rotated": ("rtn", {"rotation": Rotation(16, fixed=True)}),
    }
    rule, options = variants.get(name, (name, {}))
    rng = random.Random(f"{name}{kind}")
    for shape in ((3, 40), (1, 1)) if kind in ("normal", "zeros", "tiny", "nan") else ((3, 40),):
        check_quantize(
            rule, options, data(shape, kind, rng.choice(DTYPES), rng.randrange(2**31)), rng, kind
        )


@interpreted
def test_strides_of_neither_kind() -> None:
    """Every second column, rows in reverse order of a view, one row broadcast: addresses come from
    both strides."""
    rng = random.Random(0)
    x = torch.randn(20, 80).to(DEVICE)  # there first: a copy to a GPU closes the gaps of a view
    for view in (x[:, ::2], x[::3, 1::2], x[:1].expand(5, 80), x.t()[::2, ::2]):
        check_quantize("rtn", {}, view, rng, f"strides {view.stride()}")


@interpreted
@pytest.mark.parametrize(("rows", "columns"), BOTH, ids=lambda v: f"{v[0]}{v[1]}")
def test_quantize_both_equals_two_references(rows: tuple, columns: tuple) -> None:
    """x and x^T from one read: each as if it were alone."""
    rng = random.Random(f"{rows}{columns}")
    pairs = [(QUANTIZERS[name], options) for name, options in (rows, columns)]
    for shape in ((1, 1), (17, 33)):
        kind, transposed = rng.choice(KINDS), rng.random() < 0.5
        x = data(
            shape[::-1] if transposed else shape, kind, rng.choice(DTYPES), rng.randrange(2**31)
        )
        x = x.t() if transposed else x
        checked = [
            (q, q.check(seed=rng.randrange(2**64), sign_seed=rng.randrange(2**64), **o))
            for q, o in pairs
        ]
        got = BACKEND.quantize_both(x.to(DEVICE), *checked)
        want = ReferenceBackend().quantize_both(x, *checked)
        for side, a, b in zip(("rows", "columns"), got, want, strict=True):
            assert_same(
                a.to("cpu"), b, f"{side} of {shape} {kind} {x.dtype} transposed={transposed}"
            )


@interpreted
@pytest.mark.skipif(ON_GPU, reason="the card at hand decides how often it reads")
@pytest.mark.parametrize(
    "columns",
    [("ms_eden", {"group": 16}), ("rtn", {"rotation": Rotation(16, fixed=True)})],
    ids=str,
)
def test_quantize_both_by_two_kernels(columns: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """As data-centre cards have it, with the same bits: x is read once per orientation."""
    from nvfp4.backends.triton.quantize import kernels, launch

    launched = []

    def run(kernel: Any, *args: Any, **kwargs: Any) -> None:
        launched.append(kernel)
        launch_one(kernel, *args, **kwargs)

    launch_one = launch.launch
    monkeypatch.setattr(launch, "launch", run)
    monkeypatch.setattr(launch, "capability_of", lambda device: 90)
    rows = (QUANTIZERS["ms_eden"], QUANTIZERS["ms_eden"].check(seed=1, sign_seed=2))
    other = (
        QUANTIZERS[columns[0]],
        QUANTIZERS[columns[0]].check(seed=3, sign_seed=4, **columns[1]),
    )
    x = data((33, 70), "normal", torch.bfloat16, 5)
    got = BACKEND.quantize_both(x, rows, other)
    for a, b in zip(got, ReferenceBackend().quantize_both(x, rows, other), strict=True):
        assert_same(a, b, columns[0])
    assert kernels.quantize_both_kernel not in launched
    assert launched.count(kernels.quantize_kernel) == 2


@interpreted
def test_several_tiles_per_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """As large matrices have it: the last program's tiles lie half outside."""
    from nvfp4.backends.triton.quantize import policy

    monkeypatch.setattr(policy, "MANY", 1)
    rng = random.Random(3)
    for name in ("rtn", "sr", "four_over_six", "ms_eden"):
        for kind in ("normal", "nan"):
            check_quantize(name, {}, data((75, 270), kind, torch.bfloat16, 1), rng, kind)


SAVED = [("rtn", {}), ("rtn_2d", {}), ("four_over_six", {"row_scaled": True})]
AGAIN = [
    ("ms_eden", {"rounds": 2}, (1, 1)),
    ("sr", {"rotation": Rotation(16, 1, 9)}, (17, 33)),
    ("rtn", {}, (40, 70)),
    ("rtn_2d", {}, (20, 37)),
]


@interpreted
@pytest.mark.parametrize(
    "rest", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["pairs", "rest"]
)
@pytest.mark.parametrize("kind", ["normal", "wide", "nan"])
@pytest.mark.parametrize("saved", SAVED, ids=str)
def test_requantize_equals_reference(saved: tuple, kind: str, rest: bool) -> None:
    """Codes decoded in float32, cut, transposed, quantised: no decoded copy in between. Each pair
    of what was saved, a kind of data and what comes of it; the rest of the triples is slow."""
    first = QUANTIZERS[saved[0]]
    rng = random.Random(f"{saved}{kind}")
    turn = SAVED.index(saved) + ("normal", "wide", "nan").index(kind) + rest
    for name, options, shape in AGAIN[turn % 2 :: 2]:
        q = first.quantize(
            data(shape, kind, torch.float32, rng.randrange(2**31)), first.check(**saved[1])
        )
        second = QUANTIZERS[name]
        checked = second.check(seed=3, sign_seed=None if "rotation" in options else 4, **options)
        want = second.quantize(q.dequantize().t(), checked)
        assert_same(
            BACKEND.requantize(q.to(DEVICE), second, checked).to("cpu"),
            want,
            f"{shape} {kind} {name}",
        )


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_equals_reference(dtype: torch.dtype) -> None:
    """Decoding with the global scale, per tensor, per row and per tile, rounded once to the
    dtype."""
    for i, kind in enumerate(KINDS):
        for name, options in (("rtn", {"row_scaled": True}), ("rtn_2d", {}), ("four_over_six", {})):
            quantizer = QUANTIZERS[name]
            q = quantizer.quantize(
                data((19, 37), kind, torch.float32, i), quantizer.check(**options)
            )
            assert same(BACKEND.dequantize(q.to(DEVICE), dtype).cpu(), q.dequantize(dtype)), (
                f"{kind} {name}"
            )


@interpreted
def test_every_code_and_scale_decodes_to_its_product() -> None:
    """All 16 codes on all 128 scales without the global scale: exact in BF16; the NaN byte decodes
    to NaN."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(128, 1)
    scales = torch.arange(128, dtype=torch.uint8)[:, None].expand(-1, 32).contiguous()
    q = QTensor(codes, scales, torch.ones(1), (1, 16), (128, 512))
    for dtype in DTYPES:
        got = BACKEND.decode_blocks(q.to(DEVICE), dtype).cpu()
        assert same(got, q.decode_blocks().to(dtype))
        assert same(got.float(), q.decode_blocks())


@interpreted
@pytest.mark.parametrize(
    "rest", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["pairs", "rest"]
)
@pytest.mark.parametrize("name", ["rtn", "rtn_2d", "ms_eden"])
def test_swizzled_scales(name: str, rest: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a GEMM reads them: the scales of each row, in the order of ``layout.swizzle``, padding
    zero; the row-major ones are unchanged. From x, from codes, and of both orientations for the
    rule that finishes later: each with two tiles of the layout down and along, x also with less and
    with more; one function stores all of them. The rest is slow."""
    from nvfp4.backends.triton import operands

    monkeypatch.setattr(operands, "reads_swizzled", lambda device: True)
    quantizer = QUANTIZERS[name]
    checked = quantizer.check(seed=5, **({"group": 16} if name == "ms_eden" else {}))
    for shape in ((1, 1), (130, 90), (16, 300)):
        x = data(shape, "normal", torch.bfloat16, 1)
        here = x.to(DEVICE)
        made = [] if rest else [BACKEND.quantize(here, quantizer, checked)]
        if rest != (shape == (130, 90)):
            made.append(BACKEND.requantize(quantized(here.t()), quantizer, checked))
            if name == "ms_eden":
                made += BACKEND.quantize_both(here, (quantizer, checked), (quantizer, checked))
        for q in made:
            assert q.swizzled_scale is not None
            assert same(q.swizzled_scale, swizzle(spread(q.block_scale, q.block, q.rows)))
        if not rest:
            assert_same(made[0].to("cpu"), quantizer.quantize(x, checked), f"{shape}")


def quantized(x: torch.Tensor) -> QTensor:
    """Some codes of x."""
    return BACKEND.quantize(x, QUANTIZERS["rtn"], QUANTIZERS["rtn"].check())


@interpreted
@pytest.mark.skipif(
    ON_GPU, reason="a GPU from sm_100 on takes this path in every test, others never"
)
@pytest.mark.parametrize("kind", ["normal", "wide", "ties", "nan"])
@pytest.mark.parametrize(("name", "options"), CONVERTED, ids=str)
def test_conversions_of_the_hardware(
    name: str, options: dict, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compiled for Blackwell, where ``cvt`` rounds to E2M1, with that instruction as the
    PTX ISA has it: the same codes in the same order; values, too, where candidates are compared."""
    import ptx
    import triton.language as tl

    from nvfp4.backends.triton import operands

    seen = []

    def run(asm: str, *args: Any, **kwargs: Any) -> Any:
        seen.append(asm)
        return ptx.inline_asm_elementwise(asm, *args, **kwargs)

    monkeypatch.setattr(operands, "card_converts", lambda device: True)
    monkeypatch.setattr(tl, "inline_asm_elementwise", run)
    rng = random.Random(f"{name}{options}{kind}")
    x = data((5, 70), kind, torch.float32, rng.randrange(2**31))
    check_quantize(name, options, x, rng, kind)
    assert any("mov.b32 $0, {a, b, c, d}" in asm for asm in seen)
    assert any("cvt.f32.f16" in asm for asm in seen) == (name != "rtn")


@interpreted
@pytest.mark.parametrize("seed", [0, 1, 16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1])
def test_seeds_of_every_size(seed: int) -> None:
    """The halves of a seed are signed on their way to the kernel; no bit of it is lost."""
    x = data((2, 32), "normal", torch.float32, 0)
    for name in ("sr", "ms_eden"):
        quantizer = QUANTIZERS[name]
        checked = quantizer.check(seed=seed, sign_seed=seed ^ 2**63 ^ 2**31)
        assert_same(
            BACKEND.quantize(x.to(DEVICE), quantizer, checked).to("cpu"),
            quantizer.quantize(x, checked),
            name,
        )


@interpreted
@pytest.mark.parametrize(
    "recipe",
    [CUSTOM, *(pytest.param(name, marks=() if ON_GPU else pytest.mark.slow) for name in RECIPES)],
    ids=lambda r: getattr(r, "name", r),
)
def test_seeds_in_memory_give_the_same_layer(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, twice, of a capturable layer: the bits of one whose seeds are
    arguments; nothing is read
    back. Words whose every half has its top bit set. The first recipe draws all that there is to
    draw: signs and elements of each operand in the forward, scales in the backward. The others are
    slow in the interpreter."""
    if INTERPRETED:  # by the other tests of this file, in a fifth of the time
        monkeypatch.setattr(registry, "find_fault", lambda *args: None)
    layer, there = (layer.to(DEVICE) for layer in pair(recipe, 32, 16, "triton"))
    layer.nvfp4.noise.calls = there.nvfp4.noise.calls = 2**63 - 2**31 - 9
    nvfp4.capturable(there)
    x, dy = (t.to(DEVICE) for t in tokens(5, 32, 16))
    wants = calls(layer, x, dy)
    with no_host_read(monkeypatch):
        gots = calls(there, x, dy)
    for got, want in zip(gots, wants, strict=True):
        same_results(got, want, str(recipe))
    assert not same(wants[0].dw, wants[1].dw)


@interpreted
def test_seeds_folded_on_the_device() -> None:
    """Every bit of seed, layer, call and rank; a rank of its own or the process's."""
    for words in (
        [5, 3, 2, -1],
        [-7, 2**40, 2**33 + 1, 3],
        [-(2**63), 0, 0, 0],
        [2**63 - 1, 9, 8, 2**31],
    ):
        made = BACKEND.draw_seeds(torch.tensor(words).to(DEVICE), 6, 3)
        assert torch.equal(made.cpu(), ReferenceBackend().draw_seeds(torch.tensor(words), 6, 3))


def test_halves_fit_their_type() -> None:
    """Every seed gives two numbers of 32 bits, so none is a reason to compile again."""
    from nvfp4.backends.triton.operands import halves

    for seed in (0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1):
        low, high = halves(seed)
        assert -(2**31) <= low < 2**31
        assert -(2**31) <= high < 2**31
        assert (low & 0xFFFFFFFF) | (high & 0xFFFFFFFF) << 32 == seed


@interpreted
def test_noise_beyond_32_bits() -> None:
    """Draw numbers above 2^35 use the second word of the counter."""
    import triton_kernels

    index = torch.tensor(
        [0, 7, 2**31, 2**32 + 5, 2**35, 2**40 + 3, 2**52 + 6, 2**62 + 1], dtype=torch.int64
    )
    got = triton_kernels.draws(index.to(DEVICE), 2**63 + 7).cpu()
    words = torch.stack(philox(2**63 + 7, index >> 3, ELEMENT_STREAM))
    word = words.gather(0, ((index & 7) >> 1)[None])[0]
    assert torch.equal(got, ((word >> (index & 1) * 16 & 0xFFFF).float() + 0.5) * 2.0**-16)


@interpreted
@pytest.mark.skipif(ON_GPU, reason="takes memory that is never touched, which a GPU does not have")
def test_rows_further_apart_than_32_bits() -> None:
    """Rows 2^31 bytes apart, along and down, are read at the right place: offsets are 64-bit."""
    memory = np.zeros(2**31 + 64, dtype=np.int16)  # pages appear only where they are touched
    x = torch.from_numpy(memory).view(torch.bfloat16).as_strided((3, 64), (2**30, 1))
    values = torch.randn(3, 64).bfloat16()
    x.copy_(values)
    quantizer = QUANTIZERS["rtn"]
    for far, near in ((x, values), (x.t(), values.t())):
        assert_same(
            BACKEND.quantize(far, quantizer, quantizer.check()),
            quantizer.quantize(near, quantizer.check()),
            "far rows",
        )


@pytest.mark.cuda
@compiles
@pytest.mark.parametrize(
    ("name", "options"), [("sr", {}), ("ms_eden", {"rounds": 2}), ("rtn", {"row_scaled": True})]
)
def test_nothing_waits_and_a_graph_replays(name: str, options: dict) -> None:
    """No synchronisation, and a captured graph reads the new contents of x, NaN included."""
    quantizer = QUANTIZERS[name]
    checked = quantizer.check(seed=1, **options)
    x = torch.randn(130, 260, device="cuda")
    BACKEND.quantize(x, quantizer, checked)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            q = BACKEND.quantize(x, quantizer, checked)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for kind in ("normal", "nan", "wide"):
        fresh = data((130, 260), kind, torch.float32, 3)
        x.copy_(fresh)
        graph.replay()
        assert_same(q.to("cpu"), quantizer.quantize(fresh, checked), kind)


@interpreted
@pytest.mark.skipif(ON_GPU, reason="of the interpreter")
def test_the_interpreter_is_never_chosen() -> None:
    """It runs when it is named; "auto" passes it over and says why."""
    cpu = torch.device("cpu")
    assert select("auto", "quantize", cpu).name != "triton"
    assert select("triton", "quantize", cpu, QUANTIZERS["rtn"]) is BACKENDS["triton"]
    assert "triton: it runs here only when named" in explain("quantize", "cpu").splitlines()


@compiles
def test_what_is_compiled_does_not_run_on_the_cpu() -> None:
    """Named or not."""
    cpu = torch.device("cpu")
    assert select("auto", "quantize", cpu).name != "triton"
    said = explain("quantize", "cpu").splitlines()
    assert "triton: it runs on cuda, and on the cpu only under TRITON_INTERPRET=1" in said
    with pytest.raises(BackendUnavailable, match="TRITON_INTERPRET"):
        select("triton", "quantize", cpu)


def test_what_it_refuses_has_a_reason() -> None:
    """Other devices; nothing else."""
    assert BACKEND.refuses("matmul") is None
    assert BACKEND.refuses("quantize", QUANTIZERS["ms_eden"]) is None
    assert "not on mps" in str(BACKEND.unavailable(torch.device("mps")))
    if not torch.cuda.is_available():
        assert "no NVIDIA GPU" in str(BACKEND.unavailable(torch.device("cuda")))


REPRESENTATIVE = [
    "amax_kernel: sr_rotation=16x1 of codes",
    "amax_kernel: rtn_rotation=nvidia of bfloat16^T",
    "quantize_kernel: rtn of bfloat16",
    "quantize_kernel: rtn_2d of float32^T",
    "quantize_kernel: sr_row_scaled=True of float16",
    "quantize_kernel: sr_te_rotation=nvidia of bfloat16^T",
    "quantize_kernel: four_over_six of bfloat16",
    "quantize_kernel: scale_search of bfloat16^T",
    "quantize_kernel: ms_eden_rounds=2 of bfloat16",
    "quantize_kernel: ms_eden_rounds=2_search=True of tile_codes",
    "quantize_both_kernel: rtn and rtn_rotation=nvidia^T of bfloat16",
    "finish_kernel: ms_eden, swizzled scales",
    "decode_kernel: tensor of 16x16 to bfloat16, no global",
    "decode_kernel: rows of 1x16 to float16",
]


@compiles
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_compiled_code(name: str, tmp_path: Path) -> None:
    """For sm_90, without a GPU: nothing is fused, flushed or approximated, no FP8 type, no register
    spilled."""
    from triton import knobs

    from tools.aot import compile_variant
    from tools.quantize_variants import all_variants

    variant = {v.name: v for v in all_variants()}[name]
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path)
        compiled = compile_variant(variant, 90)
    assert not compiled.metadata.enable_fp_fusion  # ptxas is told --fmad=false
    found = set(
        re.findall(
            r"fma\.\w+|\.ftz|div\.full|div\.approx|rcp\.\w+|e4m3|e2m1|\.local", compiled.asm["ptx"]
        )
    )
    assert not found, f"{name} has {found}"
    usage = resource_usage(compiled.asm["cubin"])
    assert usage["STACK"] == usage["LOCAL"] == 0, f"{name} spills: {usage}"


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL, ... of the one kernel in a cubin, as cuobjdump counts them."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", text)}


@compiles
def test_no_kernel_is_compiled_for_a_seed() -> None:
    """Triton compiles anew for integers that divide by 16 and for 1, and ignores names that a
    kernel does not have: a seed that it looks at is a new kernel, of a second or more, every few
    steps."""
    from nvfp4.backends.triton.quantize import kernels

    for name, kernel in vars(kernels).items():
        if name.endswith("_kernel"):
            looked_at = [
                p.name
                for p in kernel.params
                if re.match("seed_|sign_", p.name) and not p.do_not_specialize
            ]
            assert not looked_at, f"{name} is specialised on {looked_at}"


@compiles
def test_variants_cover_every_kernel() -> None:
    """Every kernel of the family is listed, under names that differ, with every parameter typed."""
    from nvfp4.backends.triton.quantize import kernels
    from tools.quantize_variants import all_variants

    variants = list(all_variants())
    family = {value for key, value in vars(kernels).items() if key.endswith("_kernel")}
    assert {v.kernel for v in variants} == family
    assert len({v.name for v in variants}) == len(variants)
    for v in variants:
        assert sorted([*v.types, *v.constants]) == sorted(v.kernel.arg_names)


@interpreted
@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (17, 33), (150, 140), (3, 270)])
def test_transposed_codes(shape: tuple[int, int]) -> None:
    """Bytes of both nibbles and tile scales, ragged on either side, and back again; what has none
    is refused alike."""
    quantizer = QUANTIZERS["rtn_2d"]
    q = quantizer.quantize(data(shape, "rows", torch.float32, 5), quantizer.check()).to(DEVICE)
    got = BACKEND.transpose(q)
    assert_same(got.to("cpu"), q.to("cpu").transpose(), f"{shape}")
    assert got.axis == q.transpose().axis
    back = BACKEND.transpose(got)
    assert_same(back.to("cpu"), q.to("cpu").transpose().transpose(), f"{shape} twice")
    with pytest.raises(ValueError, match="needs an unrotated matrix"):
        BACKEND.transpose(nvfp4.quantize(torch.ones(3, 16), "rtn", backend="reference").to(DEVICE))


@interpreted
@pytest.mark.parametrize(
    ("name", "options"), [("rtn", {}), ("scale_search", {"row_scaled": True}), ("rtn_2d", {})]
)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("amax", [50.0, float("inf"), float("nan")])
def test_a_supplied_amax_is_used(name: str, options: dict, amax: float, sign: int) -> None:
    """As the reference, which looks for it in a larger matrix, whatever its sign; only one kernel
    runs."""
    quantizer = QUANTIZERS[name]
    checked = quantizer.check(**options)
    x = data((21, 50), "normal", torch.bfloat16, 3)
    given = torch.full((21 if checked.row_scaled else 1,), amax)
    given = -given if sign < 0 else given
    assert given.signbit().all() == (sign < 0)
    got = BACKEND.quantize_with_amax(x.to(DEVICE), quantizer, checked, given.to(DEVICE))
    assert_same(
        got.to("cpu"),
        ReferenceBackend().quantize_with_amax(x, quantizer, checked, given),
        f"{name} {amax}",
    )


@interpreted
@pytest.mark.parametrize("row_scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gemm_of_operands_decoded_in_memory(dtype: torch.dtype, row_scaled: bool) -> None:
    """Sums that are exact in any order: equal to the reference, ragged, biased, NaN where a global
    scale is."""
    rng = np.random.default_rng(3)
    a, b = (exact_operand(rng, rows, 80, row_scaled=row_scaled).to(DEVICE) for rows in (37, 150))
    bias = torch.arange(150, dtype=dtype, device=DEVICE)
    for extra in (None, bias):
        got = BACKEND.matmul_decoded(a, b, dtype, extra)
        want = ReferenceBackend().matmul(
            a.to("cpu"), b.to("cpu"), dtype, None if extra is None else extra.cpu()
        )
        assert same(got.cpu(), want)
    a.global_scale[0] = torch.nan
    assert BACKEND.matmul_decoded(a, b, dtype)[0].isnan().all()
