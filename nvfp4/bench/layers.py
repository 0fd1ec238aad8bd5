"""A linear layer to be measured: made, held against BF16, and asked what it keeps for the backward."""

from __future__ import annotations

import torch
from torch import nn

from nvfp4.backends.registry import AUTO
from nvfp4.bench.cases import Shape
from nvfp4.bench.timing import CPU
from nvfp4.layer.linear import Linear
from nvfp4.model.convert import convert


def layer_for(shape: Shape, recipe: str, backend: str = AUTO, device: torch.device = CPU) -> nn.Linear:
    """A BF16 linear layer of that shape, the same weight every time, converted unless the recipe is bf16."""
    layer = nn.utils.skip_init(
        nn.Linear, shape.in_features, shape.out_features, bias=False, dtype=torch.bfloat16, device=device
    )
    with torch.no_grad():
        layer.weight.copy_(normal(shape.out_features, shape.in_features) * shape.in_features**-0.5)
    if recipe != "bf16":
        convert(layer, recipe, backend=backend, seed=0, verbose=False)
    return layer


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """N(0, 1) in BF16, the same on every machine, on the CPU."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


def saved_bytes(layer: nn.Linear, x: torch.Tensor) -> int:
    """Bytes that a forward keeps for backward beside what the layer holds anyway: its weight, and the weight's
    codes."""
    sizes: list[int] = []
    layer(x)
    held = {layer.weight.data_ptr()}
    if isinstance(layer, Linear) and layer.nvfp4.weight_codes is not None:
        held |= {tensor.data_ptr() for q in layer.nvfp4.weight_codes[1] for tensor in q.tensors}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in held:
            sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(sizes)


def check(layer: nn.Linear, exact: nn.Linear, x: torch.Tensor) -> bool:
    """Whether output and both gradients are near those of BF16: quantised, but of the right things."""
    found = []
    dy = normal(x.shape[0], exact.out_features, 3).to(x.device)
    for module in (layer, exact):
        leaf = x.detach().requires_grad_()
        y = module(leaf)
        found.append((y, *torch.autograd.grad(y, (leaf, module.weight), dy)))
    # each operand's relative error is at most 0.15 in norm (relative MSE 22e-3), so 0.3 bounds the product's
    pairs = zip(*found, strict=True)
    return all((a.float() - b.float()).norm() < 0.3 * b.float().norm() for a, b in pairs)
