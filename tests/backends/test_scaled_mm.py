"""The cuBLASLt backend against a stand-in that knows torch's rules, and the self-check against
every known way to err.

There is no such GPU where these tests run: ``tests/support/scaled_mm.py`` stands in for torch's
functions, at the seam where the backend takes them. On a Blackwell card the ordinary tests of every
backend run it too.
"""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import get_args

import numpy as np
import oracle
import pytest
import torch
from assertions import assert_floats_bitwise
from scaled_mm import Mistake, ScaledGroupedMm, ScaledMm
from test_matmul import exact_operand, oracle_matmul

from nvfp4 import ops
from nvfp4.backends import registry
from nvfp4.backends import scaled_mm as scaled_mm_module
from nvfp4.backends.base import Backend
from nvfp4.backends.reference import ReferenceBackend
from nvfp4.backends.registry import find_fault
from nvfp4.backends.scaled_mm import ScaledMmBackend, SharedAlpha
from nvfp4.layer.experts import ExpertsState, grouped_linear
from nvfp4.layer.noise import Noise
from nvfp4.numerics.groups import GroupedQTensor, Groups
from nvfp4.numerics.layout import swizzle
from nvfp4.numerics.qtensor import QTensor
from nvfp4.numerics.scaling import spread
from nvfp4.recipes import RECIPES

CPU = torch.device("cpu")
MISTAKES = [mistake for mistake in get_args(Mistake) if mistake != "scales over all groups"]


class Here(ScaledMmBackend):
    """The backend on the CPU, with the stand-ins."""

    name = "here"

    def __init__(self, mistake: Mistake | None = None) -> None:
        super().__init__(ScaledMm(mistake), ScaledGroupedMm(mistake))

    def unavailable(self, device: torch.device) -> str | None:
        return None


# shapes on both sides of every unit: 32 codes of the contraction, 16 columns, 128 x 4 scales
@pytest.mark.parametrize("block", [(1, 16), (16, 16)], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 32), (3, 5, 16), (130, 48, 100), (20, 150, 240)])
def test_float32_products_are_those_of_the_definition(m, n, k, block, rng):
    """Padding, tiles of scales spread over rows, swizzling, and the global scales one after the
    other, bit for bit."""
    a, b = exact_operand(rng, m, k), exact_operand(rng, n, k, block=block)
    assert_floats_bitwise(Here().matmul(a, b, torch.float32), oracle_matmul(a, b), "y")


@pytest.mark.parametrize("row_scaled", [(True, False), (False, True), (True, True)], ids=str)
def test_row_scales_and_their_order_hold_in_every_dtype(row_scaled, rng):
    """A row's own scale cannot go inside: the float32 path takes over, whose one cast is exact."""
    a = exact_operand(rng, 20, 96, row_scaled=row_scaled[0], octaves=(-140, -135))
    b = exact_operand(rng, 37, 96, row_scaled=row_scaled[1], octaves=(100, 110))
    want = oracle_matmul(a, b)
    assert_floats_bitwise(Here().matmul(a, b, torch.float32), want, "y")
    bf16 = torch.from_numpy(want).to(torch.bfloat16)
    assert_floats_bitwise(Here().matmul(a, b, torch.bfloat16).float(), bf16.float(), "y in BF16")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_apply_both_global_scales_at_once(dtype, rng):
    """fl(acc * fl(ga gb)) and fl(fl(acc ga) gb) each round twice, by 2^-24: at most 4 * 2^-24 apart
    before the cast.

    So a result differs by at most the one step of ``dtype`` that the cast may take the other way,
    and rarely: the two have to lie on both sides of a midpoint, 2^-22 of the distance to the next
    at 8 bits.
    """
    a, b = (
        exact_operand(rng, 64, 256, octaves=(-8, -6)),
        exact_operand(rng, 128, 256, octaves=(-8, -6)),
    )
    got, want = Here().matmul(a, b, dtype), ReferenceBackend().matmul(a, b, dtype)
    step = torch.finfo(dtype).eps * want.double().abs()
    assert ((got.double() - want.double()).abs() <= step).all()
    assert (got != want).double().mean() < 1e-2


