"""How far the policy is from its reference: Schulman's estimators from the drawn tokens, and the exact number."""

from __future__ import annotations

from typing import Literal

import torch

Estimator = Literal["k1", "k2", "k3"]
Importance = Literal["none", "score", "ratio"]


def kl_estimate(
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    estimator: Estimator,
    *,
    weights: torch.Tensor | None = None,
    log_ratio_clamp: float | None = None,
    value_clamp: float | None = None,
) -> torch.Tensor:
    """KL(policy || reference) from one drawn token each; log-probabilities and result [S, T], in nats.

    With d = log policy - log reference: k1 = d, k2 = d^2 / 2, k3 = exp(-d) + d - 1. Drawn from the policy, k1 and k3
    are unbiased in value. As a loss only k2 has the gradient of the KL; k1's is 0 on average and k3's is that of
    KL(reference || policy), unless they are multiplied by the ratio policy / old policy, which repairs both. weights
    [S, T]: that ratio, or 1 with its gradient; multiplied in between the clamps, as NeMo RL does. Clamps: of d to
    +-log_ratio_clamp before, of the estimate to +-value_clamp after; beyond them the gradient is 0, the weights' too.
    """
    difference = logprobs - ref_logprobs
    if log_ratio_clamp is not None:
        whole, difference = difference, difference.clamp(-log_ratio_clamp, log_ratio_clamp)
        weights = weights if weights is None else torch.where(whole == difference, weights, weights.detach())
    if estimator == "k1":
        value = difference
    elif estimator == "k2":
        value = difference**2 / 2
    elif estimator == "k3":
        value = torch.expm1(-difference) + difference  # exactly 0 where the two agree
    else:
        raise ValueError(f"unknown KL estimator {estimator!r}; known: k1, k2, k3")
    value = value if weights is None else value * weights
    return value if value_clamp is None else value.clamp(-value_clamp, value_clamp)


def exact_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) = sum over the vocabulary of p (log p - log q), in nats; logits or log-probabilities [..., V] of each,
    result [...]. Exactly 0 where the two are equal."""
    log_p, log_q = log_p.log_softmax(dim=-1), log_q.log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
