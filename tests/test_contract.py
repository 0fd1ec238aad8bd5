"""What docs/convert.md promises of convert and the layer: a test for each number, and one for each
trap.

Where a statement is proved beside the thing it is about, ``PROOFS`` says where; ``TRAPS`` are
mistakes of neighbouring packages that no statement names.
"""

from __future__ import annotations

import ast
import copy
import io
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from assertions import assert_floats_bitwise
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel
from toy_model import (
    TOKENS,
    Block,
    Model,
    assert_same_training,
    assert_untouched,
    converted,
    gradients,
    quiet,
    reasons,
    snapshot,
)

import nvfp4
from nvfp4.backends import registry
from nvfp4.backends.base import Backend
from nvfp4.backends.reference import ReferenceBackend

ROOT = Path(__file__).parent.parent

HERE = "test_contract.py"
PROOFS: dict[int, tuple[str, ...]] = {
    **{n: (f"{HERE}::test_{n:02}_*",) for n in (*range(1, 13), *range(14, 23))},
    7: (f"{HERE}::test_07_*",),
    8: (f"{HERE}::test_07_08_*",),
    13: ("test_convert.py::test_13_*", "test_clients.py::test_13_*"),
    23: ("test_linear.py::test_23_*",),
    24: ("test_linear.py::test_23_24_dtypes_are_those_of_f_linear",),
    25: ("test_linear.py::test_25_*",),
    26: ("test_linear.py::test_26_*",),
    27: ("test_linear.py::test_27_*", f"{HERE}::test_27_*"),
    28: ("test_linear.py::test_28_*", "test_linear.py::test_25_ranks"),
    29: ("test_linear.py::test_29_*",),
    30: (
        "test_native.py::test_quantize_equals_reference",
        "test_native.py::test_matmul_equals_reference",
        "test_matmul.py::test_real_products_agree_within_float32_summation",
    ),
    31: ("test_linear.py::test_31_*", "test_unbiasedness.py::test_dense_products_are_unbiased"),
    32: (
        "test_linear.py::test_32_*",
        "test_linear.py::test_ranks_share_signs_and_differ_in_rounding",
    ),
    33: ("test_linear.py::test_33_*",),
    34: ("test_quantizers.py::test_claim_relative_mse",),
    35: ("test_linear.py::test_35_double_backward_raises",),
    36: (f"{HERE}::test_36_*",),
    37: (
        "test_linear.py::test_checkpointing_is_bit_equal",
        "test_linear.py::test_layer_used_twice_in_one_graph",
    ),
    38: (f"{HERE}::test_38_*",),
    39: ("test_distributed.py::test_on_two_processes",),
    40: (f"{HERE}::test_40_*",),
    41: (
        "test_library.py::test_quantize_opcheck",
        "test_library.py::test_dequantize_and_matmul_opcheck",
    ),
    42: ("test_clients.py::test_42_*",),
    43: ("test_clients.py::test_43_*",),
    44: (f"{HERE}::test_44_*",),
    45: (f"{HERE}::test_45_*",),
    46: ("test_info.py::test_import_is_light_and_needs_no_gpu",),
}
"""Statement -> the tests that prove it; a star stands for whatever the author calls it after its
number."""

TRAPS = {
    "the bias is ignored": f"{HERE}::test_trap_the_bias_counts",
    "only one batch is allowed": f"{HERE}::test_trap_batches_are_rows",
    "the walk returns at the first layer it skips": f"{HERE}::test_trap_the_walk_goes_on",
    "layers.1 catches layers.10": f"{HERE}::test_trap_names_are_no_substrings",
    "a second weight is made at convert": f"{HERE}::test_15_no_tensor_is_made_at_convert",
    "a call from the README raises": "test_docs.py::test_code_blocks_run",
    "a tie is lost on meta": f"{HERE}::test_07_tied_weights_on_meta",
}


