"""convert beside its contract: policies, switches, what cannot be converted, errors, seeds, real
models."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import layer_oracle
import pytest
import torch
from assertions import assert_floats_bitwise
from layer_oracle import Noise, Op, operands, product
from torch import nn
from toy_model import (
    TOKENS,
    Block,
    Model,
    assert_untouched,
    converted,
    gradients,
    quiet,
    reasons,
    snapshot,
)

import nvfp4
from nvfp4.recipes import Recipe


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
    """13: the base layer is converted, LoRA A and B are not; adapters train, the base has no
    gradient."""
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


@pytest.mark.skipif(
    importlib.util.find_spec("peft") is None,
    reason="peft is not installed; simulated above by names",
)
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
        (
            {"include": "nothing", "strict": True},
            ValueError,
            "include 'nothing' matches no linear layer",
        ),
        (
            {"filter_fn": lambda m, n: False, "strict": True},
            ValueError,
            r"no layer was converted.*filter_fn: 4",
        ),
        ({"filter_fn": _raising_filter}, RuntimeError, "mine"),
    ],
)
def test_errors_leave_the_model_unchanged(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Whatever is wrong is found before the first layer is changed, so no error leaves half a
    conversion."""
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
    assert (
        nvfp4.convert(nn.Linear(4, 4), verbose=False).nvfp4.noise.seed
        == torch.initial_seed() % 2**64
    )


def test_mixed_recipes_in_one_model() -> None:
    """Two calls give two recipes to two sets of layers, and both run."""
    model = quiet(quiet(Model(), "nvidia", include="up"), "quartet2", include="down")
    assert [model.get_submodule(n).nvfp4.recipe.name for n in converted(model)] == [
        "nvidia",
        "quartet2",
    ] * 2
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
    """A transformers Llama: seven linears a block, lm_head kept whether tied or not, trains,
    generates, and its checkpoint holds the plain names."""
    model = _llama(transformers, tied)
    names = list(model.state_dict())
    quiet(model, keep_last=1)
    assert len(converted(model)) == 14
    kept = {name: reason for name, reason in reasons(model).items() if reason is not None}
    assert kept.pop("lm_head") == ("tied_to_embedding" if tied else "output_embedding")
    assert len(kept) == 7
    assert all(
        n.startswith("model.layers.2.") and reason == "keep_last" for n, reason in kept.items()
    )
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


