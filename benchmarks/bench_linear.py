"""A linear layer, forward and backward, against BF16 nn.Linear: time, and bytes saved for backward.

python -m benchmarks.bench_linear --help
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from benchmarks.harness import gate, interleaved, show
from benchmarks.shapes import SETS, Shape
from nvfp4.convert import convert
from nvfp4.linear import Linear, invalidate
from nvfp4.recipes import RECIPES


def layer_for(shape: Shape, recipe: str, backend: str) -> nn.Linear:
    """A BF16 linear layer of that shape, converted unless the recipe is bf16."""
    torch.manual_seed(0)
    layer = nn.Linear(shape.in_features, shape.out_features, bias=False, dtype=torch.bfloat16)
    if recipe != "bf16":
        convert(layer, recipe, backend=backend, seed=0, verbose=False)
    return layer


def saved_bytes(layer: nn.Linear, x: torch.Tensor) -> int:
    """Bytes that a forward keeps for backward beside what the layer holds anyway: its weight, and the weight's
    codes."""
    sizes: list[int] = []
    layer(x)
    held = {layer.weight.data_ptr()}
    if isinstance(layer, Linear) and layer.nvfp4.weight_codes is not None:
        held |= {tensor.data_ptr() for tensor in layer.nvfp4.weight_codes[1].tensors}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in held:
            sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(sizes)


def check(layer: nn.Linear, exact: nn.Linear, x: torch.Tensor) -> bool:
    """Whether output and weight gradient are near those of BF16: quantised, but of the right things."""
    gradients = []
    for module in (layer, exact):
        module.weight.grad = None
        y = module(x)
        y.backward(torch.ones_like(y))
        gradients.append((y.detach().float(), module.weight.grad.float()))
        module.weight.grad = None
    # each operand's relative error is at most 0.15 in norm (relative MSE 22e-3), so 0.3 bounds the product's
    return all((a - b).norm() < 0.3 * b.norm() for a, b in zip(*gradients, strict=True))


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