def test_every_statement_is_proved() -> None:
    """The table names the statements of the page, 1 to 46, and nothing else."""
    page = (ROOT / "docs" / "convert.md").read_text(encoding="utf-8")
    promised = [int(number) for number in re.findall(r"^(\d+)\. ", page, flags=re.MULTILINE)]
    assert promised == sorted(PROOFS) == list(range(1, 47))


def _tests_in(file: str) -> list[str]:
    tree = ast.parse(next((ROOT / "tests").rglob(file)).read_text())
    return [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


@pytest.mark.parametrize(
    "proof", sorted({proof for proofs in PROOFS.values() for proof in proofs} | {*TRAPS.values()})
)
def test_every_proof_exists(proof: str) -> None:
    """Each named file has a test of that name: a proof that was renamed or deleted is missed
    here."""
    file, _, wanted = proof.partition("::")
    pattern = re.escape(wanted).replace(r"\*", ".+")
    assert [name for name in _tests_in(file) if re.fullmatch(pattern, name)]


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
    """3: the second call leaves class, state, noise and even another recipe's request alone, and
    prints why."""
    model = quiet(Model())
    states = [copy.copy(model.get_submodule(name).nvfp4) for name in converted(model)]
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nvfp4.convert(model, "rtn", seed=99)
    assert (
        "converted 0, kept 5 (already_converted: 4, output_embedding: 1)" in capsys.readouterr().out
    )
    assert [model.get_submodule(name).nvfp4 for name in converted(model)] == states
    assert_untouched(model, before)


def test_03_a_second_call_may_convert_more() -> None:
    """3: what the first call was told to keep, a second may convert; layer indices go on where they
    stopped."""
    model = quiet(Model(), exclude="layers.1")
    assert reasons(model)["layers.1.up"] == "excluded"
    quiet(model)
    assert reasons(model)["layers.1.up"] is None
    indices = [model.get_submodule(name).nvfp4.noise.layer for name in converted(model)]
    assert indices == [0, 1, 2, 3]


def test_04_filter_fn_sees_each_linear_path_once() -> None:
    """4: the dotted name without a leading dot, only linears, once per path (a shared layer has
    two), and its word counts."""
    model = Model()
    model.alias = model.layers[0].up
    seen: list[tuple[nn.Module, str]] = []

    def only_up(module: nn.Module, name: str) -> bool:
        seen.append((module, name))
        return name.endswith("up")

    quiet(model, filter_fn=only_up)
    names = [name for _, name in seen]
    assert sorted(names) == sorted(
        ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down", "lm_head", "alias"]
    )
    assert all(model.get_submodule(name) is module for module, name in seen)
    # layers.0.up is "alias" too, and that name was refused
    assert converted(model) == ["layers.1.up"]
    assert reasons(model)["layers.0.down"] == reasons(model)["layers.0.up"] == "filter_fn"


def test_05_globs_match_whole_parts() -> None:
    """5: layers.1 is not layers.10; a pattern matches a run of parts anywhere; * stays within a
    part."""
    model = Model(12)
    quiet(model, exclude="layers.1")
    assert "layers.10.up" in converted(model)
    assert "layers.11.up" in converted(model)
    assert {name for name, reason in reasons(model).items() if reason == "excluded"} == {
        "layers.1.up",
        "layers.1.down",
    }
    for patterns, expected in (
        ("layers.*.up", [f"layers.{i}.up" for i in range(12)]),
        (
            ["layers.1?.down", "layers.3"],
            ["layers.3.up", "layers.3.down", "layers.10.down", "layers.11.down"],
        ),
        ("[02].up", ["layers.0.up", "layers.2.up"]),
        ("layers.*", [n for i in range(12) for n in (f"layers.{i}.up", f"layers.{i}.down")]),
    ):
        assert converted(quiet(Model(12), include=patterns)) == expected
    with pytest.warns(nvfp4.ConvertWarning, match="matches no linear layer"):
        assert converted(quiet(Model(12), include=["layers*up", "3.up"])) == ["layers.3.up"]


def test_05_include_overrules_the_output_embedding() -> None:
    """5: naming lm_head converts it; exclude wins over include."""
    assert converted(quiet(Model(), include="lm_head")) == ["lm_head"]
    assert converted(quiet(Model(), include=["lm_head", "layers.0"], exclude="down")) == [
        "layers.0.up",
        "lm_head",
    ]
    assert reasons(quiet(Model(), include="layers.0"))["layers.1.up"] == "not_included"


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_06_unmatched_names_are_reported(argument: str) -> None:
    """6: a pattern that matches nothing warns with the argument, the pattern and real names; an
    error when strict, which leaves the model untouched."""
    patterns = ["layers.0", "layers.7.upp"]
    with pytest.warns(
        nvfp4.ConvertWarning, match=rf"{argument} 'layers\.7\.upp' matches no .*'layers\.0\.up'"
    ) as caught:
        nvfp4.convert(Model(), verbose=False, **{argument: patterns})
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
    """Like a transformers model: says which layer the output embedding is, under a name no list
    knows."""

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
    """7, 8: each kind of layer that is kept has its one reason, in the report and summed up in one
    printed line."""
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
    model = nn.ModuleDict(
        {"decoder": nn.ModuleDict({name: nn.Linear(8, 8), f"{name}_norm": nn.Linear(8, 8)})}
    )
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
    """9: a model without candidates warns with the count by reason; strict raises and changes
    nothing."""
    for model, text in (
        (nn.ReLU(), "0 linear layers"),
        (Model(tied=True, blocks=0), r"1 .*tied_to_embedding: 1"),
    ):
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
    # all there is to remove is the noted reason why lm_head would have been kept
    nvfp4.revert(model)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("blocks", "arguments", "kept"),
    [
        (20, {"keep_last": 0.15}, [17, 18, 19]),
        # 0.28 * 25 is 7.000000000000001 in binary
        (25, {"keep_last": 0.28}, [18, 19, 20, 21, 22, 23, 24]),
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
    """10: counts and shares (rounded up) of the numbered blocks stay in high precision, and the
    printed line names them."""
    model = Model(blocks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # keeping all 5 of 5 warns, rightly
        nvfp4.convert(model, **arguments)
    expected = [
        f"layers.{i}.{part}" for i in range(blocks) if i not in kept for part in ("up", "down")
    ]
    assert converted(model) == expected
    out = capsys.readouterr().out
    assert f"blocks kept: {', '.join(f'layers.{i}' for i in kept)}\n" in out
    named = reasons(model)
    assert all(named[f"layers.{i}.up"] in ("keep_first", "keep_last") for i in kept)


def test_10_every_stack_is_counted_and_inner_lists_are_not() -> None:
    """10: encoder and decoder each lose their last block; a list of experts inside a block is no
    stack of its own."""

    def stack() -> nn.ModuleList:
        experts = [
            nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(3))})
            for _ in range(2)
        ]
        return nn.ModuleList(experts)

    model = quiet(nn.ModuleDict({"encoder": stack(), "decoder": stack()}), keep_last=1)
    assert converted(model) == [
        f"{side}.0.experts.{i}" for side in ("encoder", "decoder") for i in range(3)
    ]


