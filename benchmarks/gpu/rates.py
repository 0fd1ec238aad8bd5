"""How fast: quantisers by backend against a copy, layers against BF16, in milliseconds of the device.

Candidates of a unit take turns and the median is kept. Device time is that of a replayed graph of ``REPEATS`` calls
between two events; "eager" is the same without a graph, so that the host counts where it is the slower one. Each call
of a graph reads an operand of its own, four in turn: 4 x 37 MB of codes do not stay in the 50 to 126 MB of an L2.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.gpu.checks import chosen
from benchmarks.gpu.processes import Job, Skip
from nvfp4.bench.cases import Shape
from nvfp4.bench.layers import layer_for, saved_bytes
from nvfp4.bench.timing import copier, machine
from nvfp4.model.weights import capturable, invalidate
from nvfp4.numerics.qtensor import QTensor
from nvfp4.ops import explain
from nvfp4.quantizers.registry import get_quantizer

REPEATS = 4
"""Calls between two events: a replay costs some microseconds beside its kernels."""

SIDE = 8192
"""Rows and columns of the matrices whose rate is taken: 134 MB of BF16, beyond every L2."""

SECONDS = 0.35
"""For each candidate: at 0.2 to 10 ms a call, hundreds of samples or more."""

CODE_BYTES = 9 / 16
"""Per element: 4 bits and a sixteenth of a scale."""

Call = Callable[[int], Any]
"""Takes the number of the call, 0 to REPEATS - 1, which says what operand it reads."""


def machine_facts(job: Job) -> None:
    """Card, clocks, versions and commit, and the two rates that everything is held against, clocks again under load."""
    place = job.settings.place
    facts = machine(place.device)
    for key, value in facts.items():
        job.add(what=key, value=value)

    n, nbytes = place.size(SIDE), place.size(1 << 15) * place.size(1 << 16)
    a, b = (torch.randn(n, n, device=place.device).bfloat16() for _ in range(2))
    copy = copier(nbytes, place.device)
    ms = medians(place, {"copy": lambda i: copy(), "gemm": lambda i: a @ b}, 0.6)
    job.add(what="copy, GB/s read and written", value=nbytes / ms["copy"] / 1e6)
    job.add(what=f"BF16 GEMM of {n}, TFLOP/s", value=2 * n**3 / ms["gemm"] / 1e9)
    for key, value in machine(place.device).items():
        if "clock" in key:
            job.add(what=f"{key} after load", value=value)


def quantising(job: Job, backend: str, name: str, both: bool) -> None:
    """Rows of one BF16 matrix, or with ``both`` rows, columns, and both in one call; against a copy of the bytes that
    rows must move. What "one read over two" says is how much longer rows and columns take one after the other."""
    place = job.settings.place
    chip = place.backend(backend)
    quantizer, options = pair = chosen(name)
    if chip.refuses("quantize", quantizer, options) is not None:
        raise Skip(f"{backend} does not quantise {name}")
    n = place.size(SIDE)
    xs = [torch.randn(n, n, device=place.device).bfloat16() for _ in range(REPEATS)]
    reads = 1 if quantizer.rotates or options.row_scaled else 2  # the others look for amax first
    nbytes = int(n * n * (2 * reads + CODE_BYTES))
    copy = copier(nbytes, place.device)

    runs: dict[str, Call] = {"copy": lambda i: copy(), "rows": lambda i: chip.quantize(xs[i], *pair)}
    if both:
        runs["columns"] = lambda i: chip.quantize(xs[i].t(), *pair)
        runs["both"] = lambda i: chip.quantize_both(xs[i], pair, pair)
    ms = medians(place, runs, SECONDS)
    row = {"what": "both" if both else "rows", "quantiser": name, "backend": backend, "MB": nbytes / 1e6}
    row |= {f"{key} ms": value for key, value in ms.items()}
    row["rows / copy"] = ms["copy"] / ms["rows"]
    if both:
        row["one read over two"] = (ms["rows"] + ms["columns"]) / ms["both"]
    job.add(**row)


def from_codes(job: Job, backend: str, name: str | None) -> None:
    """Codes and tile scales quantised again by a quantiser, or with None decoded to BF16; against a copy."""
    place = job.settings.place
    chip = place.backend(backend)
    if name is not None and chip.refuses("quantize", *chosen(name)) is not None:
        raise Skip(f"{backend} does not quantise {name}")
    n = place.size(SIDE)
    tiles = get_quantizer("rtn_2d")
    options = tiles.check()
    makers = [torch.randn(n, n, device=place.device).bfloat16() for _ in range(REPEATS)]
    qs: list[QTensor] = [chip.quantize(x, tiles, options) for x in makers]
    del makers

    if name is None:
        nbytes = int(n * n * (CODE_BYTES + 2))
        call: Call = lambda i: chip.dequantize(qs[i], torch.bfloat16)  # noqa: E731
    else:
        quantizer, checked = chosen(name)
        reads = 1 if quantizer.rotates else 2
        nbytes = int(n * n * CODE_BYTES * (reads + 1))
        call = lambda i: chip.requantize(qs[i], quantizer, checked)  # noqa: E731
    copy = copier(nbytes, place.device)
    what = "decode" if name is None else "requantise"
    ms = medians(place, {"copy": lambda i: copy(), what: call}, SECONDS)
    row = {"what": what, "quantiser": name or "-", "backend": backend, "MB": nbytes / 1e6}
    job.add(**row, **{"copy ms": ms["copy"], "ms": ms[what], "of copy": ms["copy"] / ms[what]})


def multiplying(job: Job, size: int) -> None:
    """The FP4 product with each tile, and decoded to BF16 first, against the vendor's BF16 GEMM."""
    place = job.settings.place
    n = place.size(size)
    ways = place.gemms()
    rtn = get_quantizer("rtn")
    a, b = (torch.randn(n, n, device=place.device).bfloat16() for _ in range(2))
    qa, qb = (place.backend("triton").quantize(x, rtn, rtn.check()) for x in (a, b))
    runs: dict[str, Call] = {"bf16": lambda i: a @ b.t()}
    for name, multiply in ways.items():
        runs[name] = lambda i, multiply=multiply: multiply(qa, qb, torch.bfloat16)
    if not _missing(place, "scaled_mm"):
        scaled = place.backend("scaled_mm")
        runs["scaled_mm"] = lambda i: scaled.matmul(qa, qb, torch.bfloat16)
    ms = medians(place, runs, SECONDS)
    for name, value in ms.items():
        rate = 2 * n**3 / value / 1e9
        job.add(size=size, gemm=name, ms=value, **{"TFLOP/s": rate, "x bf16": value / ms["bf16"]})


