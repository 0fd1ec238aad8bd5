"""From log-probabilities to one number: ratios, their clip, and how tokens are added up.

    logprobs, old_logprobs [S, T]  --log_ratio-->     log rho [S, T]
    log rho, advantages A [S, T]   --clipped_loss-->  -min(rho A, clip(rho, 1 - low, 1 + high) A)
    token loss, mask [S, T]        --aggregate-->     the micro-batch's share of the loss, []

Every rule of ``aggregate`` divides by ``Totals`` of the whole update, so micro-batches add up to
the batch. Which rule decides how much a token of a long completion weighs:

    grpo      1 / (samples x tokens of its completion)    a short completion's tokens weigh more
    dapo      1 / tokens of the batch                      every token the same
    dr_grpo   1 / (samples x length limit)                 every token the same, whatever was drawn
    bnpo      as dapo within a micro-batch                 the only one that depends on the split
"""

from __future__ import annotations

from typing import Literal

import torch

from nvfp4.rl.objectives.base import Metrics
from nvfp4.rl.samples import Totals

Ratio = Literal["token", "sequence", "one"]
Aggregation = Literal["grpo", "bnpo", "dapo", "dr_grpo"]

MAX_LOG_RATIO = 20.0
"""A ratio is cut at exp(20) (NeMo RL's clamp): infinity times an advantage of 0 is NaN."""


def log_ratio(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    mask: torch.Tensor,
    ratio: Ratio,
) -> torch.Tensor:
    """log(policy / old policy) [S, T], clamped to +-20.

    token: of each token. sequence: its mean over the completion, on each token (GSPO, arXiv
    2507.18071). one: 0, with the gradient of log policy (forced on-policy, ProRL v2.1).
    """
    if ratio == "one":
        return logprobs - logprobs.detach()
    difference = logprobs - old_logprobs  # [S, T]
    if ratio == "sequence":  # the mean carries the gradient of every token of the completion
        lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
        mean = torch.where(mask, difference, 0.0).sum(dim=1, keepdim=True) / lengths  # [S, 1]
        difference = torch.where(mask, mean, 0.0)
    return difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def clipped_loss(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    low: float,
    high: float,
    dual: float | None = None,
) -> torch.Tensor:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A) [S, T], rho = exp(log_ratio).

    dual (> 1; arXiv 1912.09729): at most -dual A where A < 0, so that one very likely bad token
    cannot own the step.
    """
    rho = log_ratio.exp()  # [S, T]
    loss = -torch.min(rho * advantages, rho.clamp(1 - low, 1 + high) * advantages)
    if dual is None:
        return loss
    return torch.where(advantages < 0, torch.min(loss, -dual * advantages), loss)


def clip_metrics(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    low: float,
    high: float,
    totals: Totals,
) -> Metrics:
    """Shares of the tokens whose gradient the clip takes away, under TRL's names."""
    rho = log_ratio.detach().exp()
    at_low = (rho < 1 - low) & (advantages < 0)
    at_high = (rho > 1 + high) & (advantages > 0)
    clipped = {"low": at_low, "high": at_high, "region": at_low | at_high}
    shares = {name: token_mean(at.float(), mask, totals) for name, at in clipped.items()}
    return {f"clip_ratio/{name}_mean": share for name, share in shares.items()}


def aggregate(
    values: torch.Tensor,
    mask: torch.Tensor,
    totals: Totals,
    rule: Aggregation,
) -> torch.Tensor:
    """The share of this micro-batch in one number; values, mask: [S, T].

    Values may be anything outside the mask. grpo: mean over a completion's tokens, then over
    samples (arXiv 2402.03300). dapo: mean over the tokens of the whole batch (arXiv 2503.14476).
    dr_grpo: sum over tokens, divided by samples * max_new_tokens (arXiv 2503.20783). bnpo (TRL's
    name): mean over the tokens of the micro-batch, the micro-batches weighted by their samples. A
    completion without tokens counts as a sample.
    """
    values = torch.where(mask, values, 0.0)
    tokens = mask.sum(dim=1).clamp(min=1)  # [S]
    if rule == "grpo":
        return (values.sum(dim=1) / tokens).sum() / totals.samples
    if rule == "dapo":
        return token_mean(values, mask, totals)
    if rule == "dr_grpo":
        return values.sum() / (totals.samples * totals.max_new_tokens)
    if rule == "bnpo":
        return values.sum() / mask.sum().clamp(min=1) * (len(mask) / totals.samples)
    raise ValueError(f"unknown aggregation {rule!r}; known: grpo, bnpo, dapo, dr_grpo")


def token_mean(values: torch.Tensor, mask: torch.Tensor, totals: Totals) -> torch.Tensor:
    """This micro-batch's share of the mean over the tokens of the batch; values, mask: [S, T]."""
    return torch.where(mask, values, 0.0).sum() / max(totals.tokens, 1)
