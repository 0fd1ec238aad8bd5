"""summation="tensor_core": the rotation's sums of sixteen by tensor cores, in the CUDA kernels that
have them, and by butterflies everywhere else.

The kernels run on the processor (csrc/cuda/simt.h), whose tensor core adds as a test wants it. In
the order of the definition all codes are the reference's, whatever the input, which proves places
and indices; as cards do it, a few may differ, and how many is counted. The sign of a zero is not
looked at: no value depends on it, and where sixteen products cancel out a tensor core gives +0.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import cuda_host
import pytest
import torch
from tensor_core import CARDS, TensorCore, emulated
from test_native import KINDS, data

from nvfp4.backends.native.cuda import CudaBackend
from nvfp4.backends.reference import ReferenceBackend
from nvfp4.backends.registry import BACKENDS, find_fault
from nvfp4.numerics.codec import unpack
from nvfp4.numerics.qtensor import QTensor
from nvfp4.quantizers.base import Options
from nvfp4.quantizers.registry import QUANTIZERS

MS_EDEN = QUANTIZERS["ms_eden"]
SHAPES = [(1, 1), (17, 33), (130, 128), (300, 5), (1, 257), (129, 260)]
SHARE = 1e-4
"""Of the codes, how many a tensor core may change: docs/numerics.md."""

pytestmark = pytest.mark.skipif(cuda_host.COMPILER is None, reason="there is no C++ compiler")


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> Iterator[CudaBackend]:
    """On the processor; half of the tests run blocks and warps backwards."""
    native = cuda_host.load()
    native.set_order(len(request.node.name) % 2)
    yield CudaBackend(native)
    native.set_tensor_core(0, 0)


def options(rng: random.Random, **more: object) -> Options:
    """Of ms_eden by tensor cores, under random seeds."""
    seeds = {"seed": rng.randrange(2**64), "sign_seed": rng.randrange(2**64)}
    return MS_EDEN.check(**{"summation": "tensor_core", **seeds, **more})


def values(q: QTensor) -> torch.Tensor:
    """Codes as they count: [M, Kp], without the sign of a zero."""
    codes = unpack(q.codes)
    return torch.where(codes == 8, 0, codes)


def assert_alike(got: QTensor, want: QTensor, note: str) -> None:
    """Equal to the bit, but for the signs of zeros."""
    assert torch.equal(values(got), values(want)), f"codes: {note}"
    assert torch.equal(got.block_scale, want.block_scale), f"block scales: {note}"
    assert torch.equal(got.global_scale, want.global_scale) or (
        got.global_scale.isnan().all() and want.global_scale.isnan().all()
    ), f"global scale: {note}"
    assert got.record == want.record


def coded(x: torch.Tensor, quantizer: str = "four_over_six", **how: object) -> QTensor:
    """Codes of x with a global scale that is a power of two, by which all products are exact."""
    rule = QUANTIZERS[quantizer]
    q = rule.quantize(x, rule.check(**how))
    return replace(q, global_scale=torch.full_like(q.global_scale, 2.0**-9))


@pytest.mark.parametrize("kind", KINDS)
def test_summed_in_the_order_of_the_definition(kernels: CudaBackend, kind: str) -> None:
    """Rows, columns, both from one read, and codes anew: the reference's."""
    rng = random.Random(kind)
    for shape in SHAPES:
        x = data(shape, kind, torch.bfloat16, rng.randrange(2**31))
        for matrix, note in ((x, "rows"), (x.t(), "columns")):
            how = options(rng)
            want = MS_EDEN.quantize(matrix, how)
            assert_alike(kernels.quantize(matrix, MS_EDEN, how), want, f"{note} {shape}")

        pair = [(MS_EDEN, options(rng)) for _ in range(2)]
        both = kernels.quantize_both(x, *pair)
        for got, want in zip(both, ReferenceBackend().quantize_both(x, *pair), strict=True):
            assert_alike(got, want, f"both {shape}")

        for q in (coded(x), coded(x, "rtn_2d")):
            if kind in ("nan", "inf"):
                q = replace(q, global_scale=torch.tensor([float("nan")]))
            how = options(rng)
            want = ReferenceBackend().requantize(q, MS_EDEN, how)
            assert_alike(kernels.requantize(q, MS_EDEN, how), want, f"codes {shape} {q.block}")


