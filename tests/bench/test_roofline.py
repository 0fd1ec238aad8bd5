"""The roofline: bytes, FLOPs and instructions by hand, which of them binds, and predictions that
say so. ``test_published.py`` holds it to figures of others.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from nvfp4.bench import cases, devices, roofline, roofline_report
from nvfp4.bench.devices import (
    DEVICES,
    DRAM_SHARE,
    ISSUE_SHARE,
    Device,
    Efficiency,
    find_device,
    gpu_at_hand,
    this_cpu,
)
from nvfp4.bench.issue import Counted, counted
from nvfp4.bench.roofline import (
    MODELS,
    OURS,
    OURS_AMAX_GIVEN,
    PUBLISHED,
    Kernel,
    Layer,
    host_seconds,
    layer_kernels,
    overtakes,
    rule_label,
    speedup,
    step_seconds,
)
from nvfp4.cli import main
from nvfp4.recipes import RECIPES, Recipe
from tools import mma_counts
from tools.quantize_variants import roofline_variants

TOKENS, LAYER = 1024, Layer(512, 2048)
ELEMENTS = {"x": 1024 * 512, "w": 2048 * 512, "dy": 1024 * 2048}


def bits_moved(
    recipe: str, tensor: str, traffic: roofline.Traffic, gemms=("fprop", "dgrad", "wgrad")
) -> float:
    """Bits an element of a tensor that its quantisation moves."""
    kernels = layer_kernels(RECIPES[recipe], LAYER, TOKENS, traffic)
    moved = sum(
        k.bytes
        for k in kernels
        if not k.flops and k.name.endswith(f" {tensor}") and k.gemm in gemms
    )
    return 8 * moved / ELEMENTS[tensor]


@pytest.mark.parametrize(
    ("recipe", "tensor", "traffic", "gemms", "bits"),
    [
        ("quartet2", "dy", PUBLISHED, ("dgrad", "wgrad"), 45),  # 2 x (16 + 4 + 1 and 1 + 0.5)
        ("quartet2", "dy", OURS, ("dgrad", "wgrad"), 33),  # 16 once, and lengths in float32
        ("search_eden", "dy", OURS, ("dgrad", "wgrad"), 49),  # a search reads each copy anew
        ("quartet2", "x", PUBLISHED, ("fprop",), 20.5),
        ("quartet2", "x", OURS, ("fprop",), 36.5),  # and the amax
        ("quartet2", "w", OURS_AMAX_GIVEN, ("fprop",), 20.5),
        ("quartet2", "w", OURS, ("dgrad",), 13),  # 4.5 + 6 and 2 + 0.5
        ("quartet2", "x", PUBLISHED, ("wgrad",), 11),
        ("nvidia", "dy", OURS, ("dgrad", "wgrad"), 41),  # amax of both 16, then 16 + 4.5 + 4.5
        ("nvidia", "x", OURS, ("fprop", "wgrad"), 41),
        ("nvidia", "w", OURS, ("fprop",), 32 + 4 + 0.5 / 16),
        ("nvidia", "w", OURS, ("dgrad",), 8),
        ("tetrajet2", "w", OURS, ("dgrad",), 13.5),
        ("rl", "x", OURS, ("fprop",), 36.5),  # an amax per row is one more read, too
        ("rl", "w", OURS, ("dgrad",), 20.5),
        ("rl", "dy", OURS, ("dgrad", "wgrad"), 0),
        ("bf16", "x", OURS, ("fprop", "dgrad", "wgrad"), 0),
    ],
)
def test_traffic_by_hand(recipe, tensor, traffic, gemms, bits):
    assert bits_moved(recipe, tensor, traffic, gemms) == pytest.approx(bits, rel=1e-12)


def test_gemms_by_hand():
    """2 M K N each; operands at 16 or 4.5 bits, the output at 16."""
    for recipe, bits in (("bf16", 16), ("quartet2", 4.5)):
        gemms = {k.name: k for k in layer_kernels(RECIPES[recipe], LAYER, TOKENS) if k.flops}
        assert {k.flops for k in gemms.values()} == {2 * 1024 * 512 * 2048}
        x, w, dy = (ELEMENTS[name] for name in ("x", "w", "dy"))
        wanted = {"fprop": (x + w, dy), "dgrad": (dy + w, x), "wgrad": (dy + x, w)}
        for name, (read, written) in wanted.items():
            assert gemms[f"{name} GEMM"].bytes == (read * bits + written * 16) / 8
            assert gemms[f"{name} GEMM"].fp4 == (recipe != "bf16")


def machine(**changes) -> Device:
    facts = {"fp4": 4e12, "fp8": None, "bf16": 1e12, "bandwidth": 1e12, "l2": 100.0, "launch": 1.0}
    return Device("m", **(facts | changes), source="", efficiency=Efficiency(0.5, 0.25, 0.5, ""))


def test_seconds_by_hand():
    """The longer of work and bytes, at the assumed share of the peaks, and a launch."""
    assert Kernel("", "", flops=8e12, bytes=1e12, fp4=True).seconds(machine()) == 8 / 2 + 1
    assert Kernel("", "", flops=8e12, bytes=1e12, fp4=False).seconds(machine()) == 8 / 0.25 + 1
    assert (
        Kernel("", "", flops=8e12, bytes=1e12, fp4=True).seconds(machine(fp4=None)) == 8 / 0.25 + 1
    )
    assert Kernel("", "", flops=8e12, bytes=3e12, fp4=True).seconds(machine()) == 3 / 0.5 + 1
    again = Kernel("", "", flops=0, bytes=3e12, again=1e12)
    assert again.seconds(machine()) == 3 / 0.5 + 1
    assert again.seconds(machine(l2=2e12)) == 2 / 0.5 + 1, (
        "what fills half of L2 is read from there"
    )
    assert again.seconds(machine(l2=1.9e12)) == 3 / 0.5 + 1
    back = replace(again, backwards=True)
    assert back.seconds(machine(l2=1e12)) == 2.5 / 0.5 + 1, "half of L2, from its end"
    assert back.seconds(machine(l2=3e12)) == 2 / 0.5 + 1


def card(**changes) -> Device:
    """A GPU with one multiprocessor at 1 Hz, whose schedulers are filled to ``ISSUE_SHARE``."""
    facts = {"capability": 90, "multiprocessors": 1, "clock": 1.0, "launch": 0.0}
    return machine(**(facts | changes))


@pytest.fixture
def one_kernel(monkeypatch):
    """A table with one kernel: 20 FP32 instructions per element, and 4 times as many of logic."""
    entry = Counted("k", 90, 8.0, 40, 64, {"fp32": 20.0, "logic": 80.0})
    monkeypatch.setattr(roofline, "counted", lambda: {("k", 90): entry})
    return Kernel("round", "fprop", 0.0, 1e12, counted="k", elements=1e15)


def test_the_busiest_pipe_by_hand(one_kernel):
    """100 instructions per element, but 80 of them hold a pipe of 16 lanes for two cycles each."""
    rate = 32 * 4 * 1 * 1.0 * ISSUE_SHARE
    terms = one_kernel.terms(card())
    assert terms["alu"] == 1e15 * 160 / rate
    assert terms["issue"] == 1e15 * 100 / rate
    assert terms["memory"] == 1e12 / 0.5e12
    assert one_kernel.bound(card()) == "alu"
    assert one_kernel.seconds(card()) == terms["alu"]
    assert one_kernel.seconds(card(multiprocessors=2)) == terms["alu"] / 2


def test_whichever_term_is_longest_binds(one_kernel):
    """And is found wrong if it is not: a card of endless schedulers leaves bytes, and so on."""
    assert one_kernel.bound(card(clock=1e30)) == "memory"
    assert one_kernel.seconds(card(clock=1e30)) == 1e12 / 0.5e12
    product = replace(one_kernel, flops=1e20, fp4=True)
    assert product.bound(card(clock=1e30)) == "tensor cores"
    uncounted = replace(one_kernel, counted="nobody counted this")
    assert uncounted.bound(card()) == roofline.UNCOUNTED
    assert replace(one_kernel, counted="").bound(card()) == "memory"
    assert one_kernel.bound(machine()) == "memory", "a processor has no counts, and says nothing"


COUNTED_WHOLLY = ["rtn", "nvidia", "quartet2", "search_eden"]
"""Recipes of whose kernels none is left to bytes alone, on the cards below."""


@pytest.mark.parametrize("name", COUNTED_WHOLLY)
@pytest.mark.parametrize("device", ["B200", "GB300"])
def test_every_launch_of_a_recipe_is_counted(name, device):
    """No kernel is bound by bytes because nobody looked at its instructions."""
    card = DEVICES[device]
    for kernel in layer_kernels(RECIPES[name], LAYER, TOKENS, OURS, card.decodes, card.capability):
        assert roofline.UNCOUNTED not in kernel.terms(card), kernel.counted
        assert bool(kernel.counts(card)) == bool(kernel.counted)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
def test_every_launch_of_a_recipe_is_a_kernel_that_exists(name, device):
    """Counted or not, the counting tool lists it under this name."""
    listed = {variant.name for variant in roofline_variants(device.capability)}
    for kernel in layer_kernels(
        RECIPES[name], LAYER, TOKENS, OURS, device.decodes, device.capability
    ):
        assert kernel.counted in listed | {""}
        assert bool(kernel.counted) != bool(kernel.flops)


def test_rotations_on_tensor_cores_are_counted():
    """On every architecture; the C++ kernels' names are those of the tool, and both orientations
    take less than half of what Triton's exact kernel takes on a B200."""
    allowed, plain = Recipe.from_name("quartet2+tensor_core"), RECIPES["quartet2"]
    names = {f"mma_eden_kernel: {label}" for label in mma_counts.KERNELS.values()}
    for card in DEVICES.values():
        kernels = layer_kernels(allowed, LAYER, TOKENS, OURS, card.decodes)
        on_tensor_cores = [k for k in kernels if k.counted.startswith("mma_eden")]
        assert {k.counted for k in on_tensor_cores} == {
            "mma_eden_kernel: both of bfloat16",
            "mma_eden_kernel: codes",
        }
        assert card.capability is None or all(k.counts(card) for k in on_tensor_cores)
        assert len(kernels) == len(layer_kernels(plain, LAYER, TOKENS, OURS, card.decodes))
        assert {name for name, capability in counted() if "mma_eden" in name} == names

    pair = "quantize_both_kernel: ms_eden_rounds=1 and ms_eden_rounds=1^T of bfloat16"
    ours, exact = counted()["mma_eden_kernel: both of bfloat16", 100], counted()[pair, 100]
    assert ours.busiest()[1] < exact.busiest()[1] / 2
    # a second round, and a search, stay what they are
    searched = Recipe.from_name("search_eden+tensor_core")
    assert not any(
        kernel.counted.startswith("mma_eden")
        for kernel in layer_kernels(searched, LAYER, TOKENS, OURS)
    )


