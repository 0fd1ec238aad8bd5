"""The measurements themselves, each a generator of table rows; what is predicted stands beside and says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from nvfp4.backends.base import Backend
from nvfp4.backends.registry import BACKENDS
from nvfp4.bench.cases import QUANTISERS, Shape, square
from nvfp4.bench.devices import Device
from nvfp4.bench.gates import at_hand
from nvfp4.bench.layers import layer_for, normal, saved_bytes
from nvfp4.bench.roofline import CODE_BITS, SCALE_BITS, Layer, step_seconds
from nvfp4.bench.timing import copier, interleaved
from nvfp4.model.after_step import after_step
from nvfp4.model.weights import invalidate
from nvfp4.numerics.formats import ROW_BLOCK
from nvfp4.quantizers.registry import get_quantizer
from nvfp4.recipes import RECIPES

Row = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """How much is measured. size: rows and columns of the matrix to quantise; seconds, least: for each candidate."""

    device: torch.device
    size: int
    gemms: Mapping[str, Shape]
    layers: Mapping[str, Shape]
    seconds: float
    least: int = 5
    recipes: tuple[str, ...] = ("nvidia", "quartet2", "search_eden")
    expected: Device | None = field(default=None)

    def time(self, candidates: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        """Median milliseconds of each."""
        return interleaved(candidates, self.seconds, self.least, self.device)


def workload(device: torch.device, quick: bool, seconds: float | None, expected: Device | None) -> Workload:
    """The usual amount for a device; ``quick``: a small one that takes a processor less than a minute."""
    if quick:
        sizes = square(256, 512)
        return Workload(device, 512, sizes, sizes, 0.02 if seconds is None else seconds, 3, expected=expected)
    sizes = square(2048, 4096, 8192) if device.type == "cuda" else square(512, 1024, 2048)
    largest = 8192 if device.type == "cuda" else 4096
    return Workload(device, largest, sizes, sizes, 0.5 if seconds is None else seconds, expected=expected)


def quantising(work: Workload) -> Iterator[Row]:
    """Every quantiser of every backend: x, x^T, and both in one call, against a copy of the bytes x must move."""
    x = normal(work.size, work.size).to(work.device)
    for name, (quantizer_name, options) in QUANTISERS.items():
        quantizer = get_quantizer(quantizer_name)
        checked = quantizer.check(seed=1, sign_seed=2, **options)
        reads = 1 if quantizer.rotates or checked.row_scaled else 2  # to find amax; a row, or ms_eden, needs one
        scales = SCALE_BITS * ROW_BLOCK[0] / checked.block[0]
        moved = x.numel() * (reads * x.element_size() + (CODE_BITS + scales) / 8)
        for backend in at_hand(work.device):
            if "quantize" not in backend.operations or backend.refuses("quantize", quantizer, checked) is not None:
                continue
            pair = (quantizer, checked)
            ms = work.time(
                {
                    "copy": copier(int(moved), work.device),
                    "rows": partial(backend.quantize, x, *pair),
                    "columns": partial(backend.quantize, x.t(), *pair),
                    "both": partial(backend.quantize_both, x, pair, pair),
                }
            )
            row: Row = {"quantiser": name, "backend": backend.name, "ms": ms["rows"]}
            row |= {"GB/s": moved / ms["rows"] / 1e6, "of a copy": ms["copy"] / ms["rows"]}
            row |= {"transposed ms": ms["columns"], "both ms": ms["both"]}
            if work.expected is not None:
                row["predicted ms"] = 1e3 * (moved / work.expected.memory_rate + work.expected.launch)
            yield row


def multiplying(work: Workload) -> Iterator[Row]:
    """x w^T to BF16 on codes that are there already, by every backend, against torch's BF16 product."""
    rtn = get_quantizer("rtn")
    for name, shape in work.gemms.items():
        x = normal(shape.tokens, shape.in_features, 1).to(work.device)
        w = normal(shape.out_features, shape.in_features, 2).to(work.device)
        backends = [backend for backend in at_hand(work.device) if "matmul" in backend.operations]
        maker = next(backend for backend in _all(work.device) if "quantize" in backend.operations)
        a, b = maker.quantize(x, rtn, rtn.check()), maker.quantize(w, rtn, rtn.check())
        candidates: dict[str, Callable[[], Any]] = {"bf16": partial(torch.mm, x, w.t())}
        candidates |= {each.name: partial(each.matmul, a, b, torch.bfloat16) for each in backends}
        ms = work.time(candidates)
        flops = 2.0 * shape.tokens * shape.in_features * shape.out_features
        for which, value in ms.items():
            row: Row = {"GEMM": f"{name} ({shape})", "backend": which, "ms": value, "TFLOP/s": flops / value / 1e9}
            row["speed-up over BF16"] = ms["bf16"] / value
            if work.expected is not None:
                row["predicted ms"] = 1e3 * (flops / work.expected.gemm_rate(which != "bf16") + work.expected.launch)
            yield row


