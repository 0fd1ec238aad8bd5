"""The operators nvfp4::* pass torch's own checks and equal the functions they wrap."""

from __future__ import annotations

import pytest
import torch

from nvfp4 import library, ops

X = torch.randn(20, 70, generator=torch.Generator().manual_seed(0))
CASES = [
    (("rtn",), {}),
    (("rtn_2d",), {"block_rows": 16}),
    (("sr",), {"seed": library.signed(2**64 - 1), "row_scaled": True}),
    (("sr_te",), {"seed": 3, "group": 16, "fixed": True}),
    (("four_over_six",), {"metric": "mae"}),
    (("ms_eden",), {"group": 128, "rounds": 2, "search": True, "seed": 5, "sign_seed": -7}),
]


@pytest.mark.parametrize(("args", "kwargs"), CASES, ids=lambda value: str(value))
def test_quantize_opcheck(args: tuple, kwargs: dict) -> None:
    """Schema, fake shapes, tracing with dynamic shapes: torch.library.opcheck raises where one is wrong."""
    torch.library.opcheck(library.quantize, (X, *args), kwargs)


def test_quantize_equals_ops() -> None:
    """The operator's codes are those of ``nvfp4.quantize``; signed seeds stand for the unsigned ones of equal bits."""
    got = library.quantize(
        X, "ms_eden", group=64, rounds=3, seed=library.signed(2**63 + 5), sign_seed=library.signed(9)
    )
    want = ops.quantize(X, "ms_eden", group=64, rounds=3, seed=2**63 + 5, sign_seed=9)
    assert all(torch.equal(a, b) for a, b in zip(got, want.tensors, strict=True))


def test_dequantize_and_matmul_opcheck() -> None:
    """Both operators pass, and equal ``ops.dequantize`` and ``ops.matmul``, for row and tile scales."""
    a, b = ops.quantize(X, "rtn", row_scaled=True), ops.quantize(X[:7], "four_over_six")
    tiles = ops.quantize(X, "rtn_2d")
    for q in (a, b, tiles):
        torch.library.opcheck(library.dequantize, (*q.tensors, 70, torch.bfloat16))
        assert torch.equal(library.dequantize(*q.tensors, 70, torch.float32), ops.dequantize(q))
    for right in (b, tiles):
        torch.library.opcheck(library.matmul, (*a.tensors, *right.tensors, torch.bfloat16))
        assert torch.equal(library.matmul(*a.tensors, *right.tensors, torch.float32), ops.matmul(a, right))


def test_compiles_without_graph_breaks() -> None:
    """A function of all three traces into one graph and gives the same bits."""

    def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        a = torch.ops.nvfp4.quantize(x, "scale_search")
        b = torch.ops.nvfp4.quantize(w, "scale_search")
        return torch.ops.nvfp4.matmul(*a, *b, torch.float32)

    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X, X[:5]), product(X, X[:5]))
