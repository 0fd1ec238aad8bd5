"""A linear layer, forward and backward, against BF16 nn.Linear: time, and bytes saved for backward.

python -m benchmarks.bench_linear --help
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from benchmarks.harness import gate, show
from nvfp4.bench.cases import SETS
from nvfp4.bench.layers import check, layer_for, saved_bytes
from nvfp4.bench.timing import interleaved
from nvfp4.recipes import RECIPES
from nvfp4.weights import invalidate


def main() -> None:
    """Parse, gate, time, show."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="square", choices=list(SETS))
    parser.add_argument("--recipes", default="nvidia,quartet2,search_eden", help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each candidate")
    parser.add_argument("--keep", metavar="NAME", help="keep the rows as results/NAME.json")
    args = parser.parse_args()
    recipes = ["bf16", *args.recipes.split(",")]
    rows = []
    for name, shape in SETS[args.shapes].items():
        x = torch.randn(shape.tokens, shape.in_features).bfloat16().requires_grad_()
        dy = torch.randn(shape.tokens, shape.out_features).bfloat16()
        layers = {recipe: layer_for(shape, recipe, args.backend) for recipe in recipes}
        for recipe in recipes[1:]:
            gate(check(layers[recipe], layers["bf16"], x), f"{recipe} at {name}")

        def step(layer: nn.Linear, x: torch.Tensor = x, dy: torch.Tensor = dy) -> None:
            x.grad = layer.weight.grad = None
            invalidate(layer)  # an optimiser step lies between two calls in training: the weight is quantised anew
            layer(x).backward(dy)

        ms = interleaved({r: (lambda r=r: step(layers[r])) for r in recipes}, args.seconds)  # noqa: B023
        base = saved_bytes(layers["bf16"], x)
        rows += [
            {
                "layer": f"{name} ({shape.tokens} x {shape.in_features} -> {shape.out_features})",
                "recipe": recipe,
                "forward + backward ms": ms[recipe],
                "x bf16": ms[recipe] / ms["bf16"],
                "saved MB": saved_bytes(layers[recipe], x) / 1e6,
                "saved x bf16": saved_bytes(layers[recipe], x) / base,
            }
            for recipe in recipes
        ]
    show(f"linear, backend {args.backend}", rows, args.keep)


if __name__ == "__main__":
    main()
