"""The clipped policy gradient: ratio to the old policy, and what clipping leaves of it."""

from __future__ import annotations

from typing import Literal

import torch

from nvfp4.rl.objectives.aggregation import token_mean
from nvfp4.rl.objectives.base import Metrics
from nvfp4.rl.samples import Totals

Ratio = Literal["token", "sequence", "one"]

MAX_LOG_RATIO = 20.0
"""A ratio is cut at exp(20) (NeMo RL's clamp): in float32, infinity times an advantage of 0 would be NaN."""


def log_ratio(logprobs: torch.Tensor, old_logprobs: torch.Tensor, mask: torch.Tensor, ratio: Ratio) -> torch.Tensor:
    """log(policy / old policy) [S, T], clamped to +-20. token: of each token. sequence: its mean over the completion,
    on each token (GSPO, arXiv 2507.18071). one: 0, with the gradient of log policy (forced on-policy, ProRL v2.1)."""
    if ratio == "one":
        return logprobs - logprobs.detach()
    difference = logprobs - old_logprobs
    if ratio == "sequence":
        lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
        mean = torch.where(mask, difference, 0.0).sum(dim=1, keepdim=True) / lengths
        difference = torch.where(mask, mean, 0.0)
    return difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def clipped_loss(
    log_ratio: torch.Tensor, advantages: torch.Tensor, low: float, high: float, dual: float | None = None
) -> torch.Tensor:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A) [S, T], rho = exp(log_ratio); with ``dual`` (> 1; arXiv 1912.09729)
    at most -dual A where A < 0, so that one very likely bad token cannot own the step."""
    rho = log_ratio.exp()
    loss = -torch.min(rho * advantages, rho.clamp(1 - low, 1 + high) * advantages)
    if dual is None:
        return loss
    return torch.where(advantages < 0, torch.min(loss, -dual * advantages), loss)


def clip_metrics(
    log_ratio: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, low: float, high: float, totals: Totals
) -> Metrics:
    """Shares of the tokens whose gradient the clip takes away, under TRL's names."""
    rho = log_ratio.detach().exp()
    at_low, at_high = (rho < 1 - low) & (advantages < 0), (rho > 1 + high) & (advantages > 0)
    shares = {"low": at_low, "high": at_high, "region": at_low | at_high}
    return {f"clip_ratio/{name}_mean": token_mean(at.float(), mask, totals) for name, at in shares.items()}