def test_bias_goes_along(rng):
    """One of the output's dtype inside, any other in float32 afterwards; both to the bit (1.5 and
    1.25 are exact)."""
    a, b = exact_operand(rng, 20, 64), exact_operand(rng, 24, 64)
    a.global_scale.fill_(1.5)
    b.global_scale.fill_(1.25)
    for bias_dtype in (torch.bfloat16, torch.float32):
        for dtype in (torch.bfloat16, torch.float32):
            bias = torch.arange(24).to(bias_dtype)
            want = ReferenceBackend().matmul(a, b, dtype, bias)
            assert torch.equal(Here().matmul(a, b, dtype, bias), want)


class Cuda:
    """What torch.cuda says of streams and captures, of a machine with two cards."""

    def __init__(self, monkeypatch) -> None:
        self.stream, self.capturing = 0, False
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: (device, self.stream))
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: (device, 0))
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)


def test_torchs_one_buffer_is_used_where_nothing_can_overwrite_it(monkeypatch):
    """The default stream of the first card outside of captures, and nowhere else; one thread at a
    time."""
    cuda, alpha = Cuda(monkeypatch), SharedAlpha()
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)

    def lent(device: torch.device) -> bool:
        with alpha.lent(device) as answer:
            assert alpha._lock.locked()
            return answer

    cuda.stream = 7
    assert not lent(second), "another stream, which does not decide where the buffer lies either"
    cuda.stream, cuda.capturing = 0, True
    assert not lent(second)
    cuda.capturing = False
    assert lent(first)
    assert lent(first)
    assert not lent(second), "the buffer lies on the first card"
    cuda.stream = 7
    assert not lent(first)
    assert not alpha._lock.locked()


@pytest.mark.parametrize("with_bias", [False, True])
def test_without_the_buffer_the_definition_is_computed(with_bias, rng, monkeypatch):
    """One level of scales, float32, our own epilogue: the bits of the reference in every dtype."""
    levels = []

    class Lends(SharedAlpha):
        def lent(self, device):
            return nullcontext(False)

    class Counts(ScaledMm):
        def __call__(self, mat_a, mat_b, scale_a, *args, **kwargs):
            levels.append((len(scale_a), kwargs["output_dtype"], kwargs["bias"]))
            return super().__call__(mat_a, mat_b, scale_a, *args, **kwargs)

    backend = Here()
    backend._mm = Counts()
    monkeypatch.setattr(scaled_mm_module, "ALPHA", Lends())
    a, b = (
        exact_operand(rng, 20, 96, octaves=(-8, -6)),
        exact_operand(rng, 37, 96, octaves=(-8, -6)),
    )
    for dtype in (torch.bfloat16, torch.float16):
        bias = torch.arange(37).to(dtype) if with_bias else None
        want = ReferenceBackend().matmul(a, b, dtype, bias)
        assert torch.equal(backend.matmul(a, b, dtype, bias), want)
    assert levels == [(1, torch.float32, None)] * 2


def test_nan_and_empty_operands(rng):
    """A NaN global scale makes all NaN even where the sum is 0; nothing times anything is
    nothing."""
    a, b = exact_operand(rng, 4, 32), exact_operand(rng, 16, 32)
    a.codes.zero_()
    a.global_scale.fill_(float("nan"))
    for dtype in (torch.float32, torch.bfloat16):
        assert Here().matmul(a, b, dtype).isnan().all()
    nothing = exact_operand(rng, 0, 32)
    assert Here().matmul(nothing, b, torch.bfloat16).shape == (0, 16)


def test_a_weight_is_swizzled_once(rng, monkeypatch):
    """As long as it lives and its scales stay as they are; overwriting them in place is seen."""
    from nvfp4.backends import scaled_mm

    made = []
    real = scaled_mm.swizzle
    monkeypatch.setattr(scaled_mm, "swizzle", lambda scale: made.append(1) or real(scale))
    backend, weight = Here(), exact_operand(rng, 32, 64)
    for _ in range(3):
        x = exact_operand(rng, 8, 64)
        assert_floats_bitwise(
            backend.matmul(x, weight, torch.float32), oracle_matmul(x, weight), "y"
        )
    assert len(made) == 4
    weight.block_scale.copy_(exact_operand(rng, 32, 64).block_scale)
    assert_floats_bitwise(
        backend.matmul(x, weight, torch.float32), oracle_matmul(x, weight), "y after a change"
    )
    del x, weight
    gc.collect()
    assert not backend._swizzled


