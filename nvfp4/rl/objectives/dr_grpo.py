"""Dr. GRPO: GRPO without its two biases.

    A_i    = r_i - mean                                        advantage = "group_mean"
    loss   = 1 / (S max_new_tokens) sum_i sum_t L_it           aggregation = "dr_grpo"

What was wrong with GRPO's 1/T_i: the longer a wrong completion, the less each of its tokens is
punished, so wrong answers grow. And with 1/std: questions that nearly all or hardly any completions
solve have a small std, and weigh most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nvfp4.rl.objectives.base import Defaults
from nvfp4.rl.objectives.policy_gradient import Advantage, PolicyGradient
from nvfp4.rl.objectives.token_loss import Aggregation


@dataclass(kw_only=True)
class DrGRPO(PolicyGradient):
    """GRPO done right (arXiv 2503.20783).

    The formula is at the head of the file, L as in grpo.py: a token weighs the same in a short and
    in a long completion. The authors' scripts do 8 updates per rollout (128 of 1,024 completions
    each).
    """

    name: ClassVar[str] = "dr_grpo"
    defaults: ClassVar[Defaults] = Defaults(updates=8)

    advantage: Advantage = "group_mean"
    aggregation: Aggregation = "dr_grpo"
