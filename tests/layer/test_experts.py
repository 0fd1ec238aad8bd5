"""Stacked experts: each computes as an nvfp4.Linear of its own, bit for bit, forward and backward.

The modules are transformers' own; what they are held against is one converted nn.Linear an expert,
with the noise that ``experts.py`` says an expert has.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nvfp4
from nvfp4.layer.experts import Experts, ExpertsState, grouped_linear
from nvfp4.layer.noise import HostNoise, Noise, gemm_seeds
from nvfp4.layer.stacks import ExpertNoise
from nvfp4.model.weights import quantized_weights
from nvfp4.numerics.groups import Groups
from nvfp4.numerics.rng import fold_in
from nvfp4.recipes import RECIPES, Recipe

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

NAMES = ["rtn", "nvidia", "tetrajet2", "quartet2", "search_eden", "rl"]
SIZES = (5, 0, 17, 1)
SEED, LAYER = 11, 6


def own_layers(weight: torch.Tensor, recipe: str | Recipe, calls: int = 0) -> list[nvfp4.Linear]:
    """Each expert as a converted layer by itself: index e, of a model with the seed fold_in(seed,
    layer)."""
    made = []
    for e, matrix in enumerate(weight):
        layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, dtype=weight.dtype)
        layer.weight = nn.Parameter(matrix.detach().clone())
        nvfp4.convert(layer, recipe, seed=fold_in(SEED, LAYER), verbose=False)
        layer.nvfp4.noise.layer, layer.nvfp4.noise.calls = e, calls
        made.append(layer)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", [*NAMES, "dense forward"])
def test_a_stack_is_its_experts(recipe, dtype):
    """Output, dx and dw, for ragged groups, one of them empty, in the third call (two backward
    passes before)."""
    spec = (
        RECIPES["quartet2"].with_dense_forward() if recipe == "dense forward" else RECIPES[recipe]
    )
    weight = torch.randn(4, 48, 32, dtype=dtype, requires_grad=True)
    x = torch.randn(sum(SIZES), 32, dtype=dtype, requires_grad=True)
    dy = torch.randn(sum(SIZES), 48, dtype=dtype)
    state = ExpertsState(spec, Noise(SEED, LAYER, calls=2))
    y = grouped_linear(x, weight, Groups.of(SIZES), state)
    y.backward(dy)
    assert state.noise.calls == 3
    start = 0
    for e, (layer, size) in enumerate(zip(own_layers(weight, spec, calls=2), SIZES, strict=True)):
        part = x.detach()[start : start + size].clone().requires_grad_()
        if size == 0:
            assert torch.equal(weight.grad[e], torch.zeros_like(weight[e]))
            continue
        own = layer(part)
        own.backward(dy[start : start + size])
        assert torch.equal(y[start : start + size], own), f"y of expert {e}"
        assert torch.equal(x.grad[start : start + size], part.grad), f"dx of expert {e}"
        assert torch.equal(weight.grad[e], layer.weight.grad), f"dw of expert {e}"
        start += size


@pytest.mark.parametrize("recipe", ["quartet2", "nvidia", "rl", "dense forward"])
@pytest.mark.parametrize("transposed", [False, True])
def test_biases_and_transposed_stacks(recipe, transposed):
    """[E, N] beside [E, N, K] or [E, K, N]: output and all gradients are those of layers with
    biases; of an expert without rows, zeros."""
    spec = (
        RECIPES["quartet2"].with_dense_forward() if recipe == "dense forward" else RECIPES[recipe]
    )
    weight, bias = torch.randn(4, 48, 32, requires_grad=True), torch.randn(4, 48)
    bias.requires_grad_()
    x, dy = torch.randn(sum(SIZES), 32, requires_grad=True), torch.randn(sum(SIZES), 48)
    state = ExpertsState(spec, Noise(SEED, LAYER), transposed=transposed)
    kept = weight.detach().mT.contiguous().requires_grad_() if transposed else weight
    y = grouped_linear(x, kept, Groups.of(SIZES), state, bias)
    y.backward(dy)
    dw = kept.grad.mT if transposed else kept.grad
    start = 0
    matrices = kept.mT if transposed else kept  # dense products sum by how a matrix lies
    for e, (layer, size) in enumerate(zip(own_layers(matrices, spec), SIZES, strict=True)):
        layer.bias = nn.Parameter(bias.detach()[e].clone())
        rows = slice(start, start + size)
        start += size
        if size == 0:
            assert not dw[e].any()
            assert not bias.grad[e].any()
            continue
        part = x.detach()[rows].clone().requires_grad_()
        own = layer(part)
        own.backward(dy[rows])
        assert torch.equal(y[rows], own), f"y of expert {e}"
        assert torch.equal(x.grad[rows], part.grad), f"dx of expert {e}"
        assert torch.equal(dw[e], layer.weight.grad), f"dw of expert {e}"
        assert torch.equal(bias.grad[e], layer.bias.grad), f"db of expert {e}"
    with pytest.raises(ValueError, match=r"bias must be \[4, 48\]"):
        grouped_linear(x, kept, Groups.of(SIZES), state, bias[:, :5])


def test_autocast_and_frozen_biases():
    """Under autocast y has its dtype and gradients the parameters'; frozen, a bias gets none."""
    weight, x = torch.randn(2, 16, 32, requires_grad=True), torch.randn(6, 32, requires_grad=True)
    bias = torch.randn(2, 16)
    state = ExpertsState(RECIPES["quartet2"], Noise(SEED, LAYER))
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_linear(x, weight, Groups.of((2, 4)), state, bias)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    assert bias.grad is None
    with torch.no_grad():
        state.noise.calls = 0
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(grouped_linear(x, weight, Groups.of((2, 4)), state, bias), y)


