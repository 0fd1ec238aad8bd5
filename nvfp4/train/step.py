"""One update of pretraining: forward and backward over the parts of the batch, then AdamW.

    windows [batch, seq_len + 1] -> this process's rows -> parts of micro_batch rows
    part: logits of rows[:, :-1] in the compute dtype -> cross-entropy with rows[:, 1:], float32

    loss = 1/N sum over tokens of -log softmax(logits)[target],   N = batch * seq_len

The loss is the mean over all N tokens of the update, whatever the parts and processes are. All
parts have the same number of tokens, so the mean of their means is that mean: each part's loss is
divided by the number of parts before its backward, and processes average their gradients.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F

from nvfp4.numerics.torch_state import float64_device
from nvfp4.run.log import Row
from nvfp4.run.update import apply_gradients
from nvfp4.train.parts import PretrainRun


def update(run: PretrainRun, step: int, lr: float) -> Row:
    """Train on the batch of ``step`` (0 for the first) with learning rate ``lr``.

    Returns loss (mean nats per token over all processes), lr, grad_norm (L2, before clipping) and
    skipped. With NaN or Inf in loss or gradient the weights and the optimiser stay as they are and
    skipped is True.
    """
    config, accelerator, parts = run.config, run.accelerator, run.parts

    # This process's sequences: every world-th. All go to the device at once: a copy in the loop
    # would wait for the part before it.
    batch = run.windows.batch_at(step)[accelerator.process_index :: accelerator.num_processes]
    batch = batch.to(accelerator.device)

    # Gradients add up over the parts; processes average theirs in the backward of the last one.
    exact = float64_device(accelerator.device)
    total = torch.zeros((), dtype=torch.float64, device=exact)
    for i, rows in enumerate(batch.split(run.rows)):
        with nullcontext() if i == parts - 1 else accelerator.no_sync(run.forward):
            loss = next_token_loss(run, rows) / parts
            loss.backward()
        # in float64: the figure in the log then hardly depends on the number of parts
        total += loss.detach().to(exact).double()
    if accelerator.num_processes > 1:
        total = accelerator.reduce(total, reduction="mean")

    mean = float(total)
    norm, done = apply_gradients(run.model, run.optimizer, lr, config.clip, mean)
    return {"loss": mean, "lr": lr, "grad_norm": norm, "skipped": not done}


def next_token_loss(run: PretrainRun, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next tokens in nats, a float32 scalar.

    rows: int64 [sequences, seq_len + 1].
    """
    with run.autocast():
        logits = run.forward(input_ids=rows[:, :-1]).logits  # [sequences, seq_len, vocab]
    # under autocast the logits are BF16; their log-sum over the vocabulary is taken in float32
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
