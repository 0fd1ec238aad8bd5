"""How fast: quantisers by backend against a copy, layers against BF16, in device milliseconds.

    medians(place, {"copy": copy, "rows": call}, seconds)
        each candidate becomes a replayed CUDA graph of ``REPEATS`` calls: the device's time alone
        candidates take turns, as everywhere (``nvfp4/bench/timing.py``), and the median is kept
    "eager": the same without a graph, so that the host counts where it is the slower one

Call i of a graph reads an operand of its own, ``REPEATS`` in turn: 4 x 37 MB of codes do not stay
in the 50 to 126 MB of an L2.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.gpu.checks import case_of
from benchmarks.gpu.processes import Job, Skip
from nvfp4.bench.cases import Shape, layer_for
from nvfp4.bench.measure import LayerCase
from nvfp4.bench.timing import Run, copier, interleaved, machine
from nvfp4.layer.dense import times
from nvfp4.model.switches import capturable
from nvfp4.numerics.qtensor import QTensor
from nvfp4.ops import explain
from nvfp4.quantizers.registry import get_quantizer

REPEATS = 4
"""Calls between two events: a replay costs some microseconds beside its kernels."""

SIDE = 8192
"""Rows and columns of the matrices whose rate is taken: 134 MB of BF16, beyond every L2."""

SECONDS = 0.35
"""For each candidate: at 0.2 to 10 ms per call, hundreds of samples or more."""

Call = Callable[[int], Any]
"""Takes the number of the call, 0 to REPEATS - 1, which says what operand it reads."""


def machine_facts(job: Job) -> None:
    """Card, clocks, versions, commit; the rates that all is held against; clocks under load."""
    place = job.settings.place
    for key, value in machine(place.device).items():
        job.add(what=key, value=value)

    n, nbytes = place.size(SIDE), place.size(1 << 15) * place.size(1 << 16)
    a, b = (_normal(place, n) for _ in range(2))
    copy = copier(nbytes, place.device)
    ms = medians(place, {"copy": lambda i: copy(), "gemm": lambda i: times(a, b)}, 0.6)
    job.add(what="copy, GB/s read and written", value=nbytes / ms["copy"] / 1e6)
    job.add(what=f"BF16 GEMM of {n}, TFLOP/s", value=2 * n**3 / ms["gemm"] / 1e9)

    for key, value in machine(place.device).items():
        if "clock" in key:
            job.add(what=f"{key} after load", value=value)


def _normal(place: Any, n: int) -> torch.Tensor:
    """BF16 [n, n], made on the device: on the host 67 million normal numbers take a second."""
    return torch.randn(n, n, device=place.device).bfloat16()


def quantising(job: Job, backend: str, name: str, both: bool) -> None:
    """Rows of one BF16 matrix against a copy of the bytes that they must move.

    both: also columns, and rows and columns in one call. "one read over two" is how much longer
    rows and columns take one after the other.
    """
    place = job.settings.place
    chip, case = place.backend(backend), case_of(name)
    if chip.refuses("quantize", *case) is not None:
        raise Skip(f"{backend} does not quantise {name}")

    xs = [_normal(place, place.size(SIDE)) for _ in range(REPEATS)]
    nbytes = case.bytes_moved(xs[0])
    copy = copier(nbytes, place.device)
    runs: dict[str, Call] = {
        "copy": lambda i: copy(),
        "rows": lambda i: chip.quantize(xs[i], *case),
    }
    if both:
        runs["columns"] = lambda i: chip.quantize(xs[i].t(), *case)
        runs["both"] = lambda i: chip.quantize_both(xs[i], case, case)
    ms = medians(place, runs, SECONDS)

    # "rows / copy" is the share of the copy's bandwidth: 1 would be as fast as copying.
    row = {"what": "both" if both else "rows", "quantiser": name, "backend": backend}
    row |= {"MB": nbytes / 1e6} | {f"{key} ms": value for key, value in ms.items()}
    row["rows / copy"] = ms["copy"] / ms["rows"]
    if both:
        row["one read over two"] = (ms["rows"] + ms["columns"]) / ms["both"]
    job.add(**row)


def from_codes(job: Job, backend: str, name: str | None) -> None:
    """Codes and tile scales quantised again by a quantiser, or with None decoded to BF16."""
    place = job.settings.place
    chip = place.backend(backend)
    if name is not None and chip.refuses("quantize", *case_of(name)) is not None:
        raise Skip(f"{backend} does not quantise {name}")
    n = place.size(SIDE)
    tiles = get_quantizer("rtn_2d")
    qs: list[QTensor] = [
        chip.quantize(_normal(place, n), tiles, tiles.check()) for _ in range(REPEATS)
    ]

    call: Call
    if name is None:
        what, case = "decode", case_of("rtn")
        moved = case.code_bytes(n * n) + 2 * n * n
        call = lambda i: chip.dequantize(qs[i], torch.bfloat16)  # noqa: E731
    else:
        what, case = "requantise", case_of(name)
        moved = case.code_bytes(n * n) * (case.reads + 1)
        call = lambda i: chip.requantize(qs[i], *case)  # noqa: E731
    copy = copier(int(moved), place.device)
    ms = medians(place, {"copy": lambda i: copy(), what: call}, SECONDS)

    row = {"what": what, "quantiser": name or "-", "backend": backend, "MB": moved / 1e6}
    row |= {"copy ms": ms["copy"], "ms": ms[what], "of copy": ms["copy"] / ms[what]}
    job.add(**row)


def multiplying(job: Job, size: int) -> None:
    """The FP4 product with each tile, and decoded to BF16 first, against the vendor's BF16 GEMM."""
    place = job.settings.place
    n = place.size(size)
    rtn = get_quantizer("rtn")
    a, b = (_normal(place, n) for _ in range(2))
    qa, qb = (place.backend("triton").quantize(x, rtn, rtn.check()) for x in (a, b))

    runs: dict[str, Call] = {"bf16": lambda i: times(a, b.t())}
    for name, multiply in place.gemms().items():
        runs[name] = lambda i, multiply=multiply: multiply(qa, qb, torch.bfloat16)

    # cuBLASLt's own, where the card has FP4 tensor cores.
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
    """Forward and backward of a ``capturable`` layer without bias against BF16's.

    Eager and as a replayed graph, what the host takes to ask for it, the bytes kept in between, and
    the longest kernels of a step.
    """
    place = job.settings.place
    n = place.size(size)
    x, dy = _normal(place, n).requires_grad_(), _normal(place, n)
    cases = {}
    for name in dict.fromkeys(("bf16", recipe)):
        layer = layer_for(Shape(n, n, n), name, device=place.device)
        if name != "bf16":
            capturable(layer)
        cases[name] = LayerCase(layer, x, dy)
    mine = cases[recipe]

    # Eager is what a training loop sees; a graph shows what the device alone needs.
    runs: dict[str, Call] = {name: lambda i, case=case: case.step() for name, case in cases.items()}
    eager = medians(place, runs, SECONDS, graph=False)
    device = medians(place, runs, SECONDS)
    saved = {name: case.saved_bytes() for name, case in cases.items()}
    row = {"size": size, "recipe": recipe, "ms": eager[recipe]}
    row |= {"x bf16": eager[recipe] / eager["bf16"], "ms of graph": device[recipe]}
    row |= {"x bf16 of graph": device[recipe] / device["bf16"]}
    row |= {"host us": host_us(place, mine.step)}
    row |= {"saved x bf16": saved[recipe] / saved["bf16"], "bf16 ms": eager["bf16"]}
    job.add(**row)

    # Where a step's time goes, if it is not where it should.
    for kernel, calls, us in place.profile(mine.step)[:14]:
        job.add(size=size, recipe=recipe, kernel=kernel[:70], calls=calls, us=us)
    if recipe != "bf16":
        picked = explain("matmul", place.device).replace("\n", "; ")
        job.add(size=size, recipe=recipe, matmul=picked)


