"""What the two calls do, in the order of importance, as data: stages, and units in each.

    call 1  machine, smoke (each backend once), rates, linear, graphs, large (2^31 elements)
    call 2  machine, tests, sanitizer, counters, others (dtypes, shapes, recipes)

The limits of stages, in seconds, sum to less than the call's budget, so no stage can take a later
one's time; one that ends early hands what is left to the next. Where the expected times come from:
``plan.py``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import product

from benchmarks.gpu.processes import Stage, Unit
from nvfp4.bench.cases import QUANTISERS

BUDGET_MINUTES = {1: 5.0, 2: 6.0}

RESERVE = 10.0
"""Seconds of a call kept back for starting the server of processes, ending them, and the report."""

WORKERS = max(2, min(16, os.cpu_count() or 2))
"""Processes at once where compiling takes the time: the cores, 16 on the machine on loan."""

ALIGNED, RAGGED = (256, 512), (17, 33)
OTHER_SHAPES = ((130, 100), (5, 270), (1, 1))
DEFAULT_RECIPE = "search_eden"
RECIPES = ("bf16", "nvidia", "quartet2", DEFAULT_RECIPE)
QUANTIZER_NAMES = ("rtn", "rtn_2d", "sr", "sr_te", "four_over_six", "scale_search", "ms_eden")

DECODED_SHAPES = ((512, 768, 1024), (37, 150, 100), (257, 130, 96))
"""M, N, K of what ``matmul_decoded`` and each tile multiply.

