"""Attention whose result does not depend on the shape of the batch: with it a cached rollout equals the trainer."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "nvfp4_float64"


def float64_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' sdpa attention with sums in float64, rounded once.

    Kernels add in another order for one query over a cache than for all of them at once. In float32 that moves last
    bits, and now and then one moves an FP4 code, which is worth up to .1 in a log-probability. In float64 the
    difference is some 2^-29 of float32's last bit, so nearly all results round to the same float32.
    """
    wide = query.double(), key.double(), value.double()
    out, weights = sdpa_attention_forward(module, *wide, attention_mask, **options)
    return out.to(query.dtype), weights


def register() -> str:
    """Make it known to transformers, as ``attn_implementation=`` of the name returned."""
    AttentionInterface.register(NAME, float64_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
