"""``nvfp4 bench roofline``: what ``roofline.py`` predicts as tables, JSON and a picture, beside what is measured."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from nvfp4.bench.devices import Device, at_hand
from nvfp4.bench.roofline import (
    MODELS,
    OURS_AMAX_GIVEN,
    PUBLISHED,
    PUBLISHED_SPEEDUPS,
    PUBLISHED_TOKENS,
    QUANTISE,
    Layer,
    layer_kernels,
    overtakes,
    speedup,
    step_seconds,
)
from nvfp4.model.convert import convert
from nvfp4.model.weights import invalidate
from nvfp4.recipes import GEMMS, RECIPES, Recipe

PREDICTED = "predicted, not measured"


@dataclass(frozen=True)
class Row:
    """One block of a model on one device: predicted milliseconds and, where it ran here, measured ones."""

    device: str
    model: str
    tokens: int
    recipe: str
    predicted_bf16_ms: float
    predicted_ms: dict[str, float]
    predicted_speedup: float
    predicted_overtakes_tokens: int | None
    measured_bf16_ms: float | None = None
    measured_ms: float | None = None


def predict(recipe: Recipe, model: str, tokens: int, device: Device, measure: torch.device | None = None) -> Row:
    """The row of one model; ``measure``: where to run it too, once in BF16 and once in the recipe."""
    layers = MODELS[model]
    bf16 = sum(step_seconds(RECIPES["bf16"], layers, tokens, device).values())
    ours = step_seconds(recipe, layers, tokens, device)
    found: list[float | None] = [None, None]
    if measure is not None:
        found = [1e3 * measured_seconds(each, layers, tokens, measure) for each in (RECIPES["bf16"], recipe)]
    return Row(
        device.name,
        model,
        tokens,
        recipe.name,
        predicted_bf16_ms=1e3 * bf16,
        predicted_ms={part: 1e3 * seconds for part, seconds in ours.items()},
        predicted_speedup=bf16 / sum(ours.values()),
        predicted_overtakes_tokens=overtakes(recipe, layers, device),
        measured_bf16_ms=found[0],
        measured_ms=found[1],
    )


def measured_seconds(
    recipe: Recipe, layers: Sequence[Layer], tokens: int, device: torch.device, repeats: int = 10
) -> float:
    """Median seconds of a forward and backward of the layers, one after the other; the weights are quantised anew."""
    return sum(_time_layer(recipe, layer, tokens, device, repeats) for layer in layers)


def _time_layer(recipe: Recipe, layer: Layer, tokens: int, device: torch.device, repeats: int) -> float:
    module = nn.Linear(*layer, bias=False, dtype=torch.bfloat16, device=device)
    if recipe.quantized:
        convert(module, recipe, seed=0, verbose=False)
    x = torch.randn(tokens, layer.inputs, dtype=torch.bfloat16, device=device, requires_grad=True)
    dy = torch.randn(tokens, layer.outputs, dtype=torch.bfloat16, device=device)
    wait: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(3 + repeats):
        x.grad = module.weight.grad = None
        invalidate(module)  # an optimiser step lies between two calls in training
        wait()
        start = time.perf_counter()
        module(x).backward(dy)
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def report(
    recipe: Recipe,
    models: Sequence[str],
    devices: Sequence[Device],
    tokens: int,
    json_path: str | None = None,
    plot_path: str | None = None,
    measure_cpu: bool = False,
) -> list[Row]:
    """Print every table; keep the rows as JSON and the speed-up over tokens as a picture, where a path is given.

    The GPU of this machine is measured too if it is among the devices; the processor if ``measure_cpu``.
    Raises ValueError for an unknown model.
    """
    unknown = [model for model in models if model not in MODELS]
    if unknown:
        raise ValueError(f"unknown models {unknown}; known: {', '.join(MODELS)}")
    here = at_hand()
    places = {here.name: torch.device("cuda")} if here else {}
    if measure_cpu:
        places["CPU"] = torch.device("cpu")
    rows = [predict(recipe, model, tokens, device, places.get(device.name)) for device in devices for model in models]
    published = _published(devices, models)
    console = Console()
    for table in (_device_table(devices), _kernel_table(recipe, models[-1], tokens, devices), _step_table(rows)):
        console.print(table)
    measured = [row for row in rows if row.measured_ms is not None]
    if measured:
        console.print(_measured_table(measured))
    if published:
        console.print(_published_table(published))
    for device in devices:
        console.print(f"{device.name}: {device.source}. Assumed: {device.efficiency.source}.", style="dim")
    if json_path:
        _keep(Path(json_path), rows, devices, published)
        console.print(f"kept: {json_path}")
    if plot_path:
        draw(recipe, models[-1], devices, rows, Path(plot_path))
        console.print(f"drawn: {plot_path}")
    return rows


def _published(devices: Sequence[Device], models: Sequence[str]) -> list[dict[str, Any]]:
    """Quartet II's speed-ups beside those predicted from its traffic and from ours, amax given as in its benchmark."""
    recipe = RECIPES["quartet2"]
    return [
        {
            "device": device.name,
            "model": model,
            "published": PUBLISHED_SPEEDUPS[device.name, model],
            "predicted_their_traffic": speedup(recipe, MODELS[model], PUBLISHED_TOKENS, device, PUBLISHED),
            "predicted_our_traffic": speedup(recipe, MODELS[model], PUBLISHED_TOKENS, device, OURS_AMAX_GIVEN),
        }
        for device in devices
        for model in models
        if (device.name, model) in PUBLISHED_SPEEDUPS
    ]


