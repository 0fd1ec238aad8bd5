"""The roofline: bytes and FLOPs by hand, published speed-ups from published traffic, predictions
that say so.
"""

from __future__ import annotations

import json

import pytest
import torch

from nvfp4.bench import cases, devices, roofline, roofline_report
from nvfp4.bench.devices import DEVICES, Device, Efficiency, find_device, gpu_at_hand, this_cpu
from nvfp4.bench.roofline import (
    MODELS,
    OURS,
    OURS_AMAX_GIVEN,
    PUBLISHED,
    PUBLISHED_SPEEDUPS,
    PUBLISHED_TOKENS,
    Kernel,
    Layer,
    layer_kernels,
    overtakes,
    speedup,
    step_seconds,
)
from nvfp4.cli import main
from nvfp4.recipes import RECIPES

TOKENS, LAYER = 1024, Layer(512, 2048)
ELEMENTS = {"x": 1024 * 512, "w": 2048 * 512, "dy": 1024 * 2048}
TOLERANCE = 0.06
"""Of a predicted speed-up: Quartet II's GEMMs reach 3 % more or less than their mean, and BF16 5 %,
by shape.
"""


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
        ("quartet2", "dy", OURS, ("dgrad", "wgrad"), 29),  # 16 once
        ("quartet2", "x", PUBLISHED, ("fprop",), 20.5),
        ("quartet2", "x", OURS, ("fprop",), 36.5),  # and the amax
        ("quartet2", "w", OURS_AMAX_GIVEN, ("fprop",), 20.5),
        ("quartet2", "w", OURS, ("dgrad",), 11),  # 4.5 + 5 and 1 + 0.5
        ("quartet2", "x", PUBLISHED, ("wgrad",), 11),
        ("nvidia", "dy", OURS, ("dgrad", "wgrad"), 41),  # amax of both 16, then 16 + 4.5 + 4.5
        ("nvidia", "x", OURS, ("fprop", "wgrad"), 41),
        ("nvidia", "w", OURS, ("fprop",), 32 + 4 + 0.5 / 16),
        ("nvidia", "w", OURS, ("dgrad",), 8),
        ("tetrajet2", "w", OURS, ("dgrad",), 13.5),
        ("rl", "x", OURS, ("fprop",), 20.5),  # a row at a time: no amax of the tensor
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


@pytest.mark.parametrize(("device", "model"), PUBLISHED_SPEEDUPS)
def test_published_speedups_follow_from_published_traffic(device, model):
    """And ours, which reads the gradient once, comes out better, by what 16 of 45 bits of the
    gradient are worth.
    """
    recipe, layers, published = (
        RECIPES["quartet2"],
        MODELS[model],
        PUBLISHED_SPEEDUPS[device, model],
    )
    theirs = speedup(recipe, layers, PUBLISHED_TOKENS, DEVICES[device], PUBLISHED)
    ours = speedup(recipe, layers, PUBLISHED_TOKENS, DEVICES[device], OURS_AMAX_GIVEN)
    assert abs(theirs / published - 1) < TOLERANCE
    assert 1.02 < ours / theirs < 1.15


def test_where_nvfp4_overtakes():
    """The first token count with a gain; a card without FP4 units has none."""
    recipe, layers = RECIPES["search_eden"], MODELS["7B"]
    for name in ("B200", "RTX 5090"):
        count = overtakes(recipe, layers, DEVICES[name])
        assert (
            speedup(recipe, layers, count, DEVICES[name])
            > 1
            >= speedup(recipe, layers, count - 1, DEVICES[name])
        )
        assert 64 < count < 4096
    assert overtakes(recipe, layers, DEVICES["H200"]) is None


def test_parts_add_up():
    device, layers = DEVICES["B200"], MODELS["3B"]
    parts = step_seconds(RECIPES["nvidia"], layers, 4096, device)
    kernels = [k for layer in layers for k in layer_kernels(RECIPES["nvidia"], layer, 4096)]
    assert sum(parts.values()) == pytest.approx(sum(k.seconds(device) for k in kernels))
    assert parts["quantise"] == pytest.approx(
        sum(k.seconds(device) for k in kernels if not k.flops)
    )
    assert parts["fprop"] == pytest.approx(
        sum(k.seconds(device) for k in kernels if k.name == "fprop GEMM")
    )


def test_devices_are_found_by_name(monkeypatch):
    assert find_device("rtx5090") is find_device("RTX 5090") is DEVICES["RTX 5090"]
    with pytest.raises(ValueError, match="unknown device 'B300'; known: B200, RTX 5090, H200, cpu"):
        find_device("B300")
    assert gpu_at_hand() is None or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for said, wanted in (
        ("NVIDIA B200", "B200"),
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
    assert all(device.source and device.efficiency.source for device in DEVICES.values())


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
    convert = cases.convert
    monkeypatch.setattr(
        cases, "convert", lambda *a, **k: seen.append(a[1].name) or convert(*a, **k)
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
    assert said.count("predicted, not measured") == 2
    assert "fix scales of dy" in said
    assert "Quartet II's speed-ups" in said
    kept = json.loads((tmp_path / "r.json").read_text())
    assert [(row["device"], row["model"]) for row in kept["rows"]] == [
        (device, model) for device in ("B200", "RTX 5090") for model in ("7B", "22B")
    ]
    assert all(row["measured_ms"] is None for row in kept["rows"])
    assert len(kept["published"]) == 3
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
        (["--devices", "B300"], "unknown device 'B300'"),
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
