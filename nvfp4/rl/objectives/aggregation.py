"""From a loss per token to one number. Every rule is a sum of shares, so micro-batches add up to the batch."""

from __future__ import annotations

from typing import Literal

import torch

from nvfp4.rl.samples import Totals

Aggregation = Literal["grpo", "bnpo", "dapo", "dr_grpo"]


def aggregate(values: torch.Tensor, mask: torch.Tensor, totals: Totals, rule: Aggregation) -> torch.Tensor:
    """The share of this micro-batch; values [S, T] may be anything outside mask [S, T], NaN excepted.

    grpo: mean over a completion's tokens, then over samples (arXiv 2402.03300): short ones weigh more for each token.
    dapo: mean over the tokens of the whole batch (arXiv 2503.14476). dr_grpo: sum over tokens, divided by samples *
    max_new_tokens (arXiv 2503.20783). bnpo (TRL's name): mean over the tokens of the micro-batch, the micro-batches
    weighted by their samples; the only one that depends on the split. A completion without tokens counts as a sample.
    """
    values = torch.where(mask, values, 0.0)
    tokens = mask.sum(dim=1).clamp(min=1)
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
    """This micro-batch's share of the mean over the tokens of the batch."""
    return torch.where(mask, values, 0.0).sum() / max(totals.tokens, 1)
