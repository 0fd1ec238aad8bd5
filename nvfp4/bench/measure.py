"""The measurements of ``nvfp4 bench all``, each a generator of table rows.

    quantising       rows, columns, and both in one call, against a copy of the same bytes
    multiplying      a product of codes that are there already, against the BF16 product
    layers           forward and backward, the weight quantised anew, and the bytes kept in between
    optimizer_steps  two micro-batches and AdamW, the weight quantised in forwards or after the step

What a machine of ``devices.py`` is predicted to take stands beside, in columns named "predicted".
``LayerCase`` is the one timed layer: ``benchmarks/`` and ``roofline_report`` time it as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from nvfp4.backends.registry import BACKENDS
from nvfp4.bench.cases import QUANTISERS, Shape, at_hand, layer_for, matrix, quantiser, square
from nvfp4.bench.devices import Device
from nvfp4.bench.roofline import Layer, step_seconds
from nvfp4.bench.tables import Row
from nvfp4.bench.timing import Run, copier, interleaved, timer
from nvfp4.layer.dense import times
from nvfp4.layer.linear import Linear
from nvfp4.model.weights import after_step, invalidate
from nvfp4.quantizers.registry import get_quantizer
from nvfp4.recipes import RECIPES


@dataclass(frozen=True)
class LayerCase:
    """A linear layer at work.

    x: [tokens, in_features], which wants a gradient. dy: [tokens, out_features].
    """

    layer: nn.Linear
    x: torch.Tensor
    dy: torch.Tensor

    def step(self) -> tuple[torch.Tensor, ...]:
        """(dx, dw) of a forward and backward, with the weight quantised anew.

        An optimiser's step lies between two calls in training, so no codes of the last one count.
        """
        invalidate(self.layer)
        return torch.autograd.grad(self.layer(self.x), (self.x, self.layer.weight), self.dy)

    def saved_bytes(self) -> int:
        """Bytes that a forward keeps for the backward beside what the layer holds anyway.

        It holds its weight, and an NVFP4 layer the weight's codes.
        """
        self.layer(self.x)

        # Weight and codes are told by their addresses; autograd then shows each tensor it keeps.
        held = {self.layer.weight.data_ptr()}
        if isinstance(self.layer, Linear) and self.layer.nvfp4.cache.entry is not None:
            codes = self.layer.nvfp4.cache.entry.codes
            held |= {tensor.data_ptr() for q in codes for tensor in q.tensors}

        sizes: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in held:
                sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.layer(self.x)
        return sum(sizes)


@dataclass(frozen=True)
class Workload:
    """How much is measured.

    size: rows and columns of the matrix to quantise. seconds, least: time and runs per candidate.
    expected: the device that the predictions are for, or None.
    """

    device: torch.device
    size: int
    gemms: Mapping[str, Shape]
    layers: Mapping[str, Shape]
    seconds: float
    least: int = 5
    recipes: tuple[str, ...] = ("nvidia", "quartet2", "search_eden")
    expected: Device | None = field(default=None)

    def time(self, candidates: Mapping[str, Run]) -> dict[str, float]:
        """Median milliseconds of each."""
        return interleaved(candidates, self.seconds, self.least, timer(self.device))


def workload(
    device: torch.device, quick: bool, seconds: float | None, expected: Device | None
) -> Workload:
    """The usual amount for a device; ``quick``: one that takes a processor less than a minute."""
    if quick:
        sizes = square(256, 512)
        budget = 0.02 if seconds is None else seconds
        return Workload(device, 512, sizes, sizes, budget, least=3, expected=expected)

    # Larger shapes on a GPU, where small ones would time launches.
    on_gpu = device.type == "cuda"
    sizes = square(2048, 4096, 8192) if on_gpu else square(512, 1024, 2048)
    largest = 8192 if on_gpu else 4096
    budget = 0.5 if seconds is None else seconds
    return Workload(device, largest, sizes, sizes, budget, expected=expected)


def quantising(work: Workload) -> Iterator[Row]:
    """Every quantiser of every backend: x, x^T, and both in one call."""
    x = matrix(work.size, work.size).to(work.device)
    for name in QUANTISERS:
        case = quantiser(name)
        moved = case.bytes_moved(x)
        for backend in at_hand(work.device):
            if "quantize" not in backend.operations or backend.refuses("quantize", *case):
                continue

            # A copy of as many bytes takes turns with them: the bound of what moves memory.
            ms = work.time(
                {
                    "copy": copier(moved, work.device),
                    "rows": partial(backend.quantize, x, *case),
                    "columns": partial(backend.quantize, x.t(), *case),
                    "both": partial(backend.quantize_both, x, case, case),
                }
            )

            # "of a copy" is a share: 1 would be as fast as copying.
            row: Row = {"quantiser": name, "backend": backend.name, "ms": ms["rows"]}
            row |= {"GB/s": moved / ms["rows"] / 1e6, "of a copy": ms["copy"] / ms["rows"]}
            row |= {"transposed ms": ms["columns"], "both ms": ms["both"]}
            if work.expected is not None:
                seconds = moved / work.expected.memory_rate + work.expected.launch
                row["predicted ms"] = 1e3 * seconds
            yield row


def multiplying(work: Workload) -> Iterator[Row]:
    """x w^T to BF16 of codes that are there already, by every backend, and of BF16 by ``times``."""
    rtn = get_quantizer("rtn")
    for name, shape in work.gemms.items():
        x = matrix(shape.tokens, shape.in_features, seed=1).to(work.device)
        w = matrix(shape.out_features, shape.in_features, seed=2).to(work.device)

        # A backend that multiplies need not quantise, so the codes come from the first that does.
        makers = [*at_hand(work.device), BACKENDS["reference"]]
        maker = next(backend for backend in makers if "quantize" in backend.operations)
        a, b = maker.quantize(x, rtn, rtn.check()), maker.quantize(w, rtn, rtn.check())

        candidates: dict[str, Run] = {"bf16": partial(times, x, w.t())}
        for backend in at_hand(work.device):
            if "matmul" in backend.operations:
                candidates[backend.name] = partial(backend.matmul, a, b, torch.bfloat16)
        ms = work.time(candidates)

        flops = 2.0 * shape.tokens * shape.in_features * shape.out_features
        for which, value in ms.items():
            row: Row = {"GEMM": f"{name} ({shape})", "backend": which, "ms": value}
            row |= {"TFLOP/s": flops / value / 1e9, "speed-up over BF16": ms["bf16"] / value}
            if work.expected is not None:
                rate = work.expected.gemm_rate(which != "bf16")
                row["predicted ms"] = 1e3 * (flops / rate + work.expected.launch)
            yield row


def layers(work: Workload) -> Iterator[Row]:
    """Forward and backward of a linear layer, and the bytes it keeps in between."""
    for name, shape in work.layers.items():
        # Same x, dy and weight for every recipe.
        x = matrix(shape.tokens, shape.in_features, seed=1).to(work.device).requires_grad_()
        dy = matrix(shape.tokens, shape.out_features, seed=2).to(work.device)
        cases = {
            recipe: LayerCase(layer_for(shape, recipe, device=work.device), x, dy)
            for recipe in ("bf16", *work.recipes)
        }
        ms = work.time({recipe: case.step for recipe, case in cases.items()})
        saved = {recipe: case.saved_bytes() for recipe, case in cases.items()}

        for recipe, case in cases.items():
            row: Row = {"layer": f"{name} ({shape})", "recipe": recipe, "ms": ms[recipe]}
            row |= {"speed-up over BF16": ms["bf16"] / ms[recipe]}
            row |= {"saved MB": saved[recipe] / 1e6, "saved x BF16": saved[recipe] / saved["bf16"]}
            if work.device.type == "cuda":
                row["peak MB"] = _peak_bytes(case.step, work.device) / 1e6
            if work.expected is not None:
                row |= _predicted(recipe, shape, work.expected)
            yield row


def optimizer_steps(work: Workload) -> Iterator[Row]:
    """A step of two micro-batches with fused AdamW; a micro-batch has an eighth of the tokens."""
    name, shape = list(work.layers.items())[-1]
    recipe = work.recipes[-1]
    small = shape._replace(tokens=max(shape.tokens // 8, 1))
    x = matrix(small.tokens, small.in_features).to(work.device)

    # Twice the same layer; the second is told of its optimiser.
    candidates: dict[str, Run] = {}
    for when in ("in the forward", "after_step"):
        layer = layer_for(shape, recipe, device=work.device)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-6, fused=True)
        if when == "after_step":
            after_step(optimizer, layer)
        candidates[when] = partial(_train, layer, optimizer, x)
    ms = work.time(candidates)

    for when, value in ms.items():
        title = f"{name} ({small}), {recipe}"
        share = value / ms["in the forward"]
        yield {"layer": title, "weight quantised": when, "ms": value, "of the usual": share}


def _train(layer: nn.Linear, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    for _ in range(2):
        layer(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def _predicted(recipe: str, shape: Shape, device: Device) -> Row:
    layer = [Layer(shape.in_features, shape.out_features)]
    bf16, ours = (
        1e3 * sum(step_seconds(RECIPES[name], layer, shape.tokens, device).values())
        for name in ("bf16", recipe)
    )
    return {"predicted ms": ours, "predicted speed-up": bf16 / ours}


def _peak_bytes(step: Run, device: torch.device) -> int:
    """The most that a step allocates beside what is there before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


SECTIONS: dict[str, Callable[[Workload], Iterator[Row]]] = {
    "Quantisers": quantising,
    "GEMM on codes": multiplying,
    "Linear layer, forward and backward": layers,
    "Optimiser step": optimizer_steps,
}
"""By the heading in the report, in the order in which they run."""
