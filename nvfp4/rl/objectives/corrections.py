"""Importance weights for a sampler that is not the trainer: w = old policy / sampler.

With w of a token, and their product or geometric mean over the completion or the tokens so far:

    token                  w
    token_truncate         min(w, high)                                        TIS
    token_mask             w inside [low, high], else 0                        MIS, IcePop
    prefix                 product up to the token
    sequence               product over the completion: alone unbiased, with the largest variance
    sequence_truncate      min(product, high)                                  TRL's names
    sequence_mask          product inside [low, high], else 0
    geometric_mask         1 where the geometric mean is inside [low, high], else 0
    geometric_mask_token   w there                                             ProRL v2.1

Where sampler and trainer are one function, as here by default, every weight is exactly 1.

Measured by enumerating 27 sequences, 20 policies and samplers whose logits are off by .4: only the
product over the sequence removes the bias of the policy gradient (error below 1e-12); token
weights, TIS and IcePop leave most of it.
"""

from __future__ import annotations

from typing import Literal, get_args

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
    """What the token loss is multiplied by, [S, T]; exactly 1 where trainer and sampler agree.

    old_logprobs, sampler_logprobs, mask: [S, T]. low, high: bounds of the kinds that have them.
    """
    # in logarithms: products are sums, and what lies outside the mask is a factor of 1
    log_w = torch.where(mask, old_logprobs - sampler_logprobs, 0.0).detach()
    if correction == "none":
        return torch.ones_like(log_w)

    # the completion is kept or dropped as a whole
    if correction.startswith("geometric"):
        inside = _inside(_level(log_w, mask, "geometric"), low, high)
        kept = torch.where(inside, 1.0, 0.0)
        if correction == "geometric_mask_token":
            return kept * _exp(log_w)
        return kept.to(log_w.dtype).expand_as(log_w)

    # level_rule: what is looked at, and what becomes of it
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
    """bool [S, T]: tokens whose weight the correction cuts or drops; none without bounds."""
    level, _, rule = correction.partition("_")
    if not rule:
        return torch.zeros_like(mask)
    log_w = torch.where(mask, old_logprobs - sampler_logprobs, 0.0).detach()
    least = -torch.inf if rule == "truncate" else low
    return mask & ~_inside(_level(log_w, mask, level), least, high)


def _level(log_w: torch.Tensor, mask: torch.Tensor, level: str) -> torch.Tensor:
    """The weight that is looked at: [S, T] for token and prefix, [S, 1] for the others."""
    if level == "token":
        return _exp(log_w)
    if level == "prefix":
        return _exp(log_w.cumsum(dim=1))
    total = log_w.sum(dim=1, keepdim=True)  # [S, 1]
    if level == "sequence":
        return _exp(total)
    if level == "geometric":
        return _exp(total / mask.sum(dim=1, keepdim=True).clamp(min=1))
    raise ValueError(f"unknown correction {level!r}; known: {', '.join(get_args(Correction))}")


def _exp(log_w: torch.Tensor) -> torch.Tensor:
    return log_w.clamp(-MAX_LOG_WEIGHT, MAX_LOG_WEIGHT).exp()


def _inside(weights: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return (weights >= low) & (weights <= high)
