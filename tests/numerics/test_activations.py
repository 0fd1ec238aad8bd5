"""RMSNorm and SwiGLU as they are defined: against a second program, against float64, and against
transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_native import same
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from nvfp4.numerics import activations
from nvfp4.numerics.activations import (
    EXP_FLOOR,
    LANES,
    SLAB,
    RMSNorm,
    SwiGLU,
    exp_negative,
    inverse_rms,
    row_sum,
    slab_sum,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (3, 256), (17, 300), (40, 513)]


def tree(values: list[np.float32]) -> np.float32:
    """Halves added to halves until one is left."""
    while len(values) > 1:
        half = len(values) // 2
        values = [values[i] + values[i + half] for i in range(half)]
    return values[0]


def summed(row: np.ndarray) -> np.float32:
    """``row_sum`` of one row, an addition at a time."""
    lanes = [np.float32(0)] * LANES
    for j, value in enumerate(row):
        lanes[j % LANES] = lanes[j % LANES] + value
    return tree(lanes)


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_have_one_order(shape: tuple[int, int]) -> None:
    """Bit for bit the sums of a program that adds number by number; some other order gives other
    bits."""
    x = torch.randn(shape) * torch.exp2(torch.randint(-8, 8, shape).float())
    want = np.array([summed(row) for row in x.numpy()])
    assert np.array_equal(row_sum(x).numpy(), want)
    padded = np.concatenate([x.numpy(), np.zeros((-shape[0] % SLAB, shape[1]), np.float32)])
    starts = range(0, len(padded), SLAB)
    slabs = [
        [tree(list(padded[start : start + SLAB, j])) for start in starts]
        for j in range(min(3, shape[1]))
    ]
    assert np.array_equal(
        slab_sum(x).numpy()[:3], np.array([summed(np.array(s, np.float32)) for s in slabs])
    )
    if shape[1] > LANES:
        assert not np.array_equal(x.sum(1).numpy(), want), (
            "an order that cannot be told from any other is no test"
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_inverse_rms_rounds_every_operation(dtype: torch.dtype) -> None:
    """1 / sqrt(mean + eps) of numpy, whose float32 roots are rounded correctly; torch's are not on
    every CPU."""
    x = (torch.randn(50, 48) * torch.exp2(torch.arange(-12.0, 13)).repeat(2)[:, None]).to(dtype)
    squares = np.array([summed(row * row) for row in x.float().numpy()])
    want = np.float32(1) / np.sqrt(squares / np.float32(48) + np.float32(1e-6))
    assert np.array_equal(inverse_rms(x, 1e-6).numpy(), want)


def test_exp_is_within_two_units() -> None:
    """e^-|x| over the range of float32 results, subnormal ones included, against float64."""
    x = torch.cat(
        [torch.linspace(-105, 105, 400_001), torch.randn(100_000), torch.tensor([0.0, -0.0, 1e30])]
    )
    got, want = exp_negative(x).double(), torch.exp(-x.double().abs())
    unit = (torch.nextafter(want.float(), torch.tensor(2.0)) - want.float()).double()
    assert (got - want).abs().div(unit).max() < 2
    assert exp_negative(torch.tensor([0.0])).item() == 1
    assert exp_negative(torch.tensor([EXP_FLOOR - 1, EXP_FLOOR, float("inf")])).tolist() == [
        0,
        0,
        0,
    ]
    assert 0 < exp_negative(torch.tensor([103.9])).item() < 2**-148


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_they_are_those_of_transformers(dtype: torch.dtype) -> None:
    """Rounded in the same places: where torch's exp, rsqrt or sum end up in another last bit of
    float32, a result next to a tie may differ, which one in 2^13 (FP16) or 2^16 (BF16) is; measured
    5e-6 and 0 in BF16."""
    x, up = (3 * torch.randn(256, 512)).to(dtype), torch.randn(256, 512).to(dtype)
    norm = LlamaRMSNorm(512, 1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.normal_()
        pairs = [
            (RMSNorm(x, norm.weight, 1e-5).values(), norm(x)),
            (SwiGLU(x, up).values(), torch.nn.functional.silu(x) * up),
        ]
    for got, want in pairs:
        assert got.dtype == want.dtype
        assert (got != want).float().mean() < 2**-10
        assert torch.allclose(got, want, rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_float64(dtype: torch.dtype) -> None:
    """Up to one rounding to the dtype, and in the weight's also that of the normalised x, which the
    forward used."""
    x, other, dy = (torch.randn(33, 70).to(dtype) for _ in range(3))
    rms, swiglu = RMSNorm(x, other[0].contiguous(), 1e-5), SwiGLU(x, other)

    def exact_rms(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5) * w

    def exact_swiglu(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return g * torch.sigmoid(g) * u

    for activation, exact in ((rms, exact_rms), (swiglu, exact_swiglu)):
        inputs = [t.double().requires_grad_() for t in (activation[0], activation[1])]
        want = torch.autograd.grad(exact(*inputs), inputs, dy.double())
        for got, wanted in zip(activation.gradients(dy), want, strict=True):
            assert got.dtype == dtype
            error = (got.double() - wanted).norm() / wanted.norm()
            assert error < max(torch.finfo(dtype).eps, 2e-6), (
                f"{type(activation).__name__}: {error}"
            )


def test_mixed_dtypes_promote() -> None:
    """BF16 activations and a float32 weight, as under autocast: rounded to BF16 once normalised,
    then float32."""
    x, weight = torch.randn(4, 32).bfloat16(), torch.randn(32)
    y = RMSNorm(x, weight, 1e-6).values()
    normal = RMSNorm(x, torch.ones(32, dtype=torch.bfloat16), 1e-6).values()
    assert same(y, normal.float() * weight)
    dx, dweight = RMSNorm(x, weight, 1e-6).gradients(y)
    assert (dx.dtype, dweight.dtype) == (torch.bfloat16, torch.float32)


def test_what_is_not_finite_stays_visible() -> None:
    """NaN and Inf make their row NaN (an infinite gate -Inf, as in torch: NaN); zeros are zeros,
    empty is empty."""
    weight = torch.ones(4)
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.tensor([[1.0, bad, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
        y = RMSNorm(x, weight, 1e-6).values()
        assert y[0, 1].isnan()
        assert y[1].isfinite().all()
        got, want = SwiGLU(x, torch.ones(2, 4)).values(), torch.nn.functional.silu(x)
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.isinf(), want.isinf())
    zeros = torch.zeros(2, 4)
    for activation in (RMSNorm(zeros, weight, 1e-6), SwiGLU(zeros, zeros)):
        assert not activation.values().any()
        assert all(d.isfinite().all() for d in activation.gradients(torch.ones(2, 4)))
    assert RMSNorm(torch.empty(0, 4), weight, 1e-6).values().shape == (0, 4)
    assert not RMSNorm(torch.empty(0, 4), weight, 1e-6).gradients(torch.empty(0, 4))[1].any()


def test_division_is_true_division() -> None:
    """x / 3, not x * fl(1/3): they differ for 5."""
    assert activations._over(torch.tensor([5.0]), 3).item() == np.float32(5) / np.float32(3)


@pytest.mark.parametrize("shape", [(700, 300), (3, 1), (0, 5), (2, 70_000)])
def test_stretches_are_the_whole(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """SwiGLU a few rows at a time, as on a CPU, and at once: equal bits, with strides of any
    kind."""
    gate, up, dy = (torch.randn(shape[::-1]).t() * 20 for _ in range(3))
    pair = SwiGLU(gate, up.bfloat16())
    got = [pair.values(), *pair.gradients(dy)]
    monkeypatch.setattr(activations, "_stretches", lambda *matrices: (matrices,))
    assert all(map(torch.equal, got, [pair.values(), *pair.gradients(dy)]))


@pytest.mark.parametrize("name", ["values", "gradients"])
def test_a_swiglu_takes_little_memory_on_a_cpu(name: str) -> None:
    """Beside its results, some 20 float32 matrices of ``STRETCH`` elements a thread at most; not of
    its own size."""
    gate = torch.randn(64 * torch.get_num_threads(), activations.STRETCH // 2).bfloat16()
    pair = SwiGLU(gate, gate)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        made = pair.values() if name == "values" else pair.gradients(gate)
    held = np.cumsum(
        [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    )
    results = gate.nbytes * (1 if isinstance(made, torch.Tensor) else len(made))
    assert results <= held.max() <= results + 20 * 4 * activations.STRETCH * torch.get_num_threads()
