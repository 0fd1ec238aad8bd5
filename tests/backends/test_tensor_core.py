"""Products summed as FP4 tensor cores do: groups of 64 products, added with rounding towards zero.

The oracle adds with fractions. Operands are chosen so that the order and the rounding show: scales
over the whole range of E4M3, and cancellation.
"""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from assertions import assert_floats_bitwise

import nvfp4
from nvfp4.backends.native.products import PAIRS, products
from nvfp4.backends.registry import BACKENDS, check_backend
from nvfp4.backends.tensor_core import TensorCoreBackend, add_towards_zero, sum_in_groups
from nvfp4.numerics.qtensor import QTensor
from nvfp4.ops import matmul, quantize

SHAPES = [(1, 1, 1), (3, 5, 16), (17, 9, 100), (7, 33, 64), (20, 70, 336), (29, 40, 1000)]
ROADS = ["torch", *(name for name in products() if name != PAIRS)]


def any_operand(
    rng: np.random.Generator, rows: int, k: int, block: tuple[int, int] = (1, 16)
) -> QTensor:
    """Any codes with any scales: products differ by 2^30 and more, so that sums are rounded."""
    kp = -(-k // 16) * 16
    codes = rng.integers(0, 16, (rows, kp), dtype=np.uint8)
    codes[:, k:] = 0
    scales = rng.integers(0, 127, (-(-rows // block[0]), kp // 16), dtype=np.uint8)
    globals_ = rng.uniform(1, 2, 1).astype(np.float32)
    return QTensor(
        torch.from_numpy(oracle.pack(codes)),
        torch.from_numpy(scales),
        torch.from_numpy(globals_),
        block,
        (rows, k),
    )


def product(road: str, a: QTensor, b: QTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """By one of ``ROADS``: PyTorch's float64, or a native kernel."""
    backend = TensorCoreBackend("portable" if road == "torch" else road)
    return backend.matmul(a, b, dtype)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_every_road_gives_the_oracles_bits(
    m: int, n: int, k: int, road: str, rng: np.random.Generator
) -> None:
    a, b = any_operand(rng, m, k), any_operand(rng, n, k, (16, 16))
    left, right = (oracle.Quantized(*(t.numpy() for t in q.tensors)) for q in (a, b))
    want = oracle.matmul_of_tensor_cores(left, right, a.block, b.block)
    assert_floats_bitwise(product(road, a, b), want, "y")
    if k > 128 and m > 1:
        nearest = oracle.matmul(left, right, a.block, b.block)
        assert not np.array_equal(want, nearest), "these operands cannot tell the order"


def test_any_number_of_threads_and_any_block(rng: np.random.Generator) -> None:
    """Large enough for several threads and blocks of tiles, and for depths beyond one strip."""
    a, b = any_operand(rng, 150, 1100), any_operand(rng, 300, 1100)
    want = product("torch", a, b)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for road in ROADS[1:]:
                assert_floats_bitwise(product(road, a, b), want, f"{road}, {threads} threads")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("a", "b", "want"),
    [
        (1.0, 2.0**-24, 1.0),  # a tie, and everything up to the next number
        (1.0, 1.9 * 2.0**-24, 1.0),
        (1.0, 2.0**-23, 1 + 2.0**-23),
        (-1.0, -1.9 * 2.0**-24, -1.0),
        (1.0, -(2.0**-30), 1 - 2.0**-24),  # the nearest is 1: one step too far from zero
        (-1.0, 2.0**-30, -1 + 2.0**-24),
        (3.0, -3.0, 0.0),
        (0.0, -5.0, -5.0),
    ],
)
def test_sums_are_rounded_towards_zero(a: float, b: float, want: float) -> None:
    assert add_towards_zero(torch.tensor(a), torch.tensor(b)).item() == want


def test_a_long_sum_of_one_sign_shrinks(rng: np.random.Generator) -> None:
    """What rounding towards zero costs, and why it is worth looking at: it never averages out."""
    x = quantize(torch.from_numpy(rng.uniform(1, 2, (8, 8192)).astype(np.float32)), "rtn")
    blocks = x.decode_blocks()
    exact = blocks.double() @ blocks.double().t()
    assert (sum_in_groups(blocks, blocks).double() <= exact).all()
    assert (sum_in_groups(blocks, blocks).double() < exact).float().mean() > 0.5


def test_it_is_named_and_never_chosen() -> None:
    """A layer that names it quantises with the device's fastest backend, and multiplies with it."""
    assert check_backend("tensor_core", torch.device("cpu")) == "tensor_core"
    assert not BACKENDS["tensor_core"].automatic(torch.device("cpu"))

    torch.manual_seed(0)
    plain = torch.nn.Linear(1040, 48)
    # of one magnitude, codes have products whose sum is exact in any order: it could tell nothing
    x = torch.randn(40, 1040) * torch.exp2(torch.randint(-14, 1, (40, 65))).repeat_interleave(16, 1)
    outputs = {}
    for name in ("auto", "tensor_core"):
        model = torch.nn.Sequential(torch.nn.Linear(1040, 48))
        model[0].load_state_dict(plain.state_dict())
        nvfp4.convert(model, "nvidia", seed=1, backend=name)
        outputs[name] = model(x)
        outputs[name].sum().backward()
        assert model[0].weight.grad.isfinite().all()
    assert not torch.equal(outputs["auto"], outputs["tensor_core"])
    assert torch.allclose(outputs["auto"], outputs["tensor_core"], rtol=1e-4, atol=1e-4)


def test_empty_operands_and_nan(rng: np.random.Generator) -> None:
    a, b = any_operand(rng, 4, 64), any_operand(rng, 6, 64)
    assert matmul(quantize(torch.zeros(0, 64), "rtn"), b, backend="tensor_core").shape == (0, 6)
    a.global_scale.fill_(float("nan"))
    assert matmul(a, b, backend="tensor_core").isnan().all()
