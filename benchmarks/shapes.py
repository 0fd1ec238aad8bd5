"""Shapes that benchmarks run over: name, tokens (M), in_features (K), out_features (N)."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """One linear layer: x [tokens, in_features], w [out_features, in_features]."""

    tokens: int
    in_features: int
    out_features: int


SQUARE = {str(n): Shape(n, n, n) for n in (1024, 2048, 4096)}
LLAMA_8B = {
    "qkv": Shape(2048, 4096, 6144),
    "out": Shape(2048, 4096, 4096),
    "up_gate": Shape(2048, 4096, 28672),
    "down": Shape(2048, 14336, 4096),
}
"""Llama 3 8B with 2048 tokens."""

SETS = {"square": SQUARE, "llama-8b": LLAMA_8B}
