"""One optimiser update: forward and backward over the parts of the batch, clipping, AdamW; or a counted skip."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F

from nvfp4.run.log import Row
from nvfp4.run.processes import float64_device
from nvfp4.train.setup import Run


def update(run: Run, step: int, lr: float) -> Row:
    """Train on the batch of ``step`` (0 for the first) with learning rate ``lr``.

    Returns loss (mean nats per token over all processes), lr, grad_norm (L2, before clipping) and skipped. With NaN or
    Inf in loss or gradient the weights and the optimiser stay as they are, the number is None and skipped is True.
    """
    config, accelerator, parts = run.config, run.accelerator, run.parts
    batch = run.windows.batch_at(step)[accelerator.process_index :: accelerator.num_processes]
    batch = batch.to(accelerator.device)  # all at once: a copy in the loop would wait for the part before it
    exact = float64_device(accelerator.device)
    total = torch.zeros((), dtype=torch.float64, device=exact)
    for i, rows in enumerate(batch.split(run.rows)):
        with nullcontext() if i == parts - 1 else accelerator.no_sync(run.forward):
            loss = next_token_loss(run, rows) / parts
            loss.backward()
        total += loss.detach().to(exact).double()
    trained = [parameter for parameter in run.model.parameters() if parameter.grad is not None]
    total_norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None])
    if config.clip:
        torch.nn.utils.clip_grads_with_norm_(trained, config.clip, total_norm)
    if accelerator.num_processes > 1:
        total = accelerator.reduce(total, reduction="mean")
    mean, norm = float(total), float(total_norm)
    good = math.isfinite(mean) and math.isfinite(norm)
    if good:
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return {
        "loss": mean if math.isfinite(mean) else None,
        "lr": lr,
        "grad_norm": norm if math.isfinite(norm) else None,
        "skipped": not good,
    }


def next_token_loss(run: Run, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next tokens in nats, a float32 scalar; rows: int64 [sequences, seq_len + 1]."""
    with run.autocast():
        logits = run.forward(input_ids=rows[:, :-1]).logits
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
