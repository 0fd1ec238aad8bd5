"""Log-probabilities of completions: one function for trainer, reference model and meter.

The sampler draws tokens one at a time over a KV cache; the trainer scores whole texts at once. Only
if both compute the same number is the ratio of the two policies 1 where nothing has been learnt, so
what they share is here and is written once:

    ``log_probabilities``   log softmax(logits / temperature) in float32
    ``positions``           the place of a token behind the padding on its left
    ``FLOAT64_ATTENTION``   sums that round to the same float32 whatever the shape of the batch

``score`` runs a model over [prompt | completion] (teacher forcing) and reads off, for each
completion token, its log-probability under the distribution that the tokens before it give.
"""

from __future__ import annotations

from typing import Any

import torch

from nvfp4.rl.samples import Samples, Scores
from nvfp4.run.attention import register_attention

FLOAT64_ATTENTION = "nvfp4_float64"
"""Name of that attention in transformers, after ``register_float64_attention``."""


def log_probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """log softmax(logits / temperature) in float32, [..., V]; sampler and trainer call this."""
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
    """What ``forward``, a causal LM of transformers, says about the completions.

    logits, prompt, hidden: also give ``Scores.logits``, ``prompt_logits``, ``hidden``.
    Differentiable in logprobs (and logits, hidden), unless called under ``torch.no_grad``.
    """
    length = samples.mask.shape[1]

    # Without padding on the left no mask is needed: a causal model does not see what comes after a
    # completion. The last token predicts nothing that is read, so it is left out.
    attention = samples.attention[:, :-1]
    padded = not bool(samples.attention[:, 0].all())
    out = forward(
        input_ids=samples.ids[:, :-1],
        attention_mask=attention if padded else None,
        position_ids=positions(attention) if padded else None,
        logits_to_keep=samples.ids.shape[1] - 1 if prompt else length,
        output_hidden_states=hidden,
        use_cache=False,
    )

    # Row i of the last ``length`` rows is the distribution of completion token i.
    everything = log_probabilities(out.logits, temperature)
    before, of_tokens = everything[:, :-length], everything[:, -length:]
    # log p of the token that was drawn, [S, T]
    drawn = of_tokens.gather(-1, samples.ids[:, -length:, None]).squeeze(-1)
    with torch.no_grad():
        terms = (of_tokens.exp() * of_tokens).nan_to_num(nan=0.0)  # 0 log 0 = 0 at logits of -inf
        entropy = -terms.sum(dim=-1)

    return Scores(
        logprobs=torch.where(samples.mask, drawn, 0.0),
        entropy=torch.where(samples.mask, entropy, 0.0),
        logits=of_tokens if logits else None,
        prompt_logits=before if prompt else None,
        hidden=out.hidden_states[-1][:, -length:] if hidden else None,
    )


def register_float64_attention() -> str:
    """Make sdpa attention with sums in float64 known to transformers; returns its name there.

    Kernels add in another order for one query over a cache than for all of them at once. In float32
    that moves last bits, and a last bit moves an FP4 code now and then. Measured over a cache with
    recipe ``rl`` (benchmarks/results/rl.json): on the warm start 1.4 % of tokens differ by more
    than 1e-5, by .013 nats at most; on random weights .24 %, by .32 nats at most. In float64 the
    difference is some 2^-29 of float32's last bit, so nearly all results round to the same float32:
    on the CPU the gap was exactly 0.
    """
    register_attention(FLOAT64_ATTENTION, torch.float64)
    return FLOAT64_ATTENTION