@pytest.mark.parametrize("value", [-1, 1.0, 1.5, -0.1, True, "2", float("nan"), np.int64(2), None])
def test_10_wrong_shares_are_refused(value: Any) -> None:
    """10: neither a count nor a share: ValueError with the argument and the value, and nothing is
    converted."""
    for argument in ("keep_first", "keep_last"):
        model = Model()
        with pytest.raises(ValueError, match=f"{argument} must be a number of blocks"):
            quiet(model, **{argument: value})
        assert converted(model) == []


def test_10_without_blocks_it_is_an_error() -> None:
    """10: counting blocks of a model that has none, or not the first, as a later pipeline stage, is
    refused."""
    with pytest.raises(
        ValueError, match=r"count numbered blocks .*; name the layers to keep with exclude"
    ):
        quiet(nn.ModuleDict({"up": nn.Linear(8, 8)}), keep_last=1)
    later_stage = nn.ModuleDict({"layers": nn.ModuleDict({str(i): Block() for i in range(4, 8)})})
    # its last block is not the model's
    with pytest.raises(ValueError, match="no linear layer of the model is in one"):
        quiet(later_stage, keep_first=1)


def test_11_subclasses_keep_their_forward() -> None:
    """11: a subclass with its own forward computes as before; so does one that overrides
    nothing."""

    class Mine(nn.Linear):
        pass

    model = nn.Sequential(OwnForward(8, 8), Mine(8, 8), nn.Linear(8, 8))
    x = torch.randn(3, 8)
    want = model[:2](x)
    quiet(model)
    assert [type(module) for module in model] == [OwnForward, Mine, nvfp4.Linear]
    assert torch.equal(model[:2](x), want)


