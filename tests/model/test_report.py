"""Diagnostics tell the truth: shares counted by hand, reports of what runs, observation that
changes nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import nvfp4
from nvfp4.model.health import Health
from nvfp4.model.report import LayerReport
from nvfp4.recipes import Gemm, Recipe, operand

# Under rtn with tensor maximum 2688 = 6 * 448 the global scale is 1, so block scales are
# e4m3(maximum / 6):
TOP = [2688.0] + [0.0] * 15  # scale 448, code 6: exact
# 1.06 rounds down to 1: three elements end at +-6, 0.36 short
SATURATED = [6.36, -6.36, 6.36] + [0.0] * 13
# 1e-3 / 6 is below half of 2^-9, the smallest scale: all sixteen decode to 0
UNDERFLOW = [1e-3] * 16
FLUSHED = [6.0] + [0.2] * 15  # scale 1, and 0.2 is nearer to 0 than to 0.5: fifteen decode to 0
ROW = TOP + SATURATED + UNDERFLOW + FLUSHED

SQUARED_ERROR = 3 * 0.36**2 + 16 * 1e-3**2 + 15 * 0.2**2
SQUARE = 2688**2 + 3 * 6.36**2 + 16 * 1e-3**2 + 6**2 + 15 * 0.2**2


def _assert_health(got: Health, rows: int = 1) -> None:
    """The shares of ``rows`` copies of ROW exactly; the error to 1e-5, the inputs being rounded to
    float32 (6.36 - 6 loses a factor 18 of 2^-24)."""
    assert (got.amax, got.non_finite) == (2688.0, 0.0)
    assert (got.saturated, got.underflow, got.flushed) == (3 / 64, 16 / 64, 31 / 64)
    assert math.isclose(got.relative_mse, SQUARED_ERROR / SQUARE, rel_tol=1e-5)


@pytest.mark.parametrize("shape", [(64,), (1, 64), (16, 64), (2, 3, 64)])
@pytest.mark.parametrize(
    "options", [{}, {"row_scaled": True}, {"block": (16, 16)}], ids=["1x16", "row", "16x16"]
)
def test_health_counts(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    """Saturated, underflowed and flushed elements are counted as constructed, for every shape and
    scaling; rows that repeat make tiles of equal blocks."""
    x = torch.tensor(ROW).expand(shape)
    _assert_health(nvfp4.health(x, nvfp4.quantize(x, "rtn", **options)))


def test_health_ignores_padding() -> None:
    """Shares are of real elements: 61 columns, padded to 64, lose three flushed ones."""
    x = torch.tensor(ROW)[:61]
    got = nvfp4.health(x, nvfp4.quantize(x, "rtn"))
    assert (got.saturated, got.underflow, got.flushed) == (3 / 61, 16 / 61, 28 / 61)


@pytest.mark.parametrize("exponent", [-100, 0, 100])
def test_health_has_no_scale(exponent: int) -> None:
    """Powers of two change nothing but amax, though squares of such numbers leave the range of
    float32."""
    x = torch.randn(32, 64)
    plain = nvfp4.health(x, nvfp4.quantize(x, "rtn"))
    x = x * 2.0**exponent
    got = nvfp4.health(x, nvfp4.quantize(x, "rtn"))
    assert got.amax == plain.amax * 2.0**exponent
    assert (got.relative_mse, got.saturated, got.flushed) == (
        plain.relative_mse,
        plain.saturated,
        plain.flushed,
    )
    assert 8e-3 < got.relative_mse < 10e-3  # 9.05e-3 on N(0, 1); 2048 elements are good to 5 %


def test_health_of_half_precision() -> None:
    """BF16 and FP16 are compared at their exact values."""
    x = torch.randn(32, 64).bfloat16()
    q = nvfp4.quantize(x, "rtn")
    assert nvfp4.health(x, q) == nvfp4.health(x.float(), q)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_health_of_non_finite_input(value: float) -> None:
    """One bad element: its share, an amax that shows it, and no number pretends to describe the
    rest."""
    x = torch.tensor(ROW)
    x[5] = value
    got = nvfp4.health(x, nvfp4.quantize(x, "rtn"))
    assert got.non_finite == 1 / 64
    assert not math.isfinite(got.amax)
    assert all(math.isnan(v) for v in (got.relative_mse, got.saturated, got.underflow, got.flushed))


@pytest.mark.parametrize("shape", [(4, 32), (0, 32), (4, 0)])
def test_health_of_nothing(shape: tuple[int, ...]) -> None:
    """Zeros and empty tensors are perfectly healthy."""
    x = torch.zeros(shape)
    assert nvfp4.health(x, nvfp4.quantize(x, "rtn")) == Health(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def test_health_refuses_what_it_cannot_compare() -> None:
    """A rotated q, another axis, another shape."""
    x = torch.randn(4, 128)
    for q in (
        nvfp4.quantize(x, "ms_eden", seed=1),
        nvfp4.quantize(x, "rtn", axis=0),
        nvfp4.quantize(x.view(2, 2, 128), "rtn"),
    ):
        with pytest.raises(ValueError, match="health needs x and an unrotated q"):
            nvfp4.health(x, q)


def _model() -> nn.Module:
    return nn.ModuleDict(
        {"up": nn.Linear(32, 48), "down": nn.Linear(48, 32), "head": nn.Linear(32, 8)}
    )


def test_report_says_what_is_there() -> None:
    """Each linear with its sizes, recipe, GEMMs and the backend that ``explain`` names, or with the
    reason."""
    model = nvfp4.convert(_model(), "nvidia", exclude="down", verbose=False)
    report = nvfp4.report(model)
    chosen = next(
        line.split(":")[0]
        for line in nvfp4.explain("matmul").splitlines()
        if line.endswith("chosen")
    )
    gemms = ("rtn / rtn_2d", "sr_te / same codes", "rot16 sr_te / rot16 rtn")
    assert report.layers == (
        LayerReport("up", 32, 48, "nvidia", gemms, chosen, None, ("nvfp4",) * 3),
        LayerReport("down", 48, 32, None, (), None, "excluded"),
        LayerReport("head", 32, 8, None, (), None, "output_embedding"),
    )
    assert report.converted == 1


def test_report_prints_a_table() -> None:
    """Every name, size, recipe and reason is on the page, under the count, and each recipe's
    operands below."""
    text = str(nvfp4.report(nvfp4.convert(_model(), "nvidia", exclude="down", verbose=False)))
    assert text.startswith("1 of 3 linear layers in NVFP4")
    for words in (
        ["layer", "out x in", "recipe", "fprop", "dgrad", "wgrad", "backend", "kept because"],
        ["up", "48 x 32", "nvidia", "nvfp4"],
        ["down", "32 x 48", "excluded"],
        ["head", "8 x 32"],
        ["nvidia: fprop rtn / rtn_2d", "dgrad sr_te / same codes"],
    ):
        assert any(all(word in line for word in words) for line in text.splitlines()), words


def test_report_at_every_stage() -> None:
    """Before convert, after revert, of a root layer, and on meta, where no backend can be named
    yet."""
    assert {layer.reason for layer in nvfp4.report(_model()).layers} == {"not_converted"}
    model = nvfp4.convert(_model(), "rtn", verbose=False)
    nvfp4.revert(model)
    assert {layer.reason for layer in nvfp4.report(model).layers} == {"not_converted"}
    assert "(root)" in str(nvfp4.report(nvfp4.convert(nn.Linear(4, 4), verbose=False)))
    with torch.device("meta"):
        model = _model()
    assert [
        layer.backend for layer in nvfp4.report(nvfp4.convert(model, verbose=False)).layers
    ] == [
        "auto",
        "auto",
        None,
    ]
    named = nvfp4.convert(_model(), backend="reference", verbose=False)
    assert nvfp4.report(named).layers[0].backend == "reference"


def test_report_of_a_recipe_in_part() -> None:
    """A GEMM that a recipe leaves alone is "bf16" in its column, and two recipes of one name have a
    line each."""
    mine = [Recipe("mine", fprop=nvfp4.RECIPES[name].fprop) for name in ("rtn", "quartet2")]
    model = nvfp4.convert(_model(), {"up": mine[0], "down": mine[1]}, verbose=False)
    report = nvfp4.report(model)
    assert [layer.precisions for layer in report.layers] == [("nvfp4", "bf16", "bf16")] * 2 + [()]
    lines = [line for line in str(report).splitlines() if line.startswith("mine: fprop")]
    assert [("four_over_six" in line) for line in lines] == [False, True]


SHAPES = {
    f"layers.{i}.{name}": size
    for i in range(4)
    for name, size in (("up", (72, 40)), ("down", (40, 72)))
}
SHAPES["lm_head"] = (100, 40)


def _of_shapes(device: str) -> nn.Module:
    with torch.device(device):
        blocks = [
            nn.ModuleDict({"up": nn.Linear(40, 72), "down": nn.Linear(72, 40)}) for _ in range(4)
        ]
        return nn.ModuleDict({"layers": nn.ModuleList(blocks), "lm_head": nn.Linear(40, 100)})


POLICIES: list[dict[str, Any]] = [
    {},
    {"recipe": "nvidia", "keep_last": 0.3, "exclude": "layers.0.up"},
    {"recipe": {"up": "rl", "layers.2": "bf16"}, "include": ["layers", "lm_head"]},
    {
        "filter_fn": lambda module, name: module.in_features > 40,
        "keep_first": 1,
        "backend": "reference",
    },
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: "+".join(policy))
def test_check_foretells_convert(policy: dict[str, Any]) -> None:
    """A model, the same on meta, and bare shapes have the same check; it is what convert then does,
    and until then not a class, an attribute or the random generator has changed."""
    model, state = _of_shapes("cpu"), torch.get_rng_state()
    before = [(type(m), dict(vars(m))) for m in model.modules()]
    check = nvfp4.check(model, **policy)
    assert [(type(m), dict(vars(m))) for m in model.modules()] == before
    assert nvfp4.check(_of_shapes("meta"), **policy) == nvfp4.check(SHAPES, **policy) == check
    assert torch.equal(torch.get_rng_state(), state)
    nvfp4.convert(model, **policy, verbose=False)
    done = nvfp4.report(model)
    for foretold, found in zip(check.layers, done.layers, strict=True):
        for field in (
            "name",
            "in_features",
            "out_features",
            "recipe",
            "gemms",
            "reason",
            "precisions",
        ):
            assert getattr(foretold, field) == getattr(found, field), field
    assert check.converted == done.converted


ROW_SCALED = Recipe("rows", Gemm(operand("rtn"), operand("rtn", row_scaled=True)))


@pytest.mark.parametrize(
    "recipe",
    [*(r for r in nvfp4.RECIPES.values() if r.quantized), ROW_SCALED],
    ids=lambda r: r.name,
)
@pytest.mark.parametrize("shape", [(72, 40), (48, 64), (17, 3)])
def test_check_counts_the_bytes_that_quantize_makes(recipe: Recipe, shape: tuple[int, int]) -> None:
    """NVFP4 bytes are those of the stored tensors of the weight under its recipe's fprop; BF16
    bytes two an element."""
    spec = recipe.fprop.right
    q = nvfp4.quantize(torch.randn(shape), spec.quantizer or "", **dict(spec.options))
    (layer,) = nvfp4.check({"up": shape}, recipe).layers
    assert layer.nvfp4_bytes == sum(t.numel() * t.element_size() for t in q.tensors)
    assert layer.bf16_bytes == torch.empty(shape, dtype=torch.bfloat16).nbytes


@pytest.mark.parametrize(
    ("recipe", "shape", "padding"),
    [
        ("rtn", (48, 64), 0.0),
        ("rtn", (48, 40), 0.5 * (48 / 40 - 1)),  # fprop contracts 40, padded to 48
        ("rtn", (40, 64), 0.5 * (48 / 40 - 1)),  # dgrad contracts 40
        ("rtn", (17, 3), 0.5 * (16 / 3 + 32 / 17) - 1),
        # dgrad pads to a group of 128, fprop needs no more than 16
        ("quartet2", (48, 64), 0.5 * (128 / 48 - 1)),
        ("tetrajet2", (40, 64), 0.5 * (48 / 40 - 1)),
        ("rl", (40, 40), 0.5 * (48 / 40 - 1)),  # its dgrad is not quantised, so it is not padded
    ],
)
def test_check_counts_padding(recipe: str, shape: tuple[int, int], padding: float) -> None:
    """Padding is the share of extra multiply-adds of fprop (in_features) and dgrad (out_features),
    counted by hand."""
    (layer,) = nvfp4.check({"up": shape}, recipe).layers
    assert math.isclose(layer.padding, padding, abs_tol=1e-12)


def test_check_prints_a_table() -> None:
    """Each layer with its cost, the totals above, each recipe's operands below; a kept layer costs
    what BF16 does."""
    text = str(nvfp4.check(SHAPES, "nvidia", keep_last=1))
    check = nvfp4.check(SHAPES, "nvidia", keep_last=1)
    assert text.startswith("6 of 9 linear layers would be converted; weights ")
    kept = 2 * (2 * 72 * 40 + 100 * 40)
    up, down = check.layers[0].nvfp4_bytes, check.layers[1].nvfp4_bytes
    assert check.nvfp4_bytes == 3 * (up + down) + kept
    assert f"weights {check.nvfp4_bytes:,} bytes, {check.bf16_bytes:,} in BF16" in text
    for words in (
        ["padding", "NVFP4 bytes", "BF16 bytes"],
        # (48 / 40 + 80 / 72) / 2 - 1
        ["layers.0.up", "72 x 40", "nvidia", "auto", "15.6%", f"{up:,}", "5,760"],
        ["layers.3.up", "keep_last", "5,760"],
        ["lm_head", "output_embedding", "8,000"],
        ["nvidia: fprop rtn / rtn_2d"],
    ):
        assert any(all(word in line for word in words) for line in text.splitlines()), words


def test_check_of_a_converted_model() -> None:
    """Nothing is left to convert; each layer costs what its own recipe costs, whatever is asked for
    now."""
    model = nvfp4.convert(_of_shapes("cpu"), "quartet2", backend="reference", verbose=False)
    fresh, again = (
        nvfp4.check(SHAPES, "quartet2", backend="reference"),
        nvfp4.check(model, "nvidia"),
    )
    assert again.converted == 0
    assert {layer.reason for layer in again.layers} == {"already_converted", "output_embedding"}
    for field in ("recipe", "gemms", "backend", "padding", "nvfp4_bytes"):
        assert [getattr(layer, field) for layer in again.layers] == [
            getattr(layer, field) for layer in fresh.layers
        ]


def test_check_warns_and_raises_as_convert_does() -> None:
    """Patterns that match nothing, nothing to convert, unknown names: the warning points here,
    strict raises."""
    with pytest.warns(
        nvfp4.ConvertWarning, match=r"exclude 'layers\.9' matches no linear layer"
    ) as caught:
        nvfp4.check(SHAPES, exclude="layers.9")
    assert caught[0].filename == __file__
    for arguments, words in (
        ({"exclude": "layers.9", "strict": True}, "matches no linear layer"),
        ({"include": "lm_head", "exclude": "lm_head", "strict": True}, "no layer was converted"),
        ({"recipe": "quartet3"}, "unknown recipe"),
        ({"backend": "nonsense"}, "unknown backend"),
        ({"keep_first": -1}, "keep_first must be"),
    ):
        with pytest.raises(ValueError, match=words):
            nvfp4.check(SHAPES, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "shapes",
    [{"up": (3,)}, {"up": (0, 4)}, {"up": (3, 4.0)}, {"": (3, 4)}, {"a.b": (3, 4), "a": (3, 4)}],
)
def test_check_refuses_what_is_no_shape(shapes: Any) -> None:
    """A shape that is not two positive integers, an empty name, and a layer inside which another
    lies."""
    with pytest.raises(ValueError, match=r"must be|cannot name a layer"):
        nvfp4.check(shapes)


@pytest.mark.parametrize("recipe", ["nvidia", "quartet2", "search_eden", "rl"])
def test_observe_is_health_of_the_operands(recipe: str) -> None:
    """Within the context every converted layer notes its x and its weight, quantised as its recipe
    does; outputs are the same bits, and the hooks are gone afterwards."""
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16))
    nvfp4.convert(model, recipe, verbose=False)
    x = torch.randn(2, 5, 32)
    want = model(x)
    hidden = torch.relu(model[0](x))
    with nvfp4.observe(model) as seen:
        assert torch.equal(model(x), want)
    assert list(seen) == ["0/x", "0/w", "2/x", "2/w"]
    fprop = nvfp4.RECIPES[recipe].fprop
    for key, tensor, spec in (
        ("0/x", x, fprop.left),
        ("0/w", model[0].weight, fprop.right),
        ("2/x", hidden, fprop.left),
        ("2/w", model[2].weight, fprop.right),
    ):
        q = nvfp4.quantize(tensor, spec.quantizer or "", **dict(spec.options))
        assert seen[key] == nvfp4.health(tensor, q), key
    seen.clear()
    model(x)
    assert seen == {}


def test_observe_keeps_the_last_forward_and_always_ends() -> None:
    """The last forward wins, a keyword argument is seen too, and an exception leaves no hook
    behind."""
    layer = nvfp4.convert(nn.Linear(32, 16), "rtn", verbose=False)
    with nvfp4.observe(layer) as seen:
        layer(torch.ones(3, 32))
        layer(input=torch.full((3, 32), 7.0))
        assert seen["/x"].amax == 7.0
    with pytest.raises(KeyError), nvfp4.observe(layer) as seen:
        raise KeyError
    layer(torch.ones(3, 32))
    assert seen == {}


def test_observe_skips_what_it_cannot_describe() -> None:
    """Empty batches, fprop in high precision and rotated operands leave no entry, and no error."""
    layer = nvfp4.convert(nn.Linear(32, 16), "rtn", verbose=False)
    with nvfp4.observe(layer) as seen:
        layer(torch.zeros(0, 32))
    assert list(seen) == ["/w"]
    dense = Recipe("dense fprop", dgrad=Gemm(operand("rtn"), operand("rtn")))
    turned = Recipe("turned fprop", Gemm(operand("ms_eden"), operand("ms_eden")))
    for recipe in (dense, turned):
        layer = nvfp4.convert(nn.Linear(32, 16), recipe, verbose=False)
        with nvfp4.observe(layer) as seen:
            layer(torch.randn(4, 32))
        assert seen == {}


def test_observe_warns_of_trouble_before_the_loss_does() -> None:
    """What it is for: one outlier that pushes the rest of its tensor under the smallest scale shows
    as underflow."""
    layer = nvfp4.convert(nn.Linear(32, 16), "rtn", verbose=False)
    x = torch.full((8, 32), 1e-3)
    x[0, 0] = 1e6
    with nvfp4.observe(layer) as seen:
        layer(x)
    # 15 of 16 blocks; in the first, 15 elements are flushed by the outlier
    assert seen["/x"].underflow == 15 / 16
    assert seen["/x"].flushed == 255 / 256
