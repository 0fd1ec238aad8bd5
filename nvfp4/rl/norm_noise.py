"""Adaptive noise on the sampler's norms: exploration without parameters (QeRL, arXiv 2510.11696).

While completions are drawn, the gain of every RMSNorm and LayerNorm has N(0, sigma^2) added; the
trainer never sees it. sigma follows a schedule of K equal stages (``--aqn-stages``), 0 in the first
and then

    sigma_k = start (end / start)^(k / (K - 2)),    k = 0 ... K - 2

from ``--aqn-start`` down to ``--aqn-end``. All of the authors' launch scripts have 10 stages from
1e-2 to 1e-4.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from nvfp4.numerics.rng import fold_in


def sigma_at(step: int, steps: int, stages: int, start: float, end: float) -> float:
    """Standard deviation in step ``step`` of 0 ... steps - 1; 0 throughout with ``stages`` = 0."""
    if stages == 0:
        return 0.0
    stage = min(step * stages // steps, stages - 1)
    if stage == 0:
        return 0.0
    return start * (end / start) ** ((stage - 1) / max(stages - 2, 1))


def norm_weights(model: nn.Module) -> list[torch.Tensor]:
    """The gains of norms of any make: vectors named weight of modules whose class says Norm."""
    norms = [module for module in model.modules() if "Norm" in type(module).__name__]
    weights = [getattr(norm, "weight", None) for norm in norms]
    return [w for w in weights if isinstance(w, nn.Parameter) and w.ndim == 1]


@contextmanager
def noisy_norms(model: nn.Module, sigma: float, seed: int) -> Iterator[None]:
    """Within this context the gains of all norms are noisy; after it every bit is back.

    The same seed gives the same noise on every device. sigma = 0 touches nothing.
    """
    weights = norm_weights(model) if sigma else []

    # copied back, not subtracted: a sum that was rounded cannot be undone
    before = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for i, weight in enumerate(weights):
                # drawn on the CPU, so that it is the same on every device
                generator = torch.Generator().manual_seed(fold_in(seed, i) >> 1)
                noise = torch.randn(weight.shape, generator=generator) * sigma
                weight.add_(noise.to(weight.device, weight.dtype))
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)
