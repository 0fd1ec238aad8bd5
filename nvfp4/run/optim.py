"""AdamW with decay groups, and the learning rate as a pure function of the number of the update.

    update        0 ... warmup         ... steps - decay * steps         ... steps - 1
    wsd           rises linearly        stays at the peak           falls linearly towards min_lr
    cosine        rises linearly        falls as half a cosine towards min_lr

There is no scheduler with a state: a resumed run asks for the rate of its next update.
transformers' schedules have rate 0 in their step 0 and the minimum in their last; ours are the
steps between. So no update is wasted on a rate of 0, and the last one is one step above min_lr.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import get_cosine_with_min_lr_schedule_with_warmup, get_wsd_schedule

from nvfp4.run.options import OptimOptions


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups: matrices with ``weight_decay``; norms, biases and embeddings without.

    Tied embeddings count as embeddings. Frozen parameters are in neither group. The order within a
    group is that of ``named_parameters``.
    """
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    plain = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def adamw(model: nn.Module, config: OptimOptions) -> torch.optim.AdamW:
    """AdamW over ``decay_groups`` with the resolved config's settings.

    One fused kernel where the device has one (CPU and CUDA).
    """
    assert config.lr is not None
    assert config.weight_decay is not None
    fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
    groups = decay_groups(model, config.weight_decay)
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused
    )


def learning_rates(config: OptimOptions) -> Callable[[int], float]:
    """The learning rate of update 0, 1, ..., steps - 1; never 0 within the run."""
    assert config.lr is not None
    assert config.warmup is not None
    peak, steps = config.lr, config.steps + 1

    # a schedule wants an optimiser; we want its function
    unused = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    if config.schedule == "wsd":
        # the decay may not begin before the warm-up has ended
        schedule = get_wsd_schedule(
            unused,
            num_warmup_steps=config.warmup,
            num_decay_steps=min(round(config.decay * config.steps), config.steps - config.warmup),
            num_training_steps=steps,
            decay_type="linear",
            min_lr_ratio=config.min_lr,
        )
    else:
        schedule = get_cosine_with_min_lr_schedule_with_warmup(
            unused,
            num_warmup_steps=config.warmup,
            num_training_steps=steps,
            min_lr_rate=config.min_lr,
        )

    # One on: their step 0 has rate 0, ours has the first rate above it.
    factor = schedule.lr_lambdas[0]
    return lambda step: peak * factor(step + 1)
