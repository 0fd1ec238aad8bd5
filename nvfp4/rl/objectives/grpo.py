"""GRPO: the group's mean in place of a critic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nvfp4.rl.objectives.policy_gradient import PolicyGradient


@dataclass(kw_only=True)
class GRPO(PolicyGradient):
    """Group relative policy optimisation (DeepSeekMath, arXiv 2402.03300).

        A    = (r - mean) / (std + 1e-4) of the group, standard deviation of the sample
        loss = mean over completions of the mean over their tokens of
               -min(rho A, clip(rho, 0.8, 1.2) A) + kl_coef k3 to a frozen reference

    kl_coef is 0 here as in TRL, where the paper has 0.04; DeepSeek-R1 (arXiv 2501.12948) has 0.001
    with clips of 10, by TRL's paper index. One update per rollout, as in the paper and TRL: every
    ratio is 1 and the clip waits for more.
    """

    name: ClassVar[str] = "grpo"
