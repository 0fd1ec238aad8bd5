"""Log-probabilities of completions: one function, for the trainer, the reference model and the meter."""

from __future__ import annotations

from typing import Any

import torch

from nvfp4.rl.samples import Samples, Scores


def log_probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """log softmax(logits / temperature) in float32, [..., V]; the sampler and the trainer both call this one."""
    return torch.log_softmax(logits.float() / temperature, dim=-1)


def positions(attention: torch.Tensor) -> torch.Tensor:
    """int64 [S, L]: the place of each token behind the padding on its left; 0 on padding."""
    return (attention.cumsum(dim=1) - 1).clamp(min=0)


def score(
    forward: Any,
    samples: Samples,
    temperature: float,
    *,
    logits: bool = False,
    prompt: bool = False,
    hidden: bool = False,
) -> Scores:
    """Teacher forcing: what ``forward``, a causal LM of transformers, says about the completions.

    Differentiable in ``Scores.logprobs`` (and logits, hidden), unless called under ``torch.no_grad``. Batches without
    padding on the left go without a mask, since a causal model does not see what comes after a completion.
    """
    length = samples.mask.shape[1]
    padded = not bool(samples.attention[:, 0].all())
    out = forward(
        input_ids=samples.ids[:, :-1],
        attention_mask=samples.attention[:, :-1] if padded else None,
        position_ids=positions(samples.attention[:, :-1]) if padded else None,
        logits_to_keep=samples.ids.shape[1] - 1 if prompt else length,
        output_hidden_states=hidden,
        use_cache=False,
    )
    every = log_probabilities(out.logits, temperature)
    before, every = every[:, :-length], every[:, -length:]
    chosen = every.gather(-1, samples.ids[:, -length:, None]).squeeze(-1)
    with torch.no_grad():
        entropy = -(every.exp() * every).nan_to_num(nan=0.0).sum(dim=-1)  # 0 log 0 = 0, where logits are -inf
    return Scores(
        logprobs=torch.where(samples.mask, chosen, 0.0),
        entropy=torch.where(samples.mask, entropy, 0.0),
        logits=every if logits else None,
        prompt_logits=before if prompt else None,
        hidden=out.hidden_states[-1][:, -length:] if hidden else None,
    )
