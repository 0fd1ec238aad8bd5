"""GSPO: the ratio of a whole completion.

    s_i    = (prod_t rho_it)^(1 / T_i) = exp(mean_t log rho_it)      ratio = "sequence"
    L_i    = -min(s A, clip(s, 1 - 3e-4, 1 + 4e-4) A)                clip_low, clip_high
    loss   = 1/S sum_i L_i                                           aggregation = "grpo"

A reward belongs to a completion, so the importance weight should too; token ratios add noise that
grows with the length. The mean of a completion's log-ratios moves far less than each of
them, hence the narrow clip.

In code s_i stands on each token of completion i, with the gradient of all of them; the mean over
the completion, which ``aggregate`` takes, is then L_i itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nvfp4.rl.objectives.base import Defaults, StepPlan
from nvfp4.rl.objectives.policy_gradient import PolicyGradient
from nvfp4.rl.objectives.token_loss import Ratio


@dataclass(kw_only=True)
class GSPO(PolicyGradient):
    """Group sequence policy optimisation (arXiv 2507.18071).

    The formula is at the head of the file; A as in GRPO. 4 updates per rollout (section 5.1). The
    first of them is GRPO's: the ratio is still 1.
    """

    name: ClassVar[str] = "gspo"
    defaults: ClassVar[Defaults] = Defaults(group=16, updates=4)

    ratio: Ratio = "sequence"
    clip_low: float = 3e-4
    clip_high: float = 4e-4

    def acts_like(self, plan: StepPlan) -> str | None:
        """GRPO, before the policy has moved: the mean ratio has the mean of the gradients."""
        own = self.ratio == "sequence" and self.aggregation == "grpo"
        return "grpo, since every ratio is still 1" if own and plan.updates == 1 else None
