"""The largest magnitude of several weights, kept for as long as all of them stay the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from nvfp4.layer.sharding import magnitude
from nvfp4.layer.streams import Done
from nvfp4.numerics.torch_state import is_capturing

Contents = tuple[tuple[Any, ...] | None, ...]
"""What changes when a weight does, of each one that shares; None where there is no telling."""


class SharedAmax:
    """Layers whose weights are scaled by the largest magnitude of all of them; see ``nvfp4.share_amax``."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = tuple(layers)
        self._known: dict[int, tuple[Any, torch.Tensor, Done]] = {}  # by position: what a weight was, its magnitude

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_known": {}}

    def contents(self) -> Contents:
        """What the amax is a function of; RuntimeError where the weights are not here together."""
        found = []
        for layer in self.layers:
            weight = layer.weight.detach()
            if type(layer.weight) is not nn.Parameter and type(weight) is not torch.Tensor:
                raise RuntimeError(
                    "layers that share their amax must hold their weights at the same time, in high precision: shard "
                    "the block that holds them as one, or call nvfp4.share_amax(model, ())"
                )
            found.append(layer.nvfp4.content(weight))  # type: ignore[operator, union-attr]
        return tuple(found)

    def amax(self, contents: Contents) -> torch.Tensor:
        """Float32 [1]; of each weight it is worked out anew only when its content has changed.

        In a CUDA graph always, since a replay may find other weights; what is made there holds nothing before.
        """
        found = []
        for position, (layer, content) in enumerate(zip(self.layers, contents, strict=True)):
            if content is None or is_capturing():
                found.append(magnitude(layer.weight.detach()))
                continue
            known = self._known.get(position)
            if known is None or known[0] != content:
                made = magnitude(layer.weight.detach())
                known = self._known[position] = (content, made, Done(made.device))
            known[2].before_reading((known[1],))
            found.append(known[1])
        return torch.cat(found).amax(dim=0, keepdim=True)

    def forget(self) -> None:
        """Work it out anew next time; needed after a write that leaves no trace."""
        self._known.clear()
