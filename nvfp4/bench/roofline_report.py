"""``nvfp4 bench roofline``: what ``roofline.py`` predicts as tables, JSON and a picture.

    1  the devices' peaks, and the share of each that programs are assumed to reach
    2  every kernel of the largest layer of the last model, with its bytes and its time per device
    3  milliseconds of a block's forward and backward, by part, and from how many tokens it gains
    4  what this machine measures beside what is predicted for it, where it is among the devices
    5  Quartet II's published speed-ups beside those that the model predicts of its traffic

A number is predicted unless its column says "measured" or "published".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from nvfp4.bench.cases import Shape, layer_for, matrix
from nvfp4.bench.devices import Device, gpu_at_hand
from nvfp4.bench.measure import LayerCase
from nvfp4.bench.roofline import (
    MODELS,
    OURS_AMAX_GIVEN,
    PREDICTED,
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
from nvfp4.bench.tables import Row, terminal
from nvfp4.bench.timing import interleaved, timer
from nvfp4.recipes import GEMMS, RECIPES, Recipe

RUNS = 10
"""Of each measured layer, after one that warms up."""


@dataclass(frozen=True)
class Prediction:
    """One block of a model on one device, predicted, and measured where it ran."""

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


def predict(
    recipe: Recipe, model: str, tokens: int, device: Device, measure: torch.device | None = None
) -> Prediction:
    """The prediction for a model; measure: where to run it too, in BF16 and in the recipe."""
    layers = MODELS[model]
    bf16 = sum(step_seconds(RECIPES["bf16"], layers, tokens, device).values())
    ours = step_seconds(recipe, layers, tokens, device)
    measured = (None, None) if measure is None else measured_ms(recipe, layers, tokens, measure)
    return Prediction(
        device.name,
        model,
        tokens,
        recipe.name,
        predicted_bf16_ms=1e3 * bf16,
        predicted_ms={part: 1e3 * seconds for part, seconds in ours.items()},
        predicted_speedup=bf16 / sum(ours.values()),
        predicted_overtakes_tokens=overtakes(recipe, layers, device),
        measured_bf16_ms=measured[0],
        measured_ms=measured[1],
    )


def measured_ms(
    recipe: Recipe, layers: Sequence[Layer], tokens: int, device: torch.device
) -> tuple[float, float]:
    """Milliseconds of a forward and backward of the layers, one after the other: (BF16, recipe)."""
    recipes = (RECIPES["bf16"], recipe)
    totals = dict.fromkeys((each.name for each in recipes), 0.0)
    for layer in layers:
        shape = Shape(tokens, layer.inputs, layer.outputs)
        x = matrix(shape.tokens, shape.in_features, seed=1).to(device).requires_grad_()
        dy = matrix(shape.tokens, shape.out_features, seed=2).to(device)
        steps = {each.name: LayerCase(_layer(shape, each, device), x, dy).step for each in recipes}
        for name, ms in interleaved(steps, 0.0, RUNS, timer(device)).items():
            totals[name] += ms
    return totals["bf16"], totals[recipe.name]


def _layer(shape: Shape, recipe: Recipe, device: torch.device) -> nn.Linear:
    return layer_for(shape, recipe if recipe.quantized else "bf16", device=device)


def report(
    recipe: Recipe,
    models: Sequence[str],
    devices: Sequence[Device],
    tokens: int,
    json_path: str | None = None,
    plot_path: str | None = None,
    measure_cpu: bool = False,
) -> list[Prediction]:
    """Print every table; where a path is given, keep the rows as JSON and draw the picture.

    The GPU of this machine is measured too if it is among the devices; the processor if
    ``measure_cpu``. Raises ValueError for an unknown model, OSError for a path that cannot be
    written.
    """
    unknown = [model for model in models if model not in MODELS]
    if unknown:
        raise ValueError(f"unknown models {unknown}; known: {', '.join(MODELS)}")

    # What can be measured here stands beside what is predicted for it.
    here = gpu_at_hand()
    places = {here.name: torch.device("cuda")} if here else {}
    if measure_cpu:
        places["CPU"] = torch.device("cpu")
    rows = [
        predict(recipe, model, tokens, device, places.get(device.name))
        for device in devices
        for model in models
    ]
    published = _published(devices, models)

    console = Console()
    console.print(terminal("Dense peaks, and the share assumed to be reached", _peaks(devices)))

    # The largest layer alone by kernel: all of them would be a page of rows.
    layer = max(MODELS[models[-1]], key=lambda layer: layer.inputs * layer.outputs)
    about = f"{recipe.name}, {models[-1]}: {layer.inputs} -> {layer.outputs}, {tokens} tokens"
    kernels = _kernels(recipe, layer, tokens, devices)
    console.print(terminal(f"{about}; times {PREDICTED}", kernels))

    # Then whole blocks, and beside them what was measured here and what others have published.
    about = f"{recipe.name}: ms of a forward and backward of one block, {tokens} tokens"
    console.print(terminal(f"{about}; {PREDICTED}", [_step(row) for row in rows], labels=2))
    if measured := [_beside(row) for row in rows if row.measured_ms is not None]:
        title = f"Measured on this machine, {tokens} tokens"
        console.print(terminal(title, measured, labels=2))
    if published:
        title = f"Quartet II's speed-ups over BF16, {PUBLISHED_TOKENS} tokens, amax given"
        console.print(terminal(title, [_off(row) for row in published], labels=2))
    for device in devices:
        source = f"{device.name}: {device.source}. Assumed: {device.efficiency.source}."
        console.print(source, style="dim")

    if json_path:
        _keep(Path(json_path), rows, devices, published)
        console.print(f"kept: {json_path}")
    if plot_path:
        draw(recipe, models[-1], devices, rows, Path(plot_path))
        console.print(f"drawn: {plot_path}")
    return rows


def _published(devices: Sequence[Device], models: Sequence[str]) -> list[Row]:
    """Quartet II's speed-ups beside those predicted of its traffic and of ours, amax given."""
    recipe = RECIPES["quartet2"]

    def predicted(device: Device, model: str, traffic: Any) -> float:
        return speedup(recipe, MODELS[model], PUBLISHED_TOKENS, device, traffic)

    return [
        {
            "device": device.name,
            "model": model,
            "published": PUBLISHED_SPEEDUPS[device.name, model],
            "predicted_their_traffic": predicted(device, model, PUBLISHED),
            "predicted_our_traffic": predicted(device, model, OURS_AMAX_GIVEN),
        }
        for device in devices
        for model in models
        if (device.name, model) in PUBLISHED_SPEEDUPS
    ]


