"""What is measured: quantisers with their options, and layers of models."""

from __future__ import annotations

from typing import Any, NamedTuple

from nvfp4.numerics.formats import NVFP4, TILE_BLOCK
from nvfp4.numerics.hadamard import Rotation

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
