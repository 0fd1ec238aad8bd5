"""A linear layer, forward and backward, against high-precision ones: time, and bytes kept between.

For each shape the candidates take turns, each with its weight quantised anew:

    float32   ``nn.Linear``
    bf16      high precision as the layers of this package compute it: torch's own where the
              processor has BF16 instructions, else float32 sums of BF16 operands
    recipes   converted layers, gated first: y, dx and dw near BF16's

``--isa avx2`` measures as on a processor without AVX-512, in a process of its own: torch, MKL and
oneDNN are told by environment variables, which they read when they start, our kernels by name.

    python -m benchmarks.bench_linear --isa avx2 --sizes 2048 --recipes nvidia --keep linear

measures one recipe beside float32 and BF16, and leaves the other rows of results/linear.json alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

import torch

from benchmarks.harness import gate, options, show
from nvfp4.backends.native.cpu import use_instruction_set
from nvfp4.bench.cases import SETS, Shape, layer_for, matrix
from nvfp4.bench.gates import near_bf16
from nvfp4.bench.measure import LayerCase
from nvfp4.bench.tables import Row
from nvfp4.bench.timing import interleaved
from nvfp4.recipes import RECIPES

HELD_BY = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "DNNL_MAX_CPU_ISA": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
}
"""What holds torch's libraries to an instruction set, by our name for it."""


def main() -> None:
    """Parse, gate, time, show."""
    parser = options(__doc__)
    parser.add_argument("--shapes", default="square", choices=list(SETS))
    parser.add_argument("--sizes", default="", help="only these of the shapes, as in 1024,2048")
    known = f"of {', '.join(RECIPES)}"
    parser.add_argument("--recipes", default="nvidia,quartet2,search_eden", help=known)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--isa", default="best", help="best, avx2, or both: best,avx2")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each candidate")
    parser.add_argument("--least", type=int, default=5, help="rounds, however long they take")
    parser.add_argument("--rows", action="store_true", help="print the rows as JSON, no table")
    args = parser.parse_args()

    # An instruction set that this process is not held to is measured by a child that is.
    rows: list[Row] = []
    for isa in args.isa.split(","):
        held = HELD_BY.get(isa, {})
        is_held = all(os.environ.get(name) == value for name, value in held.items())
        rows += _measured(args, isa) if is_held else _elsewhere(isa)
    if args.rows:
        print(json.dumps(rows))
        return
    show(f"linear, backend {args.backend}", rows, args.keep, labels=3)


def _elsewhere(isa: str) -> list[Row]:
    """The rows of another process with these arguments, held to ``isa``."""
    command = [sys.executable, "-m", "benchmarks.bench_linear", *sys.argv[1:]]
    command += ["--isa", isa, "--rows"]
    environment = os.environ | HELD_BY[isa]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    rows: list[Row] = json.loads(done.stdout.splitlines()[-1])
    return rows


def _measured(args: argparse.Namespace, isa: str) -> list[Row]:
    """The rows of every shape on the kernels of ``isa``."""
    if isa in HELD_BY:
        use_instruction_set(isa)
    names = args.sizes.split(",") if args.sizes else list(SETS[args.shapes])
    shapes = {name: shape for name, shape in SETS[args.shapes].items() if name in names}
    return [row for name, shape in shapes.items() for row in _of_shape(args, name, shape)]


def _of_shape(args: argparse.Namespace, name: str, shape: Shape) -> list[Row]:
    recipes = ["float32", "bf16", *args.recipes.split(",")]
    x = matrix(shape.tokens, shape.in_features, seed=1)
    dy = matrix(shape.tokens, shape.out_features, seed=2)

    # Each with x and dy in its own dtype, and a leaf of its own for the gradient.
    cases: dict[str, LayerCase] = {}
    for recipe in recipes:
        layer = layer_for(shape, recipe, args.backend)
        dtype = layer.weight.dtype
        cases[recipe] = LayerCase(layer, x.to(dtype, copy=True).requires_grad_(), dy.to(dtype))

    # Nothing is timed that is wrong; the first two are what the others are held to.
    for recipe in recipes[2:]:
        near = near_bf16(cases[recipe].layer, cases["bf16"].layer, x)
        gate(near, f"{recipe} at {name} is far from BF16")

    ms = interleaved(
        {recipe: case.step for recipe, case in cases.items()}, args.seconds, args.least
    )
    saved = {recipe: case.saved_bytes() for recipe, case in cases.items()}
    return [
        {
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "layer": f"{name} ({shape})",
            "recipe": recipe,
            "forward + backward ms": ms[recipe],
            "x float32": ms[recipe] / ms["float32"],
            "x bf16": ms[recipe] / ms["bf16"],
            "saved MB": saved[recipe] / 1e6,
            "saved x bf16": saved[recipe] / saved["bf16"],
        }
        for recipe in recipes
    ]


if __name__ == "__main__":
    main()
