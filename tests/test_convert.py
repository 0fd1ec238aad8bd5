"""convert and revert: statements 1 to 22 of the contract, one test each or more, and the traps its peers fell into."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from assertions import assert_floats_bitwise
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel

import nvfp4


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """A small language model: embedding, numbered blocks, an output embedding by name."""

    def __init__(self, blocks: int = 2, *, tied: bool = False, device: str | None = None) -> None:
        super().__init__()
        with torch.device(device or "cpu"):
            self.embed = nn.Embedding(20, 16)
            self.layers = nn.ModuleList(Block() for _ in range(blocks))
            self.lm_head = nn.Linear(16, 20, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


TOKENS = torch.arange(12).view(3, 4)


def quiet(model: nn.Module, recipe: Any = "quartet2", **kwargs: Any) -> nn.Module:
    return nvfp4.convert(model, recipe, verbose=False, seed=5, **kwargs)


def converted(model: nn.Module) -> list[str]:
    """Names of the converted layers, by type alone: without asking nvfp4."""
    return [name for name, module in model.named_modules() if type(module) is nvfp4.Linear]


def reasons(model: nn.Module) -> dict[str, str | None]:
    return {layer.name: layer.reason for layer in nvfp4.report(model).layers}


def gradients(model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    model(TOKENS).square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def assert_same_training(a: nn.Module, b: nn.Module) -> None:
    """Outputs and gradients of both models are bitwise equal."""
    assert_floats_bitwise(a(TOKENS), b(TOKENS), "logits")
    for i, (x, y) in enumerate(zip(gradients(a), gradients(b), strict=True)):
        assert_floats_bitwise(x, y, f"gradient {i}")


def assert_untouched(model: nn.Module, before: dict[int, dict[str, Any]]) -> None:
    """Every module has the class and the attributes that ``snapshot`` saw."""
    for module in model.modules():
        kind, attributes = before[id(module)]["class"], before[id(module)]["vars"]
        assert type(module) is kind
        assert vars(module).keys() == attributes


def snapshot(model: nn.Module) -> dict[int, dict[str, Any]]:
    return {id(m): {"class": type(m), "vars": vars(m).keys() | set()} for m in model.modules()}


# --- conversion


def test_01_returns_the_same_object() -> None:
    """1: in place, and the model comes back for one-liners; the output embedding is kept."""
    model = Model()
    modules = dict(model.named_modules())
    assert nvfp4.convert(model, verbose=False) is model
    assert dict(model.named_modules()) == modules
    assert converted(model) == ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"]
    assert model.layers[0].up.nvfp4.recipe.name == "search_eden"


def test_02_a_root_linear_is_converted() -> None:
    """2: a bare nn.Linear is converted and returned; being in place, it is even the same object."""
    layer = nn.Linear(8, 8)
    assert quiet(layer) is layer
    assert converted(layer) == [""]


def test_03_twice_changes_nothing_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """3: the second call leaves class, state, noise and even another recipe's request alone, and prints why."""
    model = quiet(Model())
    states = [copy.copy(model.get_submodule(name).nvfp4) for name in converted(model)]
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nvfp4.convert(model, "rtn", seed=99)
    assert "converted 0, kept 5 (already_converted: 4, output_embedding: 1)" in capsys.readouterr().out
    assert [model.get_submodule(name).nvfp4 for name in converted(model)] == states
    assert_untouched(model, before)


def test_03_a_second_call_may_convert_more() -> None:
    """3: what the first call was told to keep, a second may convert; layer indices go on where they stopped."""
    model = quiet(Model(), exclude="layers.1")
    assert reasons(model)["layers.1.up"] == "excluded"
    quiet(model)
    assert reasons(model)["layers.1.up"] is None
    indices = [model.get_submodule(name).nvfp4.noise.layer for name in converted(model)]
    assert indices == [0, 1, 2, 3]