def one_more_layer(job: Job, recipe: str) -> None:
    """Bytes by which the peak of training grows with each further application of one layer."""
    place = job.settings.place
    n = place.size(4096)
    layer = layer_for(Shape(n, n, n), recipe, device=place.device)
    x = _normal(place, n).requires_grad_()

    def train(depth: int) -> None:
        y = x
        for _ in range(depth):
            # 1.7 keeps the size of the numbers; the product with a number keeps nothing
            y = layer(y) * 1.7
        y.sum().backward()

    peaks = []
    for depth in (2, 10):
        train(depth)
        peaks.append(place.peak_bytes(lambda depth=depth: train(depth)))
    job.add(recipe=recipe, **{"MB for one more layer": (peaks[1] - peaks[0]) / 8 / 1e6})


def medians(
    place: Any, candidates: Mapping[str, Call], seconds: float, graph: bool = True
) -> dict[str, float]:
    """Median milliseconds of a call of each candidate, all taking turns.

    seconds: per candidate. graph: of a replayed graph of ``REPEATS`` calls; else of as many plain
    ones. Raises where a candidate cannot be captured: time with host gaps in it would not be the
    device's.
    """
    replays: dict[str, Run] = {}
    for name, call in candidates.items():

        def several(call: Call = call) -> None:
            for i in range(REPEATS):
                call(i)

        place.warm(several)
        replays[name] = place.capture(several)[1] if graph else several

    # a rehearsal runs everything once: its times mean nothing
    least = 5 if place.kind == "gpu" else 1
    ms = interleaved(replays, place.seconds(seconds), least, place.timed)
    return {name: value / REPEATS for name, value in ms.items()}


def host_us(place: Any, run: Run, calls: int = 20) -> float:
    """Microseconds that the host takes to ask for one call, without waiting for it: the least."""
    least = float("inf")
    for _ in range(calls):
        place.synchronize()
        start = time.perf_counter()
        run()
        least = min(least, time.perf_counter() - start)
    return least * 1e6
