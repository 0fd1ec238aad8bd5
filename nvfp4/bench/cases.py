"""What is measured: quantisers with their options, layers of models, and the numbers in both.

All of it is the same on every machine and in every run, so that two tables may be held beside each
other:

    quantiser("sr")             the pair that a backend takes, and the bytes that it must move
    matrix(4096, 4096)          BF16 [rows, columns]: N(0, 1), or what kernels get wrong
    SETS["square"]["1024"]      a Shape: x [tokens, in_features], w [out_features, in_features]
    layer_for(shape, "nvidia")  nn.Linear of that shape without bias, the same weight every time
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from nvfp4.backends.base import Backend
from nvfp4.backends.registry import AUTO, BACKENDS
from nvfp4.bench.timing import CPU
from nvfp4.layer.linear import Linear
from nvfp4.layer.noise import Noise
from nvfp4.layer.state import LinearState
from nvfp4.model.plain import dense_linears
from nvfp4.model.reclass import reclass
from nvfp4.numerics.formats import NVFP4, TILE_BLOCK
from nvfp4.numerics.hadamard import Rotation
from nvfp4.quantizers.base import Options, Quantizer
from nvfp4.quantizers.registry import get_quantizer
from nvfp4.recipes import Recipe, as_recipe

QUANTISERS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("rtn", {}),
    "rtn_2d": ("rtn_2d", {}),
    "rtn row-scaled": ("rtn", {"row_scaled": True}),
    "sr": ("sr", {}),
    "sr_te": ("sr_te", {}),
    "rot16 sr_te": ("sr_te", {"rotation": Rotation(NVFP4.block_size, fixed=True)}),
    "four_over_six": ("four_over_six", {}),
    "four_over_six 16x16": ("four_over_six", {"block": TILE_BLOCK}),
    "scale_search": ("scale_search", {}),
    "ms_eden(1)": ("ms_eden", {}),
    "ms_eden(2)": ("ms_eden", {"rounds": 2}),
    "ms_eden(2, search)": ("ms_eden", {"rounds": 2, "search": True}),
}
"""By the name in tables: every kind of operand that a recipe has."""


class QuantiserCase(NamedTuple):
    """A quantiser with its options and seeds: what ``backend.quantize(x, *case)`` takes."""

    quantizer: Quantizer
    options: Options

    @property
    def reads(self) -> int:
        """How often the input is read: once for the amax and once to quantise.

        Once where a row has a scale of its own, as it is still in the cache by then, and for
        ms_eden, which finds the tensor's range afterwards, from its block scales.
        """
        return 1 if self.quantizer.rotates or self.options.row_scaled else 2

    def code_bytes(self, elements: int) -> float:
        """Bytes of codes (4 bits each) and block scales (8 bits per block) of so many elements."""
        rows, columns = self.options.block
        return elements * (0.5 + 1 / (rows * columns))

    def bytes_moved(self, x: torch.Tensor) -> int:
        """The least that quantising x must read and write."""
        return int(self.reads * x.numel() * x.element_size() + self.code_bytes(x.numel()))


def quantiser(name: str, seed: int = 1, sign_seed: int = 2) -> QuantiserCase:
    """A row of ``QUANTISERS``; KeyError for a name that is not in it."""
    registered, options = QUANTISERS[name]
    quantizer = get_quantizer(registered)
    return QuantiserCase(quantizer, quantizer.check(seed=seed, sign_seed=sign_seed, **options))


def at_hand(device: torch.device) -> list[Backend]:
    """The backends that "auto" may choose on a device; the reference is the judge, and left out."""
    return [
        backend
        for name, backend in BACKENDS.items()
        if name != "reference" and backend.unavailable(device) is None and backend.automatic(device)
    ]


Kind = Literal["normal", "wide", "nan"]
KINDS: tuple[Kind, ...] = ("normal", "wide", "nan")


def matrix(
    rows: int,
    columns: int,
    kind: Kind = "normal",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> torch.Tensor:
    """[rows, columns] on the CPU, the same on every machine.

    "normal": N(0, 1). "wide": rows of magnitudes from 2^-20 to 2^20. "nan": with one at the end.
    """
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    if kind == "wide":
        x *= torch.exp2(torch.arange(rows).remainder(41).sub(20).float())[:, None]
    # in the last element, which a kernel that forgets a ragged tail would not see
    if kind == "nan":
        x[-1, -1] = float("nan")
    return x.to(dtype)


class Shape(NamedTuple):
    """One linear layer: x [tokens, in_features], w [out_features, in_features]."""

    tokens: int
    in_features: int
    out_features: int

    def __str__(self) -> str:
        return f"{self.tokens} x {self.in_features} -> {self.out_features}"


def square(*sizes: int) -> dict[str, Shape]:
    """Layers with as many tokens as features, by their size."""
    return {str(size): Shape(size, size, size) for size in sizes}


LLAMA_8B = {
    "qkv": Shape(2048, 4096, 6144),
    "out": Shape(2048, 4096, 4096),
    "up_gate": Shape(2048, 4096, 28672),
    "down": Shape(2048, 14336, 4096),
}
"""Llama 3 8B with 2048 tokens."""

SETS = {"square": square(1024, 2048, 4096), "llama-8b": LLAMA_8B}


def layer_for(
    shape: Shape, recipe: str | Recipe, backend: str = AUTO, device: torch.device = CPU
) -> nn.Linear:
    """A linear layer of that shape without bias, w ~ N(0, 1 / in_features).

    recipe: what a BF16 layer is converted into, or the name of it. "bf16" is the layer in high
    precision, which multiplies as the trainers' do (``dense_linears``): torch's own BF16 product is
    5 to 40 times slower than float32's on processors that emulate it, and no measure of anything.
    "float32" is the same weight in float32, torch's own layer.
    """
    dtype = torch.float32 if recipe == "float32" else torch.bfloat16
    layer = nn.utils.skip_init(
        nn.Linear, shape.in_features, shape.out_features, bias=False, dtype=dtype, device=device
    )

    # Variance 1 / in_features: outputs are of the size of inputs, as in a trained model.
    with torch.no_grad():
        w = matrix(shape.out_features, shape.in_features) * shape.in_features**-0.5
        layer.weight.copy_(w)
    if recipe == "bf16":
        dense_linears(layer)
    elif recipe != "float32":
        # ``convert`` would have nothing to decide about one layer
        reclass(layer, Linear)
        layer.nvfp4 = LinearState(as_recipe(recipe), Noise(0, 0), backend)
    return layer