def _missing(place: Any, backend: str) -> bool:
    try:
        place.backend(backend)
    except Skip:
        return True
    return False


def linear(job: Job, size: int, recipe: str) -> None:
    """Forward and backward of a ``capturable`` layer without bias, its weight quantised anew, against BF16's: eager
    and as a replayed graph, what the host takes to ask for it, and the bytes it keeps in between."""
    place = job.settings.place
    n = place.size(size)
    x = torch.randn(n, n, device=place.device).bfloat16().requires_grad_()
    dy = torch.randn(n, n, device=place.device).bfloat16()
    layers = {name: layer_for(Shape(n, n, n), name, device=place.device) for name in {"bf16": 0, recipe: 0}}
    for name, layer in layers.items():
        if name != "bf16":
            capturable(layer)

    def step(layer: torch.nn.Linear) -> Any:
        invalidate(layer)  # an optimiser's step lies between two calls in training
        return torch.autograd.grad(layer(x), (x, layer.weight), dy)

    runs: dict[str, Call] = {name: lambda i, layer=layer: step(layer) for name, layer in layers.items()}
    eager = medians(place, runs, SECONDS, graph=False)
    device = medians(place, runs, SECONDS)
    kept = {name: saved_bytes(layer, x) for name, layer in layers.items()}
    row = {"size": size, "recipe": recipe, "ms": eager[recipe], "x bf16": eager[recipe] / eager["bf16"]}
    row |= {"ms of graph": device[recipe], "x bf16 of graph": device[recipe] / device["bf16"]}
    row |= {"host us": host_us(place, lambda: step(layers[recipe]))}
    row |= {"saved x bf16": kept[recipe] / kept["bf16"], "bf16 ms": eager["bf16"]}
    job.add(**row)
    for kernel, calls, us in place.profile(lambda: step(layers[recipe]))[:14]:
        job.add(size=size, recipe=recipe, kernel=kernel[:70], calls=calls, us=us)
    if recipe != "bf16":
        picked = explain("matmul", place.device).replace("\n", "; ")
        job.add(size=size, recipe=recipe, matmul=picked)


def one_more_layer(job: Job, recipe: str) -> None:
    """Bytes by which the peak of training grows with each further application of one layer."""
    place = job.settings.place
    n = place.size(4096)
    layer = layer_for(Shape(n, n, n), recipe, device=place.device)
    x = torch.randn(n, n, device=place.device).bfloat16().requires_grad_()

    def train(depth: int) -> None:
        y = x
        for _ in range(depth):
            y = layer(y) * 1.7  # keeps the size of the numbers; the product with a number keeps nothing
        y.sum().backward()

    peaks = []
    for depth in (2, 10):
        train(depth)
        peaks.append(place.peak_bytes(lambda depth=depth: train(depth)))
    job.add(recipe=recipe, **{"MB for one more layer": (peaks[1] - peaks[0]) / 8 / 1e6})


def medians(place: Any, candidates: Mapping[str, Call], seconds: float, graph: bool = True) -> dict[str, float]:
    """Median milliseconds of a call of each candidate, all taking turns for ``seconds`` per candidate.

    graph: of a replayed graph of ``REPEATS`` calls; else of as many plain ones. Raises where a candidate cannot be
    captured: time with host gaps in it would not be the device's.
    """
    replays: dict[str, Callable[[], Any]] = {}
    for name, call in candidates.items():

        def several(call: Call = call) -> None:
            for i in range(REPEATS):
                call(i)

        place.warm(several)
        replays[name] = place.capture(several)[1] if graph else several
    place.synchronize()

    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + place.seconds(seconds) * len(candidates)
    least = 5 if place.kind == "gpu" else 1
    while time.perf_counter() < end or min(map(len, times.values())) < least:
        pending = {}
        for name, replay in replays.items():
            place.synchronize()
            pending[name] = place.timed(replay)
        place.synchronize()
        for name, ms in pending.items():
            times[name].append(ms() / REPEATS)
    return {name: statistics.median(values) for name, values in times.items()}


def host_us(place: Any, run: Callable[[], Any], calls: int = 20) -> float:
    """Microseconds that the host takes to ask for one call, without waiting for it: the least of some."""
    least = float("inf")
    for _ in range(calls):
        place.synchronize()
        start = time.perf_counter()
        run()
        least = min(least, time.perf_counter() - start)
    return least * 1e6