Whole tiles; ragged in all three; ragged in the rows.
"""

PRODUCT_SHAPES = ((256, 512, 256), (257, 130, 96), (1, 513, 272), (1, 1, 1), (3000, 2000, 512))
MOST_WAYS = 5
"""Tiles of the FP4 GEMM that the card with most of them has, and decoding first."""

BACKGROUND = (
    Unit("build _cuda", "build:build", (), 110),
    Unit("build _cpu", "build:build_cpu", (), 240),
)
"""What goes on beside the stages."""


def stages(call: int) -> tuple[Stage, ...]:
    """The stages of a call, 1 or 2."""
    return _first() if call == 1 else _second()


MACHINE = Stage("machine", 18, 1, (Unit("card and clocks", "rates:machine_facts", (), 60),))


def _first() -> tuple[Stage, ...]:
    return (
        MACHINE,
        Stage("smoke", 90, WORKERS, tuple(_smoke())),
        Stage("rates", 66, 1, tuple(_rates())),
        Stage("linear", 62, 1, tuple(_linear())),
        Stage("graphs", 36, WORKERS, tuple(_graphs())),
        Stage("large", 16, 1, tuple(_large())),
    )


def _second() -> tuple[Stage, ...]:
    return (
        MACHINE,
        Stage("tests", 130, 1, (Unit("pytest", "tools:tests", (), 600, True),)),
        Stage("sanitizer", 70, 4, tuple(_sanitizer())),
        Stage("counters", 55, 1, tuple(_counters())),
        Stage("others", 75, WORKERS, tuple(_others())),
    )


def _quantise(backend: str, name: str, shape: tuple[int, int], dtype: str) -> Unit:
    title = f"{backend} quantise {name} {shape[0]}x{shape[1]} {dtype}"
    return Unit(title, "checks:quantise", (backend, name, shape, dtype), 60, backend == "cuda")


def _smoke() -> Iterator[Unit]:
    """Triton compiles while ``_cuda`` is built.

    C++ compiles nothing, and comes as soon as it is there.
    """
    for name in QUANTISERS:
        yield _quantise("cuda", name, ALIGNED, "bf16")
        yield _quantise("cuda", name, RAGGED, "bf16")
    for name in QUANTISERS:
        yield _quantise("triton", name, ALIGNED, "bf16")

    # Products: each tile of the card, and decoding first.
    for index in range(MOST_WAYS):
        title = "matmul_decoded" if index == 0 else f"GEMM tile {index}"
        yield Unit(title, "checks:way_to_multiply", (index, DECODED_SHAPES), 60)

    # Self-checks of what training will ask for, which also compile it.
    for operation in ("matmul", "dequantize", "transpose", "draw_seeds", "grouped_matmul"):
        yield Unit(f"explain {operation}", "checks:explained", (operation, None), 60)
    for name in QUANTIZER_NAMES:
        yield Unit(f"explain quantize {name}", "checks:explained", ("quantize", name), 80, True)
    for name in QUANTISERS:
        yield _quantise("triton", name, RAGGED, "bf16")

    # Then whole layers, which use all of the above.
    for backend, recipe in product(("triton", "cuda"), RECIPES[1:]):
        arguments = (backend, recipe, "bf16", False)
        yield Unit(
            f"{backend} layer {recipe} bf16", "layers:layer", arguments, 60, backend == "cuda"
        )
    for name in ("four_over_six", "scale_search", "rtn"):
        yield Unit(f"explain activation {name}", "checks:explained", ("activation", name), 60)


RATED = ("rtn", "ms_eden(2)", "four_over_six", "ms_eden(1)", "scale_search", "ms_eden(2, search)")
RATED_BOTH = ("rtn", "ms_eden(1)")


def _rates() -> Iterator[Unit]:
    for name, backend in product(RATED[:4], ("cuda", "triton")):
        yield _rate(backend, name, name in RATED_BOTH)
    for size in (8192, 4096):
        yield Unit(f"GEMM {size}", "rates:multiplying", (size,), 40)
    for what, backend in product((None, "ms_eden(1)"), ("cuda", "triton")):
        title = f"{backend} decode" if what is None else f"{backend} requantise {what}"
        yield Unit(title, "rates:from_codes", (backend, what), 30, backend == "cuda")
    for name, backend in product(RATED[4:], ("cuda", "triton")):
        yield _rate(backend, name, False)


def _rate(backend: str, name: str, both: bool) -> Unit:
    title = f"{backend} {'both' if both else 'rows'} {name}"
    return Unit(title, "rates:quantising", (backend, name, both), 30, backend == "cuda")


def _linear() -> Iterator[Unit]:
    for size, recipe in product((8192, 4096), RECIPES):
        yield Unit(f"linear {size} {recipe}", "rates:linear", (size, recipe), 45, True)
    for recipe in RECIPES:
        yield Unit(f"memory {recipe}", "rates:one_more_layer", (recipe,), 30, True)


GRAPHED = ("rtn", "sr", "ms_eden(2)", "four_over_six", "rtn row-scaled")


def _graphs() -> Iterator[Unit]:
    backends = ("cuda", "triton")
    for backend, recipe in product(backends, RECIPES[1:3]):
        needs = backend == "cuda"
        for title, function in (
            ("graph of layer", "layers:graph_of_layer"),
            ("waits for nothing", "layers:waits_for_nothing"),
            ("two streams", "layers:streams"),
            ("torch.compile", "layers:compiled_layer"),
        ):
            yield Unit(f"{backend} {title} {recipe}", function, (backend, recipe), 60, needs)

    # Quantisers alone, so that a layer's fault can be told from one of theirs.
    for name, backend in product(GRAPHED, backends):
        arguments = (backend, name)
        yield Unit(
            f"{backend} graph of {name}",
            "layers:graph_of_quantiser",
            arguments,
            45,
            backend == "cuda",
        )
    yield Unit("triton compiles once", "layers:compiles_once", ("triton", "quartet2"), 60)


def _large() -> Iterator[Unit]:
    for what, backends in (
        ("rows", ("cuda", "triton")),
        ("columns", ("cuda", "triton")),
        ("product", ("scaled_mm", "triton")),
    ):
        for backend in backends:
            arguments = (backend, what)
            yield Unit(f"{backend} 2^31 {what}", "checks:large", arguments, 30, backend == "cuda")


def _sanitizer() -> Iterator[Unit]:
    for tool, backend in (
        ("memcheck", "cuda"),
        ("racecheck", "cuda"),
        ("memcheck", "triton"),
        ("racecheck", "triton"),
    ):
        yield Unit(f"{tool} {backend}", "tools:sanitizer", (tool, backend), 120, backend == "cuda")


def _counters() -> Iterator[Unit]:
    for what, backend in product(("rtn", "ms_eden", "both", "amax"), ("cuda", "triton")):
        yield Unit(
            f"ncu {backend} {what}", "tools:counters", (backend, what), 60, backend == "cuda"
        )


def _others() -> Iterator[Unit]:
    """The other dtypes and shapes, views, products, layers of every recipe: with what is left."""
    backends = ("cuda", "triton")
    for dtype, backend, name in product(("f32", "f16"), backends, QUANTISERS):
        yield _quantise(backend, name, RAGGED if dtype == "f32" else ALIGNED, dtype)

    # Products of every combination, then views that are not aligned.
    for shape, backend in product(PRODUCT_SHAPES, ("scaled_mm", "triton")):
        title = f"{backend} product {'x'.join(map(str, shape))}"
        yield Unit(title, "checks:product_of", (backend, shape), 90)
    for name, backend in product(("rtn", "sr"), backends):
        yield Unit(
            f"{backend} misaligned {name}",
            "checks:misaligned",
            (backend, name),
            60,
            backend == "cuda",
        )

    # Every recipe in float32, with and without autocast.
    for recipe, backend in product(
        ("rl", "rtn", "four_over_six", "tetrajet2", *RECIPES[1:]), backends
    ):
        for dtype, autocast in (("f32", False), ("f32", True)):
            title = f"{backend} layer {recipe} {dtype}{' autocast' if autocast else ''}"
            arguments = (backend, recipe, dtype, autocast)
            yield Unit(title, "layers:layer", arguments, 60, backend == "cuda")
    for shape, backend, name in product(OTHER_SHAPES, backends, QUANTISERS):
        yield _quantise(backend, name, shape, "bf16")
