"""Whether a model is causal: the logits at a position may not move when later tokens change.

    two sequences [16], equal in their first 8 tokens, different in each of the last 8
      -> logits a, b [16, vocab] -> max |a - b| over the first 8 rows <= LEAK * (max a - min a)

transformers loads a BERT as a "causal LM" with no more than a warning. Trained on next tokens it
reads the answer, its loss falls to nothing, and neither the log nor the export shows why. Two
forwards at the start cost less than that run.
"""

from __future__ import annotations

from typing import Any

import torch

from nvfp4.run.errors import TrainError

TOKENS = 16
"""Length of the sequence that is looked at; its second half is what changes."""

LEAK = 1e-4
"""Of the spread of the logits: more than this is sight, less is rounding. Weights are float32 and
both sequences have one shape, so a causal model gives 0; measured: Llama, GPT-2, OPT and Mamba 0,
Mixtral and Qwen3-MoE, whose kernels group the rows by their values, 1.4e-7. BERT and RoBERTa of two
layers with fresh weights (deviation .02, so attention is nearly flat) move by 2e-3 to 3e-3."""


def check_causal(model: Any, name: str) -> None:
    """``TrainError`` if logits of a model on the CPU depend on later tokens, or are NaN.

    model(input_ids=int64 [1, n]).logits: [1, n, vocab]. name: for the message. Two forwards of 16
    tokens in eval mode; the mode before comes back, and nothing is drawn.
    """
    text = model.config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or 0
    length = min(TOKENS, longest) if longest > 0 else TOKENS  # XLNet's is -1, for any
    half = length // 2
    if half < 1 or text.vocab_size < 2:
        return

    # Two sequences that agree in their first half and nowhere in their second.
    first = (torch.arange(length) * 7919 + 1) % text.vocab_size
    second = torch.where(torch.arange(length) < half, first, (first + 1) % text.vocab_size)
    training = model.training
    model.eval()
    with torch.no_grad():
        a, b = (
            model(input_ids=ids[None], use_cache=False).logits[0].float() for ids in (first, second)
        )
    model.train(training)
    if bool(a.isnan().any() or b.isnan().any()):
        raise TrainError(f"model: the logits of {name} are NaN; its weights are damaged")

    # Logits may be -inf (a vocabulary that is masked): equal ones do not differ.
    moved = torch.where(a == b, 0.0, a - b)[:half].abs().max()  # over [half, vocab]
    finite = a[a.isfinite()]
    spread = finite.max() - finite.min() if finite.numel() else torch.zeros(())
    if float(moved) > LEAK * float(spread):
        raise TrainError(
            f"model: {name} ({type(model).__name__}) is not causal: the logits of its first "
            f"{half} tokens move by "
            f"{float(moved):.2g} when later tokens change; give a causal LM (a BERT must be one "
            "with is_decoder)"
        )
