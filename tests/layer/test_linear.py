"""The layer against a composition by hand: every operand of every GEMM, its axis, source, seeds and
signs, bit for bit.

Statement numbers are those of the contract of the layer.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_floats_bitwise, assert_within
from layer_oracle import (
    GEMMS,
    QUANTISED,
    TABLE,
    Noise,
    exact_product,
    operands,
    product,
    summation_bound,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import nvfp4
from nvfp4.numerics.hadamard import Rotation
from nvfp4.recipes import Gemm, Recipe, operand

SEED = 0xFEEDFACE_0BADCAFE  # both halves of the Philox key matter
CUSTOM = Recipe(
    "custom",
    Gemm(operand("sr", rotation=Rotation(32, 2)), operand("sr", rotation=Rotation(32, 2))),
    Gemm(operand("ms_eden"), operand("ms_eden")),
    Gemm(operand("sr", rotation=Rotation(16)), operand("sr", rotation=Rotation(16))),
)
"""No named recipe: everything stochastic, random signs in the forward, x^T turned and quantised in
the forward."""


class Result(NamedTuple):
    y: torch.Tensor
    dx: torch.Tensor | None
    dw: torch.Tensor | None
    db: torch.Tensor | None


def make(
    recipe: str | Recipe, k: int, n: int, *, bias: bool = True, seed: int = SEED, **kwargs: Any
) -> nn.Linear:
    """A converted layer, alone in its model: layer index 0. Its parameters depend on torch's seed
    alone."""
    layer = nn.Linear(k, n, bias=bias, **kwargs)
    nvfp4.convert(layer, recipe, seed=seed, verbose=False)
    return layer


def twin(layer: nn.Linear, recipe: str | Recipe, *, seed: int = SEED, calls: int = 0) -> nn.Linear:
    """A fresh layer with a copy of the same parameters, converted alike, ``calls`` backward passes
    behind it."""
    other = nn.Linear(
        layer.in_features, layer.out_features, layer.bias is not None, dtype=layer.weight.dtype
    )
    other.load_state_dict(layer.state_dict())
    nvfp4.convert(other, recipe, seed=seed, verbose=False)
    nvfp4.load_noise_state(other, {"": calls})
    return other


def run(layer: Callable[..., torch.Tensor], x: torch.Tensor, dy: torch.Tensor) -> Result:
    """One forward and backward on a leaf copy of x."""
    x = x.detach().clone().requires_grad_()
    parameters = dict(layer.named_parameters())  # type: ignore[attr-defined]
    for p in parameters.values():
        p.grad = None
    y = layer(x)
    y.backward(dy)
    bias = parameters.get("bias")
    return Result(
        y.detach(), x.grad, parameters["weight"].grad, None if bias is None else bias.grad
    )


def same(got: Result, want: Result, what: str) -> None:
    """Bitwise equal, field by field."""
    for name, g, w in zip(Result._fields, got, want, strict=True):
        assert (g is None) == (w is None), f"{what}: {name} is {g} and {w}"
        if g is not None and w is not None:
            assert g.dtype == w.dtype, f"{what}: {name} is {g.dtype}, expected {w.dtype}"
            assert_floats_bitwise(g.float(), w.float(), f"{what}: {name}")


def composed(
    recipe: str, layer: nn.Linear, x: torch.Tensor, dy: torch.Tensor, noise: Noise
) -> Result:
    """The same by hand, with the operations of the layer in its order."""
    pairs = operands(recipe, x, layer.weight.detach(), dy, noise)
    bias = None if layer.bias is None else layer.bias.detach()
    y = product(pairs["fprop"], dy.dtype, bias)
    dx, dw = product(pairs["dgrad"], x.dtype), product(pairs["wgrad"], layer.weight.dtype)
    return Result(y, dx, dw, None if bias is None else dy.float().sum(0).to(bias.dtype))


def tokens(
    m: int, k: int, n: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [m, k] and dy [m, n], rows of different size, so that a wrong axis or scale shows."""
    size = torch.linspace(0.5, 2, m)[:, None]
    return (torch.randn(m, k) * size).to(dtype), (torch.randn(m, n) * 0.1 * size.flip(0)).to(dtype)


# --- the definition of the three GEMMs


@pytest.mark.parametrize("recipe", QUANTISED)
def test_layer_is_the_composition(recipe: str) -> None:
    """y, dx, dw, db are the hand-made operands multiplied: layer index 2, third call, both seeds,
    both operands.

    Bitwise, because the composition multiplies with the same operations; that those are right is
    the next test.
    """
    model = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50), nn.Linear(50, 23))
    nvfp4.convert(model, recipe, seed=SEED, verbose=False)
    layer = model[2]
    x, dy = tokens(37, 50, 23)
    for call in range(3):
        want = composed(recipe, layer, x, dy, Noise(SEED, layer=2, call=call))
        same(run(layer, x, dy), want, f"{recipe}, call {call}")


@pytest.mark.parametrize("recipe", QUANTISED)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("m", "k", "n"), [(37, 50, 23), (32, 48, 64)], ids=["padded", "whole blocks"]
)
def test_layer_is_the_exact_product_of_its_operands(
    recipe: str, backend: str, m: int, k: int, n: int
) -> None:
    """y, dx, dw against float64 products of what the operands decode to, within the bound of
    float32 summation.

    The operands are decoded by ``QTensor`` itself, so a backend that misreads them shows. rl
    multiplies in BF16, whose
    result is rounded to 8 bits: 2^-8 of it on top.
    """
    layer = nn.Linear(k, n)
    nvfp4.convert(layer, recipe, seed=SEED, backend=backend, verbose=False)
    x, dy = tokens(m, k, n)
    got = run(layer, x, dy)
    pairs = operands(recipe, x, layer.weight.detach(), dy, Noise(SEED))
    for gemm, result in zip(GEMMS, (got.y - layer.bias.detach(), got.dx, got.dw), strict=True):
        assert result is not None
        exact, magnitude = exact_product(pairs[gemm])
        bound = summation_bound(pairs[gemm], magnitude)
        if gemm == "fprop":  # the bias was added and taken away: two roundings at the size of y
            bound = bound + 2 * 2.0**-24 * (exact.abs() + layer.bias.detach().abs())
        if TABLE[recipe][gemm][0].quantizer is None:
            bound = bound + 2.0**-8 * exact.abs()
        excess = ((result.double() - exact).abs() - bound).max().item()
        assert excess <= 0, f"{recipe} {gemm}: {excess} beyond the bound of summation order"


SIZES = [(1, 1), (3, 17), (17, 3), (100, 1), (1, 100), (16, 32)]


