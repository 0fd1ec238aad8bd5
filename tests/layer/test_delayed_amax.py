"""Operands scaled by the amax of the call before: which one that is, and what keeps it.

A layer against a composition by hand; recomputation, evaluation, resumption, copies, compiled
graphs, parts of a whole; what is launched, and that nothing but the scales changes.
"""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import nvfp4
from nvfp4.layer import delayed_amax
from nvfp4.layer.call import LayerCall
from nvfp4.layer.delayed_amax import EXCEEDED, HELD, OPERANDS, SEEN, DelayedAmax
from nvfp4.layer.lazy_activation import swiglu
from nvfp4.layer.linear import Linear
from nvfp4.layer.sharding import Shards
from nvfp4.numerics.activations import SwiGLU
from nvfp4.ops import quantize_with
from nvfp4.quantizers.base import HeldAmax
from nvfp4.quantizers.registry import QUANTIZERS
from nvfp4.recipes import RECIPES, Gemm, Operand, Recipe

NAMES = ("rtn", "nvidia", "tetrajet2", "quartet2")
K, N, M = 48, 32, 20
by_name = pytest.mark.parametrize("name", NAMES)


def layer_of(name: str = "rtn", **options: Any) -> Linear:
    torch.manual_seed(5)
    recipe = Recipe.from_name(name).with_delayed_amax()
    return nvfp4.convert(nn.Linear(K, N), recipe, seed=3, verbose=False, **options)  # type: ignore[return-value]


def tokens(call: int, size: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """x and dy of a call; both as large as ``size``."""
    generator = torch.Generator().manual_seed(100 + call)
    return size * torch.randn(M, K, generator=generator), size * torch.randn(
        M, N, generator=generator
    )


def step(layer: Linear, call: int, size: float = 1.0) -> tuple[torch.Tensor, ...]:
    """y, dx and dw of one forward and backward."""
    x, dy = tokens(call, size)
    x.requires_grad_()
    layer.weight.grad = None
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None
    assert layer.weight.grad is not None
    return y.detach(), x.grad, layer.weight.grad.clone()


def table(layer: nn.Module) -> torch.Tensor:
    amax = layer.nvfp4.amax  # type: ignore[union-attr]
    assert isinstance(amax, DelayedAmax)
    return amax.table


def steps_agree(a: Linear, b: Linear, calls: range, note: str) -> None:
    for call in calls:
        same_steps(step(a, call), step(b, call), f"{note}, call {call}")
    assert torch.equal(table(a), table(b)), note


def same_steps(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...], note: str) -> None:
    for name, left, right in zip(("y", "dx", "dw"), a, b, strict=True):
        assert torch.equal(left, right), f"{note}: {name}"


def test_which_operands_are_delayed() -> None:
    """All that one amax scales as a whole, but the weight; a recipe without any is refused."""
    nvidia = Recipe.from_name("nvidia+delayed_amax")
    assert nvidia == RECIPES["nvidia"].with_delayed_amax()
    delayed = {
        (name, side)
        for name in ("fprop", "dgrad", "wgrad")
        for side in ("left", "right")
        if getattr(getattr(nvidia, name), side).delayed_amax
    }
    assert delayed == {("fprop", "left"), ("dgrad", "left"), ("wgrad", "left"), ("wgrad", "right")}
    quartet = RECIPES["quartet2"].with_delayed_amax()
    assert quartet.fprop.left.delayed_amax
    assert not quartet.dgrad.left.delayed_amax
    for name in ("bf16", "rl"):
        with pytest.raises(ValueError, match=f"{name}: no operand"):
            RECIPES[name].with_delayed_amax()
    with pytest.raises(ValueError, match="the weight"):
        Recipe("mine", Gemm(Operand("rtn"), Operand("rtn", delayed_amax=True)))
    for broken in (
        {"quantizer": "ms_eden"},
        {"quantizer": "rtn", "options": (("row_scaled", True),)},
        {"quantizer": None},
    ):
        with pytest.raises(ValueError, match="delayed_amax needs"):
            Operand(**broken, delayed_amax=True)


@by_name
def test_recipes_survive_json(name: str) -> None:
    """And one without delays is written as ever."""
    recipe = RECIPES[name].with_delayed_amax()
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert Recipe.from_key(recipe.key) == recipe
    assert "delayed_amax" not in json.dumps(RECIPES[name].to_dict())
    assert "amax of the call before" in str(recipe)


