"""Norms and SwiGLUs that are quantised without being written: the same numbers as written ones,
less memory, and models that keep everything else they had."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

import nvfp4
from nvfp4.layer.lazy_activation import LazyActivation, rms_norm, swiglu
from nvfp4.layer.state import LinearState
from nvfp4.numerics.activations import RMSNorm, SwiGLU

RECIPES = ["rtn", "nvidia", "four_over_six", "tetrajet2", "quartet2", "search_eden", "rl"]
WIDTH, TOKENS = 64, 24


def layers(
    recipe: str | None, *outputs: int, width: int = WIDTH, dtype: torch.dtype = torch.bfloat16
) -> nn.ModuleList:
    """Linear layers side by side, converted unless ``recipe`` is None."""
    torch.manual_seed(0)
    stack = nn.ModuleList(nn.Linear(width, n, bias=n % 32 == 0, dtype=dtype) for n in outputs)
    return stack if recipe is None else nvfp4.convert(stack, recipe, seed=3, verbose=False)


def inputs(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x and up [2, tokens / 2, width], weight [width]."""
    x, up = (torch.randn(2, TOKENS // 2, WIDTH, dtype=dtype) for _ in range(2))
    return x, up, (1 + torch.randn(WIDTH) / 4).to(dtype)


def gradients(
    stack: nn.Module, run: Callable[..., tuple], *tensors: torch.Tensor
) -> list[torch.Tensor]:
    """Outputs, and the gradients of inputs and parameters, of one pass from the beginning."""
    nvfp4.load_noise_state(stack, dict.fromkeys(nvfp4.noise_state(stack), 0))
    leaves = [t.clone().requires_grad_() for t in tensors]
    outputs = run(*leaves)
    torch.autograd.backward(outputs, [torch.ones_like(y) + y.detach() for y in outputs])
    made = [*outputs, *(leaf.grad for leaf in leaves), *(p.grad for p in stack.parameters())]
    stack.zero_grad()
    return [t.detach() for t in made]


def assert_equal(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    """Bit for bit."""
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), f"tensor {i}: {(a != b).float().mean():.1%} differ"


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and from then on layers take no formulas: activations are written first."""
    return lambda: monkeypatch.setattr(LinearState, "can_quantize_lazily", lambda self, x: False)


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_bit_depends_on_writing(recipe: str, written: Callable[[], None]) -> None:
    """Outputs and every gradient, of three layers behind one norm and of one behind a SwiGLU, with
    and without."""
    stack = layers(recipe, 32, 48, 64)
    x, up, weight = inputs()
    runs = [
        lambda x, w: nvfp4.rms_norm_linear(x, w, 1e-6, list(stack)),
        lambda gate, up: (nvfp4.swiglu_linear(gate, up, stack[1]),),
    ]
    cases = [(stack, runs[0], x, weight), (stack[1], runs[1], x, up)]
    fused = [gradients(*case) for case in cases]
    written()
    for got, case in zip(fused, cases, strict=True):
        assert_equal(got, gradients(*case))


def test_the_result_is_the_formula_then_the_layer() -> None:
    """Against the layer on the values of ``activations`` themselves."""
    stack = layers("nvidia", 32)
    x, up, weight = inputs()
    flat = x.reshape(-1, WIDTH)
    with torch.no_grad():
        (got,) = nvfp4.rms_norm_linear(x, weight, 1e-6, stack)
        assert torch.equal(got, stack[0](RMSNorm(flat, weight, 1e-6).values().view_as(x)))
        got = nvfp4.swiglu_linear(x, up, stack[0])
        assert torch.equal(got, stack[0](SwiGLU(flat, up.reshape(-1, WIDTH)).values().view_as(x)))


def test_gradients_are_those_of_float64() -> None:
    """Through layers that are not converted, in float32: each sum is of 64 terms or fewer, so about
    1e-6 relative."""
    stack = layers(None, 32, 48, dtype=torch.float32)
    x, up, weight = inputs(torch.float32)

    def exact(x: torch.Tensor, up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
        gated = x * torch.sigmoid(x) * up
        wide = [
            (layer.weight.double(), layer.bias.double() if layer.bias is not None else None)
            for layer in stack
        ]
        ys = (
            nn.functional.linear(normal, *wide[0]).tanh(),
            nn.functional.linear(gated, *wide[1]).tanh(),
        )
        return ys[0].sum() + ys[1].sum()

    leaves = [t.double().requires_grad_() for t in (x, up, weight)]
    want = torch.autograd.grad(exact(*leaves), leaves)
    leaves = [t.clone().requires_grad_() for t in (x, up, weight)]
    (normal,) = nvfp4.rms_norm_linear(leaves[0], leaves[2], 1e-6, stack[:1])
    total = normal.tanh().sum() + nvfp4.swiglu_linear(leaves[0], leaves[1], stack[1]).tanh().sum()
    for a, b in zip(torch.autograd.grad(total, leaves), want, strict=True):
        assert (a - b).norm() / b.norm() < 3e-6


def saved_bytes(run: Callable[[], object]) -> dict[int, tuple[torch.dtype, int]]:
    """Memory that a forward keeps for its backward: dtype and bytes by address."""
    found = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        found[t.untyped_storage().data_ptr()] = (t.dtype, t.untyped_storage().nbytes())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return found


@pytest.mark.parametrize("recipe", ["rtn", "nvidia", "search_eden"])
def test_codes_are_kept_once_and_no_activation(recipe: str) -> None:
    """Of x itself, two bytes an element; of what was normalised, one set of codes for three layers;
    of SwiGLU, gate, up and codes. Nothing else of that size, whatever the dtype."""
    stack = layers(recipe, 40, 40, 40)
    x, up, weight = (t.requires_grad_() for t in inputs())
    own = {t.untyped_storage().data_ptr() for t in (x, up, weight, *stack.parameters())}
    codes, scales = x.numel() // 2, x.numel() // 16

    def extra(run: Callable[[], object]) -> list[int]:
        """Sizes of what belongs to x's side: weights' codes have other lengths."""
        kept = saved_bytes(run)
        sizes = [size for address, (dtype, size) in kept.items() if address not in own]
        assert all(
            dtype == torch.uint8 or size <= 8 for a, (dtype, size) in kept.items() if a not in own
        )
        weights = {40 * WIDTH // 2, 40 * WIDTH // 16, 3 * WIDTH // 16}
        return sorted(size for size in sizes if size > 8 and size not in weights)

    transposed = WIDTH * 32 // 2, WIDTH * 32 // 16  # x^T: 24 tokens, padded to 32
    want = sorted(transposed if recipe in ("rtn", "nvidia") else (codes, scales))
    assert extra(lambda: nvfp4.rms_norm_linear(x, weight, 1e-6, stack)) == want
    assert extra(lambda: nvfp4.swiglu_linear(x, up, stack[0])) == want


def test_layers_with_other_recipes_share_no_codes(written: Callable[[], None]) -> None:
    """Each gets what its recipe asks for, also where one layer is not converted at all."""
    stack = layers(None, 32, 48, 32, 40)
    nvfp4.convert(stack, {"0": "rtn", "1": "quartet2", "2": "rtn"}, seed=1, verbose=False)
    x, _, weight = inputs()
    run = lambda x, w: nvfp4.rms_norm_linear(x, w, 1e-6, stack)  # noqa: E731
    got = gradients(stack, run, x, weight)
    assert type(stack[3]) is nn.Linear
    written()
    assert_equal(got, gradients(stack, run, x, weight))


def test_everybody_else_finds_an_ordinary_tensor() -> None:
    """Arithmetic, indexing, views, iteration; shapes without writing; written once, with a
    gradient."""
    x, _, weight = inputs()
    x.requires_grad_()
    y = rms_norm(x, weight, 1e-6)
    want = RMSNorm(x.detach().reshape(-1, WIDTH), weight, 1e-6).values().view_as(x)
    assert (y.shape, y.dtype, y.dim(), y.numel(), len(y)) == (x.shape, x.dtype, 3, x.numel(), 2)
    assert y.requires_grad
    assert isinstance(y.view(-1, WIDTH), LazyActivation)
    assert not y.is_written
    assert torch.equal(y.reshape(2, -1), want.reshape(2, -1))
    assert y.is_written
    for use in (
        lambda t: t + 1,
        lambda t: 2 * t,
        lambda t: t[0, 1:],
        lambda t: t.float().sum(),
        torch.relu,
    ):
        assert torch.equal(use(y), use(want))
        assert type(use(y)) is torch.Tensor
    assert torch.equal(next(iter(y)), want[0])
    assert torch.equal(torch.cat([y, y]), torch.cat([want, want]))
    assert y.tolist() == want.tolist()
    y.sum().backward()
    alone = RMSNorm(x.detach().view(-1, WIDTH), weight, 1e-6)
    want = alone.gradients(torch.ones(TOKENS, WIDTH, dtype=torch.bfloat16))[0]
    assert torch.equal(x.grad.view(-1, WIDTH), want)


def test_changes_in_place_are_never_missed() -> None:
    """Of the activation: layers use what it became. Of its input: refused, since the activation is
    made later."""
    stack = layers("rtn", 32)
    x, _, weight = inputs()
    y, z = rms_norm(x, weight, 1e-6), rms_norm(x, weight, 1e-6).clone()
    y.mul_(2)
    assert torch.equal(stack[0](y), stack[0](z * 2))
    late = rms_norm(x, weight, 1e-6)
    x.add_(1)
    for use in (stack[0], torch.relu):
        with pytest.raises(RuntimeError, match="changed in place"):
            use(late)


def test_bad_arguments_are_refused() -> None:
    """Shapes and dtypes, with what was expected."""
    x, up, weight = inputs()
    with pytest.raises(ValueError, match=r"weight must be \[K\]"):
        rms_norm(x, weight[:3], 1e-6)
    with pytest.raises(ValueError, match="one shape"):
        swiglu(x, up[:1])
    with pytest.raises(TypeError, match="float64"):
        swiglu(x.double(), up)
    leaf = x.requires_grad_()
    (g,) = torch.autograd.grad(swiglu(leaf, up).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        g.sum().backward()


def causal_lm(
    kind: type = LlamaConfig, recipe: str | None = "nvidia", **changes: object
) -> nn.Module:
    """A model of two blocks; converted and not fused."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = kind(**{**sizes, "num_key_value_heads": 2, "vocab_size": 64, "head_dim": 16} | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model if recipe is None else nvfp4.convert(model, recipe, seed=1, verbose=False)


IDS = torch.arange(24).view(2, 12) * 7 % 64


def loss_and_gradients(model: nn.Module) -> list[torch.Tensor]:
    """Of one step from the beginning."""
    nvfp4.load_noise_state(model, dict.fromkeys(nvfp4.noise_state(model), 0))
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    made = [loss.detach(), *(p.grad.clone() for p in model.parameters())]
    model.zero_grad()
    return made


PARTS = ("input_layernorm", "mlp", "post_attention_layernorm")


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen3Config])
def test_models_are_fused_and_separated(kind: type, written: Callable[[], None]) -> None:
    """Norms before attention and MLP and the MLPs; not the last norm, nor those of q and k; and
    back again."""
    model = causal_lm(kind)
    before, names, classes = (
        loss_and_gradients(model),
        list(model.state_dict()),
        [type(m) for m in model.modules()],
    )
    verdicts = nvfp4.fuse(model)
    assert sorted(name for name, verdict in verdicts.items() if verdict == "fused") == [
        f"model.layers.{i}.{part}" for i in (0, 1) for part in PARTS
    ]
    assert verdicts["model.norm"] == "feeds_no_converted_layer"
    assert verdicts.get("model.layers.0.self_attn.q_norm") in (None, "feeds_no_converted_layer")
    assert list(model.state_dict()) == names
    assert all(isinstance(m, was) for m, was in zip(model.modules(), classes, strict=True))
    assert nvfp4.fuse(model) == verdicts, "fusing twice changes nothing"
    got = loss_and_gradients(model)
    # torch's norm may round another way, which moves codes
    assert abs(got[0] - before[0]) < 0.01 * before[0]
    assert set(nvfp4.fuse(model, False).values()) == {"separated"}
    assert [type(m) for m in model.modules()] == classes
    assert_equal(loss_and_gradients(model), before)
    nvfp4.fuse(model)
    written()
    assert_equal(loss_and_gradients(model), got)


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
def test_with_one_definition_of_the_norm_nothing_changes(
    kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose own norm and activation compute what ``activations`` defines gives the same
    bits fused or not."""
    model = causal_lm(kind)

    def normalized(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return RMSNorm(rows, module.weight, module.variance_epsilon).values().view_as(x)

    def activated(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return SwiGLU(rows, torch.ones_like(rows)).values().view_as(x)

    monkeypatch.setattr(type(model.model.norm), "forward", normalized)
    monkeypatch.setattr(type(model.model.layers[0].mlp.act_fn), "forward", activated)
    with torch.no_grad():
        want = model(IDS).logits
        assert list(nvfp4.fuse(model).values()).count("fused") == 6
        assert torch.equal(model(IDS).logits, want)


def test_a_fused_model_keeps_what_it_had() -> None:
    """Copies, pickles, hooks, both kinds of checkpointing, no_grad, inference_mode, switching nvfp4
    off, revert."""
    model = causal_lm()
    nvfp4.fuse(model)
    want = loss_and_gradients(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(loss_and_gradients(twin), want)
        assert type(twin.model.layers[0].mlp) is type(model.model.layers[0].mlp)
    seen: list[torch.Size] = []
    block = model.model.layers[0]
    for module in (block.input_layernorm, block.mlp, block.mlp.down_proj):
        module.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    assert_equal(loss_and_gradients(model), want)
    assert len(seen) == 3
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        assert_equal(loss_and_gradients(model), want)
        model.gradient_checkpointing_disable()
    with torch.no_grad():
        assert torch.equal(model(IDS, labels=IDS).loss, want[0])
    with torch.inference_mode():
        assert torch.equal(model(IDS, labels=IDS).loss, want[0])
    plain = causal_lm(recipe=None)
    with nvfp4.disabled(model), torch.no_grad():
        assert torch.allclose(model(IDS).logits, plain(IDS).logits, atol=2e-2)
    nvfp4.revert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_under_autocast(written: Callable[[], None]) -> None:
    """float32 parameters: the norm stays float32, as it does in the model, and the layers give
    BF16."""
    model = causal_lm().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = loss_and_gradients(model)
        nvfp4.fuse(model)
        got = loss_and_gradients(model)
        assert abs(got[0] - before[0]) < 0.01 * before[0]
        assert [t.dtype for t in got] == [t.dtype for t in before]
        written()
        assert_equal(loss_and_gradients(model), got)


def test_parts_of_a_checkpointed_block() -> None:
    """The norm outside and the layers inside of what is recomputed."""
    stack = layers("nvidia", 32, 48)
    x, _, weight = inputs()

    def run(x: torch.Tensor, w: torch.Tensor, reentrant: bool | None) -> tuple[torch.Tensor, ...]:
        inner = lambda y: tuple(layer(y) for layer in stack)  # noqa: E731
        y = rms_norm(x, w, 1e-6)
        return inner(y) if reentrant is None else checkpoint(inner, y, use_reentrant=reentrant)

    want = gradients(stack, lambda x, w: run(x, w, None), x, weight)
    for reentrant in (False, True):
        assert_equal(gradients(stack, lambda x, w, r=reentrant: run(x, w, r), x, weight), want)


def test_compiled_graphs_compute_as_without() -> None:
    """A graph holds the model's own norm and SwiGLU."""
    model = causal_lm(num_hidden_layers=1)
    block = model.model.layers[0]
    x = inputs()[0]

    def run(x: torch.Tensor) -> torch.Tensor:
        return block.mlp(block.input_layernorm(x))

    with torch.no_grad():
        want = run(x)
        nvfp4.fuse(model)
        assert type(block.input_layernorm(x)) is LazyActivation
        assert torch.equal(torch.compile(run, backend="eager", fullgraph=True)(x), want)
    torch.compiler.reset()


@pytest.mark.parametrize("path", ["mlp.down_proj", "self_attn.q_proj", "self_attn"])
def test_a_part_that_is_compiled_by_itself_reads_what_is_deferred(path: str) -> None:
    """Its graph breaks there; before, tracing met memory that does not exist. The same bits, and
    gradients."""
    model = causal_lm(num_hidden_layers=1)
    nvfp4.fuse(model)
    want = loss_and_gradients(model)
    model.model.layers[0].get_submodule(path).compile(backend="eager")
    for _ in range(2):
        assert_equal(loss_and_gradients(model), want)
    torch.compiler.reset()


def test_disabled_is_the_model_that_it_was() -> None:
    """To the bit, with second derivatives and under torch.func, all of which fused modules refuse;
    fused again after it, also when it ends in an error."""
    model = causal_lm(num_hidden_layers=1)
    block, x = model.model.layers[0], inputs()[0]

    def run(x: torch.Tensor) -> torch.Tensor:
        return block.mlp(block.post_attention_layernorm(x)).float().square().sum()

    def derivatives() -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(run(leaf), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), leaf)
        return [run(leaf), first, second, torch.func.grad(run)(x)]

    with nvfp4.disabled(model):
        want = derivatives()
    nvfp4.fuse(model)
    with nvfp4.disabled(model):
        assert_equal(derivatives(), want)
    with pytest.raises(KeyError), nvfp4.disabled(model):
        raise KeyError
    assert type(block.input_layernorm(x)) is LazyActivation