def test_12_two_names_one_layer() -> None:
    """12: a layer with two names is converted once, both names reach it, and keeping either name
    keeps it."""
    model = Model()
    model.shortcut = model.layers[0].up
    quiet(model)
    assert model.shortcut is model.layers[0].up
    assert type(model.shortcut) is nvfp4.Linear
    assert [m.nvfp4.noise.layer for m in model.modules() if isinstance(m, nvfp4.Linear)] == [
        0,
        1,
        2,
        3,
    ]
    assert nvfp4.report(model).converted == 4
    other = Model()
    other.shortcut = other.layers[0].up
    quiet(other, exclude="shortcut")
    assert reasons(other)["layers.0.up"] == "excluded"


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
    """15: converting touches no parameter and makes nothing but four integers a layer, let alone a
    second weight."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            assert not any(isinstance(arg, nn.Parameter) for arg in args), (
                f"convert ran {func} on a parameter"
            )
            made = func(*args, **(kwargs or {}))
            assert not isinstance(made, torch.Tensor) or made.numel() <= 4, (
                f"{func} made {tuple(made.shape)}"
            )
            return made

    model = Model()
    with Refuse():
        quiet(model)
        nvfp4.revert(model)


def test_16_state_dict_is_that_of_the_plain_model() -> None:
    """16: the same keys in the same order, shapes, dtypes and values; strict loading works both
    ways."""
    plain, model = Model(), quiet(Model())
    a, b = plain.state_dict(), model.state_dict()
    assert [(k, v.shape, v.dtype) for k, v in a.items()] == [
        (k, v.shape, v.dtype) for k, v in b.items()
    ]
    model.load_state_dict(a, strict=True)
    assert torch.equal(model.layers[1].up.weight, plain.layers[1].up.weight)
    plain.load_state_dict(b, strict=True)
    fresh = quiet(Model(device="meta"))
    fresh.load_state_dict(a, strict=True, assign=True)
    assert_floats_bitwise(fresh(TOKENS), model(TOKENS), "after load_state_dict(assign=True)")


def test_17_attributes_survive() -> None:
    """17: requires_grad, training mode, dtype, hooks and user attributes are as they were, and
    hooks run."""
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
    assert (layer.weight.requires_grad, layer.bias.requires_grad, layer.training) == (
        False,
        True,
        False,
    )
    assert (layer.weight.dtype, layer.weight.tag, layer.note) == (
        torch.bfloat16,
        "sharded",
        {"any": "thing"},
    )
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
    """18: an optimizer made before converting moves the parameters that the converted layers
    use."""
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
    """19: a copy, also of a model that has trained, gives the same bits in forward and backward,
    and then goes its own
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
    assert_floats_bitwise(
        average.module.layers[0].up.weight, 0.5 * start + 0.5 * (start + 1), "average"
    )
    assert len(converted(average)) == 4
    plain = Model()
    plain.load_state_dict(average.module.state_dict())
    assert_floats_bitwise(average(TOKENS), quiet(plain)(TOKENS), "logits")


