"""The end of every update: gradients that micro-batches and processes have summed are applied.

    norm = L2 of all gradients
    gradients *= clip / norm      where that is below 1 and clip is not 0
    AdamW at the update's lr      if loss and norm are finite

With a NaN or an Inf in loss or norm, weights and moments stay as they are: the step is skipped and
counted, and the loop stops the run after ``max_bad_steps`` in a row. One bad batch then costs one
update and not the run. Every process sees the same norm and loss, so all skip together.
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

    # Reading the norm waits for the device: whether to step has to be known before the step.
    norm = float(total_norm)
    good = math.isfinite(loss) and math.isfinite(norm)
    if good:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, good
