"""cuBLASLt called through ctypes, against a library that multiplies on the host and checks every
descriptor (``tests/support/cublaslt.cpp``). No GPU is here to run the real one."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nvfp4.backends.cublaslt import BlasLt, BlasLtError
from nvfp4.backends.reference import ReferenceBackend
from nvfp4.numerics.qtensor import QTensor

CPU = torch.device("cpu")
SOURCE = Path(__file__).parents[1] / "support" / "cublaslt.cpp"
COMPILER = shutil.which("g++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ for the stand-in")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The stand-in, compiled."""
    path = tmp_path_factory.mktemp("cublaslt") / "cublaslt.so"
    assert COMPILER is not None
    options = ["-O1", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off"]
    subprocess.run([COMPILER, *options, str(SOURCE), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


def integers(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-6, 7, (rows, columns), generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_scaled_biased_and_rounded_once(
    library: ctypes.CDLL, dtype: torch.dtype, biased: bool
) -> None:
    """Of integers, whose sums are exact: any shape, a plan made once, NaN where alpha is."""
    blas = BlasLt(lambda: library)
    for m, n, k in ((1, 1, 16), (33, 20, 48), (33, 20, 48), (64, 7, 128)):
        a, b = integers(m, k, torch.bfloat16, 1), integers(n, k, torch.bfloat16, 2)
        bias = integers(1, n, dtype, 3)[0] if biased else None
        alpha = torch.tensor([0.3])
        want = alpha * (a.float() @ b.float().t())
        want = (want if bias is None else want + bias.float()).to(dtype)
        got = blas.product(a, b, alpha, bias, dtype)
        assert got is not None
        assert torch.equal(got, want), (m, n, k)
        nothing = blas.product(a, b, torch.tensor([torch.nan]), bias, dtype)
        assert nothing is not None
        assert nothing.isnan().all()
    assert len(blas._plans) == 3


class Changed:
    """A library of which one function is another."""

    def __init__(self, library: ctypes.CDLL, **functions: Callable[..., int]) -> None:
        self.library, self.functions = library, functions

    def __getattr__(self, name: str) -> Any:
        return self.functions.get(name) or getattr(self.library, name)


def test_it_has_to_show_that_it_is_exact(library: ctypes.CDLL) -> None:
    """A library that computes nothing, one that fails and none at all: a warning each, once."""
    assert BlasLt(lambda: library).usable(CPU)

    def missing() -> ctypes.CDLL:
        raise OSError("libcublasLt.so.13: cannot open shared object file")

    idle = Changed(library, cublasLtMatmul=lambda *arguments: 0)
    broken = Changed(library, cublasLtMatmul=lambda *arguments: 13)
    cases = [(lambda: idle, "differ"), (lambda: broken, "status 13"), (missing, "cannot open")]
    for load, words in cases:
        blas = BlasLt(load)  # type: ignore[arg-type]
        with pytest.warns(RuntimeWarning, match=words):
            assert not blas.usable(CPU)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not blas.usable(CPU)
            ones = torch.ones(1, 16, dtype=torch.bfloat16)
            assert blas.product_or_none(ones, ones, torch.ones(1), None, torch.bfloat16) is None


def test_a_shape_without_an_algorithm(library: ctypes.CDLL) -> None:
    """The caller multiplies otherwise, and asks no second time; other shapes go on."""
    blas = BlasLt(lambda: library)
    assert blas.usable(CPU)
    a = integers(5, 32, torch.bfloat16, 1)
    ctypes.c_int.in_dll(library, "refuse").value = 1
    try:
        assert blas.product_or_none(a, a, torch.ones(1), None, torch.bfloat16) is None
    finally:
        ctypes.c_int.in_dll(library, "refuse").value = 0
    assert blas.product_or_none(a, a, torch.ones(1), None, torch.bfloat16) is None
    assert blas.product_or_none(a[:4], a, torch.ones(1), None, torch.bfloat16) is not None


def test_a_failure_later_ends_its_use(library: ctypes.CDLL) -> None:
    """No training stops because of it."""
    status = 0
    multiply = library.cublasLtMatmul
    failing = Changed(library, cublasLtMatmul=lambda *arguments: status or multiply(*arguments))
    blas = BlasLt(lambda: failing)  # type: ignore[arg-type,return-value]
    a = integers(5, 32, torch.bfloat16, 1)
    assert blas.product_or_none(a, a, torch.ones(1), None, torch.bfloat16) is not None
    status = 14
    with pytest.raises(BlasLtError, match="status 14"):
        blas.product(a, a, torch.ones(1), None, torch.bfloat16)
    with pytest.warns(RuntimeWarning, match="in two passes"):
        assert blas.product_or_none(a, a, torch.ones(1), None, torch.bfloat16) is None
    assert not blas.usable(CPU)


def test_torchs_own_library_is_for_gpus() -> None:
    """Nothing is loaded, and nobody warned, on a processor."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not BlasLt().usable(CPU)


def test_the_triton_backend_goes_through_it(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 16-bit product of decoded operands with one scale each: one call, and no float32 matrix;
    row scales, float32 results and a bias of another dtype take the two passes."""
    module = pytest.importorskip("nvfp4.backends.triton.backend")
    if module._MISSING is not None:
        pytest.skip(module._MISSING)
    backend, apart = module.TritonBackend(), []
    monkeypatch.setattr(module, "BLAS_LT", BlasLt(lambda: library))
    monkeypatch.setattr(
        module.TritonBackend, "decode_blocks", lambda self, q: q.decode_blocks().to(torch.bfloat16)
    )
    monkeypatch.setattr(module, "scaled", lambda y, a, b, dtype, bias: apart.append(y) or y)
    a, b = operand(20, 64, 0.5), operand(24, 64, 0.25)
    calls = ctypes.c_int.in_dll(library, "calls")

    bias = integers(1, 24, torch.bfloat16, 5)[0]
    assert module.BLAS_LT.usable(CPU)
    before = calls.value
    for dtype in (torch.bfloat16, torch.float16):
        added = bias.to(dtype)
        want = ReferenceBackend().matmul(a, b, dtype, added)
        assert torch.equal(backend.matmul_decoded(a, b, dtype, added), want)
    assert calls.value == before + 2
    assert not apart

    backend.matmul_decoded(a, b, torch.float32)
    backend.matmul_decoded(a, b, torch.bfloat16, bias.float())
    backend.matmul_decoded(operand(20, 64, 0.5, by_row=True), b, torch.bfloat16)
    assert len(apart) == 3
    assert calls.value == before + 2


def operand(rows: int, columns: int, scale: float, by_row: bool = False) -> QTensor:
    """Codes of any kind with block scales of 1: sums are exact in float32 in any order."""
    q = QTensor.empty((rows, columns), row_scaled=by_row)
    generator = torch.Generator().manual_seed(rows)
    q.codes.copy_(torch.randint(0, 256, q.codes.shape, generator=generator, dtype=torch.uint8))
    q.block_scale.fill_(0x38)
    q.global_scale.fill_(scale)
    return q
