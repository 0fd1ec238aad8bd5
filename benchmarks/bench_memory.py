"""Peak memory that one more linear layer costs in training, against BF16 nn.Linear.

python -m benchmarks.bench_memory --help

One layer is applied again and again, so that weights and gradients stay the same and only what is kept for the backward
grows; each depth runs in a process of its own, whose peak resident memory is read at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys

import torch

from benchmarks.harness import show
from nvfp4.bench.cases import Shape
from nvfp4.bench.layers import layer_for
from nvfp4.recipes import RECIPES

SHALLOW, DEEP = 4, 12


def measure(recipe: str, size: int, depth: int) -> None:
    """Train ``depth`` applications of one layer once and print the peak resident memory in bytes."""
    layer = layer_for(Shape(size, size, size), recipe, "auto")
    x = torch.randn(size, size, dtype=torch.bfloat16)
    x.requires_grad_()
    for _ in range(2):
        y = x
        for _ in range(depth):
            y = layer(y) * 1.7  # keeps the size of the numbers; the product with a number keeps nothing
        y.sum().backward()
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)))


def peak(recipe: str, size: int, depth: int) -> int:
    """``measure`` in a fresh process, whose allocator hands tensors back when they die: its holes are not ours."""
    command = [sys.executable, "-m", "benchmarks.bench_memory", "--worker", recipe, str(size), str(depth)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return int(json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout))


def main() -> None:
    """Parse, measure, show."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096, help="tokens, in and out features")
    parser.add_argument("--recipes", default="nvidia,quartet2,search_eden", help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--keep", metavar="NAME", help="keep the rows as results/NAME.json")
    parser.add_argument("--worker", nargs=3, metavar=("RECIPE", "SIZE", "DEPTH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        measure(args.worker[0], int(args.worker[1]), int(args.worker[2]))
        return
    rows = []
    for recipe in ["bf16", *args.recipes.split(",")]:
        shallow, deep = (peak(recipe, args.size, depth) for depth in (SHALLOW, DEEP))
        more = (deep - shallow) / (DEEP - SHALLOW) / 1e6
        rows.append({"recipe": recipe, f"peak MB at {DEEP} layers": deep / 1e6, "MB for one more layer": more})
    for row in rows:
        row["x bf16"] = row["MB for one more layer"] / rows[0]["MB for one more layer"]
    show(f"peak memory, {args.size} tokens, {args.size} -> {args.size}", rows, args.keep)


if __name__ == "__main__":
    main()
