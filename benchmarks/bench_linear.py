"""A linear layer, forward and backward, against high-precision ones: time, and bytes saved for backward.

For each shape the candidates take turns: float32 ``nn.Linear``; BF16 in high precision as the layers of this package
compute it (torch's own where the processor has BF16 instructions, else float32 sums of BF16 operands); the recipes.
``--isa avx2`` measures as on a processor without AVX-512, in a process of its own: torch, MKL and oneDNN are told by
environment variables, which they read when they start, our kernels by name.

python -m benchmarks.bench_linear --help
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

import torch
from torch import nn

from benchmarks.harness import gate, show
from nvfp4.backends.native.cpu import use_instruction_set
from nvfp4.bench.cases import SETS, Shape
from nvfp4.bench.layers import check, layer_for, saved_bytes
from nvfp4.bench.timing import interleaved
from nvfp4.layer.dense import dense_linears
from nvfp4.model.weights import invalidate
from nvfp4.recipes import RECIPES

TOLD = {
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="square", choices=list(SETS))
    parser.add_argument("--sizes", default="", help="only these of the shapes, by name, separated by commas")
    parser.add_argument("--recipes", default="nvidia,quartet2,search_eden", help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--isa", default="best", help="instruction sets: best, avx2, or both, separated by commas")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each candidate")
    parser.add_argument("--keep", metavar="NAME", help="keep the rows as results/NAME.json")
    parser.add_argument("--rows", action="store_true", help="print the rows as JSON instead of a table")
    args = parser.parse_args()
    rows = []
    for isa in args.isa.split(","):
        held = isa in TOLD and os.environ.get("ATEN_CPU_CAPABILITY") != TOLD[isa]["ATEN_CPU_CAPABILITY"]
        rows += _elsewhere(isa) if held else _measured(args, isa)
    if args.rows:
        print(json.dumps(rows))
        return
    show(f"linear, backend {args.backend}", rows, args.keep)


def _elsewhere(isa: str) -> list[dict[str, Any]]:
    """The rows of another process with these arguments, held to ``isa``."""
    command = [sys.executable, "-m", "benchmarks.bench_linear", *sys.argv[1:], "--isa", isa, "--rows"]
    said = subprocess.run(command, env=os.environ | TOLD[isa], stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(said.splitlines()[-1])


def _measured(args: argparse.Namespace, isa: str) -> list[dict[str, Any]]:
    """The rows of every shape on the kernels of ``isa``."""
    if isa in TOLD:
        use_instruction_set(isa)
    rows = []
    for name, shape in SETS[args.shapes].items():
        if not args.sizes or name in args.sizes.split(","):
            rows += _of_shape(args, name, shape)
    return rows


def _of_shape(args: argparse.Namespace, name: str, shape: Shape) -> list[dict[str, Any]]:
    recipes = ["bf16", *args.recipes.split(",")]
    x = torch.randn(shape.tokens, shape.in_features).bfloat16().requires_grad_()
    dy = torch.randn(shape.tokens, shape.out_features).bfloat16()
    layers = {recipe: layer_for(shape, recipe, args.backend) for recipe in recipes}
    dense_linears(layers["bf16"])
    for recipe in recipes[1:]:
        gate(check(layers[recipe], layers["bf16"], x), f"{recipe} at {name}")
    wide = nn.Linear(shape.in_features, shape.out_features, bias=False)
    wide_x, wide_dy = x.detach().float().requires_grad_(), dy.float()

    def step(layer: nn.Linear, x: torch.Tensor, dy: torch.Tensor) -> None:
        x.grad = layer.weight.grad = None
        invalidate(layer)  # an optimiser step lies between two calls in training: the weight is quantised anew
        layer(x).backward(dy)

    candidates = {recipe: (lambda layer=layer: step(layer, x, dy)) for recipe, layer in layers.items()}
    ms = interleaved({"float32": lambda: step(wide, wide_x, wide_dy)} | candidates, args.seconds)
    base = saved_bytes(layers["bf16"], x)
    saved = {recipe: saved_bytes(layer, x) for recipe, layer in layers.items()}
    saved["float32"] = saved_bytes(wide, wide_x)
    return [
        {
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "layer": f"{name} ({shape})",
            "recipe": recipe,
            "forward + backward ms": ms[recipe],
            "x float32": ms[recipe] / ms["float32"],
            "x bf16": ms[recipe] / ms["bf16"],
            "saved MB": saved[recipe] / 1e6,
            "saved x bf16": saved[recipe] / base,
        }
        for recipe in ms
    ]


if __name__ == "__main__":
    main()