def test_04_filter_fn_sees_each_linear_path_once() -> None:
    """4: the dotted name without a leading dot, only linears, once per path (a shared layer has two), and its word
    counts."""
    model = Model()
    model.alias = model.layers[0].up
    seen: list[tuple[nn.Module, str]] = []

    def only_up(module: nn.Module, name: str) -> bool:
        seen.append((module, name))
        return name.endswith("up")

    quiet(model, filter_fn=only_up)
    names = [name for _, name in seen]
    assert sorted(names) == sorted(["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down", "lm_head", "alias"])
    assert all(model.get_submodule(name) is module for module, name in seen)
    assert converted(model) == ["layers.1.up"]  # layers.0.up is "alias" too, and that name was refused
    assert reasons(model)["layers.0.down"] == reasons(model)["layers.0.up"] == "filter_fn"


def test_05_globs_match_whole_parts() -> None:
    """5: layers.1 is not layers.10; a pattern matches a run of parts anywhere; * stays within a part."""
    model = Model(12)
    quiet(model, exclude="layers.1")
    assert "layers.10.up" in converted(model)
    assert "layers.11.up" in converted(model)
    assert {name for name, reason in reasons(model).items() if reason == "excluded"} == {"layers.1.up", "layers.1.down"}
    for patterns, expected in (
        ("layers.*.up", [f"layers.{i}.up" for i in range(12)]),
        (["layers.1?.down", "layers.3"], ["layers.3.up", "layers.3.down", "layers.10.down", "layers.11.down"]),
        ("[02].up", ["layers.0.up", "layers.2.up"]),
        ("layers.*", [n for i in range(12) for n in (f"layers.{i}.up", f"layers.{i}.down")]),
    ):
        assert converted(quiet(Model(12), include=patterns)) == expected
    with pytest.warns(nvfp4.ConvertWarning, match="matches no linear layer"):
        assert converted(quiet(Model(12), include=["layers*up", "3.up"])) == ["layers.3.up"]


def test_05_include_overrules_the_output_embedding() -> None:
    """5: naming lm_head converts it; exclude wins over include."""
    assert converted(quiet(Model(), include="lm_head")) == ["lm_head"]
    assert converted(quiet(Model(), include=["lm_head", "layers.0"], exclude="down")) == ["layers.0.up", "lm_head"]
    assert reasons(quiet(Model(), include="layers.0"))["layers.1.up"] == "not_included"


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_06_unmatched_names_are_reported(argument: str) -> None:
    """6: a pattern that matches nothing warns with the argument, the pattern and real names; an error when strict,
    which leaves the model untouched."""
    patterns = ["layers.0", "layers.7.upp"]
    with pytest.warns(
        nvfp4.ConvertWarning, match=rf"{argument} 'layers\.7\.upp' matches no .*'layers\.0\.up'"
    ) as caught:
        quiet(Model(), **{argument: patterns})
    assert len(caught) == 1
    assert caught[0].filename == __file__  # the warning points at the call of convert's caller
    model = Model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=argument):
        quiet(model, strict=True, **{argument: patterns})
    assert_untouched(model, before)