@pytest.mark.parametrize("recipe", QUANTISED)
@pytest.mark.parametrize(("k", "n"), SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_27_any_k_and_n(recipe: str, k: int, n: int, bias: bool) -> None:
    """27: every size works, forward and backward, with and without bias, and gives the composition
    bit for bit."""
    layer = make(recipe, k, n, bias=bias)
    x, dy = tokens(5, k, n)
    same(run(layer, x, dy), composed(recipe, layer, x, dy, Noise(SEED)), f"{recipe} {k} x {n}")


@pytest.mark.parametrize("recipe", QUANTISED)
def test_bf16_model(recipe: str) -> None:
    """BF16 parameters and activations: the same operands, each result rounded once to BF16."""
    layer = make(recipe, 50, 23, dtype=torch.bfloat16)
    x, dy = tokens(21, 50, 23, torch.bfloat16)
    same(run(layer, x, dy), composed(recipe, layer, x, dy, Noise(SEED)), recipe)


@pytest.mark.parametrize("recipe", QUANTISED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_the_output_alone(recipe: str, dtype: torch.dtype) -> None:
    """float32 parameters under autocast: operands are quantised from float32, y and dy have the
    autocast dtype."""
    layer = make(recipe, 50, 23)
    x, dy = tokens(21, 50, 23)
    dy = dy.to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        got = run(layer, x, dy)  # backward under autocast too: it must not change a GEMM either
    same(got, composed(recipe, layer, x, dy, Noise(SEED)), recipe)


def test_bf16_recipe_is_the_plain_layer() -> None:
    """The recipe bf16 computes what F.linear computes."""
    layer = make("bf16", 50, 23)
    plain = nn.Linear(50, 23)
    plain.load_state_dict(layer.state_dict())
    x, dy = tokens(7, 50, 23)
    same(run(layer, x, dy), run(plain, x, dy), "bf16")


@pytest.mark.parametrize("recipe", QUANTISED)
def test_ranks_share_signs_and_differ_in_rounding(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32: on rank 3 the composition with rank 3 folded into the rounding seeds, and the signs of
    every other rank."""
    layer = make(recipe, 40, 24)
    x, dy = tokens(20, 40, 24)
    rank_0 = run(twin(layer, recipe), x, dy)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    rank_3 = run(layer, x, dy)
    same(rank_3, composed(recipe, layer, x, dy, Noise(SEED, rank=3)), recipe)
    stochastic = recipe not in ("rtn", "rl")
    assert torch.equal(rank_3.dw, rank_0.dw) != stochastic  # type: ignore[arg-type]


class Spy:
    """Records what the layer quantises, and lets it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from nvfp4.layer import call, gemms

        self.made: list[tuple[str, tuple[int, ...], Any]] = []
        quantize, requantize = call.quantize_with, call.requantize_with
        both = gemms.quantize_both

        def quantized(
            x: torch.Tensor, quantizer: Any, options: Any, **kwargs: Any
        ) -> nvfp4.QTensor:
            self.made.append((quantizer.name, tuple(x.shape), options))
            return quantize(x, quantizer, options, **kwargs)

        def requantized(
            q: nvfp4.QTensor, quantizer: Any, options: Any, **kwargs: Any
        ) -> nvfp4.QTensor:
            self.made.append((quantizer.name, q.shape[::-1], options))
            return requantize(q, quantizer, options, **kwargs)

        def quantized_both(x: torch.Tensor, rows: Any, columns: Any, **kwargs: Any) -> Any:
            self.made.append((rows[0].name, tuple(x.shape), rows[1]))
            self.made.append((columns[0].name, tuple(x.shape)[::-1], columns[1]))
            return both(x, rows, columns, **kwargs)

        monkeypatch.setattr(gemms, "quantize_both", quantized_both)
        monkeypatch.setattr(call, "quantize_with", quantized)
        monkeypatch.setattr(call, "requantize_with", requantized)

    def take(self) -> list[tuple[str, tuple[int, ...], Any]]:
        made, self.made = self.made, []
        return made


@pytest.mark.parametrize("recipe", ["tetrajet2", "quartet2", "search_eden"])
def test_32_signs_are_shared_across_ranks_and_reloads(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32: both operands of a GEMM, every rank, and a layer that was saved and loaded, all draw the
    same signs; dgrad and wgrad, and one call and the next, draw different ones."""
    spy = Spy(monkeypatch)
    layer = make(recipe, 40, 24)
    x, dy = tokens(20, 40, 24)

    def signs(rank: int, reloaded: nn.Linear) -> list[Rotation]:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: rank > 0)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        run(reloaded, x, dy)
        return [options.rotation for _, _, options in spy.take() if options.rotation is not None]

    first = signs(0, twin(layer, recipe))
    # the order of the four backward operands is not promised, so each GEMM is told by its pair of
    # equal signs
    assert len(first) == 4
    seeds = {rotation.sign_seed for rotation in first}
    assert seeds == {Noise(SEED).sign_seed("dgrad"), Noise(SEED).sign_seed("wgrad")}
    assert signs(5, twin(layer, recipe)) == first
    assert {r.sign_seed for r in signs(5, twin(layer, recipe, calls=1))}.isdisjoint(seeds)


# --- dtypes, shapes, strides


@pytest.mark.parametrize("recipe", TABLE)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_23_24_dtypes_are_those_of_f_linear(
    recipe: str, autocast: torch.dtype | None, dtype: torch.dtype
) -> None:
    """23, 24: y, dx, dw, db have the dtypes that F.linear gives for the same x, weight and
    autocast."""
    layer = make(recipe, 32, 16, dtype=dtype)
    seen = []
    for forward in (layer, partial(F.linear, weight=layer.weight, bias=layer.bias)):
        layer.zero_grad(set_to_none=True)
        x = torch.randn(3, 32, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            y = forward(x)
        y.float().sum().backward()
        seen.append([t.dtype for t in (y, x.grad, layer.weight.grad, layer.bias.grad)])
    assert seen[0] == seen[1]


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_23_mixed_dtypes(x_dtype: torch.dtype, w_dtype: torch.dtype) -> None:
    """23: mixed dtypes are refused without autocast, as F.linear does, and work with it."""
    layer = make("quartet2", 32, 16, dtype=w_dtype)
    x = torch.randn(3, 32, dtype=x_dtype, requires_grad=True)
    if x_dtype != w_dtype:
        with pytest.raises(TypeError, match=f"x is {x_dtype} but weight is {w_dtype}; .*autocast"):
            layer(x)
        with pytest.raises(RuntimeError):
            F.linear(x, layer.weight, layer.bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert (y.dtype, x.grad.dtype, layer.weight.grad.dtype) == (torch.bfloat16, x_dtype, w_dtype)


def test_wrong_inputs_are_named() -> None:
    """A wrong last dimension and a dtype that NVFP4 does not take are refused by name."""
    layer = make("rtn", 32, 16)
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., in_features=32\], got \(3, 31\)"):
        layer(torch.zeros(3, 31))
    with pytest.raises(ValueError, match="in_features=32"):
        layer(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"float32, bfloat16 or float16, got torch\.float64"):
        layer(torch.zeros(3, 32, dtype=torch.float64))


def test_input_is_a_keyword_as_in_nn_linear() -> None:
    """nn.Linear calls its argument ``input``, and so does the layer that replaces it."""
    layer, x = make("rtn", 32, 16), torch.randn(3, 32)
    assert torch.equal(layer(input=x), layer(x))


@pytest.mark.parametrize("recipe", QUANTISED)
@pytest.mark.parametrize("lead", [(), (12,), (3, 4), (2, 3, 2), (1, 12)])
def test_25_ranks(recipe: str, lead: tuple[int, ...]) -> None:
    """25, 28: leading dims are flattened and restored, for y and all gradients; db sums over all of
    them."""
    k, n = 33, 18
    layer = make(recipe, k, n)
    count = torch.Size(lead).numel()
    x, dy = tokens(count, k, n)
    want = run(twin(layer, recipe), x, dy)
    got = run(layer, x.view(*lead, k), dy.view(*lead, n))
    assert (got.y.shape, got.dx.shape) == ((*lead, n), (*lead, k))  # type: ignore[union-attr]
    same(got._replace(y=got.y.view(count, n), dx=got.dx.view(count, k)), want, recipe)  # type: ignore[union-attr]
    assert torch.equal(got.db, dy.sum(0))  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", QUANTISED)
@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32)])
def test_25_zero_tokens(recipe: str, shape: tuple[int, ...]) -> None:
    """25: no tokens give an empty y and dx, and zero, not garbage, in dw and db."""
    layer = make(recipe, 32, 16)
    got = run(layer, torch.zeros(shape), torch.zeros(*shape[:-1], 16))
    assert (got.y.shape, got.dx.shape) == ((*shape[:-1], 16), shape)  # type: ignore[union-attr]
    assert torch.equal(got.dw, torch.zeros(16, 32))  # type: ignore[arg-type]
    assert torch.equal(got.db, torch.zeros(16))  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", QUANTISED)
def test_25_strides_of_x_and_dy(recipe: str) -> None:
    """25: transposed and expanded x, transposed and expanded dy give what their contiguous copies
    give."""
    layer = make(recipe, 32, 16)
    x = torch.randn(32, 6, 2).permute(2, 1, 0)
    # db is exact, whatever order the strides suggest
    dy = torch.randint(-8, 9, (16, 2, 6)).permute(1, 2, 0) / 8
    plain = (x.contiguous(), dy.contiguous())
    want = run(twin(layer, recipe), *plain)
    leaf = x.detach().requires_grad_()  # no copy: keeps the strides
    y = layer(leaf)
    y.backward(dy)
    same(Result(y.detach(), leaf.grad, layer.weight.grad, layer.bias.grad), want, recipe)

    expanded = torch.randn(1, 1, 32).expand(2, 6, 32)
    want = run(twin(layer, recipe), expanded.contiguous(), plain[1])
    other, leaf = twin(layer, recipe), expanded.detach().requires_grad_()
    other(leaf).backward(dy)
    assert torch.equal(other.weight.grad, want.dw)  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", QUANTISED)
def test_25_sum_expands_its_gradient(recipe: str) -> None:
    """25: ``y.sum()`` hands over a dy of stride 0; it counts as ones."""
    layer, x = make(recipe, 32, 16), torch.randn(2, 5, 32)
    want = run(twin(layer, recipe), x, torch.ones(2, 5, 16))
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.sum().backward()
    same(Result(y.detach(), leaf.grad, layer.weight.grad, layer.bias.grad), want, recipe)


def _narrow(rows: int, columns: int) -> torch.Tensor:
    """Magnitudes in [1/2, 1], the first element 1, so that any leading rows have the same maximum.

    Then sums are exact in any order (derived in ``test_ops.py``), and no GEMM shape can change a
    bit of them.
    """
    x = (torch.rand(rows, columns) / 2 + 0.5) * (torch.randint(0, 2, (rows, columns)) * 2 - 1)
    x[0, 0] = 1
    return x


@pytest.mark.parametrize("recipe", QUANTISED)
def test_26_any_token_count(recipe: str) -> None:
    """26: for 1 to 40 tokens the outputs are the first rows of 40, bitwise: no row sees padding or
    another row.

    (Tensor-scaled recipes share the tensor maximum, which sits in the first row here.)
    """
    layer = make(recipe, 32, 24, bias=False)
    with torch.no_grad():
        layer.weight.copy_(_narrow(24, 32))
        x = _narrow(40, 32)
        full = layer(x)
        for m in range(1, 41):
            assert_floats_bitwise(layer(x[:m]), full[:m], f"{m} tokens")


def test_26_row_scaled_tokens_do_not_see_each_other() -> None:
    """26, rl: a token gives the same logits alone as in a batch beside much larger ones, which
    rollouts rely on."""
    layer = make("rl", 32, 24, bias=False)
    with torch.no_grad():
        layer.weight.copy_(_narrow(24, 32))
        x = _narrow(8, 32) * torch.logspace(-3, 3, 8)[:, None]
        full = layer(x)
        for m in range(8):
            assert_floats_bitwise(layer(x[m : m + 1]), full[m : m + 1], f"token {m}")


@pytest.mark.parametrize("recipe", QUANTISED)
@pytest.mark.parametrize("m", [1, 15, 16, 17, 40])
def test_26_padding_tokens_change_no_gradient(recipe: str, m: int) -> None:
    """26: m tokens, and the same with explicit zero tokens up to the padded length, give the same
    dw, bitwise.

    rl does not pad its BF16 GEMM, so there the two may differ in summation order: by its bound, and
    one BF16 rounding.
    """
    layer = make(recipe, 32, 24)
    x, dy = tokens(m, 32, 24)
    group = 128 if "eden" in str(TABLE[recipe]["wgrad"][0].quantizer) else 16
    more = -m % group
    padded_x, padded_dy = F.pad(x, (0, 0, 0, more)), F.pad(dy, (0, 0, 0, more))
    want, got = run(twin(layer, recipe), padded_x, padded_dy), run(layer, x, dy)
    if recipe != "rl":
        assert_floats_bitwise(got.dw, want.dw, "dw")  # type: ignore[arg-type]
        return
    pair = operands(recipe, x, layer.weight.detach(), dy, Noise(SEED))["wgrad"]
    exact, magnitude = exact_product(pair)
    assert (
        (got.dw - want.dw).abs() <= 2 * summation_bound(pair, magnitude) + 2 * 2.0**-8 * exact.abs()
    ).all()


@pytest.mark.parametrize("recipe", QUANTISED)
def test_28_bias_gradient_sums_over_all_leading_dims(recipe: str) -> None:
    """28: db is the sum of dy over batch and sequence, exactly (small integers), also when it alone
    is wanted."""
    layer = make(recipe, 32, 16)
    dy = torch.randint(-8, 9, (3, 5, 7, 16)).float()
    layer.weight.requires_grad_(False)
    layer(torch.randn(3, 5, 7, 32)).backward(dy)
    assert torch.equal(layer.bias.grad, dy.sum((0, 1, 2)))


def test_28_bias_gradient_is_summed_in_float32() -> None:
    """Under autocast dy is BF16 and the bias is not: sums beyond 256 keep the bits that BF16 has no
    room for."""
    layer = make("nvidia", 32, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(300, 32))
    dy = torch.randint(1, 9, (300, 16)).bfloat16()
    y.backward(dy)
    want = dy.double().sum(0).float()
    assert torch.equal(layer.bias.grad, want)
    assert not torch.equal(want, want.bfloat16().float()), "cannot tell"


# --- zeros, NaN, Inf


@pytest.mark.parametrize("recipe", QUANTISED)
def test_29_zero_blocks_give_zeros(recipe: str) -> None:
    """29: zero tensors and zero blocks inside a tensor give zeros (and the bias), not NaN."""
    layer = make(recipe, 32, 16)
    got = run(layer, torch.zeros(6, 32), torch.zeros(6, 16))
    assert torch.equal(got.y, layer.bias.detach().expand(6, 16))
    for gradient in (got.dx, got.dw, got.db):
        assert torch.equal(gradient, torch.zeros_like(gradient))  # type: ignore[arg-type]
    x, dy = tokens(6, 32, 16)
    x[:, :16], x[3], dy[2], dy[:, 5] = 0, 0, 0, 0
    got = run(layer, x, dy)
    assert all(t.isfinite().all() for t in got if t is not None)
    assert torch.equal(got.y[3], layer.bias.detach())
    assert got.dx is not None
    assert got.dw is not None
    assert not got.dx[2].any()
    assert not got.dw[5].any()
    assert not got.dw[:, :16].any()
    assert got.dx[3].any()
    assert got.dw[4, 16:].any()


@pytest.mark.parametrize("recipe", QUANTISED)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["x", "weight", "dy"])
def test_29_non_finite_reaches_the_output(recipe: str, value: float, where: str) -> None:
    """29: one NaN or Inf shows in all that depends on it: the whole GEMM, or its row where
    row-scaled, and is clipped nowhere. rl multiplies dy in BF16, where a NaN reaches one row of dx
    and one row of dw, as in a plain layer."""
    layer = make(recipe, 32, 16)
    x, dy = tokens(6, 32, 16)
    target = {"x": x, "weight": layer.weight.data, "dy": dy}[where]
    target[2, 3] = value
    got = run(layer, x, dy)
    bad = [t.isfinite().logical_not() for t in (got.y, got.dx, got.dw, got.db)]  # type: ignore[union-attr]
    y, dx, dw, db = bad
    assert not (db if where != "dy" else y).any()
    if where == "x":
        rows = [2] if recipe == "rl" else range(6)
        assert [m for m in range(6) if y[m].all()] == list(rows)
        assert y.any(dim=1).sum() == len(rows)
        assert dw.all()
        assert not dx.any()
    elif where == "weight":
        assert y.all()
        assert dx.all()
        assert not dw.any()
    else:
        assert db.nonzero().tolist() == [[3]]
        assert dx[2].all()
        assert dw[3].all()
        assert dx.all() == dw.all() == (recipe != "rl")


# --- noise


STOCHASTIC = [name for name in QUANTISED if name not in ("rtn", "rl")]


@pytest.mark.parametrize("recipe", STOCHASTIC)
def test_31_noise_differs_every_call_and_repeats_under_its_seed(recipe: str) -> None:
    """31: two calls of one layer differ in dx and dw; the same seed repeats both; another seed, or
    layer, differs."""
    x, dy = tokens(20, 40, 24)
    layer = make(recipe, 40, 24)
    first, second = run(layer, x, dy), run(layer, x, dy)
    again = twin(layer, recipe)
    same(run(again, x, dy), first, "first call")
    same(run(again, x, dy), second, "second call")
    stack = nn.Sequential(nn.Linear(4, 4), nn.Linear(40, 24))
    stack[1].load_state_dict(layer.state_dict())
    nvfp4.convert(stack, recipe, seed=SEED, verbose=False)
    others = [second, run(twin(layer, recipe, seed=SEED + 1), x, dy), run(stack[1], x, dy)]
    for other in others:
        # forward operands are deterministic in every named recipe
        assert torch.equal(other.y, first.y)
        assert not torch.equal(other.dx, first.dx)  # type: ignore[arg-type]
        assert not torch.equal(other.dw, first.dw)  # type: ignore[arg-type]


def test_31_manual_seed_is_the_default() -> None:
    """31: without ``seed`` the layer follows torch.manual_seed, and draws nothing from torch's
    generator."""
    x, dy = tokens(20, 40, 24)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(7)
        layer = nn.Linear(40, 24)
        torch.manual_seed(seed)
        nvfp4.convert(layer, "quartet2", verbose=False)
        before = torch.get_rng_state()
        results.append(run(layer, x, dy))
        assert torch.equal(torch.get_rng_state(), before)
    same(results[0], results[1], "same manual_seed")
    assert not torch.equal(results[0].dw, results[2].dw)  # type: ignore[arg-type]


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 16))


def _train(model: nn.Module, steps: range) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(20, 32)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("recipe", STOCHASTIC)
def test_31_resume_is_bit_exact(recipe: str) -> None:
    """31: four steps equal two steps, a save, a fresh process' worth of objects, a load, and two
    steps; without the noise state they would not."""
    straight = nvfp4.convert(_mlp(), recipe, seed=SEED, verbose=False)
    start = {k: v.clone() for k, v in straight.state_dict().items()}
    _train(straight, range(4))

    def resumed(with_noise: bool) -> nn.Module:
        half = _mlp()
        half.load_state_dict(start)
        nvfp4.convert(half, recipe, seed=SEED, verbose=False)
        _train(half, range(2))
        saved, noise = half.state_dict(), nvfp4.noise_state(half)
        assert noise == {"0": 2, "2": 2}
        fresh = nvfp4.convert(_mlp(), recipe, seed=SEED, verbose=False)
        fresh.load_state_dict(saved)
        if with_noise:
            nvfp4.load_noise_state(fresh, noise)
        _train(fresh, range(2, 4))
        return fresh

    assert torch.equal(resumed(True)[0].weight, straight[0].weight)
    assert not torch.equal(resumed(False)[0].weight, straight[0].weight)


def test_31_noise_state_must_fit() -> None:
    """A noise state of another model is refused with the layers that differ, and changes
    nothing."""
    model = nvfp4.convert(_mlp(), "rtn", verbose=False)
    with pytest.raises(ValueError, match=r"missing \['2'\], unexpected \['3'\]"):
        nvfp4.load_noise_state(model, {"0": 5, "3": 5})
    assert nvfp4.noise_state(model) == {"0": 0, "2": 0}


def test_31_forward_and_evaluation_do_not_advance_the_noise() -> None:
    """31: only a finished backward counts: evaluating more or less often does not change
    training."""
    layer = make("quartet2", 32, 16)
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context:
            layer(torch.randn(3, 32))
    assert nvfp4.noise_state(layer) == {"": 0}
    layer(torch.randn(3, 32)).sum().backward()
    assert nvfp4.noise_state(layer) == {"": 1}


def test_31_mean_of_draws_converges() -> None:
    """31: tetrajet2's dx is unbiased: the squared error of a mean of n draws falls as 1/n.

    Independent unbiased draws give err(2) / err(32) = 16 in expectation. Each error is a mean over
    1536 elements, of which the 24 of a row share a block's noise at most: at least 1536 / 24 = 64
    independent groups, so its relative standard deviation is below sqrt(2 / 64) = 0.18, and the
    ratio's below 0.25; 3 sigma: [4, 28]. A bias of 5 % of one draw's error would hold err(32) up,
    and a noise that repeats gives a ratio of 1.
    """
    layer = make("tetrajet2", 24, 48)
    x, dy = tokens(64, 24, 48)
    w_hat = nvfp4.quantize(layer.weight.detach(), "rtn").dequantize()
    exact = dy @ w_hat  # the signs cancel, sr of dy and sr of w-hat are independent and unbiased
    draws = torch.stack([run(layer, x, dy).dx for _ in range(32)])  # type: ignore[misc]
    error = [(draws[:n].mean(0) - exact).square().mean().item() for n in (2, 32)]
    assert 4 < error[0] / error[1] < 28


@pytest.mark.parametrize("turned", [True, False], ids=["rht", "plain"])
def test_32_rotation_changes_gradients_by_quantisation_noise_alone(turned: bool) -> None:
    """32: nvidia's wgrad with and without its rotation misses the exact product by the noise of its
    two operands.

    For independent N(0,1) operands the relative squared errors add: sr_te 18.87e-3 + rtn 9.05e-3 +
    their product 1.7e-4 = 28.1e-3 (definition, section 8). Over 128 x 128 outputs of 256 terms that
    estimate is good to about 5 % (measured spread 2 %); signs that do not cancel would give 2.
    """
    rotation = Rotation(16, fixed=True) if turned else None
    tile = operand("rtn_2d")
    recipe = Recipe(
        "nvidia or nearly",
        Gemm(operand("rtn"), tile),
        Gemm(operand("sr_te"), operand(None, source="codes")),
        Gemm(operand("sr_te", rotation=rotation), operand("rtn", rotation=rotation)),
    )
    layer = make(recipe, 128, 128)
    x, dy = torch.randn(256, 128), torch.randn(256, 128)
    dw, exact = run(layer, x, dy).dw, dy.t() @ x
    assert_within(
        ((dw - exact).square().sum() / exact.square().sum()).item(), 28.1e-3, 2.8e-3, "dw"
    )


# --- what is computed and saved, and when


def test_33_frozen_weight_computes_no_wgrad(monkeypatch: pytest.MonkeyPatch) -> None:
    """33: no wgrad operand is made for a frozen weight, and x is not saved."""
    spy = Spy(monkeypatch)
    for recipe, dgrad in (
        ("nvidia", 1),
        ("quartet2", 2),
        ("search_eden", 2),
        ("rtn", 2),
        ("rl", 0),
    ):
        layer = make(recipe, 32, 16, bias=False)
        layer.weight.requires_grad_(False)
        x = torch.randn(20, 32, requires_grad=True)
        y = layer(x)
        assert {shape for _, shape, _ in spy.take()} == {(20, 32), (16, 32)}, recipe
        y.sum().backward()
        shapes = [shape for _, shape, _ in spy.take()]
        assert len(shapes) == dgrad, recipe
        assert {(16, 20), (32, 20)}.isdisjoint(shapes), recipe
        assert layer.weight.grad is None
        assert x.grad is not None


def test_33_input_without_grad_computes_no_dgrad(monkeypatch: pytest.MonkeyPatch) -> None:
    """33: no dgrad operand is made for an x that needs no gradient, as in the first layer of a
    model."""
    spy = Spy(monkeypatch)
    for recipe, wgrad in (
        ("nvidia", 2),
        ("quartet2", 2),
        ("search_eden", 2),
        ("rtn", 2),
        ("rl", 0),
    ):
        layer = make(recipe, 32, 16, bias=False)
        layer(torch.randn(20, 32)).sum().backward()
        shapes = [shape for _, shape, _ in spy.take()][2:]
        assert len(shapes) == wgrad, recipe
        assert {(20, 16), (32, 16)}.isdisjoint(shapes), recipe
        assert layer.weight.grad is not None


@pytest.mark.parametrize("recipe", QUANTISED)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_33_no_grad(
    recipe: str, context: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """33: without gradients y is bitwise the same, two operands are made and no graph."""
    layer, x = make(recipe, 32, 16), torch.randn(5, 32)
    want = twin(layer, recipe)(x).detach()
    spy = Spy(monkeypatch)
    with context():
        y = layer(x)
    assert len(spy.take()) == 2
    assert not y.requires_grad
    assert_floats_bitwise(y, want, "y")


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_33_each_gradient_alone(wanted: str) -> None:
    """33: a gradient asked for alone is bitwise the one that comes with the others."""
    layer = make("quartet2", 32, 16)
    x, dy = tokens(20, 32, 16)
    want = run(twin(layer, "quartet2"), x, dy)
    leaves = {"x": x.requires_grad_(), "weight": layer.weight, "bias": layer.bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == wanted)
    (got,) = torch.autograd.grad(layer(x), leaves[wanted], dy)
    assert_floats_bitwise(got, {"x": want.dx, "weight": want.dw, "bias": want.db}[wanted], wanted)  # type: ignore[arg-type]


def test_35_double_backward_raises() -> None:
    """35: a second derivative raises and says so; also where dy itself requires no grad
    (``y.sum()``), since a graph that silently ends there would drop the term from a gradient
    penalty."""
    layer = make("rtn", 32, 16)
    for loss in (lambda y: y.sum(), lambda y: y.square().sum()):
        x = torch.randn(5, 32, requires_grad=True)
        with pytest.raises(RuntimeError, match=r"no second derivative.*create_graph"):
            torch.autograd.grad(loss(layer(x)), x, create_graph=True)
    with nvfp4.disabled(layer):
        x = torch.randn(5, 32, requires_grad=True)
        (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        dx.square().sum().backward()
    assert x.grad is not None


def _saved(layer: nn.Linear, x: torch.Tensor) -> list[torch.Tensor]:
    kept: list[torch.Tensor] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x).sum()
    return kept


def _nbytes(tensors: list[torch.Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in {t.data_ptr(): t for t in tensors}.values())


@pytest.mark.parametrize(
    "recipe", ["nvidia", "four_over_six", "tetrajet2", "quartet2", "search_eden"]
)
def test_only_codes_and_scales_are_saved(recipe: str) -> None:
    """Backward keeps 4.5 bits an element (0.28 of BF16): x alone at most 0.30 of BF16, x and w
    together too, in bytes of whole storages (a view would keep all of what it views); never x, and
    no copy of the weight."""
    layer = make(recipe, 256, 192, dtype=torch.bfloat16)
    x = torch.randn(320, 256, dtype=torch.bfloat16)
    first = _saved(layer, x)
    assert 0 < _nbytes(first) <= 0.30 * 2 * x.numel()
    both = _saved(layer, x.requires_grad_())
    assert _nbytes(first) < _nbytes(both) <= 0.30 * 2 * (x.numel() + layer.weight.numel())
    for t in (*first, *both):
        assert t.dtype == torch.uint8 or t.numel() == 1, f"{t.dtype} {tuple(t.shape)} was saved"
        assert t.data_ptr() not in (x.data_ptr(), layer.weight.data_ptr())
    layer.weight.requires_grad_(False)
    assert _nbytes(_saved(layer, x.detach())) == 0


def test_rtn_saves_the_weight_itself_not_a_copy() -> None:
    """A recipe that quantises w^T in the backward keeps the parameter, which costs nothing, and
    notices that it was changed in between."""
    layer = make("rtn", 64, 48)
    x = torch.randn(8, 64, requires_grad=True)
    floats = [t for t in _saved(layer, x) if t.numel() > 1 and t.dtype != torch.uint8]
    assert [t.data_ptr() for t in floats] == [layer.weight.data_ptr()]
    y = layer(x)
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("recipe", QUANTISED)
def test_inputs_are_not_changed(recipe: str) -> None:
    """x, weight, bias and dy hold the same bits after forward and backward."""
    layer = make(recipe, 32, 16)
    x, dy = tokens(16, 32, 16)
    tensors = [x.requires_grad_(), dy, layer.weight, layer.bias]
    before = [t.detach().clone() for t in tensors]
    layer(x).backward(dy)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


# --- several uses, recomputation, accumulation


@pytest.mark.parametrize("recipe", QUANTISED)
def test_two_forwards_before_two_backwards(recipe: str) -> None:
    """Each backward is the composition with its own call number, whichever forward it belongs to;
    gradients add up."""
    layer = make(recipe, 32, 16)
    (x1, dy1), (x2, dy2) = tokens(20, 32, 16), tokens(9, 32, 16)
    leaves = [x1.clone().requires_grad_(), x2.clone().requires_grad_()]
    y1, y2 = layer(leaves[0]), layer(leaves[1])
    y2.backward(dy2)
    y1.backward(dy1)
    second = composed(recipe, layer, x2, dy2, Noise(SEED, call=0))
    first = composed(recipe, layer, x1, dy1, Noise(SEED, call=1))
    same(Result(y1.detach(), leaves[0].grad, None, None), first._replace(dw=None, db=None), "first")
    same(
        Result(y2.detach(), leaves[1].grad, None, None), second._replace(dw=None, db=None), "second"
    )
    assert_floats_bitwise(layer.weight.grad, second.dw + first.dw, "dw")  # type: ignore[operator]


def _looped(layer: nn.Linear, x: torch.Tensor, mode: bool | None) -> torch.Tensor:
    """layer(layer(x)), each use in a checkpoint of its own: reentrant, not reentrant, or none at
    all."""
    if mode is None:
        return layer(layer(x))
    return checkpoint(layer, checkpoint(layer, x, use_reentrant=mode), use_reentrant=mode)


@pytest.mark.parametrize("recipe", QUANTISED)
@pytest.mark.parametrize("mode", [None, True, False], ids=["plain", "reentrant", "not reentrant"])
def test_layer_used_twice_in_one_graph(recipe: str, mode: bool | None) -> None:
    """The second use runs its backward first (call 0), the first use next (call 1); rotations match
    in both, and checkpointing each use changes no bit, though the first use is recomputed after a
    backward has finished."""
    layer = make(recipe, 32, 32)
    x, dy = tokens(20, 32, 32)
    leaf = x.clone().requires_grad_()
    _looped(layer, leaf, mode).backward(dy)
    middle = composed(recipe, layer, x, dy, Noise(SEED)).y
    outer = composed(recipe, layer, middle, dy, Noise(SEED, call=0))
    inner = composed(recipe, layer, x, outer.dx, Noise(SEED, call=1))  # type: ignore[arg-type]
    assert_floats_bitwise(leaf.grad, inner.dx, "dx")  # type: ignore[arg-type]
    assert_floats_bitwise(layer.weight.grad, outer.dw + inner.dw, "dw")  # type: ignore[operator]


@pytest.mark.parametrize("mode", [None, True, False], ids=["plain", "reentrant", "not reentrant"])
def test_layer_used_twice_with_signs_drawn_in_the_forward(mode: bool | None) -> None:
    """A recipe whose x^T is turned by random signs in the forward: the backward turns dy^T by the
    same, in every mode.

    Its sr operands have a relative squared error of 22.22e-3 each, dx passes four of them on its
    way and dw six at most
    (y, dx and dw of the inner use): 0.14 and higher terms; 0.25 allows for them. Signs that do not
    meet give 2.
    """
    layer = make(CUSTOM, 128, 128, bias=False)
    plain = nn.Linear(128, 128, bias=False)
    plain.load_state_dict(layer.state_dict())
    x, dy = torch.randn(256, 128), torch.randn(256, 128)
    gradients = []
    for module, how in ((plain, None), (layer, mode)):
        leaf = x.clone().requires_grad_()
        _looped(module, leaf, how).backward(dy)
        gradients.append((leaf.grad, module.weight.grad))
    for exact, got in zip(*gradients, strict=True):
        error = ((got - exact).square().sum() / exact.square().sum()).item()  # type: ignore[operator]
        assert 0.01 < error < 0.25


def test_signs_drawn_in_the_forward_serve_a_first_layer_too() -> None:
    """The same where x needs no gradient, so that dy^T is quantised alone: two forwards, then their
    backward.

    dw passes two sr operands, of 22.22e-3 each. Signs that do not meet give 2.
    """
    layer = make(CUSTOM, 128, 128, bias=False)
    x, dy = torch.randn(2, 256, 128), torch.randn(2, 256, 128)
    results = [layer(part) for part in x]
    torch.stack(results).backward(dy)
    exact = torch.einsum("ctn,ctk->nk", dy, x)
    error = ((layer.weight.grad - exact).square().sum() / exact.square().sum()).item()  # type: ignore[operator]
    assert 0.01 < error < 0.1


@pytest.mark.parametrize("recipe", [*QUANTISED, CUSTOM], ids=str)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_bit_equal(recipe: str | Recipe, reentrant: bool) -> None:
    """37: recomputing a forward meets the same noise, so both kinds of activation checkpointing
    change no bit, over two steps (the second step has call 1)."""
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = nvfp4.convert(_mlp(), recipe, seed=SEED, verbose=False)
        for step in range(2):
            x = torch.randn(
                20, 32, generator=torch.Generator().manual_seed(step), requires_grad=True
            )
            y = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
            y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in model.parameters())])
    for plain, again in zip(*results, strict=True):
        assert_floats_bitwise(again, plain, "checkpointed")


@pytest.mark.parametrize("recipe", QUANTISED)
def test_gradient_accumulation(recipe: str) -> None:
    """Two micro-batches add the gradients of call 0 and of call 1: different noise, the same weight
    codes."""
    layer = make(recipe, 32, 16)
    batches = [tokens(20, 32, 16), tokens(20, 32, 16)]
    total = torch.zeros(16, 32)
    for call, (x, dy) in enumerate(batches):
        layer(x).backward(dy)
        total += composed(recipe, layer, x, dy, Noise(SEED, call=call)).dw  # type: ignore[arg-type]
    assert_floats_bitwise(layer.weight.grad, total, "dw")


def test_retained_graph_draws_anew() -> None:
    """A second backward through a retained graph is another call: other noise, the same forward
    codes."""
    layer = make("quartet2", 32, 16)
    x, dy = tokens(20, 32, 16)
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    for call in range(2):
        (dx,) = torch.autograd.grad(y, leaf, dy, retain_graph=True)
        want = composed("quartet2", layer, x, dy, Noise(SEED, call=call)).dx
        assert_floats_bitwise(dx, want, f"call {call}")


def test_autocast_cache_does_not_interfere() -> None:
    """Inside one autocast region: no_grad, disabled, enabled, after a change of the weight, each as
    in a region of its own; a cached BF16 copy of the weight would show as stale or without
    gradient."""
    layer = make("quartet2", 32, 16)
    x, dy = tokens(20, 32, 16)

    def step() -> torch.Tensor:
        layer.zero_grad()
        y = layer(x)
        if y.requires_grad:
            y.backward(dy.to(y.dtype))
            return torch.cat([y.detach().float(), layer.weight.grad.t()[:20]], dim=1)
        return y.float()

    def walk(region: Callable[[], Any]) -> list[torch.Tensor]:
        nvfp4.load_noise_state(layer, {"": 0})
        seen = []
        with region(), torch.no_grad():
            seen.append(step())
        with region(), nvfp4.disabled(layer):
            seen.append(step())
        with region():
            seen.append(step())
        with torch.no_grad():
            layer.weight.mul_(0.5)
        with region():
            seen.append(step())
        with torch.no_grad():
            layer.weight.mul_(2)
        return seen

    apart = walk(lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        together = walk(nullcontext)
    for i, (a, b) in enumerate(zip(apart, together, strict=True)):
        assert_floats_bitwise(b, a, f"step {i}")


def test_in_place_activation_after_the_layer() -> None:
    """An in-place ReLU on the output works as after nn.Linear, of rank 2 and 3: autograd allows it,
    and nothing that backward needs is overwritten."""
    layer = make("quartet2", 32, 16)
    x, dy = tokens(20, 32, 16)
    for lead in ((20,), (4, 5)):
        leaf = x.view(*lead, 32).clone().requires_grad_()
        y = F.relu(layer(leaf), inplace=True)
        y.backward(dy.view(*lead, 16))
        calls = nvfp4.noise_state(layer)[""] - 1
        want = run(twin(layer, "quartet2", calls=calls), x, dy * (y.view(20, 16) > 0))
        assert_floats_bitwise(leaf.grad.view(20, 32), want.dx, "dx")  # type: ignore[arg-type, union-attr]


@pytest.mark.parametrize("recipe", QUANTISED)
def test_partly_quantised_recipes(recipe: str) -> None:
    """A recipe is data: with one GEMM taken from a named recipe and the others left alone, that
    GEMM is bitwise the named one's and the others are bitwise a plain layer's."""
    named = nvfp4.RECIPES[recipe]
    layer, plain = make(recipe, 32, 16), nn.Linear(32, 16)
    plain.load_state_dict(layer.state_dict())
    x, dy = tokens(20, 32, 16)
    full, dense = run(layer, x, dy), run(plain, x, dy)
    only_fprop = run(twin(layer, Recipe("only fprop", fprop=named.fprop)), x, dy)
    same(only_fprop._replace(dx=None, dw=None), full._replace(dx=None, dw=None), "only fprop")
    same(only_fprop._replace(y=dense.y), dense, "the rest of only fprop")
    if named.dgrad.right.source != "tensor" or not named.dgrad.quantized:
        return
    only_dgrad = run(twin(layer, Recipe("only dgrad", dgrad=named.dgrad)), x, dy)
    same(only_dgrad, dense._replace(dx=full.dx), "only dgrad")


def test_forward_on_meta() -> None:
    """Shapes come out on the meta device, as from nn.Linear: for planners that run a model without
    its memory."""
    for recipe in QUANTISED:
        layer = make(recipe, 32, 16, device="meta")
        x = torch.empty(2, 5, 32, device="meta", requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert (y.shape, y.device.type) == ((2, 5, 16), "meta")
        assert (x.grad.shape, layer.weight.grad.shape) == (x.shape, layer.weight.shape)


# --- the weight is quantised in every call, or once inside fixed_weights


def _fresh(layer: nn.Linear, recipe: str, x: torch.Tensor) -> torch.Tensor:
    """What a layer that has never seen another weight gives."""
    return twin(layer, recipe)(x).detach()


def _swap_storage(layer: nn.Linear) -> None:
    layer.weight.data = torch.randn_like(layer.weight)


def _new_parameter(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def _optimizer(kind: Any, **kwargs: Any) -> Callable[[nn.Linear], None]:
    def step(layer: nn.Linear) -> None:
        layer.weight.grad = torch.randn_like(layer.weight)
        kind([layer.weight], lr=1.0, **kwargs).step()

    return step


def _merge(layer: nn.Linear) -> None:
    layer.weight.data += torch.randn_like(layer.weight)  # as PEFT merges an adapter


TRACED: dict[str, Callable[[nn.Linear], Any]] = {
    "in place": lambda layer: layer.weight.mul_(2),
    "part": lambda layer: layer.weight[3, 5:7].add_(9),
    "sgd": _optimizer(torch.optim.SGD),
    "adam": _optimizer(torch.optim.AdamW),
    "load_state_dict": lambda layer: layer.load_state_dict(nn.Linear(32, 16).state_dict()),
    "assign": lambda layer: layer.load_state_dict(nn.Linear(32, 16).state_dict(), assign=True),
    "new parameter": _new_parameter,
    "new data": _swap_storage,
    "rounded": lambda layer: layer.bfloat16().float(),
    "through a view": lambda layer: layer.weight.detach().view(-1).neg_(),
}
UNTRACED: dict[str, Callable[[nn.Linear], Any]] = {
    "fused sgd": _optimizer(torch.optim.SGD, fused=True),
    "fused adam": _optimizer(torch.optim.AdamW, fused=True),
    "data": lambda layer: layer.weight.data.mul_(2),
    "merge": _merge,
}
"""Changes that leave the version counter and the memory as they were."""


@pytest.mark.parametrize("change", TRACED | UNTRACED)
@pytest.mark.parametrize("kept", [False, True], ids=["", "fixed_weights"])
def test_a_changed_weight_is_used_at_once(change: str, kept: bool) -> None:
    """Whatever changes a weight, the next forward uses it; inside ``fixed_weights`` the changes
    that leave no trace need ``invalidate``, without which they go unseen. Ten rounds, since a freed
    weight's address may come back."""
    layer, x = make("quartet2", 32, 16), torch.randn(5, 32)
    with nvfp4.fixed_weights(layer) if kept else nullcontext(), torch.no_grad():
        for _ in range(10):
            layer.weight.copy_(torch.randn(16, 32))
            before = layer(x)
            (TRACED | UNTRACED)[change](layer)
            if kept and change in UNTRACED:
                assert_floats_bitwise(layer(x), before, "unseen")
                nvfp4.invalidate(layer)
            after = layer(x)
            assert_floats_bitwise(after, _fresh(layer, "quartet2", x), change)
            assert not torch.equal(after, before)


def test_fixed_weights_quantises_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside the context a weight is quantised by the first of several forwards, also of training
    ones, with no bit of any result changed; outside, where the backend cannot compare bytes, by
    each, and where it can, by the first."""
    layer, (x, dy) = make("quartet2", 32, 16), tokens(20, 32, 16)
    want = [run(layer, x, dy) for _ in range(2)]
    nvfp4.load_noise_state(layer, {"": 0})
    spy = Spy(monkeypatch)

    def weights() -> int:
        layer(x)
        return [shape for _, shape, _ in spy.take()].count((16, 32))

    with nvfp4.fixed_weights(layer) as same_layer:
        assert same_layer is layer
        assert [weights(), weights()] == [1, 0]
        with nvfp4.fixed_weights(layer):
            assert weights() == 0
        assert weights() == 0
        for expected in want:
            same(run(layer, x, dy), expected, "fixed")
    spy.take()
    assert [weights(), weights()] == [1, 0]  # by its bytes
    with pytest.raises(KeyError), nvfp4.fixed_weights(layer):
        raise KeyError
    layer.nvfp4.backend = "reference"
    assert [weights(), weights()] == [1, 1]


def test_codes_from_inference_serve_training() -> None:
    """Inside one context a rollout under inference_mode, then a training step: the kept codes can
    be saved for backward."""
    layer = make("quartet2", 32, 16)
    x, dy = tokens(20, 32, 16)
    with nvfp4.fixed_weights(layer):
        with torch.inference_mode():
            layer(x)
        same(run(layer, x, dy), run(twin(layer, "quartet2"), x, dy), "after inference_mode")


def test_stochastic_weights_are_never_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe that rounds the weight stochastically draws anew in every call; and under
    torch.distributed, where FSDP refills a weight's memory unseen, every recipe quantises it in
    every call."""
    x, dy = tokens(20, 32, 16)
    layer = make(CUSTOM, 32, 16)
    with nvfp4.fixed_weights(layer):
        assert not torch.equal(run(layer, x, dy).y, run(layer, x, dy).y)
    layer = make("rtn", 32, 16)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    spy = Spy(monkeypatch)
    with nvfp4.fixed_weights(layer):
        for _ in range(2):
            layer(x)
            assert (16, 32) in [shape for _, shape, _ in spy.take()]


def test_kept_codes_stay_out_of_copies() -> None:
    """deepcopy and pickle inside the context carry neither codes nor the context: a copy quantises
    its own weight."""
    layer, x = make("quartet2", 32, 16), torch.randn(5, 32)
    with nvfp4.fixed_weights(layer):
        layer(x)
        for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            copied.weight.data.mul_(2)
            assert_floats_bitwise(copied(x).detach(), _fresh(copied, "quartet2", x), "copy")
            assert_floats_bitwise(layer(x).detach(), _fresh(layer, "quartet2", x), "original")