def test_each_call_is_scaled_by_the_one_before() -> None:
    """By hand for fprop's x: its own in the first call, then 1.75 times what the last one saw."""
    layer = layer_of("rtn")
    held = None
    for call, size in enumerate((1.0, 3.0, 0.5, 40.0)):
        x, _ = tokens(call, size)
        own = x.abs().max().view(1)
        held = own * 1.75 if held is None else held
        options = QUANTIZERS["rtn"].check().holding(HeldAmax(held))
        codes = quantize_with(x, QUANTIZERS["rtn"], options)
        w = nvfp4.quantize(layer.weight.detach(), "rtn")
        want = nvfp4.matmul(codes, w, bias=layer.bias.detach())
        assert torch.equal(step(layer, call, size)[0], want), call
        held = own * 1.75
        assert table(layer)[HELD, 0] == held
    # 40 against 0.5 clips, 3 against 1 as well
    assert table(layer)[EXCEEDED, 0] == 2
    assert not table(layer)[SEEN].any()


def test_a_nan_shows_at_once_and_is_not_held() -> None:
    """In x and in dy; the call after it is scaled by the call before it."""
    layer, clean = layer_of("nvidia"), layer_of("nvidia")
    step(layer, 0), step(clean, 0)
    before = table(layer)[HELD].clone()
    x, dy = tokens(1)
    x[3, 5] = float("nan")
    y = layer(x.requires_grad_())
    assert y.isnan().all()
    y.backward(dy)
    assert layer.weight.grad is not None
    assert layer.weight.grad.isnan().all()
    # dy was finite, and is held
    assert table(layer)[HELD, OPERANDS.index(("fprop", 0))] == before[0]
    assert table(layer)[HELD].isfinite().all()
    assert not table(layer)[SEEN].any()

    x, dy = tokens(2)
    dy[0, 0] = float("inf")
    x.requires_grad_()
    layer(x).backward(dy)
    assert x.grad is not None
    assert x.grad.isnan().all()
    assert table(layer)[HELD].isfinite().all()


def test_evaluation_reads_and_leaves_no_trace() -> None:
    """Before any call by its own amax, afterwards by what is held."""
    layer = layer_of("nvidia")
    x, _ = tokens(7, 5.0)
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(layer(x), first)
    assert not table(layer).any()
    assert not layer.nvfp4.amax.known.any()  # type: ignore[union-attr]

    twin = layer_of("nvidia")
    step(layer, 0), step(twin, 0)
    with torch.inference_mode():
        layer(x)
    steps_agree(layer, twin, range(1, 3), "after an evaluation")


@pytest.mark.parametrize("reentrant", [False, True])
@by_name
def test_a_recomputed_forward_meets_the_same_amax(name: str, reentrant: bool) -> None:
    """From the first call on, and with the numbers of a layer without checkpoints."""
    plain, recomputed = layer_of(name), layer_of(name)
    for call in range(3):
        x, dy = tokens(call)
        want = step(plain, call)
        x.requires_grad_()
        recomputed.weight.grad = None
        y = checkpoint(recomputed, x, use_reentrant=reentrant)
        y.backward(dy)
        assert x.grad is not None
        assert recomputed.weight.grad is not None
        same_steps((y.detach(), x.grad, recomputed.weight.grad), want, f"call {call}")
        assert torch.equal(table(plain), table(recomputed))


@by_name
def test_a_resumed_run_goes_on_to_the_last_bit(name: str) -> None:
    """By state_dict, noise and amaxes through JSON; copies and pickles need no more than that."""
    layer = layer_of(name)
    for call in range(2):
        step(layer, call)
    fresh = layer_of(name)
    fresh.load_state_dict(layer.state_dict())
    nvfp4.load_noise_state(fresh, nvfp4.noise_state(layer))
    nvfp4.load_amax_state(fresh, json.loads(json.dumps(nvfp4.amax_state(layer))))
    copies = {
        "resumed": fresh,
        "copied": copy.deepcopy(layer),
        "pickled": pickle.loads(pickle.dumps(layer)),
    }
    for how, other in copies.items():
        steps_agree(copy.deepcopy(layer), other, range(2, 4), how)
    assert not any("amax" in key for key in layer.state_dict())