def test_cards_without_fp4_units_decode():
    """Both operands to BF16, and a product that applies the global scales and leaves BF16."""
    kernels = layer_kernels(RECIPES["quartet2"], LAYER, TOKENS, OURS, decodes=True)
    names = [kernel.name for kernel in kernels if kernel.gemm == "fprop"]
    assert names[-3:] == ["round w", "decode w", "fprop GEMM"]
    product = kernels[[kernel.name for kernel in kernels].index("fprop GEMM")]
    x, w, y = (ELEMENTS[name] for name in ("x", "w", "dy"))
    assert (product.fp4, product.bytes) == (False, 2 * (x + w + y))
    dense = layer_kernels(RECIPES["bf16"], LAYER, TOKENS, OURS, decodes=True)
    assert [kernel.name for kernel in dense] == ["fprop GEMM", "dgrad GEMM", "wgrad GEMM"]


def test_a_delayed_amax_is_a_pass_less():
    """Of x and of dy, not of w; the call ends with a launch that moves nothing to speak of."""
    nvidia = RECIPES["nvidia"]
    kernels, delayed = (
        layer_kernels(recipe, LAYER, TOKENS) for recipe in (nvidia, nvidia.with_delayed_amax())
    )
    gone = {kernel.name for kernel in kernels} - {kernel.name for kernel in delayed}
    assert gone == {"amax of both x", "amax of both dy"}
    assert delayed[-1].name == "end of the call"
    assert [each.name for each in delayed[:-1]] == [k.name for k in kernels if k.name not in gone]
    assert delayed[-1].seconds(DEVICES["B200"]) == DEVICES["B200"].launch