class OwnForward(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class SaysItsOutput(Model):
    """Like a transformers model: says which layer the output embedding is, under a name no list knows."""

    def __init__(self) -> None:
        super().__init__()
        self.unembed, self.output = self.lm_head, nn.Linear(16, 16)

    def get_output_embeddings(self) -> nn.Module:
        return self.unembed


class Odd(nn.Module):
    """One layer for each reason to keep one, and two layers without any."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(16, 16)
        self.another = nn.Linear(3, 17, bias=False)
        self.embed = nn.Embedding(20, 16)
        self.tied = nn.Linear(16, 20, bias=False)
        self.tied.weight = self.embed.weight
        self.attention = nn.MultiheadAttention(16, 2)
        self.own = OwnForward(16, 16)
        self.double = nn.Linear(16, 16, dtype=torch.float64)
        self.normed = parametrizations.weight_norm(nn.Linear(16, 16))
        self.lazy = nn.LazyLinear(16)
        self.nothing = nn.Linear(16, 0)
        self.patched = nn.Linear(16, 16)
        self.patched.forward = lambda x: x  # type: ignore[method-assign]
        self.lora_A = nn.Linear(16, 4)
        self.q_proj = nn.ModuleDict({"lora_B": nn.Linear(4, 16)})
        self.head = nn.Linear(16, 20)


ODD = {
    "plain": None,
    "another": None,
    "tied": "tied_to_embedding",
    "attention.out_proj": "subclass",
    "own": "subclass",
    "double": "dtype",
    "normed": "parametrized",
    "lazy": "subclass",
    "nothing": "empty",
    "patched": "forward_replaced",
    "lora_A": "adapter",
    "q_proj.lora_B": "adapter",
    "head": "output_embedding",
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_07_08_default_skips_and_their_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    """7, 8: each kind of layer that is kept has its one reason, in the report and summed up in one printed line."""
    model = Odd()
    nvfp4.convert(model, "quartet2")
    assert reasons(model) == ODD
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "recipe quartet2, converted 2, kept 11 (" in out
    for reason in set(ODD.values()) - {None}:
        assert f"{reason}: {list(ODD.values()).count(reason)}" in out


@pytest.mark.parametrize("name", ["lm_head", "output", "head", "embed_out"])
def test_07_output_embedding_by_name(name: str) -> None:
    """7: without get_output_embeddings() the last part of the name decides, whole."""
    model = nn.ModuleDict({"decoder": nn.ModuleDict({name: nn.Linear(8, 8), f"{name}_norm": nn.Linear(8, 8)})})
    assert converted(quiet(model)) == [f"decoder.{name}_norm"]


def test_07_output_embedding_by_question() -> None:
    """7: a model that knows its output embedding is believed, and then no name is special."""
    model = quiet(SaysItsOutput())
    assert reasons(model)["lm_head"] == "output_embedding"  # the same layer as "unembed"
    assert reasons(model)["output"] is None


def test_07_tied_weights_on_meta() -> None:
    """7: a tie is an identity of parameters, so it is seen, and survives, on the meta device."""
    model = Model(tied=True, device="meta")
    assert model.embed.weight.is_meta
    model.lm_head = nn.Sequential(model.lm_head)  # no name, no question: only the tie tells
    quiet(model)
    assert reasons(model)["lm_head.0"] == "tied_to_embedding"
    assert model.lm_head[0].weight is model.embed.weight
    assert len(converted(model)) == 4


def test_07_linears_tied_to_each_other_are_converted() -> None:
    """7: two layers that share a weight are converted, keep the tie, and their gradients add up."""
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    model[1].weight = model[0].weight
    quiet(model)
    assert len(converted(model)) == 2
    assert model[0].weight is model[1].weight
    model(torch.randn(4, 16)).sum().backward()
    assert len(list(model.parameters())) == 1


def test_09_nothing_converted_warns_or_raises() -> None:
    """9: a model without candidates warns with the count by reason; strict raises and changes nothing."""
    for model, text in ((nn.ReLU(), "0 linear layers"), (Model(tied=True, blocks=0), r"1 .*tied_to_embedding: 1")):
        with pytest.warns(nvfp4.ConvertWarning, match=f"no layer was converted.*{text}"):
            quiet(model)
        fresh = copy.deepcopy(model)
        nvfp4.revert(fresh)
        before = snapshot(fresh)
        with pytest.raises(ValueError, match="no layer was converted"):
            quiet(fresh, strict=True)
        assert_untouched(fresh, before)


def test_09_bf16_is_no_mistake() -> None:
    """9: the recipe bf16 converts nothing on purpose: no warning, and the model is untouched."""
    model = Model()
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet(model, "bf16", include="layers", strict=True)
    assert converted(model) == []
    nvfp4.revert(model)  # all there is to remove is the noted reason why lm_head would have been kept
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("blocks", "arguments", "kept"),
    [
        (20, {"keep_last": 0.15}, [17, 18, 19]),
        (25, {"keep_last": 0.28}, [18, 19, 20, 21, 22, 23, 24]),  # 0.28 * 25 is 7.000000000000001 in binary
        (7, {"keep_last": 0.15}, [5, 6]),  # ceil(1.05)
        (3, {"keep_last": 0.15}, [2]),
        (5, {"keep_first": 1, "keep_last": 2}, [0, 3, 4]),
        (5, {"keep_first": 0.2}, [0]),
        (5, {"keep_first": 99}, [0, 1, 2, 3, 4]),
        (12, {"keep_first": 2}, [0, 1]),  # not 10 and 11
    ],
)
def test_10_keep_first_and_last(
    blocks: int, arguments: dict[str, float], kept: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """10: counts and shares (rounded up) of the numbered blocks stay in high precision, and the printed line names
    them."""
    model = Model(blocks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # keeping all 5 of 5 warns, rightly
        nvfp4.convert(model, **arguments)
    expected = [f"layers.{i}.{part}" for i in range(blocks) if i not in kept for part in ("up", "down")]
    assert converted(model) == expected
    out = capsys.readouterr().out
    assert f"blocks kept: {', '.join(f'layers.{i}' for i in kept)}\n" in out
    named = reasons(model)
    assert all(named[f"layers.{i}.up"] in ("keep_first", "keep_last") for i in kept)


def test_10_every_stack_is_counted_and_inner_lists_are_not() -> None:
    """10: encoder and decoder each lose their last block; a list of experts inside a block is no stack of its own."""

    def stack() -> nn.ModuleList:
        experts = [nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(3))}) for _ in range(2)]
        return nn.ModuleList(experts)

    model = quiet(nn.ModuleDict({"encoder": stack(), "decoder": stack()}), keep_last=1)
    assert converted(model) == [f"{side}.0.experts.{i}" for side in ("encoder", "decoder") for i in range(3)]


@pytest.mark.parametrize("value", [-1, 1.0, 1.5, -0.1, True, "2", float("nan"), np.int64(2), None])
def test_10_wrong_shares_are_refused(value: Any) -> None:
    """10: neither a count nor a share: ValueError with the argument and the value, and nothing is converted."""
    for argument in ("keep_first", "keep_last"):
        model = Model()
        with pytest.raises(ValueError, match=f"{argument} must be a number of blocks"):
            quiet(model, **{argument: value})
        assert converted(model) == []


def test_10_without_blocks_it_is_an_error() -> None:
    """10: counting blocks of a model that has none is refused."""
    with pytest.raises(ValueError, match=r"keep_first and keep_last count the blocks of an nn\.ModuleList"):
        quiet(nn.Sequential(nn.Linear(8, 8)), keep_last=1)


def test_11_subclasses_keep_their_forward() -> None:
    """11: a subclass with its own forward computes as before; so does one that overrides nothing."""

    class Mine(nn.Linear):
        pass

    model = nn.Sequential(OwnForward(8, 8), Mine(8, 8), nn.Linear(8, 8))
    x = torch.randn(3, 8)
    want = model[:2](x)
    quiet(model)
    assert [type(module) for module in model] == [OwnForward, Mine, nvfp4.Linear]
    assert torch.equal(model[:2](x), want)


def test_12_two_names_one_layer() -> None:
    """12: a layer with two names is converted once, both names reach it, and keeping either name keeps it."""
    model = Model()
    model.shortcut = model.layers[0].up
    quiet(model)
    assert model.shortcut is model.layers[0].up
    assert type(model.shortcut) is nvfp4.Linear
    assert [m.nvfp4.noise.layer for m in model.modules() if isinstance(m, nvfp4.Linear)] == [0, 1, 2, 3]
    assert nvfp4.report(model).converted == 4
    other = Model()
    other.shortcut = other.layers[0].up
    quiet(other, exclude="shortcut")
    assert reasons(other)["layers.0.up"] == "excluded"


class LoraLinear(nn.Module):
    """What a PEFT layer looks like by its names."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, base.out_features, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


@pytest.mark.parametrize("first", ["adapters", "convert"])
def test_13_adapters_are_kept_in_either_order(first: str) -> None:
    """13: the base layer is converted, LoRA A and B are not; adapters train, the base has no gradient."""
    model = Model()
    if first == "convert":
        quiet(model, include="layers")
    for block in model.layers:
        block.up = LoraLinear(block.up)
    if first == "adapters":
        quiet(model, include="layers")
    assert "layers.0.up.base_layer" in converted(model)
    assert not any("lora_" in name for name in converted(model))
    if first == "adapters":
        assert reasons(model)["layers.0.up.lora_A.default"] == "adapter"
    gradients(model)
    assert model.layers[0].up.base_layer.weight.grad is None
    assert model.layers[0].up.lora_A["default"].weight.grad is not None


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed; simulated above by names")
@pytest.mark.parametrize("first", ["adapters", "convert"])
def test_13_peft(first: str) -> None:
    """13: the same with PEFT itself, and merging adapters into the converted base works."""
    import peft

    config = peft.LoraConfig(r=4, target_modules=["up", "down"])
    model: nn.Module = Model()
    if first == "convert":
        quiet(model)
    model = peft.get_peft_model(model, config)
    if first == "adapters":
        quiet(model)
    names = converted(model)
    assert len(names) == 4
    assert all(name.endswith("base_layer") for name in names)
    model(TOKENS).sum().backward()
    merged = model.merge_and_unload()
    assert len(converted(merged)) == 4


# --- identity and state


def test_14_still_an_nn_linear() -> None:
    """14: isinstance, sizes and bias as before."""
    for bias in (True, False):
        layer = quiet(nn.Linear(5, 7, bias=bias))
        assert isinstance(layer, nn.Linear)
        assert (layer.in_features, layer.out_features, layer.bias is not None) == (5, 7, bias)


@pytest.mark.parametrize("device", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_15_parameters_keep_their_identity(device: str) -> None:
    """15: the same Parameter objects over the same memory, on every device."""
    layer = nn.Linear(8, 8, device=device)
    weight, bias, pointer = layer.weight, layer.bias, layer.weight.data_ptr()
    quiet(layer)
    assert layer.weight is weight
    assert layer.bias is bias
    assert layer.weight.data_ptr() == pointer
    assert layer.weight.device.type == device


def test_15_no_tensor_is_made_at_convert() -> None:
    """15: converting touches no parameter and makes nothing but three integers a layer, let alone a second weight."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert not any(isinstance(arg, nn.Parameter) for arg in args), f"convert ran {func} on a parameter"
            made = func(*args, **(kwargs or {}))
            assert not isinstance(made, torch.Tensor) or made.numel() <= 3, (
                f"convert made {tuple(made.shape)} by {func}"
            )
            return made

    model = Model()
    with Refuse():
        quiet(model)
        nvfp4.revert(model)


def test_16_state_dict_is_that_of_the_plain_model() -> None:
    """16: the same keys in the same order, shapes, dtypes and values; strict loading works both ways."""
    plain, model = Model(), quiet(Model())
    a, b = plain.state_dict(), model.state_dict()
    assert [(k, v.shape, v.dtype) for k, v in a.items()] == [(k, v.shape, v.dtype) for k, v in b.items()]
    model.load_state_dict(a, strict=True)
    assert torch.equal(model.layers[1].up.weight, plain.layers[1].up.weight)
    plain.load_state_dict(b, strict=True)
    fresh = quiet(Model(device="meta"))
    fresh.load_state_dict(a, strict=True, assign=True)
    assert_floats_bitwise(fresh(TOKENS), model(TOKENS), "after load_state_dict(assign=True)")


def test_17_attributes_survive() -> None:
    """17: requires_grad, training mode, dtype, hooks and user attributes are as they were, and hooks run."""
    layer = nn.Linear(8, 8, dtype=torch.bfloat16)
    layer.weight.requires_grad_(False)
    layer.weight.tag = "sharded"  # type: ignore[attr-defined]
    layer.note = {"any": "thing"}  # type: ignore[assignment]
    layer.register_buffer("steps", torch.tensor(3))
    layer.eval()
    ran: list[str] = []
    layer.register_forward_pre_hook(lambda *_: ran.append("pre"))
    layer.register_forward_hook(lambda *_: ran.append("forward"))
    layer.register_full_backward_hook(lambda *_: ran.append("backward"))
    layer.bias.register_hook(lambda g: ran.append("bias"))
    quiet(layer)
    assert (layer.weight.requires_grad, layer.bias.requires_grad, layer.training) == (False, True, False)
    assert (layer.weight.dtype, layer.weight.tag, layer.note) == (torch.bfloat16, "sharded", {"any": "thing"})
    assert layer.steps == 3
    layer(torch.randn(2, 8, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert sorted(ran) == ["backward", "bias", "forward", "pre"]


def test_17_parametrised_layers_are_kept() -> None:
    """17: a parametrised layer is kept with its reason and computes what it did."""
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(8, 8)), nn.Linear(8, 8))
    x = torch.randn(2, 8)
    want = model[0](x)
    quiet(model)
    assert reasons(model) == {"0": "parametrized", "1": None}
    assert parametrize.is_parametrized(model[0])
    assert torch.equal(model[0](x), want)


def test_18_an_optimizer_from_before_steps_the_model() -> None:
    """18: an optimizer made before converting moves the parameters that the converted layers use."""
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    quiet(model)
    before = model(TOKENS)
    gradients(model)
    weight = model.layers[0].up.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.layers[0].up.weight, weight)
    assert not torch.equal(model(TOKENS), before)


def _torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _torch_save,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("recipe", ["nvidia", "search_eden"])
def test_19_copies_train_alike_and_apart(how: str, recipe: str) -> None:
    """19: a copy, also of a model that has trained, gives the same bits in forward and backward, and then goes its own
    way: its noise, its weights and its switches are not the original's."""
    model = quiet(Model(), recipe)
    gradients(model)
    twin = COPIES[how](model)
    assert converted(twin) == converted(model)
    assert nvfp4.noise_state(twin) == nvfp4.noise_state(model) != nvfp4.noise_state(quiet(Model()))
    assert_same_training(model, twin)
    gradients(twin)
    assert nvfp4.noise_state(twin) != nvfp4.noise_state(model)
    with nvfp4.disabled(twin):
        assert not torch.equal(twin(TOKENS), model(TOKENS))
    with torch.no_grad():
        twin.layers[0].up.weight.zero_()
    assert model.layers[0].up.weight.any()


def test_19_averaged_model() -> None:
    """19: an exponential moving average holds converted layers, follows, and can be evaluated."""
    model = quiet(Model())
    average = AveragedModel(model, avg_fn=lambda old, new, _: 0.5 * old + 0.5 * new)
    average.update_parameters(model)
    start = model.layers[0].up.weight.detach().clone()
    with torch.no_grad():
        model.layers[0].up.weight.add_(1)
    average.update_parameters(model)
    assert_floats_bitwise(average.module.layers[0].up.weight, 0.5 * start + 0.5 * (start + 1), "average")
    assert len(converted(average)) == 4
    plain = Model()
    plain.load_state_dict(average.module.state_dict())
    assert_floats_bitwise(average(TOKENS), quiet(plain)(TOKENS), "logits")


def test_20_revert_is_bit_equal() -> None:
    """20: plain nn.Linears over the same Parameters, not one attribute left over, and the old bits."""
    model = Model()
    want, parameters, before = model(TOKENS).detach(), list(model.parameters()), snapshot(model)
    quiet(model, exclude="down")
    assert not torch.equal(model(TOKENS), want)
    assert nvfp4.revert(model) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert_untouched(model, before)
    assert_floats_bitwise(model(TOKENS), want, "logits")
    assert converted(quiet(model)) == ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"]


def test_20_revert_of_a_part() -> None:
    """20: reverting one block leaves the others converted."""
    model = quiet(Model())
    nvfp4.revert(model.layers[0])
    assert converted(model) == ["layers.1.up", "layers.1.down"]


def test_20_disabled_is_the_plain_model_and_ends() -> None:
    """20: within disabled() outputs and gradients are the plain model's bits; it nests, and ends after an exception."""
    plain, model = Model(), Model()
    model.load_state_dict(plain.state_dict())
    quiet(model)
    quantised = model(TOKENS).detach()
    with nvfp4.disabled(model) as same:
        assert same is model
        with nvfp4.disabled(model.layers[0]):
            pass
        assert_same_training(model, plain)
        assert "disabled" in repr(model.layers[0].up)
    assert nvfp4.noise_state(model) == dict.fromkeys(converted(model), 0)
    with pytest.raises(KeyError), nvfp4.disabled(model):
        raise KeyError
    assert_floats_bitwise(model(TOKENS), quantised, "logits")
    with nvfp4.disabled(model.layers[0]):
        assert [m.nvfp4.enabled for m in model.modules() if isinstance(m, nvfp4.Linear)] == [False, False, True, True]


@pytest.mark.parametrize("move", ["half", "bfloat16", "float", "to_empty", "to", "share_memory"])
def test_21_moves_behave_as_for_nn_linear(move: str) -> None:
    """21: dtypes, devices and values after a move are those of the plain layer, and the layer still runs."""
    plain, layer = nn.Linear(8, 8), nn.Linear(8, 8)
    layer.load_state_dict(plain.state_dict())
    quiet(layer)

    def moved(module: nn.Module) -> nn.Module:
        if move == "to_empty":
            return module.to("meta").to_empty(device="cpu")
        return module.to("cpu", torch.bfloat16) if move == "to" else getattr(module, move)()

    assert moved(layer) is layer
    moved(plain)
    assert (layer.weight.dtype, layer.weight.device) == (plain.weight.dtype, plain.weight.device)
    if move == "to_empty":
        layer.load_state_dict(nn.Linear(8, 8).state_dict())
    else:
        assert torch.equal(layer.weight, plain.weight)
    x = torch.randn(3, 8, dtype=layer.weight.dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert type(layer) is nvfp4.Linear
    assert y.dtype == layer.weight.grad.dtype == x.dtype
    assert y.isfinite().all()


def test_21_a_layer_cast_to_float64_says_why_not() -> None:
    """21: double() works as a move; the forward then names the dtype instead of computing something else."""
    layer = quiet(nn.Linear(8, 8)).double()
    with pytest.raises(TypeError, match=r"float32, bfloat16 or float16, got torch\.float64"):
        layer(torch.randn(3, 8, dtype=torch.float64))


def test_22_repr() -> None:
    """22: sizes, bias, recipe, backend; after revert the plain line."""
    layer = quiet(nn.Linear(8, 4, bias=False), "nvidia", backend="reference")
    want = "Linear(in_features=8, out_features=4, bias=False"
    assert repr(layer) == f"{want}, recipe=nvidia, backend=reference)"
    assert repr(nvfp4.revert(layer)) == f"{want})"


# --- errors, seeds, real models


def _raising_filter(module: nn.Module, name: str) -> bool:
    if name == "lm_head":
        raise RuntimeError("mine")
    return True


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"recipe": "quartet3"}, ValueError, "unknown recipe 'quartet3'; known: bf16, rtn"),
        ({"recipe": None}, TypeError, "recipe must be a name"),
        ({"backend": "nonsense"}, ValueError, "unknown backend 'nonsense'"),
        ({"seed": -1}, ValueError, "seed must be an integer in"),
        ({"seed": 2**64}, ValueError, "seed must be an integer in"),
        ({"keep_last": -1}, ValueError, "keep_last must be"),
        ({"include": "nothing", "strict": True}, ValueError, "include 'nothing' matches no linear layer"),
        ({"filter_fn": lambda m, n: False, "strict": True}, ValueError, r"no layer was converted.*filter_fn: 4"),
        ({"filter_fn": _raising_filter}, RuntimeError, "mine"),
    ],
)
def test_errors_leave_the_model_unchanged(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    """Whatever is wrong is found before the first layer is changed, so no error leaves half a conversion."""
    model = Model()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        nvfp4.convert(model, **({"verbose": False} | arguments))
    assert_untouched(model, before)


def test_verbose_is_one_line_and_can_be_off(capsys: pytest.CaptureFixture[str]) -> None:
    """One summary line by default, none with verbose=False."""
    nvfp4.convert(Model(), "rtn")
    line = "nvfp4: recipe rtn, converted 4, kept 1 (output_embedding: 1)\n"
    assert capsys.readouterr().out == line
    nvfp4.convert(Model(), "rtn", verbose=False)
    assert capsys.readouterr().out == ""


def test_noise_is_seeded_by_argument_or_torch() -> None:
    """Each layer gets the seed and its index in conversion order; the default seed is torch's."""
    model = nvfp4.convert(Model(), exclude="layers.0.down", seed=17, verbose=False)
    noise = [model.get_submodule(name).nvfp4.noise for name in converted(model)]
    assert [(n.seed, n.layer, n.calls) for n in noise] == [(17, 0, 0), (17, 1, 0), (17, 2, 0)]
    torch.manual_seed(23)
    assert nvfp4.convert(nn.Linear(4, 4), verbose=False).nvfp4.noise.seed == 23
    torch.manual_seed(-1)
    assert nvfp4.convert(nn.Linear(4, 4), verbose=False).nvfp4.noise.seed == torch.initial_seed() % 2**64


def test_mixed_recipes_in_one_model() -> None:
    """Two calls give two recipes to two sets of layers, and both run."""
    model = quiet(quiet(Model(), "nvidia", include="up"), "quartet2", include="down")
    assert [model.get_submodule(n).nvfp4.recipe.name for n in converted(model)] == ["nvidia", "quartet2"] * 2
    assert len(gradients(model)) == len(list(model.parameters()))


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="transformers is not installed")


