"""What one call of a small layer costs beside its kernels: Python, autograd, allocation.

    us beside kernels = us of the whole call - us within native kernels

Each call is timed twice: whole, in turns with the other recipes', and then with a stop-watch around
every native kernel; the difference is what lies beside them. One thread. Asking every backend for
every operation was once a sixth of such a step (1274 -> 1069 us without, at 32 x 64 -> 64 in
quartet2, loaded machine). ``python -m benchmarks.bench_overhead --help`` lists the options.

    --nothing    the Triton backend over a driver that launches nothing: what the host does on a
                 GPU but for the driver itself, and how many kernels it launches. Tensors lie on
                 the CPU, results are whatever memory held, and torch's own operators compute.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch

import nvfp4.backends.native.cpu as cpu
from benchmarks.gpu.stand_in import NoDriver, compile_nothing, launch_nothing
from benchmarks.harness import options, show
from nvfp4.backends.registry import AUTO
from nvfp4.bench.cases import Shape, layer_for, matrix
from nvfp4.bench.tables import Row
from nvfp4.bench.timing import Run, interleaved
from nvfp4.recipes import RECIPES

KERNELS = ("quantize", "quantize_both", "matmul", "decode", "fingerprint")
CALLS = ("forward", "forward + backward")

CARD = (90, 132)
"""Compute capability and multiprocessors of the card that is not there: an H100."""

LAUNCHING = ("fill_", "zero_", "copy_", "sum", "add", "add_", "mul", "mm", "cat", "amax")
"""Operators of torch that launch a kernel on a GPU, of those that a layer may call."""


class Timed:
    """The native module, adding up the time within its kernels."""

    def __init__(self, native: Any) -> None:
        self.native, self.nanoseconds = native, 0

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.native, name)
        return self._timed(attribute) if name in KERNELS else attribute

    def _timed(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.perf_counter_ns()
            result = kernel(*args)
            self.nanoseconds += time.perf_counter_ns() - start
            return result

        return run


def in_kernels(run: Run, times: int = 300) -> float:
    """Microseconds of one ``run`` within native kernels, mean."""
    native, timed = cpu.native, Timed(cpu.native)
    cpu.native = timed  # type: ignore[assignment]
    try:
        for _ in range(times):
            run()
    finally:
        cpu.native = native
    return timed.nanoseconds / times / 1e3


def launches(run: Run, driver: NoDriver) -> tuple[int, int]:
    """Triton's launches of one ``run``, and torch's, once kernels and scratch memory are there."""
    run()
    before = driver.launched
    with torch.autograd.profiler.profile() as profile:
        run()
    operators = [str(event.name).removeprefix("aten::") for event in profile.function_events]
    return driver.launched - before, sum(name in LAUNCHING for name in operators)


def calls(recipe: str, shape: Shape, backend: str = AUTO) -> dict[str, Run]:
    """A forward without gradients, and a forward and backward, of one layer."""
    layer = layer_for(shape, recipe, backend)
    x = matrix(shape.tokens, shape.in_features, seed=1).requires_grad_()
    dy = matrix(shape.tokens, shape.out_features, seed=2)

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    # gradients are made, and not added to those of the call before
    def step() -> None:
        x.grad = layer.weight.grad = None
        layer(x).backward(dy)

    return dict(zip(CALLS, (forward, step), strict=True))


def main() -> None:
    """Parse, time, show."""
    parser = options(__doc__)
    sizes = ("TOKENS", "IN", "OUT")
    parser.add_argument("--shape", type=int, nargs=3, default=(32, 64, 64), metavar=sizes)
    known = f"of {', '.join(RECIPES)}"
    parser.add_argument("--recipes", default="rtn,nvidia,quartet2,search_eden", help=known)
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each candidate")
    parser.add_argument("--nothing", action="store_true", help="launch nothing: see above")
    parser.add_argument(
        "--counts", action="store_true", help="print launches as JSON, time nothing"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)

    driver = None
    if args.nothing or args.counts:
        driver = launch_nothing(*CARD)
        compile_nothing(driver)
    backend = AUTO if driver is None else "triton"
    shape = Shape(*args.shape)
    runs = {
        (recipe, call): run
        for recipe in ["bf16", *args.recipes.split(",")]
        for call, run in calls(recipe, shape, AUTO if recipe == "bf16" else backend).items()
    }
    if driver is not None and args.counts:
        counts = [(*label, *launches(run, driver)) for label, run in runs.items()]
        print(json.dumps(counts))
        return

    # Whole calls first, without the stop-watch, which costs something itself.
    ms = interleaved(
        {f"{recipe} {call}": run for (recipe, call), run in runs.items()}, args.seconds
    )

    rows: list[Row] = []
    for (recipe, call), run in runs.items():
        total = ms[f"{recipe} {call}"] * 1e3
        if driver is not None:
            triton, torchs = launches(run, driver)
            row: Row = {"recipe": recipe, "call": call, "us": total}
            row["x BF16"] = ms[f"{recipe} {call}"] / ms[f"bf16 {call}"]
            row |= {"launches of Triton": triton, "of torch": torchs}
            rows.append(row)
            continue
        kernels = in_kernels(run)
        row = {"recipe": recipe, "call": call, "us": total, "us in kernels": kernels}
        beside = total - kernels
        row["us beside kernels"] = beside
        row["of these more than BF16's whole call"] = beside - ms[f"bf16 {call}"] * 1e3
        rows.append(row)
    what = "overhead" if driver is None else "host, launching nothing"
    show(f"{what}, {shape}, one thread", rows, args.keep, labels=2)


if __name__ == "__main__":
    main()