def test_labels_name_rules_as_the_counting_tool_does():
    """By what the recipes hold."""
    quartet, nvidia = RECIPES["quartet2"], RECIPES["nvidia"]
    assert rule_label(quartet.dgrad.left) == "ms_eden_rounds=1"
    assert rule_label(RECIPES["search_eden"].wgrad.right) == "ms_eden_rounds=2_search=True"
    assert rule_label(nvidia.wgrad.left) == "sr_te_rotation=nvidia"
    assert rule_label(nvidia.fprop.right) == "rtn_2d"
    assert rule_label(RECIPES["four_over_six"].fprop.right) == "four_over_six_block=tile"
    assert rule_label(RECIPES["rl"].fprop.left) == "four_over_six_row_scaled=True"
    assert rule_label(RECIPES["tetrajet2"].dgrad.left) == "sr_rotation=16x1"


def test_the_host_waits_for_nobody():
    """Where a layer's kernels take less than their launches, the rest of these is lost."""
    recipe, device, layer = RECIPES["quartet2"], DEVICES["B200"], [Layer(256, 256)]
    parts = step_seconds(recipe, layer, 16, device)
    kernels = layer_kernels(recipe, layer[0], 16, OURS, False, device.capability)
    assert sum(parts.values()) == pytest.approx(host_seconds(recipe, kernels))
    launches = sum(kernel.launches for kernel in kernels)
    assert host_seconds(recipe, kernels) == pytest.approx(117e-6 + 10e-6 * launches)
    assert host_seconds(RECIPES["bf16"], kernels) == 117e-6
    assert step_seconds(recipe, MODELS["7B"], 16384, device)["host"] == 0
    assert step_seconds(recipe, layer, 16, machine())["host"] == 0, "a processor is its own host"