def test_rows_that_no_sixteen_bytes_divide(kernels: CudaBackend) -> None:
    """Views that begin anywhere, whose rows no chunk of a tile fits."""
    rng = random.Random(0)
    x = torch.randn(300, 300, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    for view in (x[:, 1:], x[1:, 3:290], x.t()[5:, 1:], x[::2, 4:260]):
        how = options(rng)
        want = MS_EDEN.quantize(view, how)
        assert_alike(kernels.quantize(view, MS_EDEN, how), want, f"{view.stride()}")


def test_products_of_a_card_by_two_hands(kernels: CudaBackend) -> None:
    """The emulation in C++, lane by lane, and the one in numpy give the same codes and scales.

    Also of a core that keeps so little that hundreds of codes differ from the reference's.
    """
    rng = random.Random(0)
    x = data((130, 260), "wide", torch.bfloat16, 3)
    differing = 0
    for core in (*CARDS.values(), TensorCore(8, 2)):
        cuda_host.load().set_tensor_core(*core)
        how = options(rng)
        got, want = kernels.quantize(x, MS_EDEN, how), emulated(x, how, core)
        assert_alike(got, want, f"{core}")
        differing += int((values(got) != values(MS_EDEN.quantize(x, how))).sum())
    assert differing > 100, "these sums are to round: nothing was compared"


@pytest.mark.parametrize("kind", ["normal", "student", "lognormal"])
def test_few_codes_differ(kind: str) -> None:
    """On every card's way of summing, of ordinary and of heavy-tailed numbers."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(256, 1024, generator=generator)
    if kind == "student":  # two degrees of freedom: no variance
        chi = torch.randn(2, *x.shape, generator=generator).square().sum(dim=0) / 2
        x = x / chi.sqrt()
    elif kind == "lognormal":
        x = x * torch.exp(3 * torch.randn(x.shape, generator=generator))
    x = x.to(torch.bfloat16)
    for card, core in CARDS.items():
        how = MS_EDEN.check(seed=1, sign_seed=2)
        got, want = emulated(x, how, core), MS_EDEN.quantize(x, how)
        share = (values(got) != values(want)).float().mean().item()
        scales = (got.block_scale != want.block_scale).float().mean().item()
        assert share <= SHARE, f"{card}: {share}"
        assert scales <= SHARE, f"{card}: block scales {scales}"


def test_few_codes_of_codes_differ(kernels: CudaBackend) -> None:
    """Codes whose global scale is any number: it multiplies lengths instead of elements."""
    cuda_host.load().set_tensor_core(*CARDS["Hopper, Blackwell"])
    rng = random.Random(1)
    x = data((512, 512), "normal", torch.bfloat16, 7)
    rule = QUANTIZERS["four_over_six"]
    q, how = rule.quantize(x, rule.check()), options(rng)
    got = kernels.requantize(q, MS_EDEN, how)
    want = MS_EDEN.quantize(q.dequantize().t(), how)
    assert (values(got) != values(want)).float().mean().item() <= SHARE
    assert (got.block_scale != want.block_scale).float().mean().item() <= SHARE


@pytest.mark.cuda
def test_few_codes_differ_on_a_card() -> None:
    """Its own tensor cores, on every road."""
    place, backend = torch.device("cuda"), BACKENDS["cuda"]
    reason = backend.unavailable(place)
    if reason is not None:
        pytest.skip(f"the CUDA backend: {reason}")
    rng, rule = random.Random(2), QUANTIZERS["four_over_six"]
    for kind in ("normal", "rows", "wide"):
        x = data((1024, 2048), kind, torch.bfloat16, 3)
        pair = [(MS_EDEN, options(rng)) for _ in range(2)]
        made = [
            backend.quantize(x.to(place), *pair[0]),
            backend.quantize(x.to(place).t(), *pair[1]),
            *backend.quantize_both(x.to(place), *pair),
        ]
        rows, columns = ReferenceBackend().quantize_both(x, *pair)
        wanted = [rows, columns, rows, columns]
        if kind == "normal":
            q = rule.quantize(x, rule.check())
            made.append(backend.requantize(q.to(place), *pair[0]))
            wanted.append(ReferenceBackend().requantize(q, *pair[0]))
        for got, want in zip(made, wanted, strict=True):
            share = (values(got.to("cpu")) != values(want)).float().mean().item()
            assert share <= SHARE, f"{kind}: {share}"


@pytest.mark.parametrize(
    ("dtype", "more"),
    [
        (torch.float32, {}),
        (torch.float16, {}),
        (torch.bfloat16, {"rounds": 2}),
        (torch.bfloat16, {"group": 64}),
        (torch.bfloat16, {"search": True}),
        (torch.bfloat16, {"summation": "butterflies"}),
    ],
    ids=str,
)
def test_everything_else_is_exact(kernels: CudaBackend, dtype: torch.dtype, more: dict) -> None:
    """No tensor core where there is no kernel for it, however crude it is."""
    cuda_host.load().set_tensor_core(1, 4)
    x = data((130, 140), "wide", dtype, 1)
    how = options(random.Random(0), **more)
    for matrix in (x, x.t()):
        got, want = kernels.quantize(matrix, MS_EDEN, how), MS_EDEN.quantize(matrix, how)
        assert torch.equal(got.codes, want.codes)
        assert torch.equal(got.block_scale, want.block_scale)
    for got, want in zip(
        kernels.quantize_both(x, (MS_EDEN, how), (MS_EDEN, how)),
        ReferenceBackend().quantize_both(x, (MS_EDEN, how), (MS_EDEN, how)),
        strict=True,
    ):
        assert torch.equal(got.codes, want.codes)


def test_codes_with_a_scale_per_row_are_exact(kernels: CudaBackend) -> None:
    """Their factors differ within a group, so that nothing can be put off."""
    cuda_host.load().set_tensor_core(1, 4)
    q = coded(data((130, 140), "normal", torch.bfloat16, 1), row_scaled=True)
    how = options(random.Random(0))
    got, want = kernels.requantize(q, MS_EDEN, how), ReferenceBackend().requantize(q, MS_EDEN, how)
    assert torch.equal(got.codes, want.codes)


def test_the_self_check_runs_tensor_cores(kernels: CudaBackend) -> None:
    """It accepts every card's way of summing, and finds one that drops what it must not."""
    for core in (*CARDS.values(), TensorCore(0, 0)):
        cuda_host.load().set_tensor_core(*core)
        assert find_fault(kernels, "quantize", torch.device("cpu"), MS_EDEN) is None, core
    cuda_host.load().set_tensor_core(1, 4)
    assert "differs" in str(find_fault(kernels, "quantize", torch.device("cpu"), MS_EDEN))
