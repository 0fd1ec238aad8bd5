"""The end of every update: gradients that micro-batches and processes have summed are applied.

    total norm (L2, all gradients) -> times clip / norm where that is below 1 -> AdamW

With a NaN or an Inf in loss or norm the weights and the moments stay as they are: the step is
skipped and counted, and the loop stops the run after ``max_bad_steps`` in a row.
"""

from __future__ import annotations

import math

import torch
from torch import nn


def apply_gradients(
    model: nn.Module, optimizer: torch.optim.Optimizer, lr: float, clip: float, loss: float
) -> tuple[float, bool]:
    """One optimiser step with learning rate ``lr``, which uses the gradients up.

    clip: largest L2 norm of the gradient, 0 for no clipping. loss: of the update, over all
    processes. Returns the norm before clipping, and whether the step was done.
    """
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    total_norm = nn.utils.get_total_norm(
        [parameter.grad for parameter in trained if parameter.grad is not None]
    )
    if clip:
        nn.utils.clip_grads_with_norm_(trained, clip, total_norm)

    norm = float(total_norm)
    good = math.isfinite(loss) and math.isfinite(norm)
    if good:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, good