def test_what_is_not_finite_poisons_one_expert():
    """A NaN in one expert's rows: its rows, dw and db, and no bit of any other expert's."""
    results = []
    for bad in (False, True):
        torch.manual_seed(0)
        weight, bias = torch.randn(4, 48, 32), torch.randn(4, 48)
        x = torch.randn(sum(SIZES), 32)
        if bad:
            x[7, 3] = float("nan")  # of expert 2
        for leaf in (weight, bias, x):
            leaf.requires_grad_()
        state = ExpertsState(RECIPES["search_eden"], Noise(SEED, LAYER))
        y = grouped_linear(x, weight, Groups.of(SIZES), state, bias)
        y.backward(torch.ones_like(y))
        results.append((y.detach(), weight.grad))
    (clean_y, clean_dw), (y, dw) = results
    assert y[5:22].isnan().all()
    assert dw[2].isnan().all()
    assert torch.equal(y[:5], clean_y[:5])
    assert torch.equal(y[22:], clean_y[22:])
    assert torch.equal(dw[[0, 1, 3]], clean_dw[[0, 1, 3]])


def test_noise_is_nobodys_twice():
    """Over layers, experts, calls and GEMMs: all sign seeds differ, those of ordinary layers among
    them."""
    seen = set()
    for layer in range(4):
        for calls in range(4):
            noise = HostNoise((3, layer, calls, 0))
            for gemm in ("fprop", "dgrad", "wgrad"):
                if layer < 2:
                    seen.add(
                        gemm_seeds(noise, gemm)[0]
                    )  # layers 0 and 1 are ordinary, 2 and 3 stacks
                else:
                    of_experts = ExpertNoise(noise, range(4), torch.device("cpu"), "auto")
                    seen |= {bits % 2**64 for bits in of_experts.seeds(gemm)[0].bits.tolist()}
    assert len(seen) == 3 * (2 * 4 + 2 * 4 * 4)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_seeds_of_experts_are_those_of_layers(backend):
    """Expert e is layer e of a model with the seed fold_in(seed, layer), also where a part of the
    experts is here: signs and both sides, by the extension and by torch."""
    noise = HostNoise((2**63 + 5 - 2**64, 7, 3, 2))
    made = ExpertNoise(noise, range(4, 7), torch.device("cpu"), backend)
    for gemm in ("fprop", "dgrad", "wgrad"):
        sign, sides = made.seeds(gemm)
        for place, e in enumerate(range(4, 7)):
            want = gemm_seeds((fold_in(2**63 + 5, 7), e, 3, 2), gemm)
            got = [int(seed.bits[place]) % 2**64 for seed in (sign, *sides)]
            assert got == [want[0], *want[1]]
        assert made.seeds(gemm)[0] is sign, "both operands are to see equal signs"


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_only_what_is_needed(frozen):
    """A gradient that nobody asked for is not computed, and the other one is the same."""

    def gradients(x_needs: bool, w_needs: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        torch.manual_seed(0)
        weight, x = torch.randn(4, 48, 32), torch.randn(sum(SIZES), 32)
        weight.requires_grad_(w_needs), x.requires_grad_(x_needs)
        grouped_linear(
            x, weight, Groups.of(SIZES), ExpertsState(RECIPES["quartet2"], Noise(SEED, LAYER))
        ).sum().backward()
        return x.grad, weight.grad

    both, one = gradients(True, True), gradients(frozen == "weight", frozen == "x")
    kept = 0 if frozen == "weight" else 1
    assert one[1 - kept] is None
    assert torch.equal(one[kept], both[kept])


def test_wrong_sizes_and_dtypes_are_named():
    """Rows that no expert gets, an expert too many, float64, a second derivative."""
    state = ExpertsState(RECIPES["quartet2"], Noise(1, 0))
    weight, x = torch.randn(2, 16, 32), torch.randn(6, 32)
    for sizes in ([3, 2], [2, 2, 2]):
        with pytest.raises(ValueError, match="do not fit"):
            grouped_linear(x, weight, Groups.of(sizes), state)
    with pytest.raises(TypeError, match="float64"):
        grouped_linear(x.double(), weight.double(), Groups.of([3, 3]), state)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(
            grouped_linear(x, weight, Groups.of([3, 3]), state).sum(), x, create_graph=True
        )
    assert grouped_linear(x[:0], weight, Groups.of([0, 0]), state).shape == (0, 16)


def model_of(kind: str, layers: int = 2, **options) -> nn.Module:
    """A tiny model with four experts a block, two for every token."""
    common = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    if kind == "gpt_oss":
        config = transformers.GptOssConfig(
            **common, intermediate_size=48, num_local_experts=4, head_dim=16, **options
        )
    elif kind == "mixtral":
        config = transformers.MixtralConfig(
            **common, intermediate_size=48, num_local_experts=4, **options
        )
    else:
        config = transformers.Qwen3MoeConfig(
            **common,
            intermediate_size=48,
            moe_intermediate_size=48,
            num_experts=4,
            head_dim=16,
            **options,
        )
    return transformers.AutoModelForCausalLM.from_config(config)


def converted(kind: str, **kwargs) -> nn.Module:
    return nvfp4.convert(
        model_of(kind), **({"seed": 5, "verbose": False, "experts": True} | kwargs)
    )


def loss_of(model: nn.Module) -> torch.Tensor:
    tokens = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(1))
    return F.cross_entropy(
        model(input_ids=tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten()
    )


def stacks_of(model: nn.Module) -> list[Experts]:
    return [module for module in model.modules() if isinstance(module, Experts)]


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_models_train(kind):
    """Every block's experts are converted, all stacks get gradients, and the loss goes where BF16's
    goes."""
    losses = {}
    for experts in (True, False):
        with warnings.catch_warnings():
            # with all converted there is nothing to warn of
            warnings.simplefilter("error" if experts else "ignore")
            model = converted(kind, experts=experts)
        assert len(stacks_of(model)) == 2 * experts
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(12):
            loss = loss_of(model)
            loss.backward()
            assert all(
                p.grad is not None and p.grad.any()
                for n, p in model.named_parameters()
                if "experts" in n
            )
            optimizer.step()
            optimizer.zero_grad()
        losses[experts] = loss.item()
    assert losses[True] < 3.6  # from ln 64 = 4.16
    assert abs(losses[True] - losses[False]) < 0.25


def test_a_block_is_eager_in_other_arithmetic():
    """With quantisation off the module gives transformers' own output; with it, a few percent off;
    routing included."""
    model = converted("qwen3_moe")
    block = stacks_of(model)[0]
    x, weights = torch.randn(7, 32), torch.rand(7, 2)
    # nobody chooses expert 2
    chosen = torch.tensor([[0, 1], [0, 3], [3, 0], [1, 0], [0, 1], [3, 1], [1, 3]])
    with nvfp4.disabled(model):
        exact = block(x, chosen, weights)
    by_hand = torch.zeros(7, 32)
    for token in range(7):
        for place in range(2):
            e = int(chosen[token, place])
            gate, up = (block.gate_up_proj[e] @ x[token]).chunk(2)
            by_hand[token] += weights[token, place] * (block.down_proj[e] @ (F.silu(gate) * up))
    assert torch.allclose(exact, by_hand, atol=1e-5)
    y = block(x, chosen, weights)
    error = (y - exact).norm() / exact.norm()
    assert 0.01 < error < 0.35, "three quantised products, each within 15 %"


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_identity_of_a_model(kind):
    """Parameters, keys, class and output of the plain model come back; a converted one is still of
    its old class."""
    model = model_of(kind)
    parameters, keys, kinds = (
        list(model.parameters()),
        list(model.state_dict()),
        [type(m) for m in model.modules()],
    )
    want = loss_of(model)
    nvfp4.convert(model, seed=5, verbose=False, experts=True)
    assert list(map(id, model.parameters())) == list(map(id, parameters))
    assert list(model.state_dict()) == keys
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), kinds, strict=True))
    assert not torch.equal(loss_of(model), want)
    nvfp4.revert(model)
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(loss_of(model), want)
    assert not quantized_weights(model)


