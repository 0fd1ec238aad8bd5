"""What others measured on their cards, beside what the roofline says of the same work.

    published.json    figures with their sources; counts of the kernels that they are of, compiled
                      from the sources their authors published
    Figure.predicted  the same quantity by ``roofline.py``, with the constants of all other rows
    rows              predicted, published, and the ratio

Nothing is fitted to a row. What differs between rows beside work and card is how a time was taken,
and what that adds is one number per method (``OVERHEADS``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nvfp4.bench.devices import DEVICES, Device
from nvfp4.bench.issue import Counted, table_of
from nvfp4.bench.roofline import (
    BF16_BITS,
    MODELS,
    PUBLISHED,
    PUBLISHED_TOKENS,
    Kernel,
    Layer,
    Traffic,
    layer_kernels,
    step_seconds,
)
from nvfp4.bench.tables import Row
from nvfp4.recipes import RECIPES

FIGURES = Path(__file__).parent / "published.json"

NEAR = 0.15
"""A prediction this close to a figure, as a share of it, counts as met."""

OVERHEADS = {"events": 6.3e-6, "kernel": 2e-6, "graph": 1.5e-6, "none": 0.0}
"""Seconds that a way of timing adds to a kernel.

events: of ``triton.testing.do_bench``, what copies of four sizes on a GB200 leave at no bytes
(pytorch/ao PR 4247: 12.13, 16.38, 24.58, 42.85 us of 33.6, 67.1, 117.4, 234.9 MB). kernel: a
profiler's device time, which is less than events by 3 to 6 us in the same project's tables. graph:
replays of a CUDA graph, where vLLM's smallest quantisations take 1.1 us on an RTX 5090 and 1.8 us
on a B200 (PR 43658). none: rates of sizes at which none of that shows.
"""

BYTES_ALONE = Traffic("others'", True, frozenset({"x", "w", "dy"}), kernels="")
"""Kernels that nobody counted: each tensor read once for its amax and once for both copies."""


@dataclass(frozen=True)
class Figure:
    """One published number. work: what it is of, by ``kind``; unit: "us", "TB/s", "ms" or "x"."""

    what: str
    kind: str
    card: str
    unit: str
    published: float
    source: str
    work: Mapping[str, Any]

    @property
    def device(self) -> Device:
        """The card that it was measured on."""
        return DEVICES[self.card]

    def predicted(self) -> float:
        """The same quantity, by the roofline."""
        return _PREDICTIONS[self.kind](self)

    def bound(self) -> str:
        """What decides the prediction, where one kernel is meant."""
        return _kernel(self).bound(self.device) if self.kind == "kernel" else ""

    def row(self) -> Row:
        """A line of the table."""
        predicted = self.predicted()
        line: Row = {"what": self.what, "card": self.card, "unit": self.unit}
        line |= {"predicted": predicted, "published": self.published}
        return line | {"ratio": predicted / self.published, "bound by": self.bound()}


def _kernel(figure: Figure) -> Kernel:
    work = figure.work
    elements = float(work["rows"]) * float(work["columns"])
    moved = elements * float(work["bits"]) / 8
    return Kernel(figure.what, "", 0.0, moved, counted=str(work["kernel"]), elements=elements)


def _of_kernel(figure: Figure) -> float:
    """Microseconds of one kernel, or the rate of its bytes."""
    kernel, device = _kernel(figure), figure.device
    seconds = max(kernel.terms(device).values()) + OVERHEADS[str(figure.work["timed"])]
    return kernel.bytes / seconds / 1e12 if figure.unit == "TB/s" else 1e6 * seconds


def _of_layers(figure: Figure) -> float:
    """A block's forward and backward by Quartet II's kernels: milliseconds, or over BF16.

    Their script calls backward again and again without clearing gradients, so that torch adds dx
    and dw to what is there; in BF16 alike.
    """
    layers, device = MODELS[str(figure.work["model"])], figure.device

    def seconds(name: str) -> float:
        parts = step_seconds(RECIPES[name], layers, PUBLISHED_TOKENS, device, PUBLISHED)
        return sum(parts.values()) + added

    gradients = sum(PUBLISHED_TOKENS * k + n * k for k, n in layers)
    added = 3 * BF16_BITS / 8 * gradients / device.memory_rate + 2 * len(layers) * device.launch
    if figure.unit == "x":
        return seconds("bf16") / seconds("quartet2")
    return 1e3 * seconds("quartet2")


def _of_training(figure: Figure) -> float:
    """Tokens per second over BF16's, of a whole step whose other parts stay as they are.

    work: BF16's tokens per second, the layers of a block, how many blocks, and of them how many
    are quantised.
    """
    work, device = figure.work, figure.device
    layers = [Layer(*each) for each in work["layers"]]
    tokens = int(work["tokens"])

    def seconds(name: str) -> float:
        """Of one block, per token."""
        traffic = BYTES_ALONE
        return sum(step_seconds(RECIPES[name], layers, tokens, device, traffic).values()) / tokens

    whole = 1 / float(work["bf16"])
    saved = (seconds("bf16") - seconds("nvidia")) * int(work["quantized_blocks"])
    return whole / (whole - saved)


def _of_product(figure: Figure) -> float:
    """Quantising x and multiplying, over the product alone: TFLOP/s of both."""
    work, device = figure.work, figure.device
    m, n, k = (int(work[name]) for name in ("m", "n", "k"))
    layer = next(each for each in layer_kernels(RECIPES["rtn"], Layer(k, n), m) if each.flops)
    return layer.flops / layer.seconds(device) / 1e12


_PREDICTIONS = {
    "kernel": _of_kernel,
    "layers": _of_layers,
    "training": _of_training,
    "product": _of_product,
}


@cache
def figures() -> tuple[Figure, ...]:
    """All of published.json."""
    data = json.loads(FIGURES.read_text())
    return tuple(Figure(**each) for each in data["figures"])


@cache
def others() -> dict[tuple[str, int], Counted]:
    """Counts of others' kernels, by name and compute capability."""
    return table_of(json.loads(FIGURES.read_text()))


def rows() -> Iterator[Row]:
    """Every figure with its prediction."""
    return (figure.row() for figure in figures())