@pytest.mark.parametrize("block", [(1, 16), (16, 16)], ids=str)
def test_scales_that_a_quantiser_swizzled_are_read(block, rng, monkeypatch):
    """The same bits as where they are swizzled here; codes that are overwritten bring theirs along,
    and scales that somebody wrote to by themselves are swizzled anew."""
    backend = Here()
    plain, other, b = (exact_operand(rng, rows, 80, block=block) for rows in (130, 130, 48))

    def carrying(q: QTensor) -> QTensor:
        tensors = [tensor.clone() for tensor in q.tensors]
        return QTensor(*tensors, *q.record, swizzle(spread(q.block_scale, q.block, q.rows)))

    want, renewed = (backend.matmul(q, b, torch.float32) for q in (plain, other))
    assert not torch.equal(want, renewed)
    a = carrying(plain)
    with monkeypatch.context() as patched:
        patched.setattr(scaled_mm_module, "swizzle", None)  # any call of it would raise
        got = backend.matmul(a, carrying(b), torch.float32)
        assert torch.equal(got, want)
        a.overwrite(carrying(other))
        assert torch.equal(backend.matmul(a, carrying(b), torch.float32), renewed)
    a.overwrite(plain)  # which carries none
    assert torch.equal(backend.matmul(a, b, torch.float32), want)
    for target, tensor in zip(a.tensors, other.tensors, strict=True):
        target.copy_(tensor)
    assert torch.equal(backend.matmul(a, b, torch.float32), renewed)


def test_the_stand_in_passes_the_self_check():
    """What the mistakes below are held against: both operations, through the native calls."""
    backend = Here()
    assert find_fault(backend, "matmul", CPU, None) is None
    assert find_fault(backend, "grouped_matmul", CPU, None) is None
    assert backend._mm.calls >= 4
    assert backend._grouped_mm.calls == 1


