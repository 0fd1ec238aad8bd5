"""Recipes: the named ones are the table of the definition, they survive serialisation, and broken
ones are refused."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
import torch
from layer_oracle import GEMMS, TABLE, Op

import nvfp4
from nvfp4.numerics.hadamard import Rotation
from nvfp4.recipes import RECIPES, Gemm, Operand, Recipe, as_recipe, operand

ROTATIONS = {None: None, "fixed": Rotation(group=16, fixed=True), "drawn": Rotation(group=16)}
SOURCES = {"x": "tensor", "codes": "codes", "hat": "decoded"}


def _effective(spec: Operand) -> tuple[Any, ...]:
    """What an operand does, with its options spelled out, so that two ways to write the same
    compare equal."""
    if spec.quantizer is None:
        return (None, spec.source)
    options = vars(spec.checked(seed=0)).copy()
    rotation = options.pop("rotation")
    assert options.pop("held") is None
    turn = rotation and (rotation.group, rotation.rounds, rotation.fixed)
    name = "rtn" if spec.quantizer == "rtn_2d" else spec.quantizer
    return (
        name,
        spec.source,
        turn,
        tuple(sorted((k, v) for k, v in options.items() if "seed" not in k)),
    )


def _expected(op: Op) -> tuple[Any, ...]:
    if op.quantizer is None:
        return (None, SOURCES[op.source])
    options = {
        "block": (1, 16),
        "row_scaled": False,
        "metric": "mse",
        "rounds": 1,
        "search": False,
        "candidates": (0, -2, -1, 1, 2, 3, 4, 5, 6),
        "factors": (1, 0.875, 1.125, 1.25, 1.375, 1.5),
        "group": 128,
        "summation": "butterflies",
    }
    options |= op.options
    name, turn = op.quantizer, None
    if name == "rtn_2d":
        name, options["block"] = "rtn", (16, 16)
    if name == "ms_eden":
        turn = (128, options["rounds"], False)
    elif op.rotation is not None:
        turn = (16, 1, op.rotation == "fixed")
    return (name, SOURCES[op.source], turn, tuple(sorted(options.items())))


def test_the_names() -> None:
    """Exactly the recipes of the table, each under its own name."""
    assert list(RECIPES) == list(TABLE)
    assert all(name == recipe.name for name, recipe in RECIPES.items())


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("gemm", GEMMS)
def test_named_recipe_is_the_table(name: str, gemm: str) -> None:
    """Quantiser, every option, source and rotation of both operands of every GEMM."""
    pair = getattr(RECIPES[name], gemm)
    assert (_effective(pair.left), _effective(pair.right)) == tuple(
        map(_expected, TABLE[name][gemm])
    )


@pytest.mark.parametrize("name", TABLE)
def test_quantized(name: str) -> None:
    """Only bf16 quantises nothing; a GEMM counts as quantised exactly where the table says so."""
    assert RECIPES[name].quantized == (name != "bf16")
    for gemm in GEMMS:
        assert getattr(RECIPES[name], gemm).quantized == (
            TABLE[name][gemm][0].quantizer is not None
        )


CUSTOM = Recipe(
    "mine",
    Gemm(
        operand("four_over_six", metric="mae", row_scaled=True),
        operand("scale_search", block=(16, 16), candidates=(0, -1, 5)),
    ),
    Gemm(
        operand("sr", rotation=Rotation(32, 2)),
        operand("rtn", source="decoded", rotation=Rotation(32, 2)),
    ),
    Gemm(
        operand("ms_eden", rounds=3, group=64, search=True, factors=(1.0, 1.25)),
        operand("ms_eden", rounds=3, group=64),
    ),
)


@pytest.mark.parametrize("recipe", [*RECIPES.values(), CUSTOM], ids=lambda recipe: recipe.name)
def test_round_trip(recipe: Recipe) -> None:
    """to_dict is JSON, in whatever order JSON keeps its keys, and from_dict gives an equal recipe
    of equal hash."""
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    for sort_keys in (False, True):
        back = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict(), sort_keys=sort_keys)))
        assert back == recipe
        assert hash(back) == hash(recipe)


def test_to_dict_is_plain_and_its_own() -> None:
    """Changing the dict does not change the recipe, and the recipe itself cannot be changed."""
    plain = CUSTOM.to_dict()
    plain["fprop"]["left"]["options"]["metric"] = "abs_max"
    assert dict(CUSTOM.fprop.left.options)["metric"] == "mae"
    assert Recipe.from_dict(plain) != CUSTOM
    with pytest.raises(dataclasses.FrozenInstanceError):
        CUSTOM.name = "yours"  # type: ignore[misc]


def test_from_dict_defaults_and_unknown_keys() -> None:
    """What is left out is high precision or a default; an unknown key is an error that names it."""
    both = {"quantizer": "rtn"}
    recipe = Recipe.from_dict({"name": "short", "fprop": {"left": both, "right": both}})
    assert recipe == Recipe("short", Gemm(operand("rtn"), operand("rtn")))
    for plain, word in (
        ({"name": "x", "forward": {}}, "forward"),
        ({"name": "x", "fprop": {"lhs": both}}, "lhs"),
        ({"name": "x", "fprop": {"left": {"quantiser": "rtn"}}}, "quantiser"),
        (
            {"name": "x", "fprop": {"left": {**both, "options": {"metrik": "mse"}}, "right": both}},
            "metrik",
        ),
    ):
        with pytest.raises(TypeError, match=word):
            Recipe.from_dict(plain)


def test_options_compare_without_order() -> None:
    """The order in which options were written means nothing."""
    assert operand("ms_eden", rounds=2, search=True) == operand("ms_eden", search=True, rounds=2)
    assert operand("ms_eden", rounds=2) != operand("ms_eden", rounds=3)


def test_unknown_names_list_the_known() -> None:
    """A typo is answered with every name there is: recipes, quantisers; another type with what is
    expected."""
    for call in (Recipe.from_name, as_recipe):
        with pytest.raises(ValueError, match="'quartet3'") as caught:
            call("quartet3")
        assert all(name in str(caught.value) for name in TABLE)
    with pytest.raises(ValueError, match="'rtm'") as caught:
        operand("rtm")
    assert "four_over_six" in str(caught.value)
    with pytest.raises(TypeError, match=r"recipe must be a name \(bf16, .*got int"):
        as_recipe(4)  # type: ignore[arg-type]
    assert as_recipe(CUSTOM) is CUSTOM


RTN, TILE, DENSE = operand("rtn"), operand("rtn_2d"), operand(None)
ROT = Rotation(16)
EDEN = operand("ms_eden")
SAME_CODES, HAT = operand(None, source="codes"), operand(None, source="decoded")
PLAIN = Gemm(RTN, RTN)

BROKEN = {
    "one operand quantised in fprop": (
        ("fprop", Gemm(RTN, DENSE)),
        "fprop quantises one operand only",
    ),
    "one operand quantised in dgrad": (
        ("dgrad", Gemm(DENSE, RTN)),
        "dgrad quantises one operand only",
    ),
    "one operand quantised in wgrad": (
        ("wgrad", Gemm(RTN, DENSE)),
        "wgrad quantises one operand only",
    ),
    "codes beside high precision": (
        ("dgrad", Gemm(DENSE, SAME_CODES)),
        "dgrad quantises one operand only",
    ),
    "rotation on one side": (
        ("wgrad", Gemm(operand("sr", rotation=ROT), RTN)),
        "wgrad rotates its operands diff",
    ),
    "other group": (
        ("wgrad", Gemm(EDEN, operand("ms_eden", group=64))),
        "wgrad rotates .*128, 1.*64, 1",
    ),
    "other rounds": (
        ("dgrad", Gemm(EDEN, operand("ms_eden", rounds=2))),
        "dgrad rotates .*128, 1.*128, 2",
    ),
    "fixed and drawn": (
        (
            "wgrad",
            Gemm(operand("sr", rotation=ROT), operand("rtn", rotation=Rotation(16, fixed=True))),
        ),
        "wgrad rotates",
    ),
    "rotated gradient, unrotated codes": (
        ("dgrad", Gemm(operand("sr", rotation=ROT), SAME_CODES)),
        "dgrad rotates its operands differently",
    ),
    "decoded in fprop": (
        ("fprop", Gemm(RTN, operand("rtn", source="decoded"))),
        "fprop can only quantise tensors",
    ),
    "decoded gradient": (
        ("dgrad", Gemm(operand("rtn", source="decoded"), RTN)),
        "dgrad can only quantise tensors",
    ),
    "decoded gradient in wgrad": (
        ("wgrad", Gemm(operand("sr", source="decoded"), RTN)),
        "wgrad can only quantise",
    ),
    "codes of 1x16 blocks": (
        ("dgrad", Gemm(RTN, SAME_CODES)),
        r"dgrad\.right uses 'codes', which needs block=\(16, 16",
    ),
    "x codes of 1x16 blocks": (
        ("wgrad", Gemm(RTN, SAME_CODES)),
        r"wgrad\.right uses 'codes', which needs block",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_cross_field_rules_name_recipe_and_gemm(case: str) -> None:
    """Every rule between fields refuses at construction, and says in which recipe and which
    GEMM."""
    (gemm, pair), message = BROKEN[case]
    with pytest.raises(ValueError, match=f"mine: {message}"):
        Recipe("mine", **({"fprop": PLAIN} | {gemm: pair}))


@pytest.mark.parametrize("gemm", ["dgrad", "wgrad"])
@pytest.mark.parametrize("source", ["codes", "decoded"])
def test_saved_operand_needs_a_quantised_fprop(gemm: str, source: str) -> None:
    """What fprop did not quantise cannot be used again."""
    right = SAME_CODES if source == "codes" else operand("rtn", source="decoded")
    with pytest.raises(
        ValueError, match=rf"mine: {gemm}\.right uses '{source}', but fprop does not quantise it"
    ):
        Recipe("mine", **{gemm: Gemm(RTN, right)})


def test_rotated_codes_are_refused_early() -> None:
    """Codes that fprop rotated along K cannot be contracted along N: refused here, not in the first
    backward."""
    fprop = Gemm(operand("rtn", rotation=ROT), operand("rtn_2d", rotation=ROT))
    with pytest.raises(ValueError, match=r"mine: dgrad\.right uses 'codes', but fprop rotates"):
        Recipe("mine", fprop, Gemm(RTN, SAME_CODES))
    Recipe("mine", fprop, Gemm(RTN, operand("rtn", source="decoded")))  # quantised again it is fine


def test_operand_rules() -> None:
    """What makes no sense in one operand is refused where it is written."""
    with pytest.raises(ValueError, match="source must be one of"):
        Operand("rtn", source="weights")  # type: ignore[arg-type]
    for broken in (
        {"quantizer": "rtn", "source": "codes"},
        {"options": (("block", (16, 16)),)},
        {"rotation": ROT},
        {"source": "codes", "rotation": ROT},
    ):
        with pytest.raises(ValueError, match="takes no options or rotation"):
            Operand(**broken)
    with pytest.raises(ValueError, match="ms_eden does not take row_scaled=True"):
        operand("ms_eden", row_scaled=True)
    with pytest.raises(ValueError, match="ms_eden rotates by itself"):
        operand("ms_eden", rotation=ROT)
    with pytest.raises(ValueError, match="sign_seed is drawn anew"):
        operand("sr", rotation=Rotation(16, sign_seed=1))


def test_str_shows_every_gemm() -> None:
    """One line that names all three GEMMs and what is special about each operand."""
    text = str(RECIPES["nvidia"])
    assert re.match("nvidia: fprop .*; dgrad .*; wgrad ", text)
    assert all(word in text for word in ("rtn_2d", "sr_te", "same codes", "rot16 rtn"))
    assert "rounds=2, search=True) of decoded" in str(RECIPES["search_eden"])
    assert "bf16 of decoded" in str(RECIPES["rl"])


def test_a_name_that_allows_tensor_cores() -> None:
    """Of quartet2 and search_eden every ms_eden operand; of others there is nothing to allow."""
    recipe = Recipe.from_name("quartet2+tensor_core")
    assert recipe == RECIPES["quartet2"].with_tensor_core_sums()
    assert recipe.name == "quartet2+tensor_core"
    assert recipe.fprop == RECIPES["quartet2"].fprop
    backward = [o for gemm in (recipe.dgrad, recipe.wgrad) for o in (gemm.left, gemm.right)]
    assert [o.static_options.summation for o in backward] == ["tensor_core"] * 4
    assert [o.source for o in backward] == ["tensor", "decoded"] * 2
    assert "summation=tensor_core" in str(recipe)
    for back in (
        Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))),
        Recipe.from_key(recipe.key),
    ):
        assert back == recipe

    options = Recipe.from_name("search_eden+tensor_core").wgrad.left.static_options
    assert (options.rounds, options.search, options.summation) == (2, True, "tensor_core")
    # it goes with the other word behind a name
    both = Recipe.from_name("quartet2+delayed_amax+tensor_core")
    assert both.fprop == Recipe.from_name("quartet2+delayed_amax").fprop
    assert both.wgrad == recipe.wgrad
    with pytest.raises(ValueError, match=r"unknown recipe 'quartet2[+]tensor_core[+]t"):
        Recipe.from_name("quartet2+tensor_core+tensor_core")
    with pytest.raises(ValueError, match="nvidia has no rotation that tensor cores could sum"):
        Recipe.from_name("nvidia+tensor_core")
    with pytest.raises(ValueError, match=r"unknown recipe 'quartet3\+tensor_core'; known: bf16"):
        Recipe.from_name("quartet3+tensor_core")
    with pytest.raises(ValueError, match="summation must be one of"):
        operand("ms_eden", summation="tensor")
    with pytest.raises(ValueError, match="sr does not take summation"):
        operand("sr", summation="tensor_core")


def test_a_layer_whose_recipe_allows_tensor_cores() -> None:
    """Where no kernel has them it computes what the plain recipe does, and its checkpoint, which
    holds plain names, goes from one to the other."""

    def trained(recipe: str, start: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        layer = torch.nn.Sequential(torch.nn.Linear(160, 32, dtype=torch.bfloat16))
        nvfp4.convert(layer, recipe, seed=3, verbose=False)
        layer.load_state_dict(start)
        x = torch.linspace(-3, 3, 40 * 160).view(40, 160).to(torch.bfloat16).requires_grad_()
        layer(x).square().sum().backward()
        assert list(layer.state_dict()) == list(start)
        return [x.grad, *(p.grad for p in layer.parameters())]

    start = torch.nn.Sequential(torch.nn.Linear(160, 32, dtype=torch.bfloat16)).state_dict()
    plain, allowed = (trained(name, start) for name in ("quartet2", "quartet2+tensor_core"))
    for a, b in zip(plain, allowed, strict=True):
        assert torch.equal(a, b)