def _table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table


def _device_table(devices: Sequence[Device]) -> Table:
    def tera(value: float | None) -> str:
        return "-" if value is None else f"{value / 1e12:.4g}"

    columns = ("device", "FP4 TFLOP/s", "FP8", "BF16", "TB/s", "L2 MB", "assumed: FP4", "BF16", "memory")
    lines = []
    for d in devices:
        peaks = (tera(d.fp4), tera(d.fp8), tera(d.bf16), tera(d.bandwidth), f"{d.l2 / 1e6:.0f}")
        lines.append(
            (d.name, *peaks, *(f"{e:.0%}" for e in (d.efficiency.fp4, d.efficiency.bf16, d.efficiency.memory)))
        )
    return _table("Dense peaks, and the share assumed to be reached", columns, lines)


def _kernel_table(recipe: Recipe, model: str, tokens: int, devices: Sequence[Device]) -> Table:
    layer = max(MODELS[model], key=lambda layer: layer.inputs * layer.outputs)
    columns = ("kernel", "for", "TFLOP", "MB", *(f"{device.name} ms" for device in devices))
    lines = [
        (k.name, k.gemm, f"{k.flops / 1e12:.2f}" if k.flops else "", f"{k.bytes / 1e6:.1f}", *times)
        for k in layer_kernels(recipe, layer, tokens)
        for times in [[f"{1e3 * k.seconds(device):.3f}" for device in devices]]
    ]
    title = f"{recipe.name}, {model}: {layer.inputs} -> {layer.outputs}, {tokens} tokens; times {PREDICTED}"
    return _table(title, columns, lines)


def _step_table(rows: Sequence[Row]) -> Table:
    parts = (*GEMMS, QUANTISE)
    lines = []
    for r in rows:
        times = (r.predicted_bf16_ms, *(r.predicted_ms[part] for part in parts), sum(r.predicted_ms.values()))
        gain = (f"{r.predicted_speedup:.2f}", str(r.predicted_overtakes_tokens or "never"))
        lines.append((r.device, r.model, *(f"{ms:.2f}" for ms in times), *gain))
    title = f"{rows[0].recipe}: ms of a forward and backward of one block, {rows[0].tokens} tokens; {PREDICTED}"
    return _table(title, ("device", "model", "BF16", *parts, "total", "speed-up", "from tokens"), lines)


def _measured_table(rows: Sequence[Row]) -> Table:
    lines = []
    for r in rows:
        assert r.measured_bf16_ms is not None
        assert r.measured_ms is not None
        pairs = (
            (r.predicted_bf16_ms, r.measured_bf16_ms),
            (sum(r.predicted_ms.values()), r.measured_ms),
            (r.predicted_speedup, r.measured_bf16_ms / r.measured_ms),
        )
        lines.append((r.device, r.model, *(f"{value:.2f}" for pair in pairs for value in pair)))
    columns = ("BF16 ms predicted", "measured", f"{rows[0].recipe} ms predicted", "measured")
    title = f"Measured on this machine, {rows[0].tokens} tokens"
    return _table(title, ("device", "model", *columns, "speed-up predicted", "measured"), lines)


def _published_table(published: Sequence[dict[str, Any]]) -> Table:
    lines = []
    for p in published:
        theirs, ours = p["predicted_their_traffic"], p["predicted_our_traffic"]
        off = f"{theirs / p['published'] - 1:+.1%}"
        lines.append((p["device"], p["model"], f"{p['published']:.2f}", f"{theirs:.2f}", off, f"{ours:.2f}"))
    columns = ("device", "model", "published", "45-bit gradient, predicted", "off by", "ours (29 bits), predicted")
    return _table(f"Quartet II's speed-ups over BF16, {PUBLISHED_TOKENS} tokens, amax given", columns, lines)


def _keep(path: Path, rows: Sequence[Row], devices: Sequence[Device], published: list[dict[str, Any]]) -> None:
    kept = {
        "what": f"times and speed-ups named predicted_* are {PREDICTED}",
        "devices": [asdict(device) for device in devices],
        "rows": [asdict(row) for row in rows],
        "published": published,
    }
    path.write_text(json.dumps(kept, indent=1) + "\n")


def draw(recipe: Recipe, model: str, devices: Sequence[Device], rows: Sequence[Row], path: Path) -> None:
    """Write the picture: predicted speed-up over tokens, a line a device; what was measured as points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=160, layout="constrained")
    axes = figure.subplots()
    counts = [2**i for i in range(6, 18)]
    for device in devices:
        gains = [speedup(recipe, MODELS[model], tokens, device) for tokens in counts]
        (line,) = axes.plot(counts, gains, label=device.name)
        for row in rows:
            if (row.device, row.model) == (device.name, model) and row.measured_ms and row.measured_bf16_ms:
                axes.plot(row.tokens, row.measured_bf16_ms / row.measured_ms, "o", color=line.get_color())
    axes.axhline(1, color="#999999", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts[::2], [str(count) for count in counts[::2]])
    axes.set_xlabel("tokens")
    axes.set_ylabel("speed-up over BF16")
    axes.set_title(f"{recipe.name}, {model} block, forward and backward: {PREDICTED} (points: measured)", fontsize=9)
    axes.legend(frameon=False)
    figure.savefig(path)