@pytest.mark.parametrize("use", ["layer", "arithmetic"])
def test_hooks_of_the_activation_itself_run(use: str) -> None:
    """register_hook and retain_grad write it; what is then used is what they were put on."""
    stack = layers("nvidia", 32)
    x, _, weight = inputs()
    y, seen = rms_norm(x.requires_grad_(), weight, 1e-6), []
    y.register_hook(lambda dy: seen.append(dy))
    y.retain_grad()
    (stack[0](y) if use == "layer" else 2 * y).sum().backward()
    assert len(seen) == 1
    assert torch.equal(y.grad, seen[0])


class PlusOneRMSNorm(nn.Module):
    """Gemma's: the weight is an offset from 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(width, dtype=torch.bfloat16)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return RMSNorm(x, 1 + self.weight, self.eps).values()


class DroppingMLP(nn.Module):
    """Something between the product and the last layer; and with ``swapped``, the other operand
    activated."""

    def __init__(self, swapped: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = layers(None, 64, 64, 64)
        self.act_fn, self.swapped = nn.SiLU(), swapped

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.swapped:
            return self.down_proj(self.act_fn(up) * gate)
        return self.down_proj(nn.functional.dropout(self.act_fn(gate) * up, 0.1, self.training))


def test_what_is_something_else_is_left_alone_with_the_reason() -> None:
    """Another formula, another activation, another forward, layers that are not converted."""
    block = nn.ModuleDict(
        {"input_rmsnorm": PlusOneRMSNorm(64), "drop": DroppingMLP(), "swap": DroppingMLP(True)}
    )
    block["linear"] = layers(None, 64)[0]
    block.eval()
    nvfp4.convert(block, "rtn", verbose=False)
    assert nvfp4.fuse(block) == dict.fromkeys(("input_rmsnorm", "drop", "swap"), "other_formula")
    model = causal_lm(hidden_act="gelu")
    model.model.layers[0].input_layernorm.forward = model.model.layers[0].input_layernorm.forward
    verdicts = nvfp4.fuse(model)
    assert verdicts["model.layers.0.mlp"] == "other_formula"
    assert verdicts["model.layers.0.input_layernorm"] == "forward_replaced"
    assert verdicts["model.layers.1.input_layernorm"] == "fused"
    verdicts = nvfp4.fuse(nvfp4.convert(causal_lm(recipe=None), include="q_proj", verbose=False))
    assert verdicts["model.layers.0.mlp"] == "not_converted"
    assert verdicts["model.layers.0.post_attention_layernorm"] == "fused", "q_proj has its width"


def test_hooks_of_the_activation_function_still_run() -> None:
    """A module that is bypassed would not call them."""
    model = causal_lm()
    nvfp4.fuse(model)
    calls: list[int] = []
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: calls.append(1))
    model(IDS)
    assert calls == [1]


def test_a_class_that_was_changed_since_is_not_changed_back() -> None:
    """As ``fully_shard`` does it."""
    model = causal_lm()
    nvfp4.fuse(model)
    mlp = model.model.layers[0].mlp
    mlp.__class__ = type("FSDPMLP", (type(mlp),), {})
    with pytest.raises(RuntimeError, match="before fully_shard"):
        nvfp4.fuse(model, False)