def _llama(transformers: Any, tied: bool) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("tied", [False, True])
def test_llama(transformers: Any, tied: bool) -> None:
    """A transformers Llama: seven linears a block, lm_head kept whether tied or not, trains, generates, and its
    checkpoint holds the plain names."""
    model = _llama(transformers, tied)
    names = list(model.state_dict())
    quiet(model, keep_last=1)
    assert len(converted(model)) == 14
    kept = {name: reason for name, reason in reasons(model).items() if reason is not None}
    assert kept.pop("lm_head") == ("tied_to_embedding" if tied else "output_embedding")
    assert len(kept) == 7
    assert all(n.startswith("model.layers.2.") and reason == "keep_last" for n, reason in kept.items())
    tokens = torch.arange(20).view(2, 10)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert list(model.state_dict()) == names
    model.eval()
    assert model.generate(tokens[:1], max_new_tokens=2, do_sample=False).shape == (1, 12)


def test_llama_on_meta_keeps_its_tie(transformers: Any) -> None:
    """Converted on meta, as before sharding: the tie holds and nothing is materialised."""
    with torch.device("meta"):
        model = _llama(transformers, tied=True)
    quiet(model)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert len(converted(model)) == 21
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_gpt2_has_no_linears(transformers: Any) -> None:
    """GPT-2 is made of Conv1D: nothing can be converted, which is said, not passed over."""
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=1
    )
    with pytest.warns(nvfp4.ConvertWarning, match=r"no layer was converted.*tied_to_embedding: 1"):
        model = quiet(transformers.GPT2LMHeadModel(config))
    with pytest.raises(ValueError, match="no layer was converted"):
        quiet(model, strict=True)