def layers(work: Workload) -> Iterator[Row]:
    """Forward and backward of a linear layer, its weight quantised anew, and the bytes it keeps in between."""
    for name, shape in work.layers.items():
        x = normal(shape.tokens, shape.in_features, 1).to(work.device).requires_grad_()
        dy = normal(shape.tokens, shape.out_features, 2).to(work.device)
        made = {recipe: layer_for(shape, recipe, device=work.device) for recipe in ("bf16", *work.recipes)}

        def step(layer: torch.nn.Linear, x: torch.Tensor = x, dy: torch.Tensor = dy) -> None:
            x.grad = layer.weight.grad = None
            invalidate(layer)  # an optimiser step lies between two calls in training
            layer(x).backward(dy)

        ms = work.time({recipe: partial(step, layer) for recipe, layer in made.items()})
        kept = saved_bytes(made["bf16"], x)
        for recipe, layer in made.items():
            row: Row = {"layer": f"{name} ({shape})", "recipe": recipe, "ms": ms[recipe]}
            row |= {"speed-up over BF16": ms["bf16"] / ms[recipe], "saved MB": saved_bytes(layer, x) / 1e6}
            row["saved x BF16"] = saved_bytes(layer, x) / kept
            if work.device.type == "cuda":
                row["peak MB"] = _peak(partial(step, layer), work.device)
            if work.expected is not None:
                row |= _predicted(recipe, shape, work.expected)
            yield row


def optimizer_steps(work: Workload) -> Iterator[Row]:
    """A step of two micro-batches with fused AdamW, weights quantised in forwards or right after the step."""
    name, shape = list(work.layers.items())[-1]
    x = normal(max(shape.tokens // 8, 1), shape.in_features, 1).to(work.device)
    candidates: dict[str, Callable[[], Any]] = {}
    for helped in (False, True):
        layer = layer_for(shape, work.recipes[-1], device=work.device)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-6, fused=True)
        if helped:
            after_step(optimizer, layer)
        candidates["after_step" if helped else "in the forward"] = partial(_train, layer, optimizer, x)
    ms = work.time(candidates)
    for when, value in ms.items():
        title = f"{name} ({x.shape[0]} x {shape.in_features} -> {shape.out_features}), {work.recipes[-1]}"
        yield {"layer": title, "weight quantised": when, "ms": value, "of the usual": value / ms["in the forward"]}


def _train(layer: torch.nn.Linear, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    for _ in range(2):
        layer(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def _predicted(recipe: str, shape: Shape, device: Device) -> Row:
    layer = [Layer(shape.in_features, shape.out_features)]
    bf16, ours = (
        1e3 * sum(step_seconds(RECIPES[each], layer, shape.tokens, device).values()) for each in ("bf16", recipe)
    )
    return {"predicted ms": ours, "predicted speed-up": bf16 / ours}


def _peak(step: Callable[[], Any], device: torch.device) -> float:
    """Megabytes that a step allocates at most beside what is there before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def _all(device: torch.device) -> list[Backend]:
    return [*at_hand(device), BACKENDS["reference"]]


SECTIONS: dict[str, Callable[[Workload], Iterator[Row]]] = {
    "Quantisers": quantising,
    "GEMM on codes": multiplying,
    "Linear layer, forward and backward": layers,
    "Optimiser step": optimizer_steps,
}
