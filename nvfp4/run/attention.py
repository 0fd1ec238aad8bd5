"""transformers' sdpa attention in a wider dtype than the model's, rounded once at the end.

    query, key, value, a mask that is added -> copies in ``dtype`` -> sdpa -> the dtype of the query

Two places want it, each for a reason of its own: float32, where a processor emulates BF16
(``precision.py``), and float64, where sampler and trainer have to agree (``rl/score.py``).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


def attention_in(
    dtype: torch.dtype,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sums in ``dtype``; the result has the dtype of the query, and weights are not returned.

    query, key, value: [batch, heads, tokens, columns]; key and value may have fewer heads.
    attention_mask: bool, or of numbers that are added.
    """
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.to(dtype)
    wide = query.to(dtype), key.to(dtype), value.to(dtype)
    with torch.autocast(query.device.type, enabled=False):  # it would round float32 copies again
        out, weights = sdpa_attention_forward(module, *wide, attention_mask, **options)
    return out.to(query.dtype), weights


def register_attention(name: str, dtype: torch.dtype) -> None:
    """Make it known to transformers, as ``attn_implementation=name``."""
    AttentionInterface.register(name, partial(attention_in, dtype))
    AttentionMaskInterface.register(name, sdpa_mask)
