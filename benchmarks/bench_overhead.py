"""What one call of a small layer costs beside its kernels: Python, autograd, allocation.

    us beside kernels = us of the whole call - us within native kernels

Each call is timed twice: whole, in turns with the other recipes', and then with a stop-watch around
every native kernel; the difference is what lies beside them. One thread. Asking every backend for
every operation was once a sixth of such a step (1274 -> 1069 us without, at 32 x 64 -> 64 in
quartet2, loaded machine). ``python -m benchmarks.bench_overhead --help`` lists the options.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

import nvfp4.backends.native.cpu as cpu
from benchmarks.harness import options, show
from nvfp4.bench.cases import Shape, layer_for, matrix
from nvfp4.bench.tables import Row
from nvfp4.bench.timing import Run, interleaved
from nvfp4.recipes import RECIPES

KERNELS = ("quantize", "quantize_both", "matmul", "decode", "fingerprint")
CALLS = ("forward", "forward + backward")


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


def calls(recipe: str, shape: Shape) -> dict[str, Run]:
    """A forward without gradients, and a forward and backward, of one layer."""
    layer = layer_for(shape, recipe)
    x = matrix(shape.tokens, shape.in_features, seed=1).requires_grad_()
    dy = matrix(shape.tokens, shape.out_features, seed=2)

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    def step() -> None:
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
    args = parser.parse_args()
    torch.set_num_threads(1)

    shape = Shape(*args.shape)
    runs = {
        (recipe, call): run
        for recipe in ["bf16", *args.recipes.split(",")]
        for call, run in calls(recipe, shape).items()
    }

    # Whole calls first, without the stop-watch, which costs something itself.
    ms = interleaved(
        {f"{recipe} {call}": run for (recipe, call), run in runs.items()}, args.seconds
    )

    rows: list[Row] = []
    for (recipe, call), run in runs.items():
        total, kernels = ms[f"{recipe} {call}"] * 1e3, in_kernels(run)
        row: Row = {"recipe": recipe, "call": call, "us": total, "us in kernels": kernels}
        beside = total - kernels
        row["us beside kernels"] = beside
        row["of these more than BF16's whole call"] = beside - ms[f"bf16 {call}"] * 1e3
        rows.append(row)
    show(f"overhead, {shape}, one thread", rows, args.keep, labels=2)


if __name__ == "__main__":
    main()
