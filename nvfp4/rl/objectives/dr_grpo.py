"""Dr. GRPO: GRPO without its two biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nvfp4.rl.objectives.aggregation import Aggregation
from nvfp4.rl.objectives.base import Defaults
from nvfp4.rl.objectives.policy_gradient import Advantage, PolicyGradient


@dataclass(kw_only=True)
class DrGRPO(PolicyGradient):
    """GRPO done right (arXiv 2503.20783): A = r - mean of the group, without standard deviation, which overweights
    questions that are nearly solved or hopeless; loss summed over tokens and divided by samples * max_new_tokens, so
    that a token weighs the same in a short and in a long completion. The authors' scripts do 8 updates per rollout (128
    of 1,024 completions each)."""

    name: ClassVar[str] = "dr_grpo"
    defaults: ClassVar[Defaults] = Defaults(updates=8)

    advantage: Advantage = "group_mean"
    aggregation: Aggregation = "dr_grpo"
