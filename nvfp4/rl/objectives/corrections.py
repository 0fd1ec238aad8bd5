"""Importance weights for a sampler that is not the trainer: w = trainer's old policy / sampler, never with gradient."""

from __future__ import annotations

from typing import Literal

import torch

Correction = Literal[
    "none",
    "token",
    "token_truncate",
    "token_mask",
    "prefix",
    "sequence",
    "sequence_truncate",
    "sequence_mask",
    "geometric_mask",
    "geometric_mask_token",
]

MAX_LOG_WEIGHT = 20.0
"""Weights are cut at exp(+-20): a product over a long completion must not become infinite."""


def importance_weights(
    old_logprobs: torch.Tensor,
    sampler_logprobs: torch.Tensor,
    mask: torch.Tensor,
    correction: Correction,
    low: float,
    high: float,
) -> torch.Tensor:
    """What the token loss is multiplied by, [S, T]; exactly 1 everywhere where trainer and sampler agree.

    token: w. token_truncate: min(w, high) (TIS). token_mask: w inside [low, high], else 0 (MIS, IcePop). prefix: the
    product up to the token. sequence: the product over the completion, the only unbiased one, with the largest
    variance; sequence_truncate, sequence_mask: the same of the product (TRL's names). geometric_mask: 1 where the
    geometric mean over the completion is inside [low, high], else 0; geometric_mask_token: w there (ProRL v2.1).
    """
    log_w = torch.where(mask, old_logprobs - sampler_logprobs, 0.0).detach()
    if correction == "none":
        return torch.ones_like(log_w)
    if correction.startswith("geometric"):
        kept = torch.where(_inside(_level(log_w, mask, "geometric"), low, high), 1.0, 0.0)
        return kept * _exp(log_w) if correction == "geometric_mask_token" else kept.to(log_w.dtype).expand_as(log_w)
    level, _, rule = correction.partition("_")
    weights = _level(log_w, mask, level).expand_as(log_w)
    if rule == "truncate":
        return weights.clamp(max=high)
    if rule == "mask":
        return torch.where(_inside(weights, low, high), weights, 0.0)
    return weights


def out_of_bounds(
    old_logprobs: torch.Tensor,
    sampler_logprobs: torch.Tensor,
    mask: torch.Tensor,
    correction: Correction,
    low: float,
    high: float,
) -> torch.Tensor:
    """bool [S, T]: tokens of mask whose weight the correction cuts or drops; none for one without bounds."""
    level, _, rule = correction.partition("_")
    if not rule:
        return torch.zeros_like(mask)
    weights = _level(torch.where(mask, old_logprobs - sampler_logprobs, 0.0).detach(), mask, level)
    return mask & ~_inside(weights, -torch.inf if rule == "truncate" else low, high)


def _level(log_w: torch.Tensor, mask: torch.Tensor, level: str) -> torch.Tensor:
    """The weight that is looked at: [S, T] for token and prefix, [S, 1] for the others."""
    if level == "token":
        return _exp(log_w)
    if level == "prefix":
        return _exp(log_w.cumsum(dim=1))
    total = log_w.sum(dim=1, keepdim=True)
    if level == "sequence":
        return _exp(total)
    if level == "geometric":
        return _exp(total / mask.sum(dim=1, keepdim=True).clamp(min=1))
    raise ValueError(f"unknown correction {level!r}; known: {', '.join(Correction.__args__)}")  # type: ignore[attr-defined]


def _exp(log_w: torch.Tensor) -> torch.Tensor:
    return log_w.clamp(-MAX_LOG_WEIGHT, MAX_LOG_WEIGHT).exp()


def _inside(weights: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return (weights >= low) & (weights <= high)