def test_an_amax_state_must_fit() -> None:
    layer = layer_of()
    with pytest.raises(ValueError, match=r"missing \[''\], unexpected \['0'\]"):
        nvfp4.load_amax_state(layer, {"0": {}})
    plain = nvfp4.convert(nn.Linear(K, N), "rtn", verbose=False)
    assert nvfp4.amax_state(plain) == {}
    nvfp4.load_amax_state(plain, {})


def test_layers_that_share_a_copy_hold_their_own() -> None:
    """A deep copy of a layer, put into the same model, sees other operands."""
    model = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K))
    nvfp4.convert(model, "rtn+delayed_amax", verbose=False)
    model[1] = copy.deepcopy(model[0])
    nvfp4.convert(model, "rtn+delayed_amax", verbose=False)
    model(tokens(0)[0]).sum().backward()
    tables = [table(layer) for layer in model]
    assert tables[0].data_ptr() != tables[1].data_ptr()
    assert not torch.equal(*tables)


@pytest.mark.parametrize("name", ["nvidia", "tetrajet2"])
def test_compiled_graphs_hold_the_same(name: str) -> None:
    """Forward and backward as operators that change the table: eager's bits, call after call."""
    eager, layer = layer_of(name), layer_of(name)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for call in range(3):
        x, dy = tokens(call)
        want = step(eager, call)
        x.requires_grad_()
        layer.weight.grad = None
        y = compiled(x)
        y.backward(dy)
        assert x.grad is not None
        assert layer.weight.grad is not None
        same_steps((y.detach(), x.grad, layer.weight.grad), want, f"call {call}")
        assert torch.equal(table(eager), table(layer))


def test_a_capture_needs_a_call_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph would look for the first call's own amax for ever; afterwards it reads the table."""
    layer = layer_of("rtn")
    monkeypatch.setattr(delayed_amax, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="a forward and a backward before the capture"):
        step(layer, 0)
    monkeypatch.undo()
    step(layer, 0)
    place = table(layer).data_ptr()
    monkeypatch.setattr(delayed_amax, "is_capturing", lambda device: True)
    step(layer, 1)
    assert table(layer).data_ptr() == place


def test_processes_that_hold_parts_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the operands whose scale is the whole's, once per call; a NaN of one is everybody's."""

    class Mesh:
        def get_group(self) -> str:
            return "group"

    asked = []

    def all_reduce(seen: torch.Tensor, op: Any, group: str) -> None:
        asked.append(seen.clone())
        torch.maximum(seen, torch.tensor([100.0]), out=seen)

    monkeypatch.setattr(delayed_amax.dist, "all_reduce", all_reduce)
    amax = DelayedAmax.new(torch.device("cpu"))
    amax.table[SEEN] = torch.tensor([2.0, 0, float("nan"), 0, 5, 6])
    recipe = RECIPES["nvidia"].with_delayed_amax()
    cut = dict.fromkeys(OPERANDS, 1)
    LayerCall(recipe, "auto", None, Shards(Mesh(), cut), amax).end()  # type: ignore[arg-type]
    # x of fprop alone: the others round stochastically or are rotated, and scale by their part
    assert [seen.tolist() for seen in asked] == [[2.0]]
    assert table_row(amax, HELD) == [175.0, 0.0, 0.0, 0.0, 8.75, 10.5]


def table_row(amax: DelayedAmax, row: int) -> list[float]:
    return amax.table[row].tolist()


def test_lazy_activations_are_written() -> None:
    """No kernel quantises them by a held amax: values first, the same bits as from a tensor."""
    layer, twin = layer_of("rtn"), layer_of("rtn")
    gate, up = tokens(0)[0].bfloat16(), tokens(1)[0].bfloat16()
    layer.bfloat16(), twin.bfloat16()
    with torch.no_grad():
        got = layer(swiglu(gate, up))
        want = twin(SwiGLU(gate, up).values())
    assert torch.equal(got, want)


def test_nothing_is_held_without_the_option() -> None:
    """A plain recipe has no table, and its operators are as they were."""
    layer = nvfp4.convert(nn.Linear(K, N), "nvidia", verbose=False)
    layer(tokens(0)[0]).sum().backward()
    assert layer.nvfp4.amax is None  # type: ignore[union-attr]
