"""How far the sampler is from the trainer, and how much of the FP4 weights an update moved: measured in every step.

With d = log p(trainer) - log p(sampler) of the tokens that were drawn; names as in NeMo RL where it has them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from nvfp4.model.weights import layers
from nvfp4.numerics.codec import e2m1_decode, unpack
from nvfp4.numerics.qtensor import QTensor

NOTICEABLE = 0.05  # |d| from which a token is counted


def mismatch(trainer: torch.Tensor, sampler: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
    """The gap between log-probabilities [S, T] of the same tokens, over ``mask``.

    token_mult_prob_error: mean exp |d|, 1 for none. gen_kl_error: mean of exp(d) - 1 - d, an unbiased estimate of
    KL(sampler || trainer), whose draws these are; no term is below 0. max, quantile_999: of |d|. share: of tokens with
    |d| > .05. exact: share of tokens with d = 0.
    """
    d = (trainer.detach() - sampler)[mask].double()
    if d.numel() == 0:
        d = d.new_zeros(1)
    size = d.abs()
    rank = min(len(size) - 1, int(0.999 * len(size)))
    return {
        "token_mult_prob_error": float(size.exp().mean()),
        "gen_kl_error": float((torch.expm1(d) - d).mean()),
        "max": float(size.max()),
        "quantile_999": float(size.sort().values[rank]),
        "share": float((size > NOTICEABLE).double().mean()),
        "exact": float((d == 0).double().mean()),
    }


def weight_codes(model: nn.Module) -> dict[str, QTensor]:
    """The forward's weight operand of each converted layer that quantises its weight without noise, by name."""
    found = {}
    with torch.no_grad():
        for name, layer in layers(model).items():
            state = layer.nvfp4
            if state.enabled and state.recipe.fprop.right.options_without_noise is not None:
                found[name] = state.call().weight(layer.weight.detach(), state.weight_amax())
    return found


def codes_changed(before: Mapping[str, QTensor], after: Mapping[str, QTensor]) -> float | None:
    """The share of FP4 codes that differ; -0 and 0 are the same. None if there are none."""
    changed = total = 0
    for name, old in before.items():
        a, b = (e2m1_decode(unpack(q.codes)) for q in (old, after[name]))
        changed += int((a != b).sum())
        total += a.numel()
    return changed / total if total else None