def test_20_revert_is_bit_equal() -> None:
    """20: plain nn.Linears over the same Parameters, not one attribute left over, and the old
    bits."""
    model = Model()
    want, parameters, before = model(TOKENS).detach(), list(model.parameters()), snapshot(model)
    quiet(model, exclude="down")
    assert not torch.equal(model(TOKENS), want)
    assert nvfp4.revert(model) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert_untouched(model, before)
    assert_floats_bitwise(model(TOKENS), want, "logits")
    assert converted(quiet(model)) == [
        "layers.0.up",
        "layers.0.down",
        "layers.1.up",
        "layers.1.down",
    ]


def test_20_revert_of_a_part() -> None:
    """20: reverting one block leaves the others converted."""
    model = quiet(Model())
    nvfp4.revert(model.layers[0])
    assert converted(model) == ["layers.1.up", "layers.1.down"]


def test_20_disabled_is_the_plain_model_and_ends() -> None:
    """20: within disabled() outputs and gradients are the plain model's bits; it nests, and ends
    after an exception."""
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
        assert [m.nvfp4.enabled for m in model.modules() if isinstance(m, nvfp4.Linear)] == [
            False,
            False,
            True,
            True,
        ]


@pytest.mark.parametrize("move", ["half", "bfloat16", "float", "to_empty", "to", "share_memory"])
def test_21_moves_behave_as_for_nn_linear(move: str) -> None:
    """21: dtypes, devices and values after a move are those of the plain layer, and the layer still
    runs."""
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
    """21: double() works as a move; the forward then names the dtype instead of computing something
    else."""
    layer = quiet(nn.Linear(8, 8)).double()
    with pytest.raises(TypeError, match=r"float32, bfloat16 or float16, got torch\.float64"):
        layer(torch.randn(3, 8, dtype=torch.float64))


def test_22_repr() -> None:
    """22: sizes, bias, recipe, backend; after revert the plain line."""
    layer = quiet(nn.Linear(8, 4, bias=False), "nvidia", backend="reference")
    want = "Linear(in_features=8, out_features=4, bias=False"
    assert repr(layer) == f"{want}, recipe=nvidia, backend=reference)"
    assert repr(nvfp4.revert(layer)) == f"{want})"


def test_10_blocks_are_numbered_children_of_anything() -> None:
    """10: a Sequential, a dict of numbers, GPT-2's h: the outermost numbers on the way to a linear
    make the stack, and an activation between two layers is no block."""
    mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
    assert reasons(quiet(mlp, keep_last=1)) == {"0": None, "2": "keep_last"}
    gpt = nn.ModuleDict(
        {"transformer": nn.ModuleDict({"h": nn.ModuleDict({str(i): Block() for i in range(11)})})}
    )
    quiet(gpt, keep_first=1, keep_last=0.15)
    kept = {name.rsplit(".", 1)[0] for name, reason in reasons(gpt).items() if reason}
    assert kept == {f"transformer.h.{i}" for i in (0, 9, 10)}  # 10 comes after 9
    nested = nn.Sequential(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))
    )
    assert reasons(quiet(nested, keep_first=1)) == {
        "0.0": "keep_first",
        "0.1": "keep_first",
        "1.0": None,
    }


def test_10_a_block_without_linears_does_not_count() -> None:
    """10: shares are of the blocks that hold linears, wherever they stand; a shared block counts
    under each number."""
    mixed = nn.ModuleList([Block(), nn.Conv1d(3, 3, 1), Block(), nn.Identity(), Block()])
    assert {n.split(".")[0] for n, why in reasons(quiet(mixed, keep_last=0.4)).items() if why} == {
        "2",
        "4",
    }
    shared = Block()
    looped = nn.ModuleList([shared, Block(), shared])
    assert {n.split(".")[0] for n, why in reasons(quiet(looped, keep_last=1)).items() if why} == {
        "0"
    }