def test_copies_pickles_and_resumption():
    """A deep copy, a pickle and a model with loaded state_dict and noise_state go on alike."""
    model = converted("qwen3_moe")
    loss_of(model).backward()
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded = converted("qwen3_moe")
    loaded.load_state_dict(model.state_dict())
    nvfp4.load_noise_state(loaded, nvfp4.noise_state(model))
    assert nvfp4.noise_state(model)["model.layers.0.mlp.experts.down_proj"] == 1
    others = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stream, weights_only=False),
        loaded,
    ]
    gradients = []
    for each in (model, *others):
        each.zero_grad()
        loss_of(each).backward()
        gradients.append([p.grad for p in each.parameters()])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


def test_policy_reaches_experts():
    """By the name of their module: exclude, include, keep_last, recipes by pattern; and default is
    to leave them."""

    def blocks(**kwargs) -> list[str]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = converted("qwen3_moe", **kwargs)
        return [n for n, m in model.named_modules() if isinstance(m, Experts)]

    both = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert blocks() == both
    assert blocks(exclude="layers.0.mlp.experts") == both[1:]
    assert blocks(include="experts") == both
    assert blocks(keep_last=1) == both[:1]
    assert blocks(recipe={"layers.1": "quartet2"}) == both[1:]
    assert blocks(experts=False) == []
    with pytest.warns(nvfp4.ConvertWarning, match="experts=True converts those it knows"):
        converted("qwen3_moe", experts=False)


