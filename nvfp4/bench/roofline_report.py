"""``nvfp4 bench roofline``: what ``roofline.py`` predicts as tables, JSON and a picture.

    1  the devices' peaks, and the share of each that programs are assumed to reach
    2  every kernel of the largest layer of the last model: bytes, time per device, and its bound
    3  milliseconds of a block's forward and backward, by part, and from how many tokens it gains
    4  every way of quantising: share of a copy, bound, instructions per element (``shares.py``)
    5  every recipe's speed-up over BF16, for a block of the last model
    6  what this machine measures beside what is predicted for it, where it is among the devices
    7  what others published of cards among the devices, beside the same predicted

A number is predicted unless its column says "measured" or "published".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from nvfp4.backends.triton.quantize.policy import READ_TWICE
from nvfp4.bench.cases import Shape, layer_for, matrix
from nvfp4.bench.devices import Device, gpu_at_hand
from nvfp4.bench.measure import LayerCase
from nvfp4.bench.published import NEAR
from nvfp4.bench.published import rows as published_rows
from nvfp4.bench.roofline import (
    HOST,
    MODELS,
    OURS,
    PREDICTED,
    QUANTISE,
    UNCOUNTED,
    Kernel,
    Layer,
    layer_kernels,
    overtakes,
    speedup,
    step_seconds,
)
from nvfp4.bench.shares import SIDE, shares
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
    names = {device.name for device in devices}
    published = [row for row in published_rows() if row["card"] in names]
    quantising = [share.row() for share in shares(devices)]
    recipes = _recipes(models[-1], tokens, devices)

    console = Console()
    console.print(terminal("Dense peaks, and the share assumed to be reached", _peaks(devices)))

    # The largest layer alone by kernel: all of them would be a page of rows.
    layer = max(MODELS[models[-1]], key=lambda layer: layer.inputs * layer.outputs)
    about = f"{recipe.name}, {models[-1]}: {layer.inputs} -> {layer.outputs}, {tokens} tokens"
    for kind in sorted({_kind(device) for device in devices}):
        alike = [device for device in devices if _kind(device) == kind]
        kernels = _kernels(recipe, layer, tokens, alike)
        console.print(terminal(f"{about}; times {PREDICTED}", kernels))

    # Then whole blocks, and beside them what was measured here and what others have published.
    about = f"{recipe.name}: ms of a forward and backward of one block, {tokens} tokens"
    console.print(terminal(f"{about}; {PREDICTED}", [_step(row) for row in rows], labels=2))
    if quantising:
        about = f"Quantising {SIDE} x {SIDE} BF16 by Triton's kernels; {PREDICTED}"
        console.print(terminal(about, quantising, labels=2))
    about = f"Every recipe over BF16: a block of {models[-1]}, {tokens} tokens; {PREDICTED}"
    console.print(terminal(about, recipes))
    if measured := [_beside(row) for row in rows if row.measured_ms is not None]:
        title = f"Measured on this machine, {tokens} tokens"
        console.print(terminal(title, measured, labels=2))
    if published:
        met = sum(abs(row["ratio"] - 1) <= NEAR for row in published)
        title = f"Others' figures: {met} of {len(published)} met within {NEAR:.0%}"
        console.print(terminal(title, published, labels=2))
    for device in devices:
        source = f"{device.name}: {device.source}. Assumed: {device.efficiency.source}."
        console.print(source, style="dim")

    if json_path:
        _keep(Path(json_path), rows, devices, quantising, recipes, published)
        console.print(f"kept: {json_path}")
    if plot_path:
        draw(recipe, models[-1], devices, rows, Path(plot_path))
        console.print(f"drawn: {plot_path}")
    return rows


def _recipes(model: str, tokens: int, devices: Sequence[Device]) -> list[Row]:
    """Speed-ups of a block's forward and backward, a row per recipe.

    "uncounted": the cards for which the instructions of some kernel were not counted, so that its
    bytes alone are in the number, which is then too high.
    """
    rows: list[Row] = []
    for name, recipe in RECIPES.items():
        if not recipe.quantized:
            continue
        row: Row = {"recipe": name}
        row |= {
            each.name: round(speedup(recipe, MODELS[model], tokens, each), 2) for each in devices
        }
        missing = [each.name for each in devices if not _counted(recipe, MODELS[model], each)]
        rows.append(row | {"uncounted": ", ".join(missing)})
    return rows


def _counted(recipe: Recipe, layers: Sequence[Layer], device: Device) -> bool:
    """Whether instructions are known of all that a recipe launches on a card."""
    kernels = layer_kernels(recipe, layers[0], 1, OURS, device.decodes, device.capability)
    return not any(UNCOUNTED in kernel.terms(device) for kernel in kernels)


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
            "multiprocessors": d.multiprocessors or "",
            "GHz": d.clock / 1e9 if d.clock else "",
            "assumed: FP4": f"{d.efficiency.fp4:.0%}",
            "assumed: BF16": f"{d.efficiency.bf16:.0%}",
            "memory": f"{d.efficiency.memory:.0%}",
        }
        for d in devices
    ]


def _kind(device: Device) -> tuple[bool, bool]:
    """What decides which kernels a device launches: FP4 units, and whether it reads x twice."""
    return device.decodes, device.capability in READ_TWICE


def _kernels(recipe: Recipe, layer: Layer, tokens: int, devices: Sequence[Device]) -> list[Row]:
    """What devices of one kind launch."""
    first = devices[0]
    return [
        {
            "kernel": kernel.name,
            "for": kernel.gemm,
            "TFLOP": kernel.flops / 1e12 if kernel.flops else "",
            "MB": kernel.bytes / 1e6,
            **{f"{device.name} ms": _with_bound(kernel, device) for device in devices},
        }
        for kernel in layer_kernels(recipe, layer, tokens, OURS, first.decodes, first.capability)
    ]


def _with_bound(kernel: Kernel, device: Device) -> str:
    """Milliseconds, and what decides them."""
    return f"{1e3 * kernel.seconds(device):.3g} ({kernel.bound(device)})"


def _step(row: Prediction) -> Row:
    return {
        "device": row.device,
        "model": row.model,
        "BF16": row.predicted_bf16_ms,
        **{part: row.predicted_ms[part] for part in (*GEMMS, QUANTISE, HOST)},
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
    path: Path,
    rows: Sequence[Prediction],
    devices: Sequence[Device],
    quantising: list[Row],
    recipes: list[Row],
    published: list[Row],
) -> None:
    data = {
        "what": f"times and speed-ups named predicted_* are {PREDICTED}",
        "devices": [asdict(device) for device in devices],
        "rows": [asdict(row) for row in rows],
        "quantising": quantising,
        "recipes": recipes,
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
