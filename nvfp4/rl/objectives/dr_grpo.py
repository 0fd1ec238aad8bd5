"""Dr. GRPO: GRPO without its two biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nvfp4.rl.objectives.base import Defaults
from nvfp4.rl.objectives.policy_gradient import Advantage, PolicyGradient
from nvfp4.rl.objectives.token_loss import Aggregation


@dataclass(kw_only=True)
class DrGRPO(PolicyGradient):
    """GRPO done right (arXiv 2503.20783).

        A    = r - mean of the group
        loss = sum over tokens of -min(rho A, clip(rho, 0.8, 1.2) A)
               / (completions x max_new_tokens)

    No standard deviation, which overweights questions that are nearly solved or hopeless; and a
    token weighs the same in a short and in a long completion. The authors' scripts do 8 updates per
    rollout (128 of 1,024 completions each).
    """

    name: ClassVar[str] = "dr_grpo"
    defaults: ClassVar[Defaults] = Defaults(updates=8)

    advantage: Advantage = "group_mean"
    aggregation: Aggregation = "dr_grpo"
