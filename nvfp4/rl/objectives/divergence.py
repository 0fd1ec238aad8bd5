"""How far the policy is from its reference: Schulman's estimators, and the exact number.

With d = log policy - log reference of the token that was drawn (joschu.net/blog/kl-approx.html):

    estimator                   mean under the policy       gradient as a loss
    k1 = d                      KL, unbiased                0 on average
    k2 = d^2 / 2                KL to second order          that of KL(policy || reference)
    k3 = exp(-d) + d - 1        KL, unbiased, never < 0     that of KL(reference || policy)

Multiplied by the ratio policy / old policy, k1 and k3 get the gradient of the KL as well (checked
by enumeration in tests/rl/test_rl_losses.py).
"""

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
    """KL(policy || reference) from one drawn token each; arguments and result [S, T], in nats.

    weights: [S, T], the ratio policy / old policy, or 1 with its gradient; multiplied in between
    the clamps, as NeMo RL does. log_ratio_clamp: d is clamped to +- this before; value_clamp: the
    estimate is clamped to +- this after. Beyond a clamp the gradient is 0, the weights' too.
    """
    # d, clamped; a weight beyond the clamp must not carry a gradient round it
    difference = logprobs - ref_logprobs  # [S, T]
    if log_ratio_clamp is not None:
        whole = difference
        difference = difference.clamp(-log_ratio_clamp, log_ratio_clamp)
        if weights is not None:
            weights = torch.where(whole == difference, weights, weights.detach())

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
    """KL(p || q) = sum over the vocabulary of p (log p - log q), in nats.

    log_p, log_q: logits or log-probabilities [..., V]; result [...]. Exactly 0 where the two are
    equal.
    """
    log_p, log_q = log_p.log_softmax(dim=-1), log_q.log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