def test_reports_and_summary(capsys):
    """The one line, the table, and what cannot be converted with its reason."""
    model = nvfp4.convert(model_of("qwen3_moe"), seed=5, experts=True)
    assert "experts: converted 2, kept 0" in capsys.readouterr().out
    rows = {layer.name: layer for layer in nvfp4.report(model).layers}
    row = rows["model.layers.1.mlp.experts.gate_up_proj"]
    assert (row.recipe, row.out_features, row.in_features) == ("search_eden", 96, 32)
    assert nvfp4.report(model).not_linear == ()
    again = nvfp4.convert(model, seed=5, experts=True)
    assert again is model
    assert "already_converted: 2" in capsys.readouterr().out.rpartition("experts:")[2]
    other = model_of("qwen3_moe")
    checked = {layer.name: layer for layer in nvfp4.check(other, experts=True).layers}
    stack = checked["model.layers.0.mlp.experts.down_proj"]
    assert (stack.bf16_bytes, stack.recipe, stack.in_features) == (
        2 * 4 * 32 * 48,
        "search_eden",
        48,
    )
    assert stack.nvfp4_bytes == 4 * (32 * 48 // 2 + 32 * 3 + 4)
    assert not stacks_of(other)
    for attribute, reason in (
        ("has_bias", "experts_bias"),
        ("has_post_expert_norm", "experts_norm"),
    ):
        other = model_of("qwen3_moe")
        setattr(other.model.layers[0].mlp.experts, attribute, True)
        with pytest.warns(nvfp4.ConvertWarning, match=reason):
            nvfp4.convert(other, seed=5, experts=True)
        assert len(stacks_of(other)) == 1


def test_forward_precision_and_fixed_weights_know_experts():
    """A dense forward equals the plain model's on experts and layers alike; fixed weights change
    nothing."""
    model = converted("mixtral")
    with nvfp4.disabled(model):
        plain = loss_of(model)
    with nvfp4.forward_precision(model, "bf16"):
        assert torch.allclose(loss_of(model), plain, atol=1e-5)
    free = loss_of(model)
    with nvfp4.fixed_weights(model):
        assert torch.equal(loss_of(model), free)
        held = [
            handle.state
            for handle in quantized_weights(model).values()
            if isinstance(handle.owner, Experts)
        ]
        assert held
        assert all(state.cache.entry.codes[0].count == 4 for state in held)


def test_after_step_covers_experts():
    """Two steps with a fused optimizer: the same weights, and every expert's codes are those of its
    new weight."""
    results = []
    for helped in (False, True):
        model = converted("qwen3_moe")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        if helped:
            nvfp4.after_step(optimizer, model)
        for _ in range(2):
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_checkpointing_recomputes_the_same():
    """Activation checkpointing draws the noise of the first forward again."""
    gradients = []
    for checkpointing in (False, True):
        model = converted("mixtral")
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss_of(model).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_compiled_models_run_experts_eagerly():
    """torch.compile is interrupted, not refused; output and gradients are those of the eager
    module."""
    block = stacks_of(converted("mixtral", recipe="nvidia"))[0]
    args = (torch.randn(6, 32), torch.randint(0, 4, (6, 2)), torch.rand(6, 2))
    want = block(*args)
    assert torch.equal(torch.compile(block, backend="eager")(*args), want)