def test_where_nvfp4_overtakes():
    """The first token count with a gain; a card without FP4 units has none."""
    layers = MODELS["7B"]
    for name, recipe in (("B200", "quartet2"), ("RTX 5090", "search_eden")):
        device = DEVICES[name]
        count = overtakes(RECIPES[recipe], layers, device)
        assert speedup(RECIPES[recipe], layers, count, device) > 1
        assert speedup(RECIPES[recipe], layers, count - 1, device) <= 1
        assert 64 < count < 8192
    assert overtakes(RECIPES["quartet2"], layers, DEVICES["H200"]) is None


def test_parts_add_up():
    device, layers = DEVICES["B200"], MODELS["3B"]
    parts = step_seconds(RECIPES["nvidia"], layers, 16384, device)
    kernels = [k for layer in layers for k in layer_kernels(RECIPES["nvidia"], layer, 16384)]
    assert sum(parts.values()) == pytest.approx(sum(k.seconds(device) for k in kernels))
    assert parts["quantise"] == pytest.approx(
        sum(k.seconds(device) for k in kernels if not k.flops)
    )
    assert parts["fprop"] == pytest.approx(
        sum(k.seconds(device) for k in kernels if k.name == "fprop GEMM")
    )


def test_devices_are_found_by_name(monkeypatch):
    assert find_device("rtx5090") is find_device("RTX 5090") is DEVICES["RTX 5090"]
    known = ", ".join(DEVICES)
    with pytest.raises(ValueError, match=f"unknown device 'B400'; known: {known}, cpu"):
        find_device("B400")
    assert gpu_at_hand() is None or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for said, wanted in (
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("Tesla T4", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda said=said: said)
        assert gpu_at_hand() == DEVICES.get(wanted)


def test_the_table_keeps_the_ratios_of_the_data_sheets():
    """Per tensor core FP4 is 4 times BF16 on data centre Blackwell, 8 times on GeForce (FP32 sums
    at half rate).
    """
    assert DEVICES["B200"].fp4 == 4 * DEVICES["B200"].bf16 == 2 * DEVICES["B200"].fp8
    assert DEVICES["RTX 5090"].fp4 == 8 * DEVICES["RTX 5090"].bf16 == 4 * DEVICES["RTX 5090"].fp8
    assert DEVICES["H200"].fp8 == 2 * DEVICES["H200"].bf16
    for device in DEVICES.values():
        assert device.source
        assert device.efficiency.source
        assert device.efficiency.memory == DRAM_SHARE, "one share of the bandwidth for all"


def test_this_cpu_is_measured():
    """FLOP/s of 2 n^3 and bytes/s of a read and a write, by the shortest of the runs, as a clock
    that is made up has it: 9 s, 4 s and 6 s.
    """
    reads = iter([0, 0, 9, 9, 10, 14, 15, 20, 26, 99] * 2)
    cpu = this_cpu(seconds=20, clock=lambda: next(reads))
    assert cpu.bf16 == 2 * 1024**3 / 4
    assert cpu.bandwidth == 2 * 2**26 / 4
    assert (cpu.fp4, cpu.fp8, cpu.launch) == (None, None, 0)
    assert next(reads, None) is None
    assert all(cpu.gemm_rate(fp4) == cpu.bf16 for fp4 in (False, True))
    assert this_cpu(seconds=0).bandwidth > 0, "and a real clock gives a number"


@pytest.fixture
def small(monkeypatch):
    """A model that the processor can run, and no second spent on its peaks."""
    monkeypatch.setitem(MODELS, "tiny", (Layer(64, 128), Layer(128, 64)))
    monkeypatch.setattr(devices, "this_cpu", lambda: machine(launch=1e-9))


def test_measured_beside_predicted(small, monkeypatch, capsys, tmp_path):
    """Both are in the table and in the file, under their names; the recipe's layer is really
    converted.
    """
    seen = []
    as_recipe = cases.as_recipe
    monkeypatch.setattr(
        cases, "as_recipe", lambda given: seen.append(given.name) or as_recipe(given)
    )
    cpu = Device(**{**vars(machine(launch=1e-9)), "name": "CPU"})
    path = tmp_path / "r.json"
    rows = roofline_report.report(
        RECIPES["rtn"], ["tiny"], [cpu], 32, json_path=str(path), measure_cpu=True
    )
    assert seen == ["rtn", "rtn"]
    assert rows[0].measured_ms > 0
    assert rows[0].measured_bf16_ms > 0
    monkeypatch.setattr(roofline_report, "measured_ms", lambda *_: (1.0, 2.0))
    rows = roofline_report.report(
        RECIPES["rtn"], ["tiny"], [cpu], 32, json_path=str(path), measure_cpu=True
    )
    assert (rows[0].measured_bf16_ms, rows[0].measured_ms) == (1, 2)
    assert rows[0].predicted_ms["fprop"] > 0
    kept = json.loads(path.read_text())["rows"][0]
    assert kept["measured_ms"] == rows[0].measured_ms
    assert "Measured on this machine" in capsys.readouterr().out


def test_the_command(small, capsys, tmp_path):
    """Tables, JSON and picture; times are called predictions wherever they stand."""
    paths = [str(tmp_path / name) for name in ("r.json", "r.png")]
    options = [
        "--devices",
        "B200",
        "rtx5090",
        "--models",
        "7B",
        "22B",
        "--json",
        paths[0],
        "--plot",
        paths[1],
    ]
    assert main(["bench", "roofline", *options]) == 0
    said = " ".join(capsys.readouterr().out.split())
    # the two cards launch different kernels, so that each has a table of them
    assert said.count("predicted, not measured") == 5
    assert "fix scales of dy" in said
    assert "Others' figures: " in said
    assert "bound by" in said
    kept = json.loads((tmp_path / "r.json").read_text())
    assert [(row["device"], row["model"]) for row in kept["rows"]] == [
        (device, model) for device in ("B200", "RTX 5090") for model in ("7B", "22B")
    ]
    assert all(row["measured_ms"] is None for row in kept["rows"])
    assert {row["card"] for row in kept["published"]} == {"B200", "RTX 5090"}
    assert {row["card"] for row in kept["quantising"]} == {"B200", "RTX 5090"}
    assert {key.split("_")[0] for key in kept["rows"][0]} <= {
        "device",
        "model",
        "tokens",
        "recipe",
        "predicted",
        "measured",
    }
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices", "B400"], "unknown device 'B400'"),
        (["--devices", "B200", "--models", "1T"], "unknown models ['1T']; known: 800M"),
        (["--devices", "B200", "--recipe", "fp3"], "unknown recipe 'fp3'"),
        (["--devices", "B200", "--json", "/absent/r.json"], "No such file"),
    ],
)
def test_wrong_options_are_one_line(options, message, capsys):
    assert main(["bench", "roofline", *options]) == 1
    said = capsys.readouterr().err
    assert said.startswith("nvfp4: error: ")
    assert message in said
    assert said.count("\n") == 1
