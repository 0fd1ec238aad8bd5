"""GRPO: the group's mean in place of a critic.

    A_i    = (r_i - mean) / (std + 1e-4)                   advantages.group_advantages
    rho_it = policy / policy before the updates            token_loss.log_ratio, "token"
    L_it   = -min(rho A, clip(rho, 0.8, 1.2) A)            token_loss.clipped_loss
    loss   = 1/S sum_i 1/T_i sum_t (L_it + kl_coef k3)     token_loss.aggregate, "grpo"

for completions i = 1 ... S with T_i tokens each. A critic would need a second network to say how
good a prompt's completions are on average; the mean of G completions of that prompt says it too.

All of this is ``PolicyGradient`` as it stands, so there is nothing to set: the other files of this
kind are told by what they set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nvfp4.rl.objectives.policy_gradient import PolicyGradient


@dataclass(kw_only=True)
class GRPO(PolicyGradient):
    """Group relative policy optimisation (DeepSeekMath, arXiv 2402.03300).

    The formula is at the head of the file; std is that of the sample, k3 the KL to a frozen
    reference. kl_coef is 0 here as in TRL, where the paper has 0.04; DeepSeek-R1 (arXiv 2501.12948)
    has 0.001 with clips of 10, by TRL's paper index. One update per rollout, as in the paper and
    TRL: every ratio is 1 and the clip waits for more.
    """

    name: ClassVar[str] = "grpo"
