"""Held-out loss and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from nvfp4.train.data import IGNORED, HeldOut


@dataclass(frozen=True)
class Score:
    """nats: negative log-likelihood of the text, summed; tokens and size: how many tokens and UTF-8 bytes it has."""

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
    """Score every token of the held-out text once, ``rows`` windows at a time, shared among the processes.

    model(input_ids=int64 [rows, seq_len]).logits must be [rows, seq_len, vocab]. Changes neither the training mode,
    nor a random state, nor the layers' call counters.
    """
    training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    pairs = list(zip(held_out.inputs.split(rows), held_out.targets.split(rows), strict=True))[mine]
    with torch.no_grad():
        for inputs, targets in pairs:
            with autocast():
                logits = model(input_ids=inputs.to(accelerator.device)).logits
            losses = F.cross_entropy(
                logits.float().flatten(0, 1),
                targets.to(accelerator.device).flatten(),
                ignore_index=IGNORED,
                reduction="none",
            )
            total += losses.double().sum()
    model.train(training)
    return Score(float(accelerator.reduce(total, reduction="sum")), held_out.tokens, held_out.size)
