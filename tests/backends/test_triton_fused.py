"""The Triton kernels that make RMSNorm and SwiGLU in registers, against the reference: equal to the
last bit.

They run where those of ``test_triton.py`` do: on a GPU, or in Triton's interpreter in a process of
its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from interpreting import interpreted
from test_native import KINDS, assert_same, data, same

from nvfp4.backends.reference import ReferenceBackend
from nvfp4.backends.registry import select
from nvfp4.backends.triton.backend import _MISSING, INTERPRETED, TritonBackend
from nvfp4.numerics.activations import Activation, RMSNorm, SwiGLU, row_sum
from nvfp4.numerics.hadamard import Rotation
from nvfp4.quantizers.base import Options, Quantizer
from nvfp4.quantizers.registry import QUANTIZERS

pytestmark = pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING))

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
BACKEND, REFERENCE = TritonBackend(), ReferenceBackend()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (17, 33), (5, 270), (33, 20)]
FIXED = {"rotation": Rotation(16, fixed=True)}
ROWS = [
    ("rtn", {}),
    ("sr", {"row_scaled": True}),
    ("four_over_six", {}),
    ("four_over_six", {"row_scaled": True}),
    ("rtn_2d", {}),
    ("sr", {"rotation": Rotation(128, 1, 5)}),
    ("ms_eden", {}),
]
BOTH = [
    (("rtn", {}), ("rtn", {})),
    (("rtn", {}), ("rtn", FIXED)),
    (("four_over_six", {"row_scaled": True}), ("rtn_2d", {})),
    (("ms_eden", {"group": 16}), ("rtn", {})),
    (("rtn", {}), ("sr", {"rotation": Rotation(32, 2, 7)})),
    (("rtn", {}), ("ms_eden", {"group": 64})),
    (("sr", {}), ("sr", {"row_scaled": True})),
]


@pytest.fixture(autouse=True)
def quiet_interpreter() -> Iterator[None]:
    """The interpreter is numpy, which warns of the infinities that the rules clamp."""
    with np.errstate(all="ignore"):
        yield


def spec(case: tuple[str, dict], rng: random.Random) -> tuple[Quantizer, Options]:
    """A quantiser with its options under random seeds."""
    quantizer = QUANTIZERS[case[0]]
    return quantizer, quantizer.check(
        seed=rng.randrange(2**64), sign_seed=rng.randrange(2**64), **case[1]
    )


def made(kind: type, x: torch.Tensor, other: torch.Tensor, eps: float = 1e-6) -> Activation:
    """RMSNorm of x with a row of ``other``, or SwiGLU of both."""
    return RMSNorm(x, other[-1], eps) if kind is RMSNorm else SwiGLU(x, other)


def moved(activation: Activation) -> Activation:
    """The same on the device of the kernels, strides kept."""
    return type(activation)(
        *(t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in activation)
    )


def check(activation: Activation, rows: tuple, columns: tuple | None, note: str) -> None:
    """Both backends, in both orientations where there is a second."""
    got = BACKEND.quantize_activation(moved(activation), rows, columns)
    want = REFERENCE.quantize_activation(activation, rows, columns)
    assert (got[1] is None) == (columns is None)
    for side, a, b in zip(("rows", "columns"), got, want, strict=True):
        if b is not None:
            assert_same(a.to("cpu"), b, f"{side} of {type(activation).__name__} {note}")


@interpreted
@pytest.mark.parametrize("kind", [RMSNorm, SwiGLU])
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_quantize_equals_reference(kind: type, case: tuple) -> None:
    """Rules of every kind along the rows, over shapes, data, dtypes and seeds drawn at random."""
    rng = random.Random(f"{kind}{case}")
    for shape in rng.sample(SHAPES, 2):
        what, dtype = rng.choice(("normal", "wide", "rows", "sparse")), rng.choice(DTYPES)
        x, other = (data(shape, k, dtype, rng.randrange(2**31)) for k in (what, "normal"))
        check(made(kind, x, other), spec(case, rng), None, f"{shape} {what} {dtype} {case}")


@interpreted
@pytest.mark.parametrize("kind", [RMSNorm, SwiGLU])
@pytest.mark.parametrize(("rows", "columns"), BOTH, ids=lambda v: f"{v[0]}{v[1]}")
def test_quantize_both_equals_reference(kind: type, rows: tuple, columns: tuple) -> None:
    """The activation and its transpose, tokens padded with +0 whatever the sign of the weight."""
    rng = random.Random(f"{kind}{rows}{columns}")
    shape, dtype = rng.choice(SHAPES[1:]), rng.choice(DTYPES)
    x, other = (data(shape, k, dtype, rng.randrange(2**31)) for k in (rng.choice(KINDS), "normal"))
    check(
        made(kind, x, other),
        spec(rows, rng),
        spec(columns, rng),
        f"{shape} {dtype} {rows} {columns}",
    )


@interpreted
@pytest.mark.parametrize("difficulty", ["zeros", "tiny", "huge", "nan", "inf"])
def test_difficult_data(difficulty: str) -> None:
    """Zeros (also without eps), denormals, overflow, NaN and Inf in either input; forward and
    backward."""
    rng = random.Random(difficulty)
    for kind, swapped in ((RMSNorm, False), (RMSNorm, True), (SwiGLU, False), (SwiGLU, True)):
        x, other = (
            data((3, 40), k, rng.choice(DTYPES), rng.randrange(2**31))
            for k in (difficulty, "normal")
        )
        x, other = (other, x) if swapped else (x, other)
        activation = made(kind, x, other, eps=rng.choice((0.0, 1e-5)))
        check(
            activation,
            spec(("rtn", {"row_scaled": rng.random() < 0.5}), rng),
            spec(("rtn", FIXED), rng),
            difficulty,
        )
        check_gradients(activation, torch.randn(3, 40), difficulty)


@interpreted
@pytest.mark.parametrize(
    "mixture", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str
)
@pytest.mark.parametrize("kind", [RMSNorm, SwiGLU])
def test_mixed_dtypes(kind: type, mixture: tuple) -> None:
    """Each rounding goes to the dtype it belongs to."""
    x, other = (data((5, 40), "normal", dtype, i) for i, dtype in enumerate(mixture))
    activation = made(kind, x, other)
    check(activation, spec(("rtn", {}), random.Random(0)), None, str(mixture))
    check_gradients(activation, torch.randn(5, 40), str(mixture))


@interpreted
def test_strides() -> None:
    """Halves of one matrix, a transposed one; and rows 2^31 bytes apart, where memory is
    virtual."""
    rng = random.Random(0)
    wide = torch.randn(10, 80).bfloat16()
    pairs = [(wide[:, :40], wide[:, 40:]), (wide.t()[:9, :8], wide.t()[:9, 2:])]
    if INTERPRETED:
        memory = np.zeros(2**31 + 64, dtype=np.int16)  # pages appear only where they are touched
        far = torch.from_numpy(memory).view(torch.bfloat16).as_strided((3, 64), (2**30, 1))
        pairs.append((far.copy_(wide[:3, :64]), wide[3:6, :64]))
    for first, second in pairs:
        for kind in (RMSNorm, SwiGLU):
            activation = made(kind, first, second)
            check(activation, spec(("rtn", {}), rng), None, f"strides {first.stride()}")
            check_gradients(
                activation,
                torch.randn(first.shape).t().contiguous().t(),
                f"strides {first.stride()}",
            )


def check_gradients(activation: Activation, dy: torch.Tensor, note: str) -> None:
    """Both gradients, bit for bit."""
    got = BACKEND.activation_gradients(moved(activation), dy.to(DEVICE))
    for side, a, b in zip(("first", "second"), got, activation.gradients(dy), strict=True):
        assert same(a.cpu(), b), (
            f"gradient of the {side} input of {type(activation).__name__} {note}"
        )


@interpreted
@pytest.mark.parametrize("kind", [RMSNorm, SwiGLU])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_equal_reference(kind: type, dtype: torch.dtype) -> None:
    """Slabs of rows and the rest of one, rows of more than one stretch of lanes."""
    for shape in ((1, 1), (19, 300)):
        x, other, dy = (data(shape, "normal", dtype, i) for i in range(3))
        check_gradients(made(kind, x, other), dy, f"{shape} {dtype}")


@interpreted
def test_slabs_of_many_rows() -> None:
    """More slabs than lanes: the second stretch is added to the first."""
    from nvfp4.backends.triton.activation import kernels as fused_kernels

    slabs, out = torch.randn(300, 3), torch.empty(3, device=DEVICE)
    fused_kernels.slab_sum_kernel[(1,)](
        slabs.to(DEVICE), out, 300, 3, 16, "float32", enable_fp_fusion=False
    )
    assert same(out.cpu(), row_sum(slabs.t()))


@interpreted
def test_empty() -> None:
    """No rows: empty codes, a dweight of zeros."""
    activation = RMSNorm(torch.empty(0, 32), torch.ones(32), 1e-6)
    check(activation, spec(("rtn", {}), random.Random(0)), None, "empty")
    check_gradients(activation, torch.empty(0, 32), "empty")


@interpreted
def test_it_passes_its_self_check() -> None:
    """What is asked before the first use."""
    assert select("triton", "activation", DEVICE).name == "triton"


@compiles
def test_variants_cover_every_kernel() -> None:
    """Every kernel is compiled ahead of time, under names that differ, with every parameter
    typed."""
    from nvfp4.backends.triton.activation import kernels as fused_kernels
    from tools.activation_variants import kernel_variants

    variants = kernel_variants(90, few=False)
    assert {v.kernel for v in variants} == {
        f for name, f in vars(fused_kernels).items() if name.endswith("_kernel")
    }
    assert len({v.name for v in variants}) == len(variants)
    for v in variants:
        assert set(v.types) | set(v.constants) == set(v.kernel.arg_names)
        assert not set(v.types) & set(v.constants)


@pytest.mark.cuda
@compiles
def test_nothing_waits() -> None:
    """No synchronisation in the forward, nor in the backward."""
    x, other = (torch.randn(130, 272, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rng = random.Random(0)
    rows, columns = spec(("rtn", {}), rng), spec(("rtn", FIXED), rng)
    for activation in (RMSNorm(x, other[0], 1e-6), SwiGLU(x, other)):
        for _ in range(2):  # the first compiles
            BACKEND.quantize_activation(activation, rows, columns)
            BACKEND.activation_gradients(activation, other)
            torch.cuda.set_sync_debug_mode("error")
        torch.cuda.set_sync_debug_mode("default")
