"""The largest magnitude of several weights, kept for as long as all of them stay the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class SharedAmax:
    """Layers whose weights are scaled by the largest magnitude of all of them; see ``nvfp4.share_amax``."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = tuple(layers)
        self._known: dict[int, tuple[Any, torch.Tensor]] = {}  # by position: what a weight was, and its magnitude

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_known": {}}

    def amax(self, backend: str) -> torch.Tensor:
        """Float32 [1]; of each weight it is worked out anew only when its bytes have changed."""
        found = []
        for position, layer in enumerate(self.layers):
            weight = layer.weight.detach()
            if type(layer.weight) is not nn.Parameter and type(weight) is not torch.Tensor:
                raise RuntimeError(
                    "layers that share their amax must hold their weights at the same time, in high precision: shard "
                    "the block that holds them as one, or call nvfp4.share_amax(model, ())"
                )
            content = layer.nvfp4.content(weight)  # type: ignore[operator, union-attr]
            known = self._known.get(position)
            if known is None or content is None or known[0] != content:
                known = (content, weight.abs().amax().to(torch.float32).view(1))
                if content is not None:
                    self._known[position] = known
            found.append(known[1])
        return torch.cat(found).amax(dim=0, keepdim=True)

    def forget(self) -> None:
        """Work it out anew next time; needed after a write that leaves no trace."""
        self._known.clear()
