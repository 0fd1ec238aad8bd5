"""Layers that share the amax of their weights: one global scale, so the fused matrix is the one
that was trained."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import nvfp4
from nvfp4.layer import weight_cache
from nvfp4.layer.linear import Linear, layers
from nvfp4.numerics.scaling import magnitude
from nvfp4.ops import matmul, quantize
from nvfp4.recipes import RECIPES, Gemm, Recipe, operand

RECIPE_NAMES = ["rtn", "nvidia", "four_over_six", "tetrajet2", "quartet2", "search_eden", "rl"]


class Attention(nn.Module):
    """Three projections of different size in rows and in magnitude."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(48, 32),
            nn.Linear(48, 16),
            nn.Linear(48, 16, bias=False),
        )
        with torch.no_grad():
            self.k_proj.weight.mul_(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), dim=-1)


def converted(recipe: str | Recipe = "quartet2", **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return nvfp4.convert(
        nn.ModuleList([Attention(), Attention()]), recipe, seed=1, verbose=False, **kwargs
    )


def codes_of(layer: Linear) -> nvfp4.QTensor:
    layer(torch.randn(3, 48))
    return layer.nvfp4.cache.entry.codes[0]


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_the_fused_matrix_is_the_one_that_was_trained(recipe: str) -> None:
    """q, k and v side by side are, bit for bit, codes, scales and output of the fused weight
    quantised as one."""
    block = converted(recipe)[0]
    assert nvfp4.share_amax(block) == [("q_proj", "k_proj", "v_proj")]
    layers = (block.q_proj, block.k_proj, block.v_proj)
    spec = RECIPES[recipe].fprop.right
    fused = quantize(
        torch.cat([layer.weight.detach() for layer in layers]), spec.quantizer, **dict(spec.options)
    )
    parts = [codes_of(layer) for layer in layers]
    assert torch.equal(torch.cat([part.codes for part in parts]), fused.codes)
    assert torch.equal(torch.cat([part.block_scale for part in parts]), fused.block_scale)
    assert all(torch.equal(part.global_scale, fused.global_scale) for part in parts)
    x = torch.randn(5, 48)
    left = RECIPES[recipe].fprop.left
    product = matmul(quantize(x, left.quantizer, **dict(left.options)), fused)
    with torch.no_grad():
        for layer in (block.q_proj, block.k_proj):
            layer.bias.zero_()
        assert torch.equal(block(x), product)


def test_only_the_largest_keeps_its_scale_and_all_follow_it() -> None:
    """Alone each layer has its own scale; shared, a change of the largest weight by any route moves
    all of them."""
    model = converted()
    alone = [codes_of(layer).global_scale.item() for layer in (model[0].q_proj, model[0].k_proj)]
    assert alone[0] < alone[1]
    assert nvfp4.share_amax(model) == [tuple(f"{i}.{n}_proj" for n in "qkv") for i in (0, 1)]
    assert codes_of(model[0].q_proj).global_scale.item() == alone[1]
    model[0].k_proj.weight.data.mul_(2)
    assert codes_of(model[0].q_proj).global_scale.item() == 2 * alone[1]
    assert codes_of(model[1].q_proj).global_scale.item() != 2 * alone[1]
    assert "amax shared by 3" in repr(model[0].q_proj)
    assert nvfp4.share_amax(model, ()) == []
    assert codes_of(model[0].q_proj).global_scale.item() == alone[0]


def test_copies_share_among_themselves() -> None:
    """A deep copy or a pickle of the model shares within the copy: changing the original leaves it
    alone."""
    model = converted()
    nvfp4.share_amax(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[0].q_proj.nvfp4.cache.group.layers[1] is other[0].k_proj
        before = codes_of(other[0].q_proj).global_scale.clone()
        model[0].k_proj.weight.data.mul_(2)
        assert torch.equal(codes_of(other[0].q_proj).global_scale, before)
        assert list(other.state_dict()) == list(model.state_dict())


def test_a_step_of_training_compiled_and_eager() -> None:
    """Forward and backward run, alike to the bit in a compiled graph, and the backward decodes the
    shared codes."""
    eager, compiled = converted()[0], converted()[0]
    x, results = torch.randn(20, 48), []
    for block in (eager, compiled):
        nvfp4.share_amax(block)
        run = (
            torch.compile(block, fullgraph=True, backend="aot_eager")
            if block is compiled
            else block
        )
        y = run(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in block.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    alone = converted()[0]
    alone(x).square().sum().backward()
    assert not torch.equal(alone.q_proj.weight.grad, eager.q_proj.weight.grad)


def test_non_finite_weights_reach_all() -> None:
    """A NaN in one weight of a fused matrix makes all of its output NaN, as it would in one
    GEMM."""
    block = converted()[0]
    nvfp4.share_amax(block)
    with torch.no_grad():
        block.k_proj.weight[3, 3] = torch.nan
    assert block(torch.randn(2, 48)).isnan().all()


def test_what_cannot_share_is_refused() -> None:
    """Different recipes, stochastic or row-scaled weights: one error that names the layers; kept
    layers join none."""
    mixed = converted({"q_proj": "rtn", "*": "quartet2"})
    with pytest.raises(ValueError, match=r"0\.q_proj.*different recipes"):
        nvfp4.share_amax(mixed)
    stochastic = Recipe("stochastic", Gemm(operand("rtn"), operand("sr")))
    with pytest.raises(ValueError, match="no single scale"):
        nvfp4.share_amax(converted(stochastic))
    assert nvfp4.share_amax(converted(exclude="q_proj")) == [
        (f"{i}.k_proj", f"{i}.v_proj") for i in (0, 1)
    ]
    assert nvfp4.share_amax(converted(include="q_proj")) == []


def test_sharing_survives_what_convert_does_to_copies() -> None:
    """A copied block that is converted again gets noise of its own and goes on sharing among its
    own layers."""
    model = converted()
    nvfp4.share_amax(model)
    model.append(copy.deepcopy(model[0]))
    nvfp4.convert(model, "quartet2", verbose=False)
    block = model[2]
    assert block.q_proj.nvfp4.noise.layer not in {m.q_proj.nvfp4.noise.layer for m in model[:2]}
    assert block.q_proj.nvfp4.cache.group.layers == (block.q_proj, block.k_proj, block.v_proj)
    block.k_proj.weight.data.mul_(10)
    assert torch.equal(codes_of(block.q_proj).global_scale, codes_of(block.k_proj).global_scale)


def test_a_refusal_changes_nothing() -> None:
    """Overlapping groups, mixed dtypes, names instead of groups: an error, and the sharing that was
    there stays."""
    model = converted()
    nvfp4.share_amax(model)
    before = [layer.nvfp4.cache.group for layer in layers(model).values()]
    with pytest.raises(ValueError, match="overlap"):
        nvfp4.share_amax(model, [("q_proj", "k_proj"), ("k_proj", "v_proj")])
    with pytest.raises(TypeError, match="sequence of sequences"):
        nvfp4.share_amax(model, ("q_proj", "k_proj"))
    model[1].q_proj.half()
    with pytest.raises(ValueError, match="different dtypes"):
        nvfp4.share_amax(model)
    assert [layer.nvfp4.cache.group for layer in layers(model).values()] == before


def test_kept_codes_ask_for_no_amax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside ``fixed_weights`` the amax is worked out once a weight, nothing is read on the host,
    and a change of another layer's weight in place makes the codes anew."""
    block = converted()[0]
    nvfp4.share_amax(block)
    x, seen = torch.randn(3, 48), []
    monkeypatch.setattr(weight_cache, "magnitude", lambda w: seen.append(w) or magnitude(w))
    monkeypatch.setattr(
        torch.Tensor, "item", lambda tensor: pytest.fail("a value was read on the host")
    )
    with torch.no_grad(), nvfp4.fixed_weights(block):
        block(x)
        assert len(seen) == 3
        kept = block.q_proj.nvfp4.cache.entry
        block(x)
        assert len(seen) == 3
        assert block.q_proj.nvfp4.cache.entry is kept
        block.k_proj.weight.mul_(2)
        block(x)
        assert len(seen) == 4
        assert torch.equal(codes_of(block.q_proj).global_scale, 2 * kept.codes[0].global_scale)