@pytest.mark.parametrize("operation", ["matmul", "grouped_matmul"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_is_caught_at_first_use(mistake, operation):
    """Scales in another order, zeros or leftovers for a result, global scales left out, nibbles
    exchanged."""
    assert (
        find_fault(Here(mistake), operation, CPU, None)
        == f"its first {operation} differs from the reference"
    )


def test_scales_swizzled_over_all_groups_are_caught():
    """What cost torchao a training run: the first group's scales for all."""
    assert find_fault(Here("scales over all groups"), "grouped_matmul", CPU, None) is not None
    assert find_fault(Here("scales over all groups"), "matmul", CPU, None) is None


def test_a_wrong_backend_is_passed_over(monkeypatch):
    """The registry asks once and goes on to the next; who names it hears why."""
    wrong = Here("row-major scales")
    monkeypatch.setattr(registry, "BACKENDS", {"here": wrong} | registry.BACKENDS)
    monkeypatch.setattr(registry, "_FAULTS", {})
    assert registry.select("auto", "matmul", CPU) is not wrong
    calls = wrong._mm.calls
    registry.select("auto", "matmul", CPU)
    assert wrong._mm.calls == calls
    with pytest.raises(
        registry.BackendUnavailable, match="its first matmul differs from the reference"
    ):
        registry.select("here", "matmul", CPU)


def test_named_it_multiplies_and_leaves_the_rest(monkeypatch):
    """So ``backend="scaled_mm"`` can be given to a whole model."""
    backend = Here()
    monkeypatch.setattr(registry, "BACKENDS", registry.BACKENDS | {"here": backend})
    assert registry.select("here", "matmul", CPU) is backend
    assert registry.select("here", "quantize", CPU) is registry.select("auto", "quantize", CPU)
    x = torch.randn(8, 64)
    y = ops.matmul(
        ops.quantize(x, "rtn", backend="here"),
        ops.quantize(x, "rtn", backend="here"),
        backend="here",
    )
    assert y.shape == (8, 8)
    assert "here: it only multiplies" in ops.explain("quantize")


@pytest.mark.parametrize(
    ("capability", "word"), [((9, 0), "9.0"), ((8, 9), "8.9"), ((11, 0), "11.0")]
)
def test_other_cards_are_refused_by_us(capability, word, monkeypatch):
    """torch would let Hopper through to cuBLASLt; Blackwell's two families pass, and a torch
    without the function says so."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    backend, cuda = ScaledMmBackend(), torch.device("cuda", 0)
    assert word in (backend.unavailable(cuda) or "")
    for good in ((10, 0), (10, 3), (12, 0), (12, 1)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, good=good: good)
        assert backend.unavailable(cuda) is None
    backend._mm = None
    assert "2.10" in (backend.unavailable(cuda) or "")
    assert ScaledMmBackend().unavailable(CPU) == "it runs on cuda, not on cpu"


def test_the_order_of_backends():
    """cuBLASLt before Triton before what any machine has."""
    names = list(registry.BACKENDS)
    assert names.index("scaled_mm") < names.index("triton") < names.index("reference")


def groups(
    rng: np.random.Generator, heights: list[int], n: int, k: int
) -> tuple[list[QTensor], list[QTensor]]:
    return [exact_operand(rng, rows, k) for rows in heights], [
        exact_operand(rng, n, k) for _ in heights
    ]


@pytest.mark.parametrize("tall", [1, 16], ids=["rows", "tiles"])
def test_grouped_products_are_the_single_ones(tall, rng):
    """Ragged groups, two of them empty; in one launch (BF16), by turns elsewhere: the same bits."""
    backend: Backend = Here()
    heights = [0, 5, 130, 0, 16]
    a = [exact_operand(rng, rows, 72) for rows in heights]
    b = [exact_operand(rng, 32, 72, block=(tall, 16)) for _ in heights]
    for q in (*a, *b):
        q.global_scale.fill_(1.25)  # exact in any order, so that BF16 can be compared bit for bit
    left, right = GroupedQTensor.of(a, "rows"), GroupedQTensor.of(b, None)
    for dtype in (torch.bfloat16, torch.float32):
        got = backend.grouped_matmul(left, right, dtype)
        for e, y in enumerate(got.split(heights)):
            assert torch.equal(y, ReferenceBackend().matmul(a[e], b[e], dtype))
    assert backend._grouped_mm.calls == 1


def test_experts_run_in_one_launch(monkeypatch):
    """fprop and dgrad of a stack are one grouped product each; wgrad, ragged in its contraction,
    goes expert by expert.

    Held against the same stack on the reference: at most the step that ``test_sixteen_bits``
    allows, of sums that the stand-in adds exactly.
    """
    backend = Here()
    monkeypatch.setattr(registry, "BACKENDS", registry.BACKENDS | {"here": backend})
    weight = torch.randn(3, 32, 64, dtype=torch.bfloat16)
    x, dy = torch.randn(148, 64, dtype=torch.bfloat16), torch.randn(148, 32, dtype=torch.bfloat16)
    made = {}
    for name in ("here", "reference"):
        w, leaf = (tensor.clone().requires_grad_() for tensor in (weight, x))
        y = grouped_linear(
            leaf, w, Groups.of((7, 1, 140)), ExpertsState(RECIPES["quartet2"], Noise(1, 0), name)
        )
        y.backward(dy)
        made[name] = (y.detach(), leaf.grad, w.grad)
    assert backend._grouped_mm.calls == 2 + 1, "and the self-check's"
    assert backend._mm.calls == 3 + 3 + 3, "three of wgrad, six in float32 of the self-check"
    for got, want in zip(made["here"], made["reference"], strict=True):
        want, step = want.double(), torch.finfo(torch.bfloat16).eps * want.double().abs()
        assert ((got.double() - want).abs() <= step + 1e-6 * want.abs().max()).all()


def test_the_probe_is_exact_in_any_order():
    """What the self-check rests on: float64 gives the same bits, with the global scales applied in
    either way."""
    from nvfp4.backends import selfcheck

    a = selfcheck._exact(CPU, 136, 1.5, 40503)
    b = selfcheck._exact(CPU, 152, 1.25, 48271)
    exact = a.decode_blocks().double() @ b.decode_blocks().double().t() * 1.875
    assert_floats_bitwise(ReferenceBackend().matmul(a, b, torch.float32), exact.float(), "y")
    assert torch.equal(exact, exact.float().double())
    rows = np.array([[oracle.swizzle_offset(r, c, 13) for c in range(13)] for r in range(136)])
    assert rows.max() > 512 * 4, "more than one row of tiles"
    assert len(a.block_scale.unique()) == 3