def test_27_what_cannot_run_is_kept_at_convert_time() -> None:
    """27: a layer that NVFP4 cannot compute has its reason after convert, and the model runs:
    nothing waits for the first forward to fail."""
    model = nn.Sequential(
        nn.Linear(8, 8, dtype=torch.float64), nn.Linear(8, 3, dtype=torch.float64)
    )
    with pytest.warns(nvfp4.ConvertWarning, match="dtype: 2"):
        quiet(model)
    x = torch.randn(2, 8, dtype=torch.float64)
    assert torch.equal(model(x), nvfp4.revert(model)(x))


def _mlp(recipe: str) -> nn.Module:
    return quiet(nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 24)), recipe)


@pytest.mark.parametrize("recipe", ["rtn", "nvidia", "quartet2", "search_eden"])
def test_36_compiles_into_one_graph(recipe: str) -> None:
    """36: forward and backward with bias and a rank-3 input trace without a graph break into the
    bits of eager mode, step after step; another token count compiles at most once more, and a third
    one not at all."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = _mlp(recipe)
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for tokens, frames in (((2, 5), 1), ((2, 5), 1), ((3, 7), 2), ((4, 11), 2)):
        x = torch.randn(*tokens, 40)
        results = []
        for module, parameters in ((compiled, model), (eager, eager)):
            leaf = x.clone().requires_grad_()
            parameters.zero_grad()
            y = module(leaf)
            y.square().mean().backward()
            results.append([y.detach(), leaf.grad, *(p.grad for p in parameters.parameters())])
        for i, (got, want) in enumerate(zip(*results, strict=True)):
            assert_floats_bitwise(got, want, f"{recipe}, {tokens} tokens, tensor {i}")
        assert counter.frame_count <= frames
    assert {name: int(n) for name, n in nvfp4.noise_state(model).items()} == {"0": 4, "2": 4}


@pytest.mark.cuda
def test_38_cuda_graphs_draw_new_noise_at_every_replay() -> None:
    """38: forward and backward of a stochastic recipe can be captured, each replay draws anew, and
    gives what eager mode gives at that call."""
    device = torch.device("cuda")
    native = [
        name
        for name, b in registry.BACKENDS.items()
        if name != "reference" and b.unavailable(device) is None
    ]
    if not native:
        pytest.skip(
            "no native backend runs on this CUDA device, and capture is promised of native ones"
        )
    layer = quiet(nn.Linear(256, 128, device=device), "quartet2", backend=native[0])
    twin = copy.deepcopy(layer)
    nvfp4.capturable(layer)
    x = torch.randn(128, 256, device=device, requires_grad=True)
    dy = torch.randn(128, 128, device=device)

    def step(module: nn.Module) -> torch.Tensor:
        (dx,) = torch.autograd.grad(module(x), x, dy)
        return dx

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # x and dy may not be there yet
    with torch.cuda.stream(side):
        for module in (layer, twin):
            step(module)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(layer)
    replays = []
    for _ in range(3):
        graph.replay()
        replays.append(captured.clone())
        assert_floats_bitwise(replays[-1].cpu(), step(twin).cpu(), "replay")
    assert not torch.equal(replays[0], replays[1])
    assert not torch.equal(replays[1], replays[2])


def test_40_grad_scaler_skips_the_step_that_overflows() -> None:
    """40: FP16 with a loss scale that overflows: no parameter moves, the scale is halved until one
    step fits, and that one moves them; a NaN that the layer swallowed would let the bad step
    through."""
    model = quiet(Model(), "quartet2")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=1000)
    before = [p.detach().clone() for p in model.parameters()]
    moved = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(TOKENS).square().mean()
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        finite = all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        scaler.step(optimizer)
        scaler.update()
        moved.append(
            any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        )
        assert moved[-1] == finite
        assert scaler.get_scale() == (scale if finite else scale / 2)
        if finite:
            break
    assert moved[0] is False
    assert moved[-1] is True
    assert all(p.isfinite().all() for p in model.parameters())


class Imitation(Backend):
    """The reference under another name, but for what a test breaks; ``asked`` counts the
    operations."""

    name = "imitation"

    def __init__(self, reason: str | None = None) -> None:
        self.reason, self.asked, self.judge = reason, 0, ReferenceBackend()

    def unavailable(self, device: torch.device) -> str | None:
        return self.reason

    def quantize(self, x: torch.Tensor, quantizer: Any, options: Any) -> nvfp4.QTensor:
        self.asked += 1
        return self.judge.quantize(x, quantizer, options)

    def dequantize(self, q: nvfp4.QTensor, dtype: torch.dtype) -> torch.Tensor:
        return self.judge.dequantize(q, dtype)

    def matmul(
        self,
        a: nvfp4.QTensor,
        b: nvfp4.QTensor,
        out_dtype: torch.dtype,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.judge.matmul(a, b, out_dtype, bias)


class Zeros(Imitation):
    def matmul(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros_like(super().matmul(*args, **kwargs))


class Unwritten(Imitation):
    def quantize(self, x: torch.Tensor, quantizer: Any, options: Any) -> nvfp4.QTensor:
        q = super().quantize(x, quantizer, options)
        return nvfp4.QTensor(torch.empty_like(q.codes), *q.tensors[1:], *q.record)


class NoImage(Imitation):
    def matmul(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image is available for execution on the device")


class OneBitOff(Imitation):
    """Wrong for one quantiser alone, in the last bit of one code of one block."""

    def quantize(self, x: torch.Tensor, quantizer: Any, options: Any) -> nvfp4.QTensor:
        q = super().quantize(x, quantizer, options)
        if quantizer.name == "ms_eden":
            q.codes[-1, -1] ^= 1
        return q


def _install(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    """Make it the preferred backend of a process that has said nothing yet."""
    reference = registry.BACKENDS["reference"]
    monkeypatch.setattr(registry, "BACKENDS", {backend.name: backend, "reference": reference})
    monkeypatch.setattr(registry, "_SAID", {"meta"})
    monkeypatch.setattr(registry, "_FAULTS", {})


def test_44_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """44: asked for by name it raises with its reason, at convert and without changing a layer;
    "auto" falls back and says so once, with the reason."""
    _install(monkeypatch, Imitation("its kernels were not built"))
    model = Model()
    before = snapshot(model)
    with pytest.raises(
        nvfp4.BackendUnavailable, match=r"'imitation' cannot run on cpu: its kernels were not built"
    ):
        quiet(model, backend="imitation")
    assert_untouched(model, before)
    with pytest.warns(
        RuntimeWarning, match=r"reference backend.*imitation: its kernels were not built"
    ) as caught:
        [nvfp4.report(quiet(model)), gradients(model)]
    assert len(caught) == 1
    assert "imitation: its kernels were not built" in nvfp4.explain("matmul")


def test_44_nothing_is_said_where_nothing_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """44: a preferred backend that runs, a backend that was asked for, and the meta device raise no
    warning."""
    _install(monkeypatch, Imitation())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(quiet(Model()))
        gradients(quiet(Model(), backend="reference"))
        quiet(nn.Linear(8, 8, device="meta"))(torch.empty(2, 8, device="meta"))


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        (Zeros, "its first matmul differs from the reference"),
        (Unwritten, "its first quantize differs from the reference"),
        (NoImage, "its first matmul failed: no kernel image is available"),
        (OneBitOff, "its first quantize differs from the reference"),
    ],
)
def test_45_a_backend_that_lies_is_not_used(
    backend: type[Imitation], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """45: zeros, unwritten memory, a missing kernel and one wrong bit of one quantiser are found at
    first use: "auto" gives the reference's bits and warns once, the name raises, ``explain``
    tells."""
    model = quiet(Model(), "quartet2")
    want = quiet(nvfp4.revert(copy.deepcopy(model)), "quartet2", backend="reference")
    _install(monkeypatch, backend())
    with pytest.warns(RuntimeWarning, match=words) as caught:
        assert_same_training(model, want)
    assert len([w for w in caught if issubclass(w.category, RuntimeWarning)]) == 1
    named = quiet(nvfp4.revert(copy.deepcopy(model)), "quartet2", backend="imitation")
    with pytest.raises(nvfp4.BackendUnavailable, match=words):
        gradients(named)
    operation: Any = "matmul" if "matmul" in words else "quantize"
    assert f"imitation: {words}" in nvfp4.explain(
        operation, quantizer="ms_eden" if operation == "quantize" else None
    )


def test_45_an_honest_backend_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """45: the check runs at the first use of each operation and quantiser and never again, draws no
    random number, and is seen by no dispatch mode, be it one that counts or one that replays."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.seen += 1
            return func(*args, **(kwargs or {}))

    backend = Imitation()
    _install(monkeypatch, backend)
    x, state = torch.randn(4, 32), torch.get_rng_state()
    counts = []
    for _ in range(2):
        before = backend.asked
        with Count() as mode:
            nvfp4.quantize(x, "rtn")
        counts.append((backend.asked - before, mode.seen))
    (first, seen), (second, seen_again) = counts
    assert first > second == 1
    assert seen == seen_again
    assert torch.equal(torch.get_rng_state(), state)
    nvfp4.quantize(x, "four_over_six")
    assert backend.asked - before - second > 1


