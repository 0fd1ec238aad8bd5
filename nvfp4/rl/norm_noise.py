"""Adaptive noise on the norms of the sampler (QeRL, arXiv 2510.11696): exploration that costs no parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from nvfp4.numerics.rng import fold_in


def sigma_at(step: int, steps: int, stages: int, start: float, end: float) -> float:
    """Standard deviation in step ``step`` of 0 ... steps - 1.

    The steps are cut into ``stages`` equal parts: 0 in the first, then start (end / start)^(k / (stages - 2)) for k = 0
    ... stages - 2, from ``start`` down to ``end``. Nothing with stages = 0. All of the authors' launch scripts have 10
    stages from 1e-2 to 1e-4.
    """
    if stages == 0:
        return 0.0
    stage = min(step * stages // steps, stages - 1)
    if stage == 0:
        return 0.0
    return start * (end / start) ** ((stage - 1) / max(stages - 2, 1))


def norm_weights(model: nn.Module) -> list[torch.Tensor]:
    """The gains of RMSNorm and LayerNorm layers of any make: vectors named weight of modules whose class says Norm."""
    found = [getattr(module, "weight", None) for module in model.modules() if "Norm" in type(module).__name__]
    return [weight for weight in found if isinstance(weight, nn.Parameter) and weight.ndim == 1]


@contextmanager
def noisy_norms(model: nn.Module, sigma: float, seed: int) -> Iterator[None]:
    """Within this context the gains of all norms have N(0, sigma^2) added; afterwards they are as before, to the bit.

    The same seed gives the same noise on every device. sigma = 0 touches nothing.
    """
    weights = norm_weights(model) if sigma else []
    before = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for i, weight in enumerate(weights):
                generator = torch.Generator().manual_seed(fold_in(seed, i) >> 1)
                noise = torch.randn(weight.shape, generator=generator) * sigma
                weight.add_(noise.to(weight.device, weight.dtype))
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)
