"""Held-out loss and bits per byte: a function of weights, text and rows per forward alone.

    nats            sum over tokens of -log p(token | those before it in its window)
    loss            nats / tokens
    bits per byte   nats / ln 2 / bytes of the text in UTF-8; comparable between tokenizers

A recipe with one scale per activation tensor (all but ``rl`` and ``bf16``) quantises the rows of a
forward together, so its loss depends on which rows those are: in a small model 8.3516, 8.3505 and
8.3512 bits per byte for 1, 2 and 8 of them (``nvidia``). So the windows are dealt out in batches of
``eval_batch`` rows, whatever the micro-batch and the number of processes are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from nvfp4.numerics.torch_state import float64_device
from nvfp4.train.data import IGNORED, HeldOut


@dataclass(frozen=True)
class Score:
    """nats: negative log-likelihood of the text, summed. tokens; size: its UTF-8 bytes."""

    nats: float
    tokens: int
    size: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """nats / ln 2 / bytes: comparable between tokenizers."""
        return self.nats / math.log(2) / self.size


def evaluate(
    model: torch.nn.Module,
    held_out: HeldOut,
    rows: int,
    autocast: Callable[[], AbstractContextManager],
    accelerator: Accelerator,
) -> Score:
    """Score every token of the held-out text once, ``rows`` windows at a time.

    model(input_ids=int64 [rows, seq_len]).logits must be [rows, seq_len, vocab]. Processes share
    the batches; the result is the same to the bit for any number of them. Changes neither the
    training mode, nor a random state, nor the layers' call counters.
    """
    training = model.training
    model.eval()
    batches = list(zip(held_out.inputs.split(rows), held_out.targets.split(rows), strict=True))

    # A place per batch, not one sum: the order of addition then does not depend on the processes.
    exact = float64_device(accelerator.device)
    nats = torch.zeros(len(batches), dtype=torch.float64, device=exact)
    with torch.no_grad():
        for i in range(accelerator.process_index, len(batches), accelerator.num_processes):
            nats[i] = (
                _nats(model, *batches[i], autocast, accelerator.device).to(exact).double().sum()
            )
    model.train(training)
    if accelerator.num_processes > 1:
        # each place has one number and zeros: nothing is rounded
        nats = accelerator.reduce(nats, reduction="sum")
    return Score(math.fsum(nats.tolist()), held_out.tokens, held_out.size)


def _nats(
    model: torch.nn.Module,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    autocast: Callable[[], AbstractContextManager],
    device: torch.device,
) -> torch.Tensor:
    """Negative log-likelihood per target, float32 [rows * seq_len]; 0 where it is ``IGNORED``."""
    with autocast():
        logits = model(input_ids=inputs.to(device)).logits  # [rows, seq_len, vocab]
    return F.cross_entropy(
        logits.float().flatten(0, 1),
        targets.to(device).flatten(),
        ignore_index=IGNORED,
        reduction="none",
    )
