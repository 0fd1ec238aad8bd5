"""The operators nvfp4::* pass torch's own checks and equal the functions they wrap."""

from __future__ import annotations

import pytest
import torch

from nvfp4 import ops
from nvfp4.layer import gemms
from nvfp4.layer.noise import signed
from nvfp4.layer.saved import Needs, inputs_to_save, saved_specs
from nvfp4.numerics.hadamard import Rotation
from nvfp4.recipes import RECIPES, Gemm, Recipe, operand

library = torch.ops.nvfp4
X = torch.randn(20, 70, generator=torch.Generator().manual_seed(0))
CASES = [
    (("rtn",), {}),
    (("rtn_2d",), {"block_rows": 16}),
    (("sr",), {"seed": signed(2**64 - 1), "row_scaled": True}),
    (("sr_te",), {"seed": 3, "group": 16, "fixed": True}),
    (("four_over_six",), {"metric": "mae"}),
    (("ms_eden",), {"group": 128, "rounds": 2, "search": True, "seed": 5, "sign_seed": -7}),
    (("scale_search",), {"candidates": [0, -1, 5]}),
    (("ms_eden",), {"group": 16, "search": True, "factors": [1.5, 1.0], "seed": 5}),
]


@pytest.mark.parametrize(("args", "kwargs"), CASES, ids=lambda value: str(value))
def test_quantize_opcheck(args: tuple, kwargs: dict) -> None:
    """Schema, fake shapes, tracing with dynamic shapes: torch.library.opcheck raises where one is
    wrong."""
    torch.library.opcheck(library.quantize.default, (X, *args), kwargs)


def test_quantize_equals_ops() -> None:
    """The operator's codes are those of ``nvfp4.quantize``; signed seeds stand for the unsigned
    ones of equal bits."""
    got = library.quantize(
        X, "ms_eden", group=64, rounds=3, seed=signed(2**63 + 5), sign_seed=signed(9)
    )
    want = ops.quantize(X, "ms_eden", group=64, rounds=3, seed=2**63 + 5, sign_seed=9)
    assert all(torch.equal(a, b) for a, b in zip(got, want.tensors, strict=True))
    got = library.quantize(X, "scale_search", candidates=[5, 0])
    want = ops.quantize(X, "scale_search", candidates=(5, 0))
    assert all(torch.equal(a, b) for a, b in zip(got, want.tensors, strict=True))


def test_dequantize_and_matmul_opcheck() -> None:
    """Both operators pass, and equal ``ops.dequantize`` and ``ops.matmul``, for row and tile
    scales."""
    a, b = ops.quantize(X, "rtn", row_scaled=True), ops.quantize(X[:7], "four_over_six")
    tiles = ops.quantize(X, "rtn_2d")
    for q in (a, b, tiles):
        torch.library.opcheck(library.dequantize.default, (*q.tensors, 70, torch.bfloat16))
        assert torch.equal(library.dequantize(*q.tensors, 70, torch.float32), ops.dequantize(q))
    for right in (b, tiles):
        torch.library.opcheck(library.matmul.default, (*a.tensors, *right.tensors, torch.bfloat16))
        assert torch.equal(
            library.matmul(*a.tensors, *right.tensors, torch.float32), ops.matmul(a, right)
        )


def test_compiles_without_graph_breaks() -> None:
    """A function of all three traces into one graph and gives the same bits."""

    def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        a = torch.ops.nvfp4.quantize(x, "scale_search")
        b = torch.ops.nvfp4.quantize(w, "scale_search")
        return torch.ops.nvfp4.matmul(*a, *b, torch.float32)

    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X, X[:5]), product(X, X[:5]))


@pytest.mark.parametrize(("args", "kwargs"), CASES, ids=lambda value: str(value))
def test_requantize_opcheck_and_value(args: tuple, kwargs: dict) -> None:
    """The operator passes, and equals quantising the decoded transpose."""
    q = ops.quantize(X, "four_over_six")
    inputs = (*q.tensors, X.shape[1], *args)
    torch.library.opcheck(library.requantize.default, inputs, kwargs)
    want = library.quantize(ops.dequantize(q).t(), *args, **kwargs)
    assert all(
        torch.equal(a, b) for a, b in zip(library.requantize(*inputs, **kwargs), want, strict=True)
    )


ROTATED_X = Recipe(
    "rotated_x",
    Gemm(operand("rtn", rotation=Rotation(16)), operand("rtn", rotation=Rotation(16))),
    Gemm(operand("sr"), operand("sr")),
    Gemm(operand("ms_eden", group=32), operand("ms_eden", group=32)),
)
"""Draws signs in the forward for codes that the backward uses, which no named recipe does."""


@pytest.mark.parametrize(
    "recipe", [*(r for r in RECIPES.values() if r.quantized), ROTATED_X], ids=lambda r: r.name
)
@pytest.mark.parametrize(
    "needs", [[True, True, True], [True, False, False], [False, True, False]], ids=str
)
def test_layer_operators_opcheck(recipe: Recipe, needs: list[bool]) -> None:
    """The layer's two operators pass torch's checks for every recipe and every subset of
    gradients."""
    x, weight, bias, words = (
        torch.randn(20, 70),
        torch.randn(33, 70),
        torch.randn(33),
        torch.tensor([-3, 2, 7, -1]),
    )
    f32 = torch.float32
    forward = (x, weight, bias, words, recipe.key, "auto", f32, needs)
    torch.library.opcheck(gemms.forward_operator, forward)
    saved = gemms.forward_operator(*forward)[1:]
    own = inputs_to_save(saved_specs(recipe), Needs(*needs), weight, x)
    backward = (
        torch.randn(20, 33),
        [*saved, *own],
        words,
        recipe.key,
        "auto",
        needs,
        70,
        f32,
        f32,
        f32,
    )
    torch.library.opcheck(gemms.backward_operator, backward)
