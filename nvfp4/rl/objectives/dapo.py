"""DAPO: four repairs of GRPO for long chains of thought.

    clip-higher         clip(rho, 0.8, 1.28)                  clip_high: rare tokens may rise
    dynamic sampling    groups of equal rewards are replaced  dynamic_sampling: each A counts
    token-level loss    mean over all tokens of the batch     aggregation: long ones weigh more
    overlong shaping    a penalty that rises near the limit   overlong_share, lengths.py

Each is an option of ``PolicyGradient`` or of ``RewardedObjective``; this file switches them on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nvfp4.rl.objectives.base import Defaults
from nvfp4.rl.objectives.policy_gradient import PolicyGradient
from nvfp4.rl.objectives.token_loss import Aggregation


@dataclass(kw_only=True)
class DAPO(PolicyGradient):
    """Decoupled clip and dynamic sampling policy optimisation (arXiv 2503.14476).

        r'   = r - penalty, linear over the last fifth of the length limit (4096 of 20480 tokens)
        loss = mean over all tokens of the batch of -min(rho A, clip(rho, 0.8, 1.28) A),  GRPO's A

    Groups of equal rewards are replaced; no KL. ``truncated=mask`` in place of the penalty is the
    paper's filter. The paper's rewards are +1 and -1 with a penalty of up to 1, so that here, where
    they are 1 and 0, it is half of that. Groups of 16, 16 updates per rollout (32 of 512 prompts),
    weight decay 0.1.
    """

    name: ClassVar[str] = "dapo"
    defaults: ClassVar[Defaults] = Defaults(group=16, updates=16, weight_decay=0.1)

    clip_high: float = 0.28
    aggregation: Aggregation = "dapo"
    dynamic_sampling: bool = True
    overlong_share: float = 0.2
