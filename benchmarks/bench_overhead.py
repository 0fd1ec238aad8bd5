"""What one call of a small layer costs beside its kernels: Python, autograd, allocation.

python -m benchmarks.bench_overhead --help
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

import nvfp4.backends.native.cpu as cpu
from benchmarks.harness import show
from nvfp4.bench.cases import Shape
from nvfp4.bench.layers import layer_for
from nvfp4.bench.timing import interleaved
from nvfp4.recipes import RECIPES

KERNELS = ("quantize", "quantize_both", "matmul", "decode", "fingerprint")


class Timed:
    """The native module, adding up the time within its kernels."""

    def __init__(self, native: Any) -> None:
        self.native, self.nanoseconds = native, 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.native, name)
        return self._timed(found) if name in KERNELS else found

    def _timed(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.perf_counter_ns()
            result = kernel(*args)
            self.nanoseconds += time.perf_counter_ns() - start
            return result

        return run


def in_kernels(run: Callable[[], Any], times: int = 300) -> float:
    """Microseconds of one ``run`` within native kernels, mean."""
    native, timed = cpu.native, Timed(cpu.native)
    cpu.native = timed  # type: ignore[assignment]
    try:
        for _ in range(times):
            run()
    finally:
        cpu.native = native
    return timed.nanoseconds / times / 1e3


def main() -> None:
    """Parse, time, show."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=(32, 64, 64), metavar=("TOKENS", "IN", "OUT"))
    parser.add_argument("--recipes", default="rtn,nvidia,quartet2,search_eden", help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each candidate")
    parser.add_argument("--keep", metavar="NAME", help="keep the rows as results/NAME.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shape = Shape(*args.shape)
    x = torch.randn(shape.tokens, shape.in_features).bfloat16().requires_grad_()
    dy = torch.randn(shape.tokens, shape.out_features).bfloat16()
    layers = {recipe: layer_for(shape, recipe, "auto") for recipe in ["bf16", *args.recipes.split(",")]}

    def forward(layer: torch.nn.Module) -> None:
        with torch.no_grad():
            layer(x)

    def step(layer: torch.nn.Module) -> None:
        layer(x).backward(dy)

    rows = []
    runs = {
        (recipe, what): (lambda run=run, layer=layer: run(layer))
        for recipe, layer in layers.items()
        for what, run in (("forward", forward), ("forward + backward", step))
    }
    ms = interleaved({f"{recipe} {what}": run for (recipe, what), run in runs.items()}, args.seconds)
    for (recipe, what), run in runs.items():
        total, kernels = ms[f"{recipe} {what}"] * 1e3, in_kernels(run)
        plain = ms[f"bf16 {what}"] * 1e3
        rows.append(
            {
                "recipe": recipe,
                "call": what,
                "us": total,
                "us in kernels": kernels,
                "us beside kernels": total - kernels,
                "of these more than BF16's whole call": total - kernels - plain,
            }
        )
    show(f"overhead, {shape.tokens} x {shape.in_features} -> {shape.out_features}, one thread", rows, args.keep)


if __name__ == "__main__":
    main()
