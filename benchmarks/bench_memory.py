"""Peak memory that one more linear layer costs in training, against BF16 nn.Linear.

    (peak of 12 applications - peak of 4) / 8

One layer is applied again and again, so weights and gradients stay the same and only what is kept
for the backward grows. Each depth runs in a process of its own, whose peak resident memory is read
at the end. ``python -m benchmarks.bench_memory --help`` lists the options.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys

from benchmarks.harness import options, show
from nvfp4.bench.cases import Shape, layer_for, matrix
from nvfp4.bench.tables import Row
from nvfp4.recipes import RECIPES

SHALLOW, DEEP = 4, 12


def train(recipe: str, size: int, depth: int) -> int:
    """Train ``depth`` applications of one layer twice; the peak resident memory in bytes."""
    layer = layer_for(Shape(size, size, size), recipe)
    x = matrix(size, size, seed=1).requires_grad_()
    for _ in range(2):
        y = x
        for _ in range(depth):
            # 1.7 keeps the size of the numbers; the product with a number keeps nothing
            y = layer(y) * 1.7
        y.sum().backward()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak(recipe: str, size: int, depth: int) -> int:
    """``train`` in a fresh process, whose allocator hands tensors back as they die: no holes."""
    command = [sys.executable, "-m", "benchmarks.bench_memory", "--worker", recipe]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [*command, str(size), str(depth)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(json.loads(done.stdout))


def main() -> None:
    """Parse, measure, show."""
    parser = options(__doc__)
    parser.add_argument("--size", type=int, default=4096, help="tokens, in and out features")
    known = f"of {', '.join(RECIPES)}"
    parser.add_argument("--recipes", default="nvidia,quartet2,search_eden", help=known)
    worker = ("RECIPE", "SIZE", "DEPTH")
    parser.add_argument("--worker", nargs=3, metavar=worker, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        recipe, size, depth = args.worker
        print(json.dumps(train(recipe, int(size), int(depth))))
        return

    # The difference of two depths: what a process needs anyway drops out.
    rows: list[Row] = []
    for recipe in ["bf16", *args.recipes.split(",")]:
        shallow, deep = (peak(recipe, args.size, depth) for depth in (SHALLOW, DEEP))
        more = (deep - shallow) / (DEEP - SHALLOW) / 1e6
        row: Row = {"recipe": recipe, f"peak MB at {DEEP} layers": deep / 1e6}
        rows.append(row | {"MB for one more layer": more})
    for row in rows:
        row["x bf16"] = row["MB for one more layer"] / rows[0]["MB for one more layer"]
    show(f"peak memory, {args.size} tokens, {args.size} -> {args.size}", rows, args.keep)


if __name__ == "__main__":
    main()