@pytest.mark.parametrize("recipe", ["rtn", "nvidia", "quartet2", "search_eden", "rl"])
def test_trap_the_bias_counts(recipe: str) -> None:
    """Quartet-II, TetraJet-v2: with a weight of zeros the output is the bias, and moves as it
    moves."""
    layer = quiet(nn.Linear(32, 16), recipe)
    with torch.no_grad():
        layer.weight.zero_()
    x = torch.randn(5, 32)
    assert torch.equal(layer(x), layer.bias.expand(5, 16))
    with torch.no_grad():
        layer.bias.add_(1)
    assert torch.equal(layer(x), layer.bias.expand(5, 16))
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((16,), 5.0))


def test_trap_batches_are_rows() -> None:
    """fouroversix: a batch of four is four times three rows, forward and backward."""
    layer, x = quiet(nn.Linear(32, 16), "quartet2"), torch.randn(4, 3, 32)
    flat = copy.deepcopy(layer)
    assert_floats_bitwise(layer(x).view(12, 16), flat(x.view(12, 32)), "y")
    layer(x).square().sum().backward()
    flat(x.view(12, 32)).square().sum().backward()
    assert_floats_bitwise(layer.weight.grad, flat.weight.grad, "dw")


def test_trap_the_walk_goes_on() -> None:
    """accelerate: a kept layer first, in the middle and inside a block ends nothing; all others are
    converted."""
    model = nn.ModuleDict(
        {"head": nn.Linear(8, 8), "a": nn.Linear(8, 8), "layers": nn.ModuleList([Block(), Block()])}
    )
    model["layers"][0].up = OwnForward(16, 32)
    assert converted(quiet(model)) == ["a", "layers.0.down", "layers.1.up", "layers.1.down"]


def test_trap_names_are_no_substrings() -> None:
    """torchtitan: layers.1 is not layers.10, in every argument that takes a name."""
    for arguments in ({"exclude": "layers.1"}, {"keep_first": 2, "exclude": "layers.0"}):
        kept = {name for name, reason in reasons(quiet(Model(12), **arguments)).items() if reason}
        assert not any(name.startswith(("layers.10", "layers.11")) for name in kept)
        assert {"layers.1.up", "layers.1.down"} <= kept
    model = quiet(Model(12), {"layers.1": "rtn", "layers": "nvidia"})
    by_recipe = {layer.name: layer.recipe for layer in nvfp4.report(model).layers}
    assert (by_recipe["layers.1.up"], by_recipe["layers.10.up"], by_recipe["layers.11.up"]) == (
        "rtn",
        "nvidia",
        "nvidia",
    )