@pytest.mark.filterwarnings("default::nvfp4.ConvertWarning")
def test_gpt2_names_its_conv1d(transformers: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The warning names what GPT-2 is made of, and so do the summary and the report of a model that
    has both; a convolution of rank 3 is none of these."""
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    with pytest.warns(
        nvfp4.ConvertWarning, match=r"no layer was converted.*not_linear: Conv1D x 8"
    ):
        quiet(model)
    both = nn.ModuleDict({"gpt": model, "up": nn.Linear(16, 16), "conv": nn.Conv1d(3, 3, 3)})
    nvfp4.convert(both, "rtn")
    assert capsys.readouterr().out == (
        "nvfp4: recipe rtn, converted 1, kept 1 (tied_to_embedding: 1); not_linear: Conv1D x 8\n"
    )
    assert "not linear, so not converted: Conv1D x 8" in str(nvfp4.report(both))
    assert nvfp4.check(both, strict=True).not_linear == ("Conv1D x 8",)


class Conv1D(nn.Conv1d):
    """A convolution in one dimension, which happens to have the name of GPT-2's transposed
    linear."""


def test_a_convolution_of_that_name_is_none() -> None:
    """Conv1D is told by its name and its weight of rank 2: a convolution's has rank 3."""
    assert nvfp4.report(nn.ModuleList([Conv1D(3, 3, 3), nn.Linear(3, 3)])).not_linear == ()


class Experts(nn.Module):
    """Fused experts as transformers 5 keeps them: parameters of rank 3, no linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 32, 16))
        self.down_proj = nn.Parameter(torch.randn(4, 16, 16))
        self.scale = nn.Parameter(torch.ones(4, 16))


def test_fused_experts_are_counted_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Parameters of rank 3 of experts are no linears: a warning and the summary say how many there
    are; strict is about arguments and does not raise; other parameters of rank 3 (a position
    embedding) are not counted."""
    model = nn.ModuleDict({"attention": nn.Linear(16, 16), "moe": Experts()})
    model.register_parameter("position", nn.Parameter(torch.zeros(1, 8, 16)))
    with pytest.warns(
        nvfp4.ConvertWarning, match="3-D expert parameter x 2: fused experts .* high precision"
    ) as caught:
        nvfp4.convert(model, "rtn", strict=True)
    assert caught[0].filename == __file__
    assert (
        capsys.readouterr().out
        == "nvfp4: recipe rtn, converted 1, kept 0; not_linear: 3-D expert parameter x 2\n"
    )


def test_mixtral(transformers: Any) -> None:
    """A transformers Mixtral: attention is converted, its fused experts are counted, and it
    trains."""
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    model = transformers.MixtralForCausalLM(config)
    fused = [p for n, p in model.named_parameters() if "experts" in n and p.dim() == 3]
    if not fused:
        pytest.skip(f"transformers {transformers.__version__} keeps Mixtral's experts as linears")
    with pytest.warns(nvfp4.ConvertWarning, match=f"3-D expert parameter x {len(fused)}"):
        quiet(model)
    assert {name.rsplit(".", 1)[1] for name in converted(model)} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    tokens = torch.arange(20).view(2, 10)
    assert model(input_ids=tokens, labels=tokens).loss.isfinite()


# recipes by pattern


def recipes(model: nn.Module) -> dict[str, str | None]:
    return {layer.name: layer.recipe for layer in nvfp4.report(model).layers}


def test_recipes_by_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    """The first pattern in order wins, names and Recipes mix, "bf16" and no match keep a layer with
    their reasons, the output embedding stays kept, and the printed line counts each recipe."""
    mine = Recipe("mine", fprop=nvfp4.RECIPES["rtn"].fprop)
    model = Model(4)
    nvfp4.convert(
        model, {"layers.0": "bf16", "layers.[12].up": "nvidia", "up": mine, "layers.1": "quartet2"}
    )
    assert recipes(model) == {
        "layers.0.up": None,
        "layers.0.down": None,
        "layers.1.up": "nvidia",
        "layers.1.down": "quartet2",
        "layers.2.up": "nvidia",
        "layers.2.down": None,
        "layers.3.up": "mine",
        "layers.3.down": None,
        "lm_head": None,
    }
    assert {name: why for name, why in reasons(model).items() if why} == {
        "layers.0.up": "bf16",
        "layers.0.down": "bf16",
        "layers.2.down": "no_recipe",
        "layers.3.down": "no_recipe",
        "lm_head": "output_embedding",
    }
    assert capsys.readouterr().out == (
        "nvfp4: recipe bf16, nvidia, mine, quartet2, converted 4 (nvidia: 2, quartet2: 1, mine: "
        "1), "
        "kept 5 (bf16: 2, no_recipe: 2, output_embedding: 1)\n"
    )
    assert len(gradients(model)) == len(list(model.parameters()))


def test_recipes_by_pattern_meet_the_other_policies() -> None:
    """exclude, include and keep_last decide whether, the mapping decides what; a layer with two
    names takes the first pattern that fits either."""
    model = Model(3)
    model.alias = model.layers[0].up
    quiet(
        model,
        {"alias": "rtn", "*": "nvidia"},
        include=["layers", "alias", "lm_head"],
        keep_last=1,
        exclude="1.down",
    )
    assert {n: r for n, r in recipes(model).items() if r} == {
        "layers.0.up": "rtn",
        "layers.0.down": "nvidia",
        "layers.1.up": "nvidia",
        "lm_head": "nvidia",
    }


def test_recipes_by_pattern_that_match_nothing() -> None:
    """A pattern without a layer warns, or raises when strict; so does a mapping under which nothing
    is converted, unless that is what it says."""
    patterns = {"layers.9": "rtn", "up": "nvidia"}
    with pytest.warns(nvfp4.ConvertWarning, match=r"recipe 'layers\.9' matches no linear layer"):
        quiet(Model(), patterns)
    model = Model()
    before = snapshot(model)
    for recipe, words in (
        (patterns, "recipe 'layers.9' matches no"),
        ({}, "no layer was converted.*no_recipe: 4"),
    ):
        with pytest.raises(ValueError, match=words):
            quiet(model, recipe, strict=True)
        assert_untouched(model, before)
    quiet(model, {"layers": "bf16"}, strict=True)
    with pytest.raises(TypeError, match="goes from name patterns to recipes, got the pattern 3"):
        quiet(Model(), {3: "rtn"})
    with pytest.raises(ValueError, match="unknown recipe 'quartet3'"):
        quiet(Model(), {"up": "quartet3"})


# what cannot, or should not, be converted


def encoder_layer(**kwargs: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **kwargs)


def test_fast_path_layers_are_kept() -> None:
    """In eval mode nn.TransformerEncoderLayer hands its weights to a fused kernel: converted
    linears would be bypassed without a word, so they are kept with the reason, and nothing changes,
    also with padding."""
    model = nn.ModuleDict(
        {"encoder": nn.TransformerEncoder(encoder_layer(), 2), "out": nn.Linear(16, 16)}
    ).eval()
    x, padding = torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    with torch.no_grad():
        want = [model["encoder"](x), model["encoder"](x, src_key_padding_mask=padding)]
        quiet(model)
        got = [model["encoder"](x), model["encoder"](x, src_key_padding_mask=padding)]
    for a, b in zip(got, want, strict=True):
        assert_floats_bitwise(a, b, "encoder")
    linears = {name: why for name, why in reasons(model).items() if "encoder" in name}
    assert sorted(set(linears.values()) - {None}) == ["fast_path", "subclass"]
    assert all(why == "fast_path" for name, why in linears.items() if "linear" in name)
    assert converted(model) == ["out"]


class OwnEncoderLayer(nn.TransformerEncoderLayer):
    """Calls its linears itself."""

    def forward(self, src: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.linear2(torch.relu(self.linear1(src)))


@pytest.fixture
def without_fast_path() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def assert_uses_what_it_converted(layer: nn.Module, x: torch.Tensor) -> None:
    """linear1 and linear2 are converted, and in eval mode without gradients the output shows it."""
    quiet(layer.eval())
    assert [type(layer.linear1), type(layer.linear2)] == [nvfp4.Linear] * 2
    with torch.no_grad():
        got = layer(x)
        with nvfp4.disabled(layer):
            assert not torch.equal(got, layer(x))


def test_layers_that_cannot_take_the_fast_path_are_converted() -> None:
    """A sequence-first layer, which is torch's default, a forward of one's own, and a decoder
    layer."""
    sequence_first = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
    assert_uses_what_it_converted(sequence_first, torch.randn(5, 2, 16))
    assert_uses_what_it_converted(
        OwnEncoderLayer(16, 2, 32, batch_first=True), torch.randn(2, 5, 16)
    )
    decoder = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    quiet(decoder)
    assert type(decoder.linear1) is nvfp4.Linear


@pytest.mark.usefixtures("without_fast_path")
def test_the_fast_path_can_be_switched_off() -> None:
    """torch's own switch, thrown before convert, lets everything be converted and used."""
    assert_uses_what_it_converted(encoder_layer(), torch.randn(2, 5, 16))


def test_attention_that_reads_a_weight_is_bypassed() -> None:
    """nn.MultiheadAttention never calls out_proj, whatever its class: kept, with its reason."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2), "up": nn.Linear(16, 16)})
    model["attention"].out_proj = nn.Linear(16, 16)
    assert reasons(quiet(model)) == {"attention.out_proj": "bypassed", "up": None}


class Packed(torch.Tensor):
    """A weight with arithmetic of its own, as quantisation packages make them."""


def test_tensor_subclasses_are_kept() -> None:
    """A weight or bias that is a tensor subclass has other plans for F.linear: kept, with its
    reason."""
    model = nn.ModuleDict({name: nn.Linear(16, 16) for name in ("weight", "bias", "plain")})
    model["weight"].weight = nn.Parameter(torch.randn(16, 16).as_subclass(Packed))
    model["bias"].bias = nn.Parameter(torch.randn(16).as_subclass(Packed))
    assert type(model["weight"].weight) is Packed
    assert reasons(quiet(model)) == {
        "weight": "tensor_subclass",
        "bias": "tensor_subclass",
        "plain": None,
    }


def test_sharded_parameters_are_converted() -> None:
    """A DTensor is a parameter in several places: converted, and still that very parameter."""
    distributed = pytest.importorskip("torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        layer = nn.Linear(16, 16)
        mesh = init_device_mesh("cpu", (1,))
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
        weight = layer.weight
        assert type(weight).__name__ == "DTensor"
        assert type(quiet(layer)) is nvfp4.Linear
        assert layer.weight is weight
    finally:
        distributed.destroy_process_group()


def test_fake_parameters_are_converted() -> None:
    """A model made under FakeTensorMode, as planners make it, is converted like one on meta."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = Model()
    assert converted(quiet(model)) == converted(quiet(Model()))


def test_weights_that_are_gathered_when_needed_are_converted() -> None:
    """DeepSpeed's ZeRO-3 leaves an empty parameter behind until the forward: the sizes of the layer
    count."""
    layer = nn.Linear(16, 16)
    full, layer.weight.data = layer.weight.data, torch.empty(0)
    layer.register_forward_pre_hook(lambda module, _: setattr(module.weight, "data", full))
    assert type(quiet(layer)) is nvfp4.Linear
    assert layer(torch.randn(2, 16)).isfinite().all()


def test_weights_made_by_hooks_are_kept() -> None:
    """The older weight_norm computes its weight in a hook, so that it is no Parameter: kept as
    parametrised."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model[0])
    assert reasons(quiet(model)) == {"0": "parametrized", "1": None}


def test_linear_is_made_by_convert_alone() -> None:
    """Constructing the class is refused at once, with the way to do it; copies and pickles
    construct nothing."""
    with pytest.raises(TypeError, match=r"no constructor.*nvfp4\.convert"):
        nvfp4.Linear(8, 8)
    layer = quiet(nn.Linear(8, 8))
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(torch.ones(1, 8)), layer(torch.ones(1, 8)))


# copies of layers


def noises(model: nn.Module) -> list[tuple[int, int]]:
    return [
        (m.nvfp4.noise.seed, m.nvfp4.noise.layer)
        for m in model.modules()
        if isinstance(m, nvfp4.Linear)
    ]


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy])
def test_copied_layers_get_noise_of_their_own(
    copied: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Layers copied, deeply or not, to be further layers of the same model draw the first ones'
    noise, until convert, called again, gives them indices of their own and says so; the first keep
    theirs, and a third call finds nothing."""
    model = quiet(Model())
    gradients(model)
    block = Block()
    block.up, block.down = copied(model.layers[1].up), copied(model.layers[1].down)
    model.layers.append(block)
    assert noises(model) == [(5, 0), (5, 1), (5, 2), (5, 3), (5, 2), (5, 3)]
    nvfp4.convert(model, "quartet2")
    assert noises(model) == [(5, 0), (5, 1), (5, 2), (5, 3), (5, 4), (5, 5)]
    assert (
        "; copied layers given noise of their own: layers.2.up, layers.2.down\n"
        in capsys.readouterr().out
    )
    assert {int(calls) for calls in nvfp4.noise_state(model).values()} == {1}
    x, dy = torch.randn(4, 16), torch.randn(4, 32)
    grads = []
    for layer in (model.layers[1].up, model.layers[2].up):
        leaf = x.clone().requires_grad_()
        layer(leaf).backward(dy)
        grads.append(leaf.grad)
    assert not torch.equal(*grads)
    # counted apart
    assert [int(calls) for calls in nvfp4.noise_state(model).values()] == [1, 1, 2, 1, 2, 1]
    nvfp4.convert(model, "quartet2")
    assert "copied layers" not in capsys.readouterr().out
    assert noises(model) == [(5, 0), (5, 1), (5, 2), (5, 3), (5, 4), (5, 5)]


def test_a_copy_that_stands_alone_keeps_its_noise() -> None:
    """A deep copy of the whole model, a moving average or a reference, has the original's noise,
    and convert, called on either of them, leaves it so."""
    model = quiet(Model())
    reference = copy.deepcopy(model)
    for again in (model, reference):
        quiet(again)
        assert noises(again) == [(5, 0), (5, 1), (5, 2), (5, 3)]


# forward_precision


def layer_and_plain(recipe: str) -> tuple[nn.Linear, nn.Linear]:
    layer = nn.Linear(48, 32)
    plain = copy.deepcopy(layer)
    return nvfp4.convert(layer, recipe, seed=5, verbose=False), plain


def step(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.backward(dy)
    return [y.detach(), leaf.grad, layer.weight.grad, layer.bias.grad]


def assert_equal_steps(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for name, a, b in zip(("y", "dx", "dw", "db"), got, want, strict=True):
        assert_floats_bitwise(a, b, name)


def _of_tensors(table: dict[str, tuple[Op, Op]]) -> dict[str, tuple[Op, Op]]:
    """The definition of a recipe with its backward made of x and w themselves, written by hand from
    its words."""
    fprop, dgrad, wgrad = table["fprop"], table["dgrad"], table["wgrad"]

    def of_tensor(op: Op, forward: Op) -> Op:
        return forward if op.source == "codes" else op._replace(source="x")

    dgrad, wgrad = (
        (dgrad[0], of_tensor(dgrad[1], fprop[1])),
        (wgrad[0], of_tensor(wgrad[1], fprop[0])),
    )
    return {"fprop": fprop, "dgrad": dgrad, "wgrad": wgrad}


@pytest.mark.parametrize(
    "recipe", ["rtn", "nvidia", "four_over_six", "tetrajet2", "quartet2", "search_eden"]
)
def test_bf16_forward_is_the_plain_forward_and_an_nvfp4_backward(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """y is F.linear's to the bit; dx and dw are NVFP4 products of dy with w and x themselves,
    quantised by the recipe's quantisers with its noise, put together by hand; and back again it is
    the recipe as if nothing had happened."""
    layer, plain = layer_and_plain(recipe)
    untouched = copy.deepcopy(layer)
    x, dy = torch.randn(37, 48), torch.randn(37, 32)
    nvfp4.forward_precision(layer, "bf16")
    monkeypatch.setitem(layer_oracle.TABLE, "switched", _of_tensors(layer_oracle.TABLE[recipe]))
    for call in range(2):
        y, dx, dw, db = step(layer, x, dy)
        exact = step(plain, x, dy)
        pairs = operands("switched", x, layer.weight.detach(), dy, Noise(5, call=call))
        assert_equal_steps(
            [y, dx, dw, db],
            [
                exact[0],
                product(pairs["dgrad"], torch.float32),
                product(pairs["wgrad"], torch.float32),
                exact[3],
            ],
        )
        assert not torch.equal(dw, exact[2])
        step(untouched, x, dy)
    nvfp4.forward_precision(layer, "nvfp4")
    assert layer.nvfp4 == untouched.nvfp4
    assert_equal_steps(step(layer, x, dy), step(untouched, x, dy))


@pytest.mark.parametrize("recipe", nvfp4.RECIPES.values(), ids=lambda r: r.name)
def test_bf16_forward_is_a_recipe_like_any_other(recipe: Recipe) -> None:
    """Its rules hold, it survives to_dict and it needs no codes of a forward that has none."""
    switched = recipe.with_dense_forward()
    assert Recipe.from_dict(switched.to_dict()) == switched
    assert not switched.fprop.quantized
    backward = [
        operand for gemm in (switched.dgrad, switched.wgrad) for operand in (gemm.left, gemm.right)
    ]
    assert {operand.source for operand in backward} == {"tensor"}
    assert switched.quantized == (recipe.name not in ("bf16", "rl"))


def test_bf16_forward_of_rl_is_the_plain_layer() -> None:
    """rl quantises nothing but the forward, so without it nothing is quantised."""
    layer, plain = layer_and_plain("rl")
    x, dy = torch.randn(7, 48), torch.randn(7, 32)
    with nvfp4.forward_precision(layer, "bf16"):
        assert_equal_steps(step(layer, x, dy), step(plain, x, dy))


def test_forward_precision_as_a_call_and_as_a_context() -> None:
    """A call lasts, and again changes nothing; a context ends, also after an exception, nests, and
    puts back what it found, be that a switch made before."""
    model = quiet(Model())
    nvfp4_y = model(TOKENS).detach()
    with nvfp4.disabled(model):
        dense_y = model(TOKENS).detach()
    with nvfp4.forward_precision(model, "bf16") as same:
        assert same is model
        assert_floats_bitwise(model(TOKENS), dense_y, "inside")
        with nvfp4.forward_precision(model.layers[0], "nvfp4"):
            assert not torch.equal(model(TOKENS), dense_y)
        assert_floats_bitwise(model(TOKENS), dense_y, "inside again")
    assert_floats_bitwise(model(TOKENS), nvfp4_y, "after")
    for _ in range(2):
        nvfp4.forward_precision(model, "bf16")
    with nvfp4.forward_precision(model, "nvfp4"):
        assert_floats_bitwise(model(TOKENS), nvfp4_y, "nvfp4 inside bf16")
    with pytest.raises(KeyError), nvfp4.forward_precision(model, "nvfp4"):
        raise KeyError
    assert_floats_bitwise(model(TOKENS), dense_y, "still bf16")
    nvfp4.forward_precision(model, "nvfp4")
    assert_floats_bitwise(model(TOKENS), nvfp4_y, "back")


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_forward_precision_travels_and_shows(how: Any) -> None:
    """A copy and a pickle carry the switch and can be switched back, apart from the original; repr
    and report name it; revert leaves nothing of it."""
    model = quiet(Model(), "nvidia")
    plain = snapshot(nvfp4.revert(copy.deepcopy(model)))
    nvfp4.forward_precision(model, "bf16")
    twin = how(model)
    assert "recipe=nvidia+bf16_forward" in repr(twin.layers[0].up)
    row = nvfp4.report(twin).layers[0]
    assert (row.recipe, row.precisions) == ("nvidia+bf16_forward", ("bf16", "nvfp4", "nvfp4"))
    assert (
        "nvidia+bf16_forward: fprop high precision / high precision; dgrad sr_te / rtn_2d"
        in str(nvfp4.report(twin))
    )
    assert_floats_bitwise(twin(TOKENS), model(TOKENS), "copy")
    nvfp4.forward_precision(twin, "nvfp4")
    assert "recipe=nvidia," in repr(twin.layers[0].up)
    assert "bf16_forward" in repr(model.layers[0].up)
    nvfp4.revert(model)
    assert [vars(m).keys() for m in model.modules()] == [p["vars"] for p in plain.values()]


def test_a_switched_training_resumes_bit_for_bit() -> None:
    """Noise state and state_dict resume a training that has switched, given the same switch;
    without it they do not."""

    def train(model: nn.Module, steps: int) -> nn.Module:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            model(TOKENS).square().mean().backward()
            optimizer.step()
        return model

    start = Model().state_dict()

    def fresh() -> nn.Module:
        model = quiet(Model())
        model.load_state_dict(start)
        return model

    straight = train(fresh(), 2)
    nvfp4.forward_precision(straight, "bf16")
    train(straight, 1)
    saved, noise = copy.deepcopy(straight.state_dict()), nvfp4.noise_state(straight)
    noise = {name: int(calls) for name, calls in noise.items()}
    train(straight, 2)
    for switched in (True, False):
        resumed = quiet(Model())
        resumed.load_state_dict(saved)
        nvfp4.load_noise_state(resumed, noise)
        if switched:
            nvfp4.forward_precision(resumed, "bf16")
        train(resumed, 2)
        same = all(
            torch.equal(a, b)
            for a, b in zip(resumed.parameters(), straight.parameters(), strict=True)
        )
        assert same == switched


def test_forward_precision_says_what_is_wrong() -> None:
    """Another precision is refused with the choice; a model without converted layers is warned
    of."""
    with pytest.raises(
        ValueError, match=r"precision must be one of \('nvfp4', 'bf16'\), got 'fp8'"
    ):
        nvfp4.forward_precision(quiet(Model()), "fp8")
    with pytest.warns(nvfp4.ConvertWarning, match="no converted layer") as caught:
        nvfp4.forward_precision(Model(), "bf16")
    assert caught[0].filename == __file__


def test_revert_refuses_a_layer_whose_class_has_changed() -> None:
    """``fully_shard(layer)`` gives the layer itself another class, which reverting would drop:
    nothing is changed."""
    model = nvfp4.convert(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), "rtn", verbose=False)
    model[1].__class__ = type("FSDPLinear", (nvfp4.Linear,), {})
    with pytest.raises(RuntimeError, match="FSDPLinear: revert before fully_shard"):
        nvfp4.revert(model)
    assert type(model[0]) is nvfp4.Linear


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exclude": [0]}, "names with globs.*got 0"),
        ({"include": 3.5}, "include"),
        ({"filter_fn": "q_proj"}, "filter_fn must be callable"),
    ],
    ids=str,
)
def test_arguments_of_another_type_are_named(arguments: dict[str, Any], message: str) -> None:
    """A TypeError says which argument, what was expected and what came; so does one for the
    model."""
    with pytest.raises(TypeError, match=message):
        nvfp4.convert(nn.Linear(8, 8), "rtn", **arguments)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        nvfp4.convert("model", "rtn")  # type: ignore[arg-type]