def _off(published: Row) -> Row:
    theirs = published["predicted_their_traffic"]
    return {
        "device": published["device"],
        "model": published["model"],
        "published": published["published"],
        "45-bit gradient, predicted": theirs,
        "off by": f"{theirs / published['published'] - 1:+.1%}",
        "ours (29 bits), predicted": published["predicted_our_traffic"],
    }


def _peaks(devices: Sequence[Device]) -> list[Row]:
    def tera(value: float | None) -> str:
        return "-" if value is None else f"{value / 1e12:.4g}"

    return [
        {
            "device": d.name,
            "FP4 TFLOP/s": tera(d.fp4),
            "FP8": tera(d.fp8),
            "BF16": tera(d.bf16),
            "TB/s": tera(d.bandwidth),
            "L2 MB": d.l2 / 1e6,
            "assumed: FP4": f"{d.efficiency.fp4:.0%}",
            "assumed: BF16": f"{d.efficiency.bf16:.0%}",
            "memory": f"{d.efficiency.memory:.0%}",
        }
        for d in devices
    ]


def _kernels(recipe: Recipe, layer: Layer, tokens: int, devices: Sequence[Device]) -> list[Row]:
    return [
        {
            "kernel": kernel.name,
            "for": kernel.gemm,
            "TFLOP": kernel.flops / 1e12 if kernel.flops else "",
            "MB": kernel.bytes / 1e6,
            **{f"{device.name} ms": 1e3 * kernel.seconds(device) for device in devices},
        }
        for kernel in layer_kernels(recipe, layer, tokens)
    ]


def _step(row: Prediction) -> Row:
    return {
        "device": row.device,
        "model": row.model,
        "BF16": row.predicted_bf16_ms,
        **{part: row.predicted_ms[part] for part in (*GEMMS, QUANTISE)},
        "total": sum(row.predicted_ms.values()),
        "speed-up": row.predicted_speedup,
        "from tokens": row.predicted_overtakes_tokens or "never",
    }


def _beside(row: Prediction) -> Row:
    assert row.measured_bf16_ms is not None
    assert row.measured_ms is not None
    return {
        "device": row.device,
        "model": row.model,
        "BF16 ms predicted": row.predicted_bf16_ms,
        "BF16 ms measured": row.measured_bf16_ms,
        f"{row.recipe} ms predicted": sum(row.predicted_ms.values()),
        f"{row.recipe} ms measured": row.measured_ms,
        "speed-up predicted": row.predicted_speedup,
        "speed-up measured": row.measured_bf16_ms / row.measured_ms,
    }


def _keep(
    path: Path, rows: Sequence[Prediction], devices: Sequence[Device], published: list[Row]
) -> None:
    data = {
        "what": f"times and speed-ups named predicted_* are {PREDICTED}",
        "devices": [asdict(device) for device in devices],
        "rows": [asdict(row) for row in rows],
        "published": published,
    }
    path.write_text(json.dumps(data, indent=1) + "\n")


def draw(
    recipe: Recipe, model: str, devices: Sequence[Device], rows: Sequence[Prediction], path: Path
) -> None:
    """Write the picture: predicted speed-up over tokens, a line per device; points: measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=160, layout="constrained")
    axes = figure.subplots()

    # 64 to 131,072 tokens: from where quantising the weight is most of the cost to where it is
    # next to nothing.
    counts = [2**i for i in range(6, 18)]
    for device in devices:
        gains = [speedup(recipe, MODELS[model], tokens, device) for tokens in counts]
        (line,) = axes.plot(counts, gains, label=device.name)
        for row in rows:
            if (row.device, row.model) != (device.name, model):
                continue
            if row.measured_ms and row.measured_bf16_ms:
                gain = row.measured_bf16_ms / row.measured_ms
                axes.plot(row.tokens, gain, "o", color=line.get_color())

    axes.axhline(1, color="#999999", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts[::2], [str(count) for count in counts[::2]])
    axes.set_xlabel("tokens")
    axes.set_ylabel("speed-up over BF16")
    what = f"{recipe.name}, {model} block, forward and backward"
    axes.set_title(f"{what}: {PREDICTED} (points: measured)", fontsize=9)
    axes.legend(frameon=False)
    figure.savefig(path)
